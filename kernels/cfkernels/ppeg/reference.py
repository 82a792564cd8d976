"""PPEG in plain PyTorch: the definition, with the three kernels merged into one.

The identity stays outside the merged kernel. Inside, as a 1 at the centre, it would be exact too in
float32, but rounding the kernel to bfloat16 (8 bits) would drown weights of about 0.01 beside that 1.
"""

from __future__ import annotations

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
    weight, bias = merge_windows(weights), biases[0] + biases[1] + biases[2]
    sizes = tuple(size for side in grid_sizes for size in (prefix, side * side))
    parts = list(split(x, sizes))
    for i, side in enumerate(grid_sizes):
        tokens = parts[2 * i + 1]
        parts[2 * i + 1] = tokens + convolve(tokens, weight, bias, side)
    return join([part for part in parts if len(part)])
