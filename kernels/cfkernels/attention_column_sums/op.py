"""The Triton implementation as a PyTorch op: tile sizes, launch, fake result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cfkernels import packing
from cfkernels.attention.op import Tiles, dot_precision, padded_width
from cfkernels.attention_column_sums.kernel import attention_column_sums_kernel
from cfkernels.library import register
from cfkernels.triton_support import architecture, launch, tuned_for

_TUNED = {90: Tiles(64, 128, 4, 3), 80: Tiles(64, 128, 8, 2), 86: Tiles(64, 128, 8, 2)}
_FLOAT32 = Tiles(32, 16, 8, 1)


def attention_column_sums_triton(
    q: Tensor, k: Tensor, lse: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]
) -> Tensor:
    """As `cfkernels.attention_column_sums`."""
    sums: Tensor = torch.ops.cfkernels.attention_column_sums(q, k, lse, q_lengths, kv_lengths)
    return sums


def _forward(q: Tensor, k: Tensor, lse: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> Tensor:
    q, k, lse = packing.dense_rows(q), packing.dense_rows(k), lse.contiguous()
    width, device = q.shape[2], q.device
    tiles = _FLOAT32 if q.dtype == torch.float32 else _TUNED[tuned_for(architecture(device))]
    programs = packing.row_tiles(tuple(kv_lengths), tiles.keys, device)
    shares = _shares(len(programs) * k.shape[1], max(q_lengths), tiles.rows, device)
    sums = torch.empty(shares, k.shape[1], k.shape[0], dtype=torch.float32, device=device)
    offsets = (packing.offsets(tuple(lengths), device) for lengths in (q_lengths, kv_lengths))
    launch(
        attention_column_sums_kernel,
        (len(programs), k.shape[1], shares),
        *(q, k, lse, sums, programs, *offsets),
        *(q.shape[0], k.shape[0], *q.stride()[:2], *k.stride()[:2], math.log2(math.e) * width**-0.5),
        DH=width,
        D=padded_width(width),
        BM=tiles.rows,
        BN=tiles.keys,
        PRECISION=dot_precision(q.dtype),
        SPLIT=q.dtype != torch.float32,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return sums[0] if shares == 1 else sums.sum(0)


def _shares(programs: int, longest: int, rows: int, device: torch.device) -> int:
    """Into how many shares queries are cut, so that each processor has two programs where there is work for them."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(-(-2 * processors // programs), -(-longest // rows)))


def _fake(q: Tensor, k: Tensor, lse: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> Tensor:
    return k.new_empty((k.shape[1], k.shape[0]), dtype=torch.float32)


register(
    "attention_column_sums(Tensor q, Tensor k, Tensor lse, SymInt[] q_lengths, SymInt[] kv_lengths) -> Tensor",
    _forward,
    _fake,
)
