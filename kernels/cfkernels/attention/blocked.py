"""Attention in blocks of query rows, in plain PyTorch: a few tables of 8 MiB in float32, never all scores.

The backward makes scores and dropout masks again. What dropout keeps is `cfkernels.dropout.keep_mask`, as in the
kernels. Computes in float32, or in float64 for float64.

Per block, forward: scores, softmax, mask, product with v. Backward, with g = gradient of the output, rescaled:
dv += (mask * p)ᵀ g; ds = p * (mask * (g vᵀ) - delta), delta = sum(out * gradient) per row; dq = ds k; dk += dsᵀ q.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cfkernels.dropout import random_bytes, rescale

_BLOCK_ELEMENTS = 1 << 21
"""Scores in one block, of all heads it holds."""
_LEAST_ROWS = 32
"""Blocks of fewer rows than this take one head at a time instead: short matrices multiply slowly. With more than
65,536 keys a block is larger than _BLOCK_ELEMENTS for that reason."""


class _Bag(NamedTuple):
    """One bag, heads first, in the dtype of the computation; the scale is in q."""

    number: int
    queries: slice
    keys: slice
    q: Tensor  # [H, N, dh]
    k: Tensor  # [H, M, dh]
    v: Tensor  # [H, M, dh]


class _Block(NamedTuple):
    heads: slice
    rows: slice


def blocked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """Output [T_q, H, dh] as q, and the natural log of each row's sum of exponentials, [H, T_q]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=_precision(q), device=q.device)
    for bag in _bags(q, k, v, q_lengths, kv_lengths):
        for block in _blocks(bag):
            heads, rows = block
            s = torch.bmm(bag.q[block], bag.k[heads].mT, out=_scores("p", bag, block))
            highest = s.amax(dim=2)
            p = torch.softmax(s, dim=2, out=s)
            # the highest score has the probability 1 / sum(exp(s - highest))
            lse[heads, bag.queries][:, rows] = highest - p.amax(dim=2).log()
            mask = _mask(bag, block, seed, threshold)
            if mask is not None:
                p.mul_(mask)
            weighted = torch.bmm(p, bag.v[heads]).transpose(0, 1)
            out[bag.queries, heads][rows] = weighted.mul_(rescale(threshold))
    return out, lse


def blocked_backward(
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
    """Gradients of q, k and v, as they are."""
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    precision = _precision(q)
    delta = (grad.to(precision) * out.to(precision)).sum(dim=2).T.unsqueeze(2)  # [H, T_q, 1]
    for bag in _bags(q, k, v, q_lengths, kv_lengths):
        g = _heads_first(grad[bag.queries], precision) * rescale(threshold)
        grad_k, grad_v = torch.zeros_like(bag.k), torch.zeros_like(bag.v)
        for block in _blocks(bag):
            heads, rows = block
            rows_q, rows_g, head_k = bag.q[block], g[block], bag.k[heads]
            p, ds = _scores("p", bag, block), _scores("ds", bag, block)
            torch.softmax(torch.bmm(rows_q, head_k.mT, out=p), dim=2, out=p)
            mask = _mask(bag, block, seed, threshold)
            dropped = p if mask is None else torch.mul(p, mask, out=ds)
            grad_v[heads].baddbmm_(dropped.mT, rows_g)
            torch.bmm(rows_g, bag.v[heads].mT, out=ds)
            if mask is not None:
                ds.mul_(mask)
            ds.sub_(delta[heads, bag.queries][:, rows]).mul_(p)
            grad_k[heads].baddbmm_(ds.mT, rows_q)
            gradients[0][bag.queries, heads][rows] = torch.bmm(ds, head_k).transpose(0, 1).mul_(q.shape[2] ** -0.5)
        gradients[1][bag.keys] = grad_k.transpose(0, 1)
        gradients[2][bag.keys] = grad_v.transpose(0, 1)
    return gradients[0], gradients[1], gradients[2]


def _precision(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor, precision: torch.dtype) -> Tensor:
    return x.transpose(0, 1).to(precision).contiguous()


def _bags(q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> Iterator[_Bag]:
    precision, scale = _precision(q), q.shape[2] ** -0.5
    first_query, first_key = 0, 0
    for number, (n, m) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
        queries, keys = slice(first_query, first_query + n), slice(first_key, first_key + m)
        of_q = _heads_first(q[queries], precision) * scale
        yield _Bag(number, queries, keys, of_q, _heads_first(k[keys], precision), _heads_first(v[keys], precision))
        first_query, first_key = queries.stop, keys.stop


def _blocks(bag: _Bag) -> Iterator[_Block]:
    n_heads, n, _ = bag.q.shape
    m = bag.k.shape[1]
    together = n_heads if n_heads * min(n, _LEAST_ROWS) * m <= _BLOCK_ELEMENTS else 1
    n_rows = max(1, min(n, max(_LEAST_ROWS, _BLOCK_ELEMENTS // (together * m))))
    for head in range(0, n_heads, together):
        for row in range(0, n, n_rows):
            yield _Block(slice(head, head + together), slice(row, min(row + n_rows, n)))


class _Workspace(threading.local):
    """Memory for one block, reused by the next and by the next call: fresh pages cost more than writing to them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        kept = self._kept.get((name, dtype, device))
        if kept is None or kept.numel() < size:
            kept = self._kept[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(*shape)


_workspace = _Workspace()


def _scores(name: str, bag: _Bag, block: _Block) -> Tensor:
    heads, rows = block
    shape = (heads.stop - heads.start, rows.stop - rows.start, bag.k.shape[1])
    return _workspace.room(name, shape, bag.q.dtype, bag.q.device)


def _mask(bag: _Bag, block: _Block, seed: Tensor | None, threshold: int) -> Tensor | None:
    """What is kept, as numbers 0 and 1: products with them are faster than a choice by truth values."""
    if seed is None or threshold == 0:
        return None
    heads, rows = block
    device, n_heads, m = bag.q.device, bag.q.shape[0], bag.k.shape[1]
    streams = torch.arange(heads.start, heads.stop, device=device) + bag.number * n_heads
    numbers = torch.arange(rows.start, rows.stop, device=device)
    words = 7 * len(streams) * len(numbers) * ((m + 15) // 16)
    scratch = _workspace.room("words", (words,), torch.int64, device)
    mask = _scores("mask", bag, block).copy_(random_bytes(seed, numbers, m, streams, scratch))
    return mask.ge_(threshold)
