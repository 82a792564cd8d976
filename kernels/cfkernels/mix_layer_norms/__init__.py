"""Several maps, each behind its own LayerNorm, mixed into one: the way into the Conv Processor in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels import triton_support
from cfkernels.dispatch import Candidate, choose
from cfkernels.errors import ShapeError
from cfkernels.mix_layer_norms.reference import mix_layer_norms_reference

if triton_support.HAS_TRITON:
    from cfkernels.mix_layer_norms.op import mix_layer_norms_triton

__all__ = ["candidates", "mix_layer_norms"]

_WIDEST, _KERNEL_MAPS = 4096, 3


def mix_layer_norms(
    maps: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    mix_weight: Tensor,
    mix_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Sum `mix_weight[i] * LayerNorm_i(maps[i])` over the maps and add `mix_bias`: [T, D], as the first map.

    With the maps of three scales it is the end of three Pad-Transformers and the 1x1x1 3D convolution behind them.

    Parameters
    ----------
    maps : N of [T, D] float
    weights, biases : N of [D] float
        The parameters of each map's LayerNorm.
    mix_weight : [N] float
    mix_bias : [1] float
    eps
        Added to the variance of a row.

    Raises
    ------
    ShapeError
        The maps are not of one shape [T, D], or something else is not there once for each map.
    """
    _check(maps, weights, biases, mix_weight, mix_bias)
    available = candidates(maps[0].device, maps[0].dtype, len(maps), maps[0].shape[1])
    if choose("mix_layer_norms", available).name == "triton":
        return mix_layer_norms_triton(maps, weights, biases, mix_weight, mix_bias, eps)
    return mix_layer_norms_reference(maps, weights, biases, mix_weight, mix_bias, eps)


def candidates(
    device: torch.device, dtype: torch.dtype, n_maps: int = _KERNEL_MAPS, width: int = 512
) -> tuple[Candidate, ...]:
    """The implementations for such tensors, best first."""
    reason = None
    if n_maps != _KERNEL_MAPS:
        reason = f"the kernel mixes {_KERNEL_MAPS} maps, not {n_maps}"
    elif width > _WIDEST:
        reason = f"rows of {width} are too wide, a program holds {_WIDEST}"
    return (
        triton_support.candidate(device, dtype, "one pass over all maps, nothing stored between", unless=reason),
        Candidate("reference", None, "PyTorch's LayerNorms, the mix folded into their parameters"),
    )


def _check(
    maps: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    mix_weight: Tensor,
    mix_bias: Tensor,
) -> None:
    shapes = [list(x.shape) for x in maps]
    if not maps or maps[0].ndim != 2 or any(shape != shapes[0] for shape in shapes):
        raise ShapeError(f"the maps must all be one [T, D], got {shapes}")
    width = maps[0].shape[1:]
    for name, parameters in (("weights", weights), ("biases", biases)):
        if [x.shape for x in parameters] != [width] * len(maps):
            given = [list(x.shape) for x in parameters]
            raise ShapeError(f"the {name} must be {list(width)} for each map, got {given}")
    if mix_weight.shape != (len(maps),) or mix_bias.shape != (1,):
        found = f"{list(mix_weight.shape)} and {list(mix_bias.shape)}"
        raise ShapeError(f"mix_weight, mix_bias must be [{len(maps)}] and [1], got {found}")
