"""The Triton implementation as a PyTorch op: launches, fake results, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfkernels.dropout import rescale
from cfkernels.gelu_dropout.kernel import gelu_dropout_bwd_kernel, gelu_dropout_fwd_kernel
from cfkernels.library import register
from cfkernels.triton_support import launch

_ROWS, _COLUMNS, _WARPS = 4, 512, 4


def gelu_dropout_triton(x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """As `cfkernels.gelu_dropout`, with the rate in 256ths."""
    y: Tensor = torch.ops.cfkernels.gelu_dropout(x, seed, threshold)
    return y


def _launch(kernel: Any, tensors: tuple[Tensor | None, ...], x: Tensor, threshold: int) -> None:
    n_rows, n_columns = x.shape
    grid = (-(-n_rows // _ROWS), -(-n_columns // _COLUMNS))
    constants = {"THRESHOLD": threshold, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": _WARPS}
    launch(kernel, grid, *tensors, n_rows, n_columns, rescale(threshold), **constants)


def _forward(x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch(gelu_dropout_fwd_kernel, (x, seed, y), x, threshold)
    return y


def _backward(grad: Tensor, x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    _launch(gelu_dropout_bwd_kernel, (grad, x, seed, grad_x), x, threshold)
    return grad_x


def _fake(x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, seed, ctx.threshold = inputs
    ctx.save_for_backward(x, seed)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, seed = ctx.saved_tensors
    return torch.ops.cfkernels.gelu_dropout_backward(grad, x, seed, ctx.threshold), None, None


register(
    "gelu_dropout_backward(Tensor grad, Tensor x, Tensor? seed, int threshold) -> Tensor",
    _backward,
    _fake_backward,
)
register(
    "gelu_dropout(Tensor x, Tensor? seed, int threshold) -> Tensor",
    _forward,
    _fake,
    backward=_gradient,
    save=_save,
)
