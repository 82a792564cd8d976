"""The Triton implementation as a PyTorch op: launches, fake results, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfkernels.layer_norm.kernel import layer_norm_bwd_kernel, layer_norm_fwd_kernel
from cfkernels.library import register
from cfkernels.packing import dense_rows
from cfkernels.triton_support import launch

# a tile of ROWS x COLUMNS elements gives each of 128 threads 16, and at D = 512 each warp one row
_TILE, _MOST_ROWS = 2048, 16
# sums of the parameters' gradients: so many programs on every GPU, so the same result on every GPU
_GROUPS = 512

_Three = tuple[Tensor, Tensor, Tensor]


def layer_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `cfkernels.layer_norm`."""
    y: Tensor = torch.ops.cfkernels.layer_norm(x, residual, weight, bias, eps)[0]
    return y


def _tile(n_columns: int) -> dict[str, int]:
    columns = max(16, 1 << (n_columns - 1).bit_length())
    rows = min(_MOST_ROWS, max(1, _TILE // columns))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 8 if columns > _TILE else 4}


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> _Three:
    x, other = dense_rows(x), None if residual is None else dense_rows(residual)
    n_rows, n_columns = x.shape
    y, mean, rstd = _fake(x, residual, weight, bias, eps)
    tile = _tile(n_columns)
    if n_rows:
        tensors = (x, other, weight.contiguous(), bias.contiguous(), y, mean, rstd)
        numbers = (n_rows, n_columns, x.stride(0), 0 if other is None else other.stride(0), eps)
        grid = (-(-n_rows // tile["ROWS"]),)
        launch(layer_norm_fwd_kernel, grid, *tensors, *numbers, RESIDUAL=other is not None, **tile)
    return y, mean, rstd


def _backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    grad, x, other = dense_rows(grad), dense_rows(x), None if residual is None else dense_rows(residual)
    n_rows, n_columns = x.shape
    tile = _tile(n_columns)
    n_tiles = max(1, -(-n_rows // (tile["ROWS"] * _GROUPS)))
    n_programs = -(-n_rows // (tile["ROWS"] * n_tiles))
    grad_x = x.new_empty(x.shape)
    partial = x.new_empty((n_programs, 2, n_columns), dtype=torch.float32)
    if n_rows:
        tensors = (grad, x, other, weight.contiguous(), mean, rstd, grad_x, partial)
        strides = (grad.stride(0), x.stride(0), 0 if other is None else other.stride(0))
        numbers = (n_rows, n_tiles, n_columns, *strides)
        launch(layer_norm_bwd_kernel, (n_programs,), *tensors, *numbers, RESIDUAL=other is not None, **tile)
    return grad_x, partial.sum(0)


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> _Three:
    mean, rstd = (x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _fake_backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, residual, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, residual, weight, mean, rstd = ctx.saved_tensors
    grad_x, grad_parameters = torch.ops.cfkernels.layer_norm_backward(grad, x, residual, weight, mean, rstd)
    # a sum passes its gradient to both sides: one tensor serves both
    grad_residual = None if residual is None else grad_x.to(residual.dtype)
    grad_weight, grad_bias = grad_parameters.unbind()
    return grad_x, grad_residual, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None


register(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
register(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    backward=_gradient,
    save=_save,
)
