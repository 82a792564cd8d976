"""A slide that nobody scanned: for counting what a model costs, and for timing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cftrain.errors import MissingScaleError
from cftrain.models.bags import BagBatch
from cftrain.zoo import Extra


def made_up_slide(
    patches: Mapping[int, int],
    feature_dim: int,
    extras: Sequence[Extra] = (),
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BagBatch:
    """One slide of so many patches, features normally distributed, on a square grid of each scale.

    Parameters
    ----------
    patches
        Scale to N.
    extras
        What else to make up: coordinates of the grid, neighbours that lie next in the list, parents in equal shares.

    Raises
    ------
    MissingScaleError
        A scale has no patch.
    """
    for scale, n in patches.items():
        if n < 1:
            raise MissingScaleError(f"{scale}x has {n} patches; a slide has at least 1")
    bags = {scale: torch.randn(n, feature_dim, device=device, dtype=dtype) for scale, n in patches.items()}
    made = {extra: _made_up(extra, patches, device) for extra in extras}
    return BagBatch.pack(["a slide drawn at random"], [bags], [made])


def _made_up(extra: Extra, patches: Mapping[int, int], device: torch.device | str) -> Tensor:
    n = patches[extra.scale]
    rows = torch.arange(n, device=device)
    if extra.kind == "coords":
        edge = 256 * 20 // extra.scale
        width = max(1, round(n**0.5))
        return torch.stack([rows % width * edge, rows // width * edge], dim=1).int()
    if extra.kind == "parents":
        return rows * patches[extra.coarse] // n
    step = torch.arange(1, extra.k + 1, device=device)
    found = (rows[:, None] + step) % n
    return torch.where(step < n, found, torch.full_like(found, -1))
