"""What kernel_resources.py compiles: every op of cfkernels, as the models call it, on small CPU tensors.

Import this before cfkernels: it registers what is launched on CUDA for CPU tensors too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@contextlib.contextmanager
def _serving_cpu_tensors() -> Iterator[None]:
    """Register what is launched on CUDA for CPU tensors too, as under the interpreter: here nothing is launched."""
    register = torch.library.Library.impl

    def impl(self: Any, name: Any, function: Any, key: str = "", **how: Any) -> None:
        for each in ("CUDA", "CPU") if key == "CUDA" else (key,):
            register(self, name, function, each, **how)

    torch.library.Library.impl = impl  # type: ignore[method-assign,assignment]
    yield
    torch.library.Library.impl = register  # type: ignore[method-assign]


with contextlib.nullcontext() if INTERPRETED else _serving_cpu_tensors():
    from cfkernels.attention.op import attention_triton
    from cfkernels.attention_column_sums.op import attention_column_sums_triton
    from cfkernels.dropout_add.op import dropout_add_triton
    from cfkernels.gelu_dropout.op import gelu_dropout_triton
    from cfkernels.grouped_window_conv.op import grouped_window_conv_triton
    from cfkernels.layer_norm.op import layer_norm_triton
    from cfkernels.mix_layer_norms.op import mix_layer_norms_triton
    from cfkernels.ppeg.op import ppeg_triton

WIDTH = 512
THRESHOLD = 51

GRIDS = ((4, 4), (1,), (1, 6))
"""Sides of the bags' grids in three batches: 32, 1 and 37 rows. Triton compiles apart what is 1, divisible by 16, or
neither; a length must not be treated so."""


Outcome = tuple[Tensor, Sequence[Tensor]]
Run = Callable[..., Outcome]


class Case(NamedTuple):
    """One op on one kind of tensors; `run` takes a dtype and the sides of the bags' grids."""

    op: str
    what: str
    dtype: torch.dtype
    run: Run
    """Returns the result and what to take gradients of."""
    head_dim: int | None = None
    """None where it is no attention."""
    extra: bool = False
    """Whether only `--all` compiles it."""


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _rows(grids: tuple[int, ...]) -> int:
    return sum(side * side for side in grids)


def _seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def _attention(dtype: torch.dtype, grids: tuple[int, ...], *, head_dim: int, threshold: int) -> Outcome:
    packed = _empty((_rows(grids), 3 * WIDTH), dtype)
    q, k, v = packed.unflatten(1, (3, WIDTH // head_dim, head_dim)).unbind(1)
    lengths = tuple(side * side for side in grids)
    return attention_triton(q, k, v, _seed() if threshold else None, lengths, lengths, threshold)[0], [packed]


def _column_sums(dtype: torch.dtype, grids: tuple[int, ...], *, head_dim: int) -> Outcome:
    q, k = torch.empty(_rows(grids), 2, WIDTH // head_dim, head_dim, dtype=dtype).unbind(1)
    lengths = tuple(side * side for side in grids)
    return attention_column_sums_triton(q, k, torch.empty(q.shape[1], q.shape[0]), lengths, lengths), []


def _gelu_dropout(dtype: torch.dtype, grids: tuple[int, ...], *, threshold: int) -> Outcome:
    x = _empty((_rows(grids), WIDTH), dtype)
    return gelu_dropout_triton(x, _seed() if threshold else None, threshold), [x]


def _dropout_add(dtype: torch.dtype, grids: tuple[int, ...]) -> Outcome:
    x, residual = (_empty((_rows(grids), WIDTH), dtype) for _ in range(2))
    return dropout_add_triton(x, residual, _seed(), THRESHOLD), [x, residual]


def _layer_norm(dtype: torch.dtype, grids: tuple[int, ...], *, residual: bool = True, width: int = WIDTH) -> Outcome:
    x, other = (_empty((_rows(grids), width), dtype) for _ in range(2))
    return layer_norm_triton(x, other if residual else None, _empty((width,)), _empty((width,)), 1e-5), [x]


def _mix_layer_norms(dtype: torch.dtype, grids: tuple[int, ...]) -> Outcome:
    maps = tuple(_empty((_rows(grids), WIDTH), dtype) for _ in range(3))
    weights, biases = (tuple(_empty((WIDTH,)) for _ in range(3)) for _ in range(2))
    return mix_layer_norms_triton(maps, weights, biases, _empty((3,)), _empty((1,)), 1e-5), maps


def _windows(channels: int, inputs: int, sides: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    weights = tuple(_empty((channels, inputs, side, side)) for side in sides)
    return weights, tuple(_empty((channels,)) for _ in sides)


def _ppeg(dtype: torch.dtype, grids: tuple[int, ...]) -> Outcome:
    x = _empty((_rows(grids) + len(grids), WIDTH), dtype)
    return ppeg_triton(x, *_windows(WIDTH, 1, (7, 5, 3)), grid_sizes=grids, prefix=1), [x]


def _grouped_window_conv(dtype: torch.dtype, grids: tuple[int, ...], *, scaled: bool = True) -> Outcome:
    x = _empty((_rows(grids), WIDTH), dtype)
    scale = torch.empty(len(grids), WIDTH // 2) if scaled else None
    windows = _windows(WIDTH // 2, 2, (7, 5, 3, 1))
    return grouped_window_conv_triton(x, *windows, scale, grid_sizes=grids), [x]


def _attention_case(head_dim: int, dropout: bool, dtype: torch.dtype = torch.bfloat16) -> Case:
    run = partial(_attention, head_dim=head_dim, threshold=THRESHOLD if dropout else 0)
    return Case("attention", f"head_dim {head_dim}{', dropout' * dropout}", dtype, run, head_dim)


def _column_sums_case(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    run = partial(_column_sums, head_dim=head_dim)
    return Case("attention_column_sums", f"head_dim {head_dim}", dtype, run, head_dim)


def cases() -> list[Case]:
    """Every op in every configuration that its launches have, slow ones first."""
    bf16, fp32 = torch.bfloat16, torch.float32
    common = [
        *(_attention_case(128, dropout) for dropout in (True, False)),
        _column_sums_case(128),
        Case("grouped_window_conv", "", bf16, _grouped_window_conv),
        Case("ppeg", "", bf16, _ppeg),
        Case("mix_layer_norms", "", bf16, _mix_layer_norms),
        Case("layer_norm", "residual", bf16, _layer_norm),
        Case("layer_norm", "residual", fp32, _layer_norm),
        Case("gelu_dropout", "dropout", bf16, partial(_gelu_dropout, threshold=THRESHOLD)),
        Case("dropout_add", "", bf16, _dropout_add),
    ]
    others = [
        *(_attention_case(head_dim, dropout, fp32) for dropout in (True, False) for head_dim in (128, 64, 32)),
        *(_attention_case(*kind) for kind in product((64, 32, 16), (True, False))),
        *(_column_sums_case(head_dim, fp32) for head_dim in (128, 64, 32)),
        *(_column_sums_case(head_dim) for head_dim in (64, 32, 16)),
        Case("grouped_window_conv", "", fp32, _grouped_window_conv),
        Case("grouped_window_conv", "unscaled", bf16, partial(_grouped_window_conv, scaled=False)),
        Case("ppeg", "", fp32, _ppeg),
        Case("mix_layer_norms", "", fp32, _mix_layer_norms),
        Case("layer_norm", "", bf16, partial(_layer_norm, residual=False)),
        *(Case("layer_norm", "D 4096", dtype, partial(_layer_norm, width=4096)) for dtype in (bf16, fp32)),
        Case("gelu_dropout", "", bf16, partial(_gelu_dropout, threshold=0)),
        Case("gelu_dropout", "dropout", fp32, partial(_gelu_dropout, threshold=THRESHOLD)),
        Case("dropout_add", "", fp32, _dropout_add),
    ]
    return common + [case._replace(extra=True) for case in others]
