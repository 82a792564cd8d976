"""Ragged multi-head attention: every bag attends to its own context only."""

from __future__ import annotations

from torch import Tensor

from cfkernels.attention.reference import attention_reference
from cfkernels.errors import ShapeError

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend within each bag, `softmax(q kᵀ / sqrt(dh)) v` per head: [T_q, H, dh], as q.

    Parameters
    ----------
    q : [T_q, H, dh] float
        Queries of all bags, one bag after the other.
    k, v : [T_k, H, dh] float
        Keys and values of all bags, in the same order of bags.
    q_lengths, kv_lengths
        Rows of each bag in q, and in k and v; one entry per bag, each at least 1.
    dropout_p
        Share of attention probabilities set to zero. It always acts: pass 0 when evaluating. Above 0,
        PyTorch on CPU materialises the T_q x T_k probabilities of a bag.

    Raises
    ------
    ShapeError
        Ranks, heads or widths disagree, or the lengths do not add up to the rows.
    """
    _check(q, k, v, q_lengths, kv_lengths)
    return attention_reference(q, k, v, q_lengths=q_lengths, kv_lengths=kv_lengths, dropout_p=dropout_p)


def _check(q: Tensor, k: Tensor, v: Tensor, q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...]) -> None:
    if q.ndim != 3 or q.shape[1:] != k.shape[1:] or k.shape != v.shape:
        shapes = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        raise ShapeError(f"q, k, v must be [T_q, H, dh] and twice [T_k, H, dh], got {shapes}")
    if len(q_lengths) != len(kv_lengths):
        raise ShapeError(f"q_lengths names {len(q_lengths)} bags, kv_lengths {len(kv_lengths)}")
    for name, rows, lengths in (("q", q.shape[0], q_lengths), ("kv", k.shape[0], kv_lengths)):
        if sum(lengths) != rows or min(lengths, default=0) < 1:
            raise ShapeError(f"{name}_lengths {lengths} must be positive and add up to {rows} rows")
