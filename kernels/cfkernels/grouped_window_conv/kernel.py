"""The grouped window convolution in Triton (`cfkernels.windows`): two input channels to one output channel.

Forward, a thread has an output channel and reads its two inputs as one word. Backward, it has an input channel, and
two neighbours read the same output gradient, which passes where the output is positive.
"""

# mypy: disable-error-code="assignment"
# (a tuple gets longer with every step of an unrolled loop)

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


@triton.jit
def take_apart(pairs, N: tl.constexpr, CHANNELS: tl.constexpr):
    """N x [2 * CHANNELS] into the even and the odd channels, N x [CHANNELS] each."""
    even, odd = (), ()
    for i in tl.static_range(N):
        left, right = tl.split(tl.reshape(pairs[i], (CHANNELS, 2)))
        even += (left,)
        odd += (right,)
    return even, odd


@triton.jit
def load_gated(grad_ptr, y_ptr, at, mask):
    """The output's gradient where ReLU passed it; without the channel's scale."""
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(y > 0.0, grad, 0.0)


@triton.jit
def load_scale(scale_ptr, bag, channels, C: tl.constexpr, CHANNELS: tl.constexpr):
    """The bag's factor of each channel; 1 where there is none."""
    if scale_ptr is None:
        scale = tl.full([CHANNELS], 1.0, tl.float32)
    else:
        scale = tl.load(scale_ptr + bag.to(tl.int64) * C + channels, mask=channels < C, other=0.0).to(tl.float32)
    return scale


@triton.jit
def conv_kernel(
    x_ptr, taps_ptr, scale_ptr, y_ptr, tiles_ptr,
    C: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The forward pass: windows over both inputs, ReLU, scale."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inputs = tl.program_id(0) * 2 * CHANNELS + tl.arange(0, 2 * CHANNELS)
    first, side, top, bottom, left, bag = read_tile(tiles_ptr)
    even_taps, odd_taps = take_apart(load_taps(taps_ptr, inputs, 2 * C, False), 49, CHANNELS)
    bias = tl.load(taps_ptr + 98 * C + 2 * channels, mask=channels < C, other=0.0)
    scale = load_scale(scale_ptr, bag, channels, C, CHANNELS)
    held = (tl.zeros([CHANNELS], tl.float32),) * (6 * COLUMNS)
    for row in range(top - 3, bottom + 3):
        at = (first + row * side + left).to(tl.int64)
        high = tl.where((row >= 0) & (row < side), side - left + 3, 0)
        pairs = load_cells(x_ptr + at * (2 * C) + inputs, 3 - left, high, inputs, 2 * C, COLUMNS, 2 * CHANNELS)
        even, odd = take_apart(pairs, COLUMNS + 6, CHANNELS)
        sums = add_row(held + (bias,) * COLUMNS, even, even_taps, COLUMNS)
        sums = add_row(sums, odd, odd_taps, COLUMNS)
        y_row = y_ptr + (at - 3 * side) * C + channels
        width = tl.where(row >= top + 3, side - left, 0)
        for column in tl.static_range(COLUMNS):
            value = (tl.maximum(sums[column], 0.0) * scale).to(y_ptr.dtype.element_ty)
            tl.store(y_row + column * C, value, mask=below(column, width, channels, C, CHANNELS))
        held = sums[COLUMNS:]


@triton.jit
def conv_input_kernel(
    grad_ptr, y_ptr, taps_ptr, scale_ptr, grad_x_ptr, tiles_ptr,
    C: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of the input: the windows turned by half a turn over the gated gradient."""
    D: tl.constexpr = 2 * C
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, side, top, bottom, left, bag = read_tile(tiles_ptr)
    taps = load_taps(taps_ptr, channels, D, True)
    scale = load_scale(scale_ptr, bag, channels // 2, C, CHANNELS)
    zero = tl.zeros([CHANNELS], tl.float32)
    held = (zero,) * (6 * COLUMNS)
    for row in range(top - 3, bottom + 3):
        at = (first + row * side + left).to(tl.int64)
        high = tl.where((row >= 0) & (row < side), side - left + 3, 0)
        cells = ()
        for i in tl.static_range(COLUMNS + 6):
            mask = below(i, high, channels, D, CHANNELS)
            if i < 3:
                mask = mask & (tl.full([CHANNELS], i, tl.int32) >= 3 - left)
            cells += (load_gated(grad_ptr, y_ptr, (at + i - 3) * C + channels // 2, mask),)
        sums = add_row(held + (zero,) * COLUMNS, cells, taps, COLUMNS)
        grad_row = grad_x_ptr + (at - 3 * side) * D + channels
        width = tl.where(row >= top + 3, side - left, 0)
        for column in tl.static_range(COLUMNS):
            value = (sums[column] * scale).to(grad_x_ptr.dtype.element_ty)
            tl.store(grad_row + column * D, value, mask=below(column, width, channels, D, CHANNELS))
        held = sums[COLUMNS:]


@triton.jit
def conv_weights_kernel(
    grad_ptr, x_ptr, y_ptr, scale_ptr, partial_ptr, tiles_ptr,
    C: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program's share of the gradients of the taps, in float32."""
    D: tl.constexpr = 2 * C
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, side, top, bottom, left, bag = read_tile(tiles_ptr)
    zero = tl.zeros([CHANNELS], tl.float32)
    sums, total, held = (zero,) * 49, zero, (zero,) * (6 * COLUMNS)
    for row in range(top - 3, bottom + 3):
        at = (first + row * side + left).to(tl.int64)
        high = tl.where((row >= 0) & (row < side), side - left + 3, 0)
        cells = load_cells(x_ptr + at * D + channels, 3 - left, high, channels, D, COLUMNS, CHANNELS)
        width = tl.where(row + 3 < bottom, side - left, 0)
        for column in tl.static_range(COLUMNS):
            mask = below(column, width, channels, D, CHANNELS)
            grad = load_gated(grad_ptr, y_ptr, (at + 3 * side + column) * C + channels // 2, mask)
            total += grad
            held += (grad,)
        sums = correlate_row(sums, held, cells, COLUMNS)
        held = held[COLUMNS:]
    scale = load_scale(scale_ptr, bag, channels // 2, C, CHANNELS)
    scaled = ()
    for tap in tl.static_range(49):
        scaled += (sums[tap] * scale,)
    store_partial(partial_ptr, scaled, total * scale, channels, D)
