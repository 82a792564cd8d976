"""The Triton implementation as a PyTorch op: tile sizes, launches, fake results, gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfkernels import packing
from cfkernels.attention.kernel import (
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_fwd_kernel,
)
from cfkernels.dropout import rescale
from cfkernels.library import register
from cfkernels.triton_support import architecture, launch, tuned_for

_DELTA_ROWS = 32


class Tiles(NamedTuple):
    """BM query rows, BN keys, and how a program is built."""

    rows: int
    keys: int
    warps: int
    stages: int


class _Tuned(NamedTuple):
    forward: Tiles
    to_keys: Tiles
    to_queries: Tiles


# free of register spills, with dropout and without, and within the shared memory of the architecture; by width
_TUNED: dict[int, dict[int, _Tuned]] = {
    90: {
        64: _Tuned(Tiles(128, 128, 8, 2), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 2)),
        128: _Tuned(Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 3), Tiles(128, 64, 8, 2)),
    },
    86: {
        64: _Tuned(Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2)),
        128: _Tuned(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 1), Tiles(128, 32, 8, 2)),
    },
}
_TUNED[80] = _TUNED[86]
_NARROW = _Tuned(Tiles(128, 64, 8, 2), Tiles(32, 64, 4, 2), Tiles(64, 32, 8, 2))
"""Below 9.0 for widths up to 32, and up to 64 where no power of two: masks, of columns too, take registers."""
_FLOAT32 = {
    arch: _Tuned(Tiles(32, 32, 8, 1), Tiles(16, 16, 8, stages), Tiles(16, 32, 8, 1))
    for arch, stages in ((80, 1), (86, 2), (90, 2))
}
"""Without tensor cores every product of a tile is an instruction: small tiles everywhere."""


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `cfkernels.attention_and_lse`, with the rate in 256ths."""
    out: tuple[Tensor, Tensor] = torch.ops.cfkernels.attention(q, k, v, seed, q_lengths, kv_lengths, threshold)
    return out


def padded_width(head_dim: int) -> int:
    """Columns of a tile: the next power of two, for the matrix units at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch is told to, in `torch.backends.cuda.matmul`."""
    rounded = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if rounded else "ieee"


def _tuned(q: Tensor) -> _Tuned:
    arch, width = tuned_for(architecture(q.device)), q.shape[2]
    if q.dtype == torch.float32:
        return _FLOAT32[arch]
    padded = width < padded_width(width)
    if arch < 90 and (width <= 32 or (padded and width <= 64)):
        return _NARROW
    return _TUNED[arch][64 if width <= 64 and not padded else 128]


def _split(q: Tensor) -> bool:
    """Whether there are registers for a second loop, without masks."""
    return tuned_for(architecture(q.device)) == 90 and q.dtype != torch.float32


def _constants(q: Tensor, threshold: int, tiles: Tiles) -> dict[str, Any]:
    return {
        "DH": q.shape[2],
        "D": padded_width(q.shape[2]),
        "BM": tiles.rows,
        "BN": tiles.keys,
        "THRESHOLD": threshold,
        "PRECISION": dot_precision(q.dtype),
        "SPLIT": _split(q),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor]:
    q, k, v = (packing.dense_rows(x) for x in (q, k, v))
    out, lse = _fake(q, k, v, seed, q_lengths, kv_lengths, threshold)
    tiles = _tuned(q).forward
    maps = _Maps.of(q, q_lengths, kv_lengths)
    programs = packing.row_tiles(maps.q_lengths, tiles.rows, q.device)
    launch(
        attention_fwd_kernel,
        (len(programs), q.shape[1]),
        *(q, k, v, out, lse, seed, programs, maps.q_offsets, maps.kv_offsets),
        *(q.shape[0], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2]),
        *(math.log2(math.e) * q.shape[2] ** -0.5, rescale(threshold)),
        **_constants(q, threshold, tiles),
    )
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, out = grad.contiguous(), out.contiguous()
    q, k, v = (packing.dense_rows(x) for x in (q, k, v))
    n, n_heads, width = q.shape
    grad_q, grad_k, grad_v = _fake_backward(grad, q, k, v, out, lse, seed, q_lengths, kv_lengths, threshold)
    delta = torch.empty_like(lse)
    launch(
        attention_delta_kernel,
        (-(-n // _DELTA_ROWS), n_heads),
        *(out, grad, delta, n, *out.stride()[:2]),
        DH=width,
        D=padded_width(width),
        BM=_DELTA_ROWS,
        num_warps=4,
    )
    tuned, maps, root = _tuned(q), _Maps.of(q, q_lengths, kv_lengths), width**-0.5
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2])
    numbers = (n, *strides, math.log2(math.e) * root, rescale(threshold), root)
    programs = packing.row_tiles(maps.kv_lengths, tuned.to_keys.keys, q.device)
    launch(
        attention_dkdv_kernel,
        (len(programs), n_heads),
        *(q, k, v, grad, lse, delta, grad_k, grad_v, seed, programs, maps.q_offsets, maps.kv_offsets, *numbers),
        **_constants(q, threshold, tuned.to_keys),
    )
    programs = packing.row_tiles(maps.q_lengths, tuned.to_queries.rows, q.device)
    launch(
        attention_dq_kernel,
        (len(programs), n_heads),
        *(q, k, v, grad, lse, delta, grad_q, seed, programs, maps.q_offsets, maps.kv_offsets, *numbers),
        **_constants(q, threshold, tuned.to_queries),
    )
    return grad_q, grad_k, grad_v


class _Maps(NamedTuple):
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    q_offsets: Tensor
    kv_offsets: Tensor

    @classmethod
    def of(cls, q: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> _Maps:
        queries, keys = tuple(q_lengths), tuple(kv_lengths)
        return cls(queries, keys, packing.offsets(queries, q.device), packing.offsets(keys, q.device))


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, seed, ctx.q_lengths, ctx.kv_lengths, ctx.threshold = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, seed)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    more = (ctx.q_lengths, ctx.kv_lengths, ctx.threshold)
    gradients = torch.ops.cfkernels.attention_backward(grad, *ctx.saved_tensors, *more)
    return *gradients, None, None, None, None


_LENGTHS = "SymInt[] q_lengths, SymInt[] kv_lengths, int threshold"
register(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? seed, {_LENGTHS})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
register(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? seed, {_LENGTHS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    backward=_gradient,
    save=_save,
)
