"""Ragged attention in plain PyTorch, with all scores of a bag: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cfkernels.dropout import keep_mask, rescale
from cfkernels.packing import join, split


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `cfkernels.attention_and_lse`, with the rate in 256ths."""
    outputs, norms = [], []
    for bag, (queries, keys, values) in enumerate(
        zip(split(q, q_lengths), split(k, kv_lengths), split(v, kv_lengths), strict=True)
    ):
        scores = torch.einsum("nhd,mhd->hnm", queries, keys) * q.shape[2] ** -0.5
        weights = scores.softmax(dim=2)
        if seed is not None and threshold:
            weights = torch.where(_mask(weights, seed, threshold, bag), weights * rescale(threshold), 0)
        outputs.append(torch.einsum("hnm,mhd->nhd", weights, values))
        norms.append(scores.detach().to(torch.promote_types(q.dtype, torch.float32)).logsumexp(dim=2).T)
    return join(outputs), join(norms).T


def _mask(weights: Tensor, seed: Tensor, threshold: int, bag: int) -> Tensor:
    n_heads, n, m = weights.shape
    rows = torch.arange(n, device=weights.device)
    return torch.stack([keep_mask(seed, rows, m, threshold, stream=bag * n_heads + head) for head in range(n_heads)])
