"""GELU, then dropout: the middle of a feed-forward layer, in one pass and without a stored mask."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels import triton_support
from cfkernels.dispatch import Candidate, choose
from cfkernels.dropout import draw_seed, threshold
from cfkernels.errors import ShapeError
from cfkernels.gelu_dropout.reference import gelu_dropout_reference

if triton_support.HAS_TRITON:
    from cfkernels.gelu_dropout.op import gelu_dropout_triton

__all__ = ["candidates", "gelu_dropout"]


def gelu_dropout(x: Tensor, *, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Apply GELU (erf form), then dropout: [T, D], as x.

    Parameters
    ----------
    x : [T, D] float
    dropout_p
        Share of elements set to zero, in 256ths (`cfkernels.dropout`). It always acts: pass 0 when evaluating.
    seed : [1] int64
        Decides the mask; drawn from PyTorch's generator where None.

    Raises
    ------
    ShapeError
        x is not [T, D].
    RateError
        The rate is outside [0, 1), or too small to act.
    """
    if x.ndim != 2:
        raise ShapeError(f"x must be [T, D], got {list(x.shape)}")
    rate = threshold(dropout_p)
    if rate and seed is None:
        seed = draw_seed(x.device)
    if choose("gelu_dropout", candidates(x.device, x.dtype)).name == "triton":
        return gelu_dropout_triton(x, seed, rate)
    return gelu_dropout_reference(x, seed, rate)


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """The implementations for such tensors, best first."""
    return (
        triton_support.candidate(device, dtype, "one pass, the mask is recomputed, not stored"),
        Candidate("reference", None, "PyTorch's GELU and a mask computed in vector operations"),
    )
