"""The Triton implementation as a PyTorch op: launches, fake results, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfkernels.library import register
from cfkernels.mix_layer_norms.kernel import mix_layer_norms_bwd_kernel, mix_layer_norms_fwd_kernel
from cfkernels.packing import dense_rows
from cfkernels.triton_support import launch

# elements of a tile: the backward holds eight tiles in registers at once
_TILE, _MOST_ROWS = 1024, 16
# sums of the parameters' gradients: so many programs on every GPU, so the same result on every GPU
_GROUPS = 512


def mix_layer_norms_triton(
    maps: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    mix_weight: Tensor,
    mix_bias: Tensor,
    eps: float,
) -> Tensor:
    """As `cfkernels.mix_layer_norms`, for three maps."""
    y: Tensor = torch.ops.cfkernels.mix_layer_norms(*maps, *weights, *biases, mix_weight, mix_bias, eps)[0]
    return y


def _tile(n_columns: int) -> dict[str, int]:
    columns = max(16, 1 << (n_columns - 1).bit_length())
    rows = min(_MOST_ROWS, max(1, _TILE // columns))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(16, max(4, columns // 256))}


def _forward(
    x0: Tensor, x1: Tensor, x2: Tensor,
    weight0: Tensor, weight1: Tensor, weight2: Tensor,
    bias0: Tensor, bias1: Tensor, bias2: Tensor,
    mix_weight: Tensor, mix_bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_rows, n_columns = x0.shape
    y, statistics = _results(x0)
    if n_rows:
        maps = [dense_rows(x) for x in (x0, x1, x2)]
        rows = [x.contiguous() for x in (weight0, weight1, weight2, bias0, bias1, bias2, mix_weight)]
        tile = _tile(n_columns)
        numbers = (n_rows, n_columns, *(x.stride(0) for x in maps), eps)
        grid = (-(-n_rows // tile["ROWS"]),)
        launch(mix_layer_norms_fwd_kernel, grid, *maps, *rows, mix_bias, y, statistics, *numbers, **tile)
    return y, statistics


def _backward(
    grad: Tensor, x0: Tensor, x1: Tensor, x2: Tensor,
    weight0: Tensor, weight1: Tensor, weight2: Tensor, mix_weight: Tensor, statistics: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    n_rows, n_columns = x0.shape
    tile = _tile(n_columns)
    n_tiles = max(1, -(-n_rows // (tile["ROWS"] * _GROUPS)))
    n_programs = -(-n_rows // (tile["ROWS"] * n_tiles))
    grads = [x.new_empty(x.shape) for x in (x0, x1, x2)]
    partial = x0.new_empty((n_programs, 4, n_columns), dtype=torch.float32)
    if n_rows:
        read = [dense_rows(x) for x in (grad, x0, x1, x2)]
        rows = [x.contiguous() for x in (weight0, weight1, weight2, mix_weight)]
        numbers = (n_rows, n_tiles, n_columns, *(x.stride(0) for x in read))
        launch(mix_layer_norms_bwd_kernel, (n_programs,), *read, *rows, statistics, *grads, partial, *numbers, **tile)
    return *grads, partial.sum(0)


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((3, 2, x.shape[0]), dtype=torch.float32)


def _fake(x0: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(x0)


def _fake_backward(grad: Tensor, x0: Tensor, x1: Tensor, x2: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (x0, x1, x2)), x0.new_empty((4, x0.shape[1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, mix_bias, _ = inputs
    _, statistics = output
    ctx.mix_bias_dtype = mix_bias.dtype
    ctx.save_for_backward(*tensors, statistics)
    ctx.mark_non_differentiable(statistics)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, mix_weight, statistics = ctx.saved_tensors
    maps, weights, biases = tensors[:3], tensors[3:6], tensors[6:]
    *grad_maps, sums = torch.ops.cfkernels.mix_layer_norms_backward(grad, *maps, *weights, mix_weight, statistics)
    # the formulas are in kernel.py
    scaled = mix_weight.float()[:, None, None] * torch.stack((sums[:3], sums[3].expand(3, -1)), dim=1)
    grad_weights = [one.to(weight.dtype) for one, weight in zip(scaled[:, 0], weights, strict=True)]
    grad_biases = [one.to(bias.dtype) for one, bias in zip(scaled[:, 1], biases, strict=True)]
    grad_mix = (torch.stack(weights).float() * sums[:3] + torch.stack(biases).float() * sums[3]).sum(1)
    grad_mix_bias = sums[3].sum().reshape(1).to(ctx.mix_bias_dtype)
    return *grad_maps, *grad_weights, *grad_biases, grad_mix.to(mix_weight.dtype), grad_mix_bias, None


register(
    "mix_layer_norms_backward(Tensor grad, Tensor x0, Tensor x1, Tensor x2, Tensor weight0, Tensor weight1,"
    " Tensor weight2, Tensor mix_weight, Tensor statistics) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
register(
    "mix_layer_norms(Tensor x0, Tensor x1, Tensor x2, Tensor weight0, Tensor weight1, Tensor weight2, Tensor bias0,"
    " Tensor bias1, Tensor bias2, Tensor mix_weight, Tensor mix_bias, float eps) -> (Tensor, Tensor)",
    _forward,
    _fake,
    backward=_gradient,
    save=_save,
)
