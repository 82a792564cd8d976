"""Square windows sliding over square grids of packed tokens: what both convolution operators share.

Convolutions of one input with kernels of odd sides k, each zero-padded by k // 2, sum to one convolution
with the sum of the kernels, the smaller ones centred in the largest. The sum is formed on the fly, so
gradients reach every part.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cfkernels.errors import ShapeError


def merge_windows(weights: tuple[Tensor, ...]) -> Tensor:
    """Sum [C, I, k, k] kernels of several odd sides k, centred, into one of the first and largest side."""
    largest = weights[0].shape[-1]
    merged = weights[0]
    for weight in weights[1:]:
        margin = (largest - weight.shape[-1]) // 2
        merged = merged + functional.pad(weight, (margin, margin, margin, margin))
    return merged


def convolve(tokens: Tensor, weight: Tensor, bias: Tensor, side: int) -> Tensor:
    """Convolve one bag's tokens, [side * side, D] row-major on its grid, with [C, I, k, k] kernels."""
    image = tokens.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    groups = tokens.shape[1] // weight.shape[1]
    output = functional.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=groups)
    return output.squeeze(0).permute(1, 2, 0).flatten(0, 1)


def check_grids(x: Tensor, grid_sizes: tuple[int, ...], prefix: int = 0) -> None:
    """Refuse tokens that are not `prefix + g * g` rows per bag.

    Raises
    ------
    ShapeError
        x is not [T, D], a grid has no side, or T is another number.
    """
    if x.ndim != 2:
        raise ShapeError(f"tokens must be [T, D], got {list(x.shape)}")
    rows = sum(prefix + side * side for side in grid_sizes)
    if min(grid_sizes, default=0) < 1 or prefix < 0 or rows != x.shape[0]:
        raise ShapeError(f"grids of sides {grid_sizes} with {prefix} tokens before each do not hold {x.shape[0]}")


def check_windows(windows: dict[int, tuple[Tensor, Tensor]], channels: int, inputs: int) -> None:
    """Refuse kernels that are not [channels, inputs, k, k] with a bias [channels] for each side k.

    Raises
    ------
    ShapeError
        Names the first kernel or bias of another shape.
    """
    for side, (weight, bias) in windows.items():
        expected = (channels, inputs, side, side)
        if tuple(weight.shape) != expected or tuple(bias.shape) != (channels,):
            found = f"{list(weight.shape)} and {list(bias.shape)}"
            raise ShapeError(f"weight{side}, bias{side} must be {list(expected)} and [{channels}], got {found}")
