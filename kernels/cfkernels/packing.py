"""Packed bags: the rows of all bags one after the other in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def split(x: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Take packed rows apart into one view for each bag."""
    return (x,) if len(lengths) == 1 else torch.split(x, list(lengths))


def join(bags: list[Tensor]) -> Tensor:
    """Pack bags into one tensor, without a copy where there is only one."""
    return bags[0] if len(bags) == 1 else torch.cat(bags)
