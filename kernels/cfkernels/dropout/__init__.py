"""Dropout masks that nobody stores: a function of (seed, stream, row, column), the same on every device.

The bit that keeps an element comes from Philox 4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"): key = the seed's two halves, counter = (column // 16, row, stream, 0). Its four words are 16
bytes, one for each of 16 neighbouring columns; an element is kept where its byte is at least the threshold.

Rates are therefore 256ths: 0.2 acts as 51/256 = 0.1992. What is kept is scaled by 256 / (256 - threshold), so
means are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels.dropout.drop import drop
from cfkernels.dropout.rates import rescale, threshold
from cfkernels.dropout.reference import keep_mask, random_bytes

__all__ = ["draw_seed", "drop", "keep_mask", "random_bytes", "rescale", "threshold"]


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from PyTorch's own generator of that device: [1] int64, never read by the host."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
