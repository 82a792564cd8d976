"""Grouped windows over square grids of tokens: two input channels to each output channel."""

from __future__ import annotations

from torch import Tensor

from cfkernels.errors import ShapeError
from cfkernels.grouped_window_conv.reference import grouped_window_conv_reference
from cfkernels.windows import check_grids, check_windows

__all__ = ["grouped_window_conv"]


def grouped_window_conv(
    x: Tensor,
    weight7: Tensor,
    bias7: Tensor,
    weight5: Tensor,
    bias5: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    *,
    grid_sizes: tuple[int, ...],
) -> Tensor:
    """Sum four grouped convolutions of each grid, sides 7, 5, 3 and 1: [T, C].

    Output channel c sees input channels 2c and 2c + 1.

    Parameters
    ----------
    x : [T, 2C] float
        Packed tokens; each bag has g * g tokens, row-major on its g x g grid.
    weight7, weight5, weight3, weight1 : [C, 2, k, k] float
        Grouped kernels; borders are zero-padded by k // 2.
    bias7, bias5, bias3, bias1 : [C] float
    grid_sizes
        The side g of each bag's grid, at least 1.

    Raises
    ------
    ShapeError
        The grids do not hold T tokens, x has an odd width, or a kernel or bias has another shape.
    """
    check_grids(x, grid_sizes)
    windows = {7: (weight7, bias7), 5: (weight5, bias5), 3: (weight3, bias3), 1: (weight1, bias1)}
    if x.shape[1] % 2:
        raise ShapeError(f"the width must be even, two input channels to an output channel; got {x.shape[1]}")
    check_windows(windows, x.shape[1] // 2, 2)
    return grouped_window_conv_reference(
        x, (weight7, weight5, weight3, weight1), (bias7, bias5, bias3, bias1), grid_sizes=grid_sizes
    )
