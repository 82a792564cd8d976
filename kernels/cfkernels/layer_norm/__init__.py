"""LayerNorm of a sum: the residual connection and the norm behind it in one pass, no sum stored."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels import triton_support
from cfkernels.dispatch import Candidate, choose
from cfkernels.errors import ShapeError
from cfkernels.layer_norm.reference import layer_norm_reference

if triton_support.HAS_TRITON:
    from cfkernels.layer_norm.op import layer_norm_triton

__all__ = ["candidates", "layer_norm"]

_WIDEST = 4096


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise each row of `x + residual`, then scale and shift it: [T, D] in the dtype of x.

    The kernel keeps statistics and sums in float32 whatever the dtype, and its gradients are the same in every run.

    Parameters
    ----------
    x : [T, D] float
        Under autocast, too, the result has its dtype (`torch.nn.functional.layer_norm` returns float32).
    weight, bias : [D] float
    residual : [T, D] float
        Added to x first; it has the same gradient as x.
    eps
        Added to the variance of a row, the mean of its squared deviations.

    Raises
    ------
    ShapeError
        x is not [T, D], the residual has another shape, or a parameter is not [D].

    References
    ----------
    Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    _check(x, residual, weight, bias)
    if choose("layer_norm", candidates(x.device, x.dtype, x.shape[1])).name == "triton":
        return layer_norm_triton(x, residual, weight, bias, eps)
    return layer_norm_reference(x, residual, weight, bias, eps)


def candidates(device: torch.device, dtype: torch.dtype, width: int = 512) -> tuple[Candidate, ...]:
    """The implementations for such tensors, best first."""
    too_wide = f"rows of {width} are too wide, a program holds {_WIDEST}" if width > _WIDEST else None
    return (
        triton_support.candidate(device, dtype, "one pass, the sum is never stored", unless=too_wide),
        Candidate("reference", None, "PyTorch's sum and LayerNorm"),
    )


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 2:
        raise ShapeError(f"x must be [T, D], got {list(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(f"the residual must be {list(x.shape)} as x, got {list(residual.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[1:]:
            raise ShapeError(f"the {name} must be {list(x.shape[1:])}, got {list(parameter.shape)}")
