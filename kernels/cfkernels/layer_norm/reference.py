"""LayerNorm of a sum in plain PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def layer_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `cfkernels.layer_norm`.

    PyTorch's own takes parameters of the input's dtype only, on CUDA, and returns float32 under autocast.
    """
    total = x if residual is None else x + residual
    parameters = weight.to(total.dtype), bias.to(total.dtype)
    return functional.layer_norm(total, x.shape[-1:], *parameters, eps=eps).to(x.dtype)
