"""PPEG in Triton. One program: COLUMNS columns of some rows of a grid, CHANNELS channels (`cfkernels.windows`)."""

from __future__ import annotations

import triton
import triton.language as tl

from cfkernels.windows.kernel import (
    add_row,
    below,
    correlate_row,
    load_cells,
    load_taps,
    read_tile,
    store_partial,
)


@triton.jit(do_not_specialize=["prefix"])
def ppeg_kernel(
    x_ptr, taps_ptr, y_ptr, tiles_ptr, prefix,
    D: tl.constexpr, FLIP: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The forward pass; with FLIP, which has no bias, the gradient of the input."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, side, top, bottom, left, _ = read_tile(tiles_ptr)
    # the bag's first program copies the tokens before the grid
    n_copied = tl.where((top == 0) & (left == 0), prefix, 0)
    for back in range(n_copied):
        at = (first - 1 - back).to(tl.int64) * D + channels
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=channels < D), mask=channels < D)
    taps = load_taps(taps_ptr, channels, D, FLIP)
    if FLIP:
        bias = tl.zeros([CHANNELS], tl.float32)
    else:
        bias = tl.load(taps_ptr + 49 * D + channels, mask=channels < D, other=0.0)
    held = (tl.zeros([CHANNELS], tl.float32),) * (6 * COLUMNS)
    for row in range(top - 3, bottom + 3):
        at = (first + row * side + left).to(tl.int64) * D
        high = tl.where((row >= 0) & (row < side), side - left + 3, 0)
        cells = load_cells(x_ptr + at + channels, 3 - left, high, channels, D, COLUMNS, CHANNELS)
        sums = add_row(held + (bias,) * COLUMNS, cells, taps, COLUMNS)
        y_row = y_ptr + at - (3 * side).to(tl.int64) * D + channels
        width = tl.where(row >= top + 3, side - left, 0)
        for column in tl.static_range(COLUMNS):
            value = sums[column].to(y_ptr.dtype.element_ty)
            tl.store(y_row + column * D, value, mask=below(column, width, channels, D, CHANNELS))
        # the slots move up; the one that becomes 2 was this row's own, and takes the identity
        held = sums[COLUMNS : 3 * COLUMNS]
        for column in tl.static_range(COLUMNS):
            held += (sums[3 * COLUMNS + column] + cells[column + 3],)
        held += sums[4 * COLUMNS :]


@triton.jit
def ppeg_weights_kernel(
    grad_ptr, x_ptr, partial_ptr, tiles_ptr,
    D: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program's share of the gradients of the taps, in float32."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, side, top, bottom, left, _ = read_tile(tiles_ptr)
    zero = tl.zeros([CHANNELS], tl.float32)
    sums, total, held = (zero,) * 49, zero, (zero,) * (6 * COLUMNS)
    for row in range(top - 3, bottom + 3):
        at = (first + row * side + left).to(tl.int64) * D
        high = tl.where((row >= 0) & (row < side), side - left + 3, 0)
        cells = load_cells(x_ptr + at + channels, 3 - left, high, channels, D, COLUMNS, CHANNELS)
        grad_row = grad_ptr + at + (3 * side).to(tl.int64) * D + channels
        width = tl.where(row + 3 < bottom, side - left, 0)
        for column in tl.static_range(COLUMNS):
            mask = below(column, width, channels, D, CHANNELS)
            grad = tl.load(grad_row + column * D, mask=mask, other=0.0).to(tl.float32)
            total += grad
            held += (grad,)
        sums = correlate_row(sums, held, cells, COLUMNS)
        held = held[COLUMNS:]
    store_partial(partial_ptr, sums, total, channels, D)
