"""Ragged multi-head attention: every bag attends to its own context only."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels import triton_support
from cfkernels.attention.blocked_op import attention_blocked
from cfkernels.attention.reference import attention_reference
from cfkernels.attention.sdpa import attention_sdpa
from cfkernels.attention.shapes import check_lengths, check_width
from cfkernels.dispatch import Candidate, choose
from cfkernels.dropout import draw_seed, threshold
from cfkernels.errors import ShapeError

if triton_support.HAS_TRITON:
    from cfkernels.attention.op import attention_triton

__all__ = ["attention", "attention_and_lse", "candidates"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attend within each bag, `softmax(q kᵀ / sqrt(dh)) v` per head: [T_q, H, dh], as q.

    Parameters
    ----------
    q : [T_q, H, dh] float
        Queries of all bags, one bag after the other. Views are taken as they are.
    k, v : [T_k, H, dh] float
        Keys and values of all bags, in the same order of bags.
    q_lengths, kv_lengths
        Rows of each bag in q, and in k and v; one entry per bag, each at least 1.
    dropout_p
        Share of attention probabilities set to zero, in 256ths (`cfkernels.dropout`): 0.2 acts as 51/256, and what
        is kept is multiplied with 256/205. It always acts: pass 0 when evaluating.
    seed : [1] int64
        Decides the mask: stream bag * H + head, row and column within the bag. Drawn from PyTorch's generator
        where None.

    Raises
    ------
    ShapeError
        Ranks, heads or widths disagree, or the lengths do not add up to the rows.
    RateError
        The rate is outside [0, 1), or too small to act.
    """
    return _attend(q, k, v, q_lengths, kv_lengths, dropout_p, seed, need_lse=False)[0]


def attention_and_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attention`, and the log-sum-exp of its scores, which `attention_column_sums` takes.

    The second, [H, T_q], is the natural log of the sum of exp(q kᵀ / sqrt(dh)) over the keys of the bag: float32, or
    float64 for float64, before dropout, and without gradient.
    """
    out, lse = _attend(q, k, v, q_lengths, kv_lengths, dropout_p, seed, need_lse=True)
    return out, lse.detach()


def candidates(
    device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool, need_lse: bool
) -> tuple[Candidate, ...]:
    """The implementations for such tensors, best first."""
    triton = triton_support.candidate(
        device, dtype, "no scores in memory, masks recomputed, one launch for all bags", unless=check_width(head_dim)
    )
    sdpa = Candidate("sdpa", _sdpa_blocker(dropout, need_lse), "PyTorch's own fused attention, a call for each bag")
    rest = (
        Candidate("blocked", None, "PyTorch, in blocks of query rows: a few MiB of scores"),
        Candidate("reference", None, "the definition", only_named="it holds all scores of a bag"),
    )
    if device.type == "cuda" and triton_support.architecture(device) >= 90:
        # there PyTorch takes cuDNN's, as fast as anything known there; not measured by us
        return (sdpa, triton, *rest)
    return (triton, sdpa, *rest)


def _sdpa_blocker(dropout: bool, need_lse: bool) -> str | None:
    if dropout:
        return "its dropout draws other masks, and on a CPU holds all scores of a bag"
    return "it returns no log-sum-exp" if need_lse else None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    dropout_p: float,
    seed: Tensor | None,
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, q_lengths, kv_lengths)
    rate = threshold(dropout_p)
    if rate and seed is None:
        seed = draw_seed(q.device)
    name = choose("attention", candidates(q.device, q.dtype, q.shape[2], rate > 0, need_lse)).name
    if name == "sdpa":
        return attention_sdpa(q, k, v, q_lengths, kv_lengths), q[:0]
    if name == "triton":
        return attention_triton(q, k, v, seed, q_lengths, kv_lengths, rate)
    if name == "blocked":
        out: tuple[Tensor, Tensor] = attention_blocked(q, k, v, seed, q_lengths, kv_lengths, rate)
        return out
    return attention_reference(q, k, v, seed, q_lengths, kv_lengths, rate)


def _check(q: Tensor, k: Tensor, v: Tensor, q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...]) -> None:
    if q.ndim != 3 or q.shape[1:] != k.shape[1:] or k.shape != v.shape:
        shapes = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        raise ShapeError(f"q, k, v must be [T_q, H, dh] and twice [T_k, H, dh], got {shapes}")
    check_lengths(q.shape[0], k.shape[0], q_lengths, kv_lengths)
