"""Column sums in plain PyTorch: the definition, in blocks of scores that fit a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cfkernels.packing import split

_ROWS, _KEYS = 512, 1024
"""One block of one head: 2 MiB of float32 scores."""


def attention_column_sums_reference(
    q: Tensor, k: Tensor, lse: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]
) -> Tensor:
    """As `cfkernels.attention_column_sums`."""
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, lse = q.to(precision) * q.shape[2] ** -0.5, k.to(precision), lse.to(precision)
    sums = torch.zeros(k.shape[1], k.shape[0], dtype=precision, device=k.device)
    bags = zip(split(q, q_lengths), split(k, kv_lengths), split(lse.T, q_lengths), strict=True)
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores, and sums would not add up
        for into, (queries, keys, norms) in zip(split(sums.T, kv_lengths), bags, strict=True):
            for head in range(k.shape[1]):
                _add(into[:, head], queries[:, head], keys[:, head], norms[:, head])
    return sums


def _add(sums: Tensor, q: Tensor, k: Tensor, lse: Tensor) -> None:
    for key in range(0, len(k), _KEYS):
        keys = k[key : key + _KEYS]
        for row in range(0, len(q), _ROWS):
            scores = torch.addmm(lse[None, row : row + _ROWS], keys, q[row : row + _ROWS].T, beta=-1)
            sums[key : key + _KEYS] += scores.exp_().sum(1)
