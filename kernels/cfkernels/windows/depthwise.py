"""A depth-wise convolution of token-major grids on CPUs, with a weight gradient several times as fast as PyTorch's.

PyTorch takes the weight gradient of a channels-last depth-wise convolution for a grouped one with blocks of 16 x 16
channels, of which it needs the diagonal. Here it is what it is by definition: a depth-wise convolution of the input
with the output's gradient as its kernel. `benchmarks/windows_cpu.py` measures both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Bands of so many rows: they stay in the cache, and float32 sums stay short.
_ROWS = 8


# An op, not an autograd.Function: tracing one of those warns (PyTorch 2.11 to 2.13), and warnings are errors here.
@torch.library.custom_op("cfkernels::depthwise", mutates_args=())
def depthwise(grid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve [H, W, D] with [D, 1, k, k], zero-padded by k // 2, and add [D]: [H, W, D].

    It can be differentiated once.
    """
    return _slide(grid, weight, bias).contiguous()


@depthwise.register_fake
def _fake(grid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return grid.new_empty(grid.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    grid, weight, _ = inputs
    ctx.save_for_backward(grid, weight)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grid, weight = ctx.saved_tensors
    wants_grid, wants_weight, wants_bias = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_grid = _slide(grad, weight.flip(2, 3), None) if wants_grid else None
    grad_weight = _correlate(grid, grad, weight.shape[-1] // 2) if wants_weight else None
    return grad_grid, grad_weight, grad.sum((0, 1)) if wants_bias else None


depthwise.register_autograd(_gradient, setup_context=_save)


def _image(grid: Tensor) -> Tensor:
    """[H, W, D] as [1, D, H, W], channels last.

    In this order: a batch axis added after the permutation has a stride by which PyTorch does not know the format.
    """
    return grid.unsqueeze(0).permute(0, 3, 1, 2)


def _slide(grid: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(grid.device.type, enabled=False):  # the caller chose the precision
        output = functional.conv2d(_image(grid), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return output.squeeze(0).permute(1, 2, 0)


def _correlate(grid: Tensor, grad: Tensor, reach: int) -> Tensor:
    """The gradient of the weight, [D, 1, k, k] with k = 2 * reach + 1."""
    height = len(grid)
    total: Tensor | None = None
    for top in range(0, height, _ROWS):
        bottom = min(top + _ROWS, height)
        above, below = max(top - reach, 0), min(bottom + reach, height)
        band, kernel = _image(grid[above:below]), grad[top:bottom].permute(2, 0, 1).unsqueeze(1)
        if below - above < bottom - top + 2 * reach:
            band = functional.pad(band, (0, 0, above - top + reach, bottom + reach - below))
        with torch.autocast(grid.device.type, enabled=False):
            part = functional.conv2d(band, kernel, padding=(0, reach), groups=grid.shape[2])
        total = part if total is None else total + part
    assert total is not None  # noqa: S101 - a grid has rows
    return total.transpose(0, 1)
