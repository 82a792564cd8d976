"""The grouped window convolution in plain PyTorch: the definition, with its four kernels merged into one."""

from __future__ import annotations

from torch import Tensor

from cfkernels.packing import join, split
from cfkernels.windows import convolve, merge_windows


def grouped_window_conv_reference(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    grid_sizes: tuple[int, ...],
) -> Tensor:
    """Merge the kernels, convolve each grid; arguments as `cfkernels.grouped_window_conv`."""
    weight, bias = merge_windows(weights), biases[0] + biases[1] + biases[2] + biases[3]
    grids = zip(split(x, tuple(side * side for side in grid_sizes)), grid_sizes, strict=True)
    return join([convolve(tokens, weight, bias, side) for tokens, side in grids])
