"""PPEG on CPUs: one depth-wise convolution that carries the identity too, and its fast weight gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels.packing import join, split
from cfkernels.windows import merge_windows
from cfkernels.windows.depthwise import depthwise


def ppeg_merged(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
    *,
    grid_sizes: tuple[int, ...],
    prefix: int,
) -> Tensor:
    """As `cfkernels.ppeg`.

    The identity is a 1 at the window's centre. That is safe where nothing is rounded below float32: what the sum
    1 + w loses, the output x + w x would lose as well.
    """
    exact = torch.promote_types(torch.promote_types(x.dtype, weights[0].dtype), torch.float32)
    weight = merge_windows(tuple(weight.to(exact) for weight in weights))
    centre = torch.zeros(1, 1, *weight.shape[2:], dtype=exact, device=x.device)
    centre[..., weight.shape[-1] // 2, weight.shape[-1] // 2] = 1
    weight, bias = weight + centre, (biases[0] + biases[1] + biases[2]).to(exact)
    sizes = tuple(size for side in grid_sizes for size in (prefix, side * side))
    parts = list(split(x, sizes))
    for i, side in enumerate(grid_sizes):
        grid = parts[2 * i + 1].to(exact).reshape(side, side, -1)
        parts[2 * i + 1] = depthwise(grid, weight, bias).flatten(0, 1).to(x.dtype)
    return join([part for part in parts if len(part)])
