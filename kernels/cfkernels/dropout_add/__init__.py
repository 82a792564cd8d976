"""Dropout, then the residual connection: the end of a feed-forward layer, without a stored mask."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels import triton_support
from cfkernels.dispatch import Candidate, choose
from cfkernels.dropout import draw_seed, threshold
from cfkernels.dropout_add.reference import dropout_add_reference
from cfkernels.errors import ShapeError

if triton_support.HAS_TRITON:
    from cfkernels.dropout_add.op import dropout_add_triton

__all__ = ["candidates", "dropout_add"]


def dropout_add(x: Tensor, residual: Tensor, *, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Apply dropout to x and add the residual: [T, D], in the wider dtype of the two.

    Parameters
    ----------
    x : [T, D] float
    residual : [T, D] float
    dropout_p
        Share of elements of x set to zero, in 256ths (`cfkernels.dropout`). It always acts: pass 0 when evaluating,
        which leaves PyTorch's own sum.
    seed : [1] int64
        Decides the mask; drawn from PyTorch's generator where None.

    Raises
    ------
    ShapeError
        x is not [T, D], or the residual has another shape.
    RateError
        The rate is outside [0, 1), or too small to act.
    """
    if x.ndim != 2 or residual.shape != x.shape:
        raise ShapeError(f"x and residual must both be [T, D], got {list(x.shape)} and {list(residual.shape)}")
    rate = threshold(dropout_p)
    if rate and seed is None:
        seed = draw_seed(x.device)
    chosen = choose("dropout_add", candidates(x.device, torch.promote_types(x.dtype, residual.dtype)))
    if rate and chosen.name == "triton":
        return dropout_add_triton(x, residual, seed, rate)
    return dropout_add_reference(x, residual, seed, rate)


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """The implementations for such tensors, best first."""
    return (
        triton_support.candidate(device, dtype, "one pass, the mask is recomputed, not stored"),
        Candidate("reference", None, "PyTorch's sum and a mask computed in vector operations"),
    )
