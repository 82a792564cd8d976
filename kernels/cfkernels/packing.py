"""Packed bags: the rows of all bags one after the other in one tensor, and the maps that kernels read.

The maps are small int32 tensors made on the host, once per set of lengths: all layers of a batch share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


def split(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Take packed rows apart into one view for each bag."""
    return (x,) if len(lengths) == 1 else torch.split(x, list(lengths))


def join(bags: list[Tensor]) -> Tensor:
    """Pack bags into one tensor, without a copy where there is only one."""
    return bags[0] if len(bags) == 1 else torch.cat(bags)


def dense_rows(x: Tensor) -> Tensor:
    """The view itself where the elements of a row lie next to each other (rows may lie apart), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=256)
def offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each bag begins, and where the last ends: [B + 1] int32."""
    return to_device([0, *accumulate(lengths)], device)


@lru_cache(maxsize=256)
def row_tiles(lengths: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """Cut every bag into tiles of so many rows: [n_tiles, 2] int32 of (bag, first row within it).

    Tiles of long bags come first: what starts last is then short, and no processor waits long at the end.
    """
    longest_first = sorted(range(len(lengths)), key=lambda bag: -lengths[bag])
    tiles = [(bag, row) for bag in longest_first for row in range(0, lengths[bag], rows)]
    return to_device(tiles, device)


def to_device(numbers: Sequence[int] | Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Small whole numbers as int32 on a device.

    They are staged before the call returns, so the host need not wait until the GPU has come to them.
    """
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)
