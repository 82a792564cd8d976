"""Ragged attention by PyTorch's scaled_dot_product_attention, one call for each bag."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from cfkernels.packing import join, split


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> Tensor:
    """As `cfkernels.attention` without dropout."""
    bags = zip(split(q, q_lengths), split(k, kv_lengths), split(v, kv_lengths), strict=True)
    return join([_attend(*bag) for bag in bags])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
