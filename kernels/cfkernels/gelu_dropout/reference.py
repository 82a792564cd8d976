"""GELU and dropout in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cfkernels.dropout import keep_mask, rescale


def gelu_dropout_reference(x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """As `cfkernels.gelu_dropout`, with the rate in 256ths; the seed is None where it is 0."""
    y = functional.gelu(x)
    if seed is None or threshold == 0:
        return y
    kept = keep_mask(seed, torch.arange(len(x), device=x.device), x.shape[1], threshold)
    return torch.where(kept, y * rescale(threshold), 0)
