"""Attention maps: how much attention each patch receives, exactly, in memory for N + M numbers.

The released code builds heads x N x M tables, 38 GB for the largest slide in bfloat16; the mean over queries is
all that a map of the slide shows, and it comes from queries, keys and log-sum-exp alone
(`cfkernels.attention_column_sums`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from cftrain.models.layers import Attention, ClassTokenTransformer, Lengths

Maps = dict[str, tuple[Tensor, ...]]


@contextmanager
def attention_maps(
    model: nn.Module, *, places: Collection[str] | None = None, every_row: bool = False
) -> Iterator[Maps]:
    """Collect the attention of the forward passes made in the block, in evaluation mode.

    Example: `with attention_maps(model.eval()) as maps: model(batch)`.

    The result maps each attention's place in the model ("fine_cross_attention", "source_transformer.pre.0", ...) to
    one [H, M] tensor per slide of the batch: the mean over its N queries of softmax(q kᵀ / sqrt(dh)), each row adding
    up to 1. M counts patches in their stored order, padding after them; in the final transformer the class token first.

    Parameters
    ----------
    places
        The attentions to collect, each a second look at its queries and keys; None: all.
    every_row
        The last block of the final transformer computes the class token's row only, and its map is that row: what the
        prediction looked at. True: all rows, and their mean.
    """
    maps: Maps = {}
    changed: list[ClassTokenTransformer] = []
    for name, module in model.named_modules():
        place = name.removesuffix(".attention")
        if isinstance(module, Attention) and (places is None or place in places):
            module.recorder = partial(_record, maps, place)
        if isinstance(module, ClassTokenTransformer) and every_row:
            module.every_row = True
            changed.append(module)
    try:
        yield maps
    finally:
        for module in model.modules():
            if isinstance(module, Attention):
                module.recorder = None
        for transformer in changed:
            transformer.every_row = False


def _record(maps: Maps, name: str, sums: Tensor, q_lengths: Lengths, kv_lengths: Lengths) -> None:
    bags = torch.split(sums, list(kv_lengths), dim=1)
    maps[name] = tuple(of_bag / n for of_bag, n in zip(bags, q_lengths, strict=True))
