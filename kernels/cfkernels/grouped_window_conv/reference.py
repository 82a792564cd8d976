"""The grouped window convolution in plain PyTorch: the definition, with its four kernels merged into one.

Computed in the wider dtype of tokens and weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels.packing import join, split
from cfkernels.windows import convolve, merge_windows


def grouped_window_conv_reference(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor, Tensor],
    channel_scale: Tensor | None,
    *,
    grid_sizes: tuple[int, ...],
) -> Tensor:
    """Merge the kernels, convolve each grid, ReLU, scale; arguments as `cfkernels.grouped_window_conv`."""
    exact = torch.promote_types(x.dtype, weights[0].dtype)
    weight, bias = merge_windows(weights).to(exact), (biases[0] + biases[1] + biases[2] + biases[3]).to(exact)
    outputs = []
    for bag, tokens in enumerate(split(x, tuple(side * side for side in grid_sizes))):
        output = torch.relu(convolve(tokens.to(exact), weight, bias, grid_sizes[bag]))
        if channel_scale is not None:
            output = output * channel_scale[bag].detach().to(exact)
        outputs.append(output.to(x.dtype))
    return join(outputs)
