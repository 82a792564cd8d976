"""How much attention each key receives from all queries of its bag, exactly, without their table of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels import triton_support
from cfkernels.attention.shapes import check_lengths, check_width
from cfkernels.attention_column_sums.reference import attention_column_sums_reference
from cfkernels.dispatch import Candidate, choose
from cfkernels.errors import ShapeError

if triton_support.HAS_TRITON:
    from cfkernels.attention_column_sums.op import attention_column_sums_triton

__all__ = ["attention_column_sums", "candidates"]


def attention_column_sums(
    q: Tensor, k: Tensor, lse: Tensor, *, q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...]
) -> Tensor:
    """Sum softmax(q kᵀ / sqrt(dh)) over a bag's queries, for each head and key: [H, T_k].

    float32, or float64 for float64; without gradient. A head's sums over one bag add up to its number of queries.

    Parameters
    ----------
    q : [T_q, H, dh] float
        Queries of all bags, one bag after the other.
    k : [T_k, H, dh] float
        Keys of all bags, in the same order of bags.
    lse : [H, T_q] float
        Log-sum-exp of each query, from `cfkernels.attention_and_lse`.
    q_lengths, kv_lengths
        Rows of each bag in q, and in k; one entry per bag, each at least 1.

    Raises
    ------
    ShapeError
        Ranks, heads or widths disagree, or the lengths do not add up to the rows.
    """
    if q.ndim != 3 or k.ndim != 3 or q.shape[1:] != k.shape[1:]:
        raise ShapeError(f"q, k must be [T_q, H, dh] and [T_k, H, dh], got {list(q.shape)}, {list(k.shape)}")
    if lse.shape != (q.shape[1], q.shape[0]):
        raise ShapeError(f"lse must be [H, T_q] = {[q.shape[1], q.shape[0]]}, got {list(lse.shape)}")
    check_lengths(q.shape[0], k.shape[0], q_lengths, kv_lengths)
    q, k, lse = q.detach(), k.detach(), lse.detach()
    if choose("attention_column_sums", candidates(q.device, q.dtype, q.shape[2])).name == "triton":
        return attention_column_sums_triton(q, k, lse, q_lengths, kv_lengths)
    return attention_column_sums_reference(q, k, lse, q_lengths, kv_lengths)


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Candidate, ...]:
    """The implementations for such tensors, best first."""
    return (
        triton_support.candidate(device, dtype, "scores never leave the chip", unless=check_width(head_dim)),
        Candidate("reference", None, "PyTorch, in blocks of scores that fit a cache"),
    )
