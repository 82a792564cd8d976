"""Dropout and a sum in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels.dropout import keep_mask, rescale


def dropout_add_reference(x: Tensor, residual: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """As `cfkernels.dropout_add`, with the rate in 256ths; the seed is None where it is 0."""
    if seed is None or threshold == 0:
        return x + residual
    kept = keep_mask(seed, torch.arange(len(x), device=x.device), x.shape[1], threshold)
    return torch.where(kept, x * rescale(threshold), 0) + residual
