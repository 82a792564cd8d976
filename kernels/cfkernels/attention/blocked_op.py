"""The blocked implementation as a PyTorch op: one node in a compiled graph, whatever the number of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfkernels.attention.blocked import blocked_backward, blocked_forward


@torch.library.custom_op("cfkernels::attention_blocked", mutates_args=())
def attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `cfkernels.attention_and_lse`, with the rate in 256ths."""
    return blocked_forward(q, k, v, seed, q_lengths, kv_lengths, threshold)


@torch.library.custom_op("cfkernels::attention_blocked_backward", mutates_args=())
def attention_blocked_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return blocked_backward(grad, q, k, v, out, seed, q_lengths, kv_lengths, threshold)


@attention_blocked.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor]:
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=precision)


@attention_blocked_backward.register_fake
def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, seed, ctx.q_lengths, ctx.kv_lengths, ctx.threshold = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, output[0], seed)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    more = (ctx.q_lengths, ctx.kv_lengths, ctx.threshold)
    return *attention_blocked_backward(grad, *ctx.saved_tensors, *more), None, None, None, None


attention_blocked.register_autograd(_gradient, setup_context=_save)
