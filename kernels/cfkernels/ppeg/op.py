"""The Triton implementation as a PyTorch op: launches, fake results, gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfkernels.library import register
from cfkernels.ppeg.kernel import ppeg_kernel, ppeg_weights_kernel
from cfkernels.triton_support import launch
from cfkernels.windows.launches import COLUMNS, channel_block, merge_taps, split_partials, window_tiles

_SIDES = (7, 5, 3)


def ppeg_triton(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
    *,
    grid_sizes: tuple[int, ...],
    prefix: int,
) -> Tensor:
    """As `cfkernels.ppeg`."""
    windows = [part.float() for pair in zip(weights, biases, strict=True) for part in pair]
    y: Tensor = torch.ops.cfkernels.ppeg(x, *windows, grid_sizes, prefix)[0]
    return y


def _slide(x: Tensor, taps: Tensor, grid_sizes: Sequence[int], prefix: int, *, flip: bool) -> Tensor:
    width = x.shape[1]
    y = torch.empty_like(x)
    block = channel_block(width)
    tiles = window_tiles(tuple(grid_sizes), prefix, COLUMNS, block.blocks, x.device)
    constants = {"D": width, "FLIP": flip, "COLUMNS": COLUMNS, "CHANNELS": block.channels, "num_warps": block.warps}
    launch(ppeg_kernel, (block.blocks, len(tiles)), x, taps, y, tiles, prefix, **constants)
    return y


def _forward(
    x: Tensor, w7: Tensor, b7: Tensor, w5: Tensor, b5: Tensor, w3: Tensor, b3: Tensor, grids: Sequence[int], prefix: int
) -> tuple[Tensor, Tensor]:
    taps = merge_taps((w7, b7, w5, b5, w3, b3, None, None), inputs=1)
    return _slide(x.contiguous(), taps, grids, prefix, flip=False), taps


def _backward(grad: Tensor, x: Tensor, taps: Tensor, grids: Sequence[int], prefix: int) -> tuple[Tensor, ...]:
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = _slide(grad, taps, grids, prefix, flip=True)
    width = x.shape[1]
    block = channel_block(width)
    tiles = window_tiles(tuple(grids), prefix, COLUMNS, block.blocks, x.device)
    partials = taps.new_empty((len(tiles), 50, width))
    constants = {"D": width, "COLUMNS": COLUMNS, "CHANNELS": block.channels, "num_warps": block.warps}
    launch(ppeg_weights_kernel, (block.blocks, len(tiles)), grad, x, partials, tiles, **constants)
    return grad_x, *split_partials(partials, _SIDES, inputs=1)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((50, x.shape[1]), dtype=torch.float32)


def _fake_backward(grad: Tensor, x: Tensor, taps: Tensor, grids: Sequence[int], prefix: int) -> tuple[Tensor, ...]:
    weights = [taps.new_empty((x.shape[1], 1, side, side)) for side in _SIDES]
    return x.new_empty(x.shape), *weights, taps.new_empty((x.shape[1],))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.grids, ctx.prefix = inputs[-2:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, w7, w5, w3, bias = torch.ops.cfkernels.ppeg_backward(grad, *ctx.saved_tensors, ctx.grids, ctx.prefix)
    return x, w7, bias, w5, bias, w3, bias, None, None


register(
    "ppeg_backward(Tensor grad, Tensor x, Tensor taps, int[] grids, int prefix)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
register(
    "ppeg(Tensor x, Tensor w7, Tensor b7, Tensor w5, Tensor b5, Tensor w3, Tensor b3, int[] grids, int prefix)"
    " -> (Tensor y, Tensor taps)",
    _forward,
    _fake,
    backward=_gradient,
    save=_save,
)
