"""Grouped windows over square grids of tokens: two input channels to each output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels import triton_support
from cfkernels.dispatch import Candidate, choose
from cfkernels.errors import ShapeError
from cfkernels.grouped_window_conv.merged import grouped_window_conv_merged
from cfkernels.grouped_window_conv.reference import grouped_window_conv_reference
from cfkernels.windows import check_grids, check_windows

if triton_support.HAS_TRITON:
    from cfkernels.grouped_window_conv.op import grouped_window_conv_triton

__all__ = ["candidates", "grouped_window_conv"]


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
    channel_scale: Tensor | None = None,
) -> Tensor:
    """Sum four grouped convolutions of each grid, sides 7, 5, 3 and 1, then ReLU and a factor per channel: [T, C].

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
    channel_scale : [B, C] float
        What each bag's channels are multiplied with after ReLU, at least 0; it gets no gradient. Dropout of whole
        channels is 0 or 1 / (1 - p) here.

    Raises
    ------
    ShapeError
        The grids do not hold T tokens, x has an odd width, or a kernel, bias or channel_scale has another shape.
    """
    check_grids(x, grid_sizes)
    windows = {7: (weight7, bias7), 5: (weight5, bias5), 3: (weight3, bias3), 1: (weight1, bias1)}
    if x.shape[1] % 2:
        raise ShapeError(f"the width must be even, two input channels to an output channel; got {x.shape[1]}")
    check_windows(windows, x.shape[1] // 2, 2)
    if channel_scale is not None and tuple(channel_scale.shape) != (len(grid_sizes), x.shape[1] // 2):
        expected = [len(grid_sizes), x.shape[1] // 2]
        raise ShapeError(f"channel_scale must be {expected}, got {list(channel_scale.shape)}")
    weights, biases = (weight7, weight5, weight3, weight1), (bias7, bias5, bias3, bias1)
    chosen = choose("grouped_window_conv", candidates(x.device, x.dtype)).name
    if chosen == "triton":
        return grouped_window_conv_triton(x, weights, biases, channel_scale, grid_sizes=grid_sizes)
    compute = grouped_window_conv_merged if chosen == "merged" else grouped_window_conv_reference
    return compute(x, weights, biases, channel_scale, grid_sizes=grid_sizes)


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """The implementations for such tensors, best first."""
    elsewhere = None if device.type == "cpu" else "its weight gradient is written for CPUs"
    return (
        triton_support.candidate(device, dtype, "one merged window, ReLU and the channels' factor in the same pass"),
        Candidate("merged", elsewhere, "a depth-wise convolution of all inputs; its weight gradient is another"),
        Candidate("reference", None, "PyTorch's grouped convolution with the merged window"),
    )
