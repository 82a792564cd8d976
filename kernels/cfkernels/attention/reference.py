"""Ragged attention in plain PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cfkernels.packing import join, split


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    dropout_p: float,
) -> Tensor:
    """One scaled dot-product attention per bag; arguments as `cfkernels.attention`."""
    bags = zip(split(q, q_lengths), split(k, kv_lengths), split(v, kv_lengths), strict=True)
    return join([_attend(*bag, dropout_p) for bag in bags])


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    output = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return output.squeeze(0).transpose(0, 1)
