"""Dropout in PyTorch operations. It is its own gradient: the backward makes the mask again, nothing is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfkernels.dropout.rates import rescale
from cfkernels.dropout.reference import keep_mask


@torch.library.custom_op("cfkernels::drop", mutates_args=())
def drop(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Set elements of [T, D] to zero where `keep_mask` of the same seed says so, and rescale the others."""
    kept = keep_mask(seed, torch.arange(len(x), device=x.device), x.shape[1], threshold)
    # on a CPU a product with 0 or 1 is much cheaper than a choice by truth values
    dropped: Tensor = kept.to(x.dtype).mul_(x).mul_(rescale(threshold))
    return dropped


@drop.register_fake
def _fake(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, seed, ctx.threshold = inputs
    ctx.save_for_backward(seed)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return drop(grad, seed, ctx.threshold), None, None


drop.register_autograd(_gradient, setup_context=_save)
