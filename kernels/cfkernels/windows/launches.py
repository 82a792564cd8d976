"""Launches that both window kernels make, and how a batch of grids is cut into programs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cfkernels.packing import to_device
from cfkernels.triton_support import launch
from cfkernels.windows.kernel import merge_kernel, split_kernel

COLUMNS = 8
"""Columns that a program holds where one tensor is read: 3 programs of 4 warps fit a multiprocessor."""
_PROGRAMS = 384
_FEWEST_ROWS = 8


class Block(NamedTuple):
    """How many channels a program holds, in how many warps, and how many such blocks there are."""

    channels: int
    warps: int
    blocks: int


def channel_block(width: int) -> Block:
    """One channel per thread, up to 128 of them."""
    channels = min(128, max(16, 1 << (width - 1).bit_length()))
    return Block(channels, max(1, channels // 32), -(-width // channels))


@lru_cache(maxsize=256)
def window_tiles(grid_sizes: tuple[int, ...], prefix: int, columns: int, blocks: int, device: torch.device) -> Tensor:
    """Cut grids into tiles, a program's work each: [n, 6] int32 of (first token, side, top, bottom, left, bag).

    A tile reads six rows beyond its own: tall ones waste less, many fill the GPU. Rows are shared out so that one
    large grid makes about 384 programs (three on each of an H100's 132 multiprocessors); no tile is cut below eight.
    Neither the device nor the dtype counts, so the sums of a weight's gradient have the same order everywhere.
    """
    total = blocks * sum(-(-side // columns) * side for side in grid_sizes)
    rows = max(_FEWEST_ROWS, -(-total // _PROGRAMS))
    tiles, first = [], 0
    for bag, side in enumerate(grid_sizes):
        first += prefix
        height = -(-side // -(-side // rows))
        tiles += [
            (first, side, top, min(top + height, side), left, bag)
            for top in range(0, side, height)
            for left in range(0, side, columns)
        ]
        first += side * side
    tiles.sort(key=lambda tile: tile[2] - tile[3])  # the longest first; the order among equals stays
    return to_device(tiles, device)


def merge_taps(windows: Sequence[Tensor | None], inputs: int) -> Tensor:
    """weight7, bias7, weight5, bias5, weight3, bias3, weight1, bias1 (the last two may be None): taps [50, D]."""
    weight = windows[0]
    assert weight is not None  # noqa: S101 - for the type checker
    width = weight.shape[0] * inputs
    channels = min(32, channel_block(width).channels)
    taps = weight.new_empty((50, width))
    pointers = [None if window is None else window.contiguous() for window in windows]
    constants = {"D": width, "INPUTS": inputs, "CHANNELS": channels, "num_warps": 4}
    launch(merge_kernel, (-(-width // channels),), *pointers, taps, **constants)
    return taps


def split_partials(partials: Tensor, sides: tuple[int, ...], inputs: int) -> list[Tensor]:
    """Sum [P, 50, D] partial gradients of the taps: weight gradients [C, inputs, k, k] for each side, bias [C]."""
    n_partials, _, width = partials.shape
    weights = [partials.new_empty((width // inputs, inputs, side, side)) for side in sides]
    bias = partials.new_empty((width // inputs,))
    channels = min(64, channel_block(width).channels)
    constants = {"D": width, "INPUTS": inputs, "CHANNELS": channels, "PARTIALS": 16, "num_warps": 4}
    pointers = [*weights, *[None] * (4 - len(weights))]
    launch(split_kernel, (50, -(-width // channels)), partials, *pointers, bias, n_partials, **constants)
    return [*weights, bias]
