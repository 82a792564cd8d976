"""PPEG in plain PyTorch: the definition, with the three kernels merged into one.

Computed in the wider dtype of tokens and weights. The identity stays outside the merged kernel: inside, as a 1 at
the centre, it would be exact too in float32, but rounding the kernel to bfloat16 (8 bits) would drown weights of
about 0.01 beside that 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels.packing import join, split
from cfkernels.windows import convolve, merge_windows


def ppeg_reference(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
    *,
    grid_sizes: tuple[int, ...],
    prefix: int,
) -> Tensor:
    """Merge the kernels, convolve each grid; arguments as `cfkernels.ppeg`."""
    exact = torch.promote_types(x.dtype, weights[0].dtype)
    weight, bias = merge_windows(weights).to(exact), (biases[0] + biases[1] + biases[2]).to(exact)
    sizes = tuple(size for side in grid_sizes for size in (prefix, side * side))
    parts = list(split(x, sizes))
    for i, side in enumerate(grid_sizes):
        tokens = parts[2 * i + 1].to(exact)
        parts[2 * i + 1] = (tokens + convolve(tokens, weight, bias, side)).to(x.dtype)
    return join([part for part in parts if len(part)])
