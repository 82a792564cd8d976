"""The grouped window convolution on CPUs: a depth-wise one over all input channels, then the sum of each pair.

PyTorch has fast depth-wise convolutions there, but none for two channels to a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels.packing import join, split
from cfkernels.windows import merge_windows
from cfkernels.windows.depthwise import depthwise


def grouped_window_conv_merged(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor, Tensor],
    channel_scale: Tensor | None,
    *,
    grid_sizes: tuple[int, ...],
) -> Tensor:
    """As `cfkernels.grouped_window_conv`."""
    exact = torch.promote_types(torch.promote_types(x.dtype, weights[0].dtype), torch.float32)
    weight = merge_windows(tuple(weight.to(exact) for weight in weights))
    channels = len(weight)
    # all first inputs, then all second ones: their two halves of the output are added as whole rows
    weight = weight.transpose(0, 1).reshape(2 * channels, 1, *weight.shape[2:])
    bias = (biases[0] + biases[1] + biases[2] + biases[3]).to(exact)
    none = torch.zeros(2 * channels, dtype=exact, device=x.device)
    outputs = []
    for bag, tokens in enumerate(split(x, tuple(side * side for side in grid_sizes))):
        side = grid_sizes[bag]
        halves = tokens.to(exact).reshape(side, side, channels, 2).transpose(2, 3).reshape(side, side, 2 * channels)
        pairs = depthwise(halves, weight, none).reshape(side * side, 2, channels)
        output = torch.relu(pairs[:, 0] + pairs[:, 1] + bias)
        if channel_scale is not None:
            output = output * channel_scale[bag].detach().to(exact)
        outputs.append(output.to(x.dtype))
    return join(outputs)
