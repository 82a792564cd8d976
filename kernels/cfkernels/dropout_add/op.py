"""The Triton implementation as a PyTorch op: launches, fake results, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfkernels.dropout import rescale
from cfkernels.dropout_add.kernel import dropout_add_bwd_kernel, dropout_add_fwd_kernel
from cfkernels.library import register
from cfkernels.packing import dense_rows
from cfkernels.triton_support import launch

_ROWS, _COLUMNS, _WARPS = 4, 512, 4


def dropout_add_triton(x: Tensor, residual: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """As `cfkernels.dropout_add`, with the rate in 256ths, above 0."""
    y: Tensor = torch.ops.cfkernels.dropout_add(x, residual, seed, threshold)
    return y


def _launch(kernel: Any, read: tuple[Tensor, ...], seed: Tensor, written: Tensor, threshold: int) -> None:
    n_rows, n_columns = written.shape
    grid = (-(-n_rows // _ROWS), -(-n_columns // _COLUMNS))
    strides = (x.stride(0) for x in read)
    constants = {"THRESHOLD": threshold, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": _WARPS}
    if n_rows:
        numbers = (n_rows, n_columns, *strides, rescale(threshold))
        launch(kernel, grid, *read, seed, written, *numbers, **constants)


def _forward(x: Tensor, residual: Tensor, seed: Tensor, threshold: int) -> Tensor:
    y = _fake(x, residual, seed, threshold)
    _launch(dropout_add_fwd_kernel, (dense_rows(x), dense_rows(residual)), seed, y, threshold)
    return y


def _backward(grad: Tensor, seed: Tensor, threshold: int) -> Tensor:
    grad_x = _fake_backward(grad, seed, threshold)
    _launch(dropout_add_bwd_kernel, (dense_rows(grad),), seed, grad_x, threshold)
    return grad_x


def _fake(x: Tensor, residual: Tensor, seed: Tensor, threshold: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _fake_backward(grad: Tensor, seed: Tensor, threshold: int) -> Tensor:
    return grad.new_empty(grad.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, seed, ctx.threshold = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(seed)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    grad_x = torch.ops.cfkernels.dropout_add_backward(grad, seed, ctx.threshold)
    x_dtype, residual_dtype = ctx.dtypes
    return grad_x.to(x_dtype), grad.to(residual_dtype), None, None


register(
    "dropout_add_backward(Tensor grad, Tensor seed, int threshold) -> Tensor",
    _backward,
    _fake_backward,
)
register(
    "dropout_add(Tensor x, Tensor residual, Tensor seed, int threshold) -> Tensor",
    _forward,
    _fake,
    backward=_gradient,
    save=_save,
)
