"""The Triton implementation as a PyTorch op: launches, fake results, gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfkernels.grouped_window_conv.kernel import conv_input_kernel, conv_kernel, conv_weights_kernel
from cfkernels.library import register
from cfkernels.triton_support import launch
from cfkernels.windows.launches import COLUMNS, channel_block, merge_taps, split_partials, window_tiles

_SIDES = (7, 5, 3, 1)
_FORWARD_COLUMNS = 4
"""98 weights are held, twice as many as backward: half the columns keep the registers at 3 programs of 4 warps."""


def grouped_window_conv_triton(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor, Tensor],
    channel_scale: Tensor | None,
    *,
    grid_sizes: tuple[int, ...],
) -> Tensor:
    """As `cfkernels.grouped_window_conv`."""
    windows = [part.float() for pair in zip(weights, biases, strict=True) for part in pair]
    y: Tensor = torch.ops.cfkernels.grouped_window_conv(x, *windows, channel_scale, grid_sizes)[0]
    return y


def _forward(
    x: Tensor, w7: Tensor, b7: Tensor, w5: Tensor, b5: Tensor, w3: Tensor, b3: Tensor, w1: Tensor, b1: Tensor,
    scale: Tensor | None, grids: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, scale = x.contiguous(), None if scale is None else scale.contiguous()
    outputs = w7.shape[0]
    taps = merge_taps((w7, b7, w5, b5, w3, b3, w1, b1), inputs=2)
    y = x.new_empty((x.shape[0], outputs))
    block = channel_block(outputs)
    tiles = window_tiles(tuple(grids), 0, _FORWARD_COLUMNS, block.blocks, x.device)
    constants = {"C": outputs, "COLUMNS": _FORWARD_COLUMNS, "CHANNELS": block.channels, "num_warps": block.warps}
    launch(conv_kernel, (block.blocks, len(tiles)), x, taps, scale, y, tiles, **constants)
    return y, taps


def _backward(
    grad: Tensor, x: Tensor, y: Tensor, taps: Tensor, scale: Tensor | None, grids: Sequence[int]
) -> tuple[Tensor, ...]:
    grad, x, scale = grad.contiguous(), x.contiguous(), None if scale is None else scale.contiguous()
    block = channel_block(x.shape[1])
    tiles = window_tiles(tuple(grids), 0, COLUMNS, block.blocks, x.device)
    grid = (block.blocks, len(tiles))
    constants = {"C": y.shape[1], "COLUMNS": COLUMNS, "CHANNELS": block.channels, "num_warps": block.warps}
    grad_x = torch.empty_like(x)
    launch(conv_input_kernel, grid, grad, y, taps, scale, grad_x, tiles, **constants)
    partials = taps.new_empty((len(tiles), *taps.shape))
    launch(conv_weights_kernel, grid, grad, x, y, scale, partials, tiles, **constants)
    return grad_x, *split_partials(partials, _SIDES, inputs=2)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], x.shape[1] // 2)), x.new_empty((50, x.shape[1]), dtype=torch.float32)


def _fake_backward(
    grad: Tensor, x: Tensor, y: Tensor, taps: Tensor, scale: Tensor | None, grids: Sequence[int]
) -> tuple[Tensor, ...]:
    outputs = y.shape[1]
    weights = [taps.new_empty((outputs, 2, side, side)) for side in _SIDES]
    return x.new_empty(x.shape), *weights, taps.new_empty((outputs,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, ctx.grids = inputs[0], *inputs[-2:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, *output, scale)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.cfkernels.grouped_window_conv_backward(grad, *ctx.saved_tensors, ctx.grids)
    x, w7, w5, w3, w1, bias = grads
    return x, w7, bias, w5, bias, w3, bias, w1, bias, None, None


register(
    "grouped_window_conv_backward(Tensor grad, Tensor x, Tensor y, Tensor taps, Tensor? scale, int[] grids)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
register(
    "grouped_window_conv(Tensor x, Tensor w7, Tensor b7, Tensor w5, Tensor b5, Tensor w3, Tensor b3, Tensor w1,"
    " Tensor b1, Tensor? scale, int[] grids) -> (Tensor y, Tensor taps)",
    _forward,
    _fake,
    backward=_gradient,
    save=_save,
)
