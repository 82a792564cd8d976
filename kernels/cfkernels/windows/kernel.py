"""Sliding windows in Triton: what the kernels of PPEG and of the grouped window convolution share.

A program holds COLUMNS neighbouring columns of a grid for CHANNELS channels and walks down its rows, one row of
cells at a time. Seven output rows are under way at once; each cell is loaded once per program, converted once and
used up to 49 times. Every number of one column is its own [CHANNELS] tensor, so that all of them are registers.

Taps are the merged 7 x 7 window in float32, [50, D]: 49 weights, row by row, then the bias.
"""

# mypy: disable-error-code="assignment"
# (a tuple gets longer with every step of an unrolled loop)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_tile(tiles_ptr):
    """First token of the grid, its side, and the tile's rows [top, bottom), first column and bag."""
    tile = tiles_ptr + tl.program_id(1) * 6
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)


@triton.jit
def below(index: tl.constexpr, bound, channels, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels that exist, all or none of them as index < bound: [CHANNELS] bool.

    The comparison is one of blocks: a scalar truth value spread over a block is no mask in the interpreter.
    """
    mask = tl.full([CHANNELS], index, tl.int32) < bound
    if D % CHANNELS != 0:
        mask = mask & (channels < D)
    return mask


@triton.jit
def load_taps(taps_ptr, channels, D: tl.constexpr, FLIP: tl.constexpr):
    """The 49 weights of each channel, turned by half a turn if FLIP: 49 x [CHANNELS]."""
    taps = ()
    for tap in tl.static_range(49):
        row = 48 - tap if FLIP else tap
        taps += (tl.load(taps_ptr + row * D + channels, mask=channels < D, other=0.0),)
    return taps


@triton.jit
def load_cells(row_ptr, low, high, channels, D: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """One row of cells with three more on either side, zero outside [low, high): (COLUMNS + 6) x [CHANNELS] fp32.

    row_ptr points to the first column of the tile, which is cell 3; tiles begin at multiples of COLUMNS >= 4, so
    that only cells 0 to 2 can lie left of the grid.
    """
    cells = ()
    for i in tl.static_range(COLUMNS + 6):
        mask = below(i, high, channels, D, CHANNELS)
        if i < 3:
            mask = mask & (tl.full([CHANNELS], i, tl.int32) >= low)
        cells += (tl.load(row_ptr + (i - 3) * D, mask=mask, other=0.0).to(tl.float32),)
    return cells


@triton.jit
def add_row(sums, cells, taps, COLUMNS: tl.constexpr):
    """Add what one row of cells gives to the seven output rows around it: 7 * COLUMNS x [CHANNELS].

    Slot 0 is the output row three above, which this row completes; slot 6 is three below.
    """
    added = ()
    for slot in tl.static_range(7):
        for column in tl.static_range(COLUMNS):
            total = sums[slot * COLUMNS + column]
            for dx in tl.static_range(7):
                total = tl.fma(cells[column + dx], taps[(6 - slot) * 7 + dx], total)
            added += (total,)
    return added


@triton.jit
def correlate_row(sums, held, cells, COLUMNS: tl.constexpr):
    """Add what one row of cells gives to the gradients of the 49 weights: 49 x [CHANNELS].

    `held` are the output gradients of the seven rows around it, in the slots of `add_row`.
    """
    added = ()
    for tap in tl.static_range(49):
        total = sums[tap]
        for column in tl.static_range(COLUMNS):
            total = tl.fma(held[(6 - tap // 7) * COLUMNS + column], cells[column + tap % 7], total)
        added += (total,)
    return added


@triton.jit
def store_partial(partial_ptr, sums, total, channels, D: tl.constexpr):
    """Write one program's share of the gradients of the taps."""
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * (50 * D) + channels
    for tap in tl.static_range(49):
        tl.store(partial + tap * D, sums[tap], mask=channels < D)
    tl.store(partial + 49 * D, total, mask=channels < D)


@triton.jit
def merge_kernel(
    weight7_ptr, bias7_ptr, weight5_ptr, bias5_ptr, weight3_ptr, bias3_ptr, weight1_ptr, bias1_ptr, taps_ptr,
    D: tl.constexpr, INPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum centred kernels and their biases into taps. Input channel d belongs to output channel d // INPUTS."""
    channels = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    tap = tl.arange(0, 64)[:, None]
    y, x = tap // 7, tap % 7
    real = channels < D
    in7 = (tap < 49) & real
    in5 = (y >= 1) & (y < 6) & (x >= 1) & (x < 6) & real
    in3 = (y >= 2) & (y < 5) & (x >= 2) & (x < 5) & real
    taps = tl.load(weight7_ptr + channels * 49 + tap, mask=in7, other=0.0)
    taps += tl.load(weight5_ptr + channels * 25 + (y - 1) * 5 + x - 1, mask=in5, other=0.0)
    taps += tl.load(weight3_ptr + channels * 9 + (y - 2) * 3 + x - 2, mask=in3, other=0.0)
    at_bias = (tap == 49) & real
    outputs = channels // INPUTS + tap * 0
    taps += tl.load(bias7_ptr + outputs, mask=at_bias, other=0.0)
    taps += tl.load(bias5_ptr + outputs, mask=at_bias, other=0.0)
    taps += tl.load(bias3_ptr + outputs, mask=at_bias, other=0.0)
    if weight1_ptr is not None:
        taps += tl.load(weight1_ptr + channels + tap * 0, mask=(tap == 24) & real, other=0.0)
        taps += tl.load(bias1_ptr + outputs, mask=at_bias, other=0.0)
    tl.store(taps_ptr + tap * D + channels, taps, mask=(tap < 50) & real)


@triton.jit(do_not_specialize=["n_partials"])
def split_kernel(
    partial_ptr, weight7_ptr, weight5_ptr, weight3_ptr, weight1_ptr, bias_ptr, n_partials,
    D: tl.constexpr, INPUTS: tl.constexpr, CHANNELS: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Sum the partial gradients of one tap in a fixed order; a tap belongs to every kernel that reaches it."""
    tap = tl.program_id(0)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = channels < D
    numbers = tl.arange(0, PARTIALS)[:, None]
    sums = tl.zeros([PARTIALS, CHANNELS], tl.float32)
    for first in range(0, n_partials, PARTIALS):
        at = (first + numbers).to(tl.int64) * (50 * D) + tap * D + channels[None, :]
        sums += tl.load(partial_ptr + at, mask=(first + numbers < n_partials) & real[None, :], other=0.0)
    total = tl.sum(sums, 0)
    y, x = tap // 7, tap % 7
    if tap < 49:
        tl.store(weight7_ptr + channels * 49 + tap, total, mask=real)
        if (y >= 1) & (y < 6) & (x >= 1) & (x < 6):
            tl.store(weight5_ptr + channels * 25 + (y - 1) * 5 + x - 1, total, mask=real)
        if (y >= 2) & (y < 5) & (x >= 2) & (x < 5):
            tl.store(weight3_ptr + channels * 9 + (y - 2) * 3 + x - 2, total, mask=real)
        if weight1_ptr is not None and tap == 24:
            tl.store(weight1_ptr + channels, total, mask=real)
    else:
        tl.store(bias_ptr + channels // INPUTS, total, mask=real & (channels % INPUTS == 0))
