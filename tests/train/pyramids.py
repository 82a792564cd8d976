"""Slides of a pyramid in which patches share parents, lack them, or have no children."""

from __future__ import annotations

import torch

from cftrain.models import BagBatch
from cftrain.zoo.extras import parents

FIRST, SECOND, THIRD = (3, 7, 19), (1, 1, 1), (2, 4, 30)
"""Patches at 5x, 10x, 20x."""


def pyramid(sizes, dim, *, seed=5, scales=(5, 10, 20), missing=0.2, dtype=torch.float64):
    """Features and parents of one slide; the last coarse patch has no child where there are others."""
    draw = torch.Generator().manual_seed(seed)
    bags = {
        scale: torch.randn(n, dim, generator=draw, dtype=torch.float64).to(dtype)
        for scale, n in zip(scales, sizes, strict=True)
    }
    *coarser, finest = scales
    extras = {}
    for coarse in coarser:
        of = torch.randint(max(1, len(bags[coarse]) - 1), (len(bags[finest]),), generator=draw)
        lacks = torch.rand(len(of), generator=draw) < missing
        extras[parents(finest, coarse)] = torch.where(lacks, -1, of)
    return bags, extras


def packed(*slides):
    """A batch of what `pyramid` gave."""
    return BagBatch.pack([f"slide-{i}" for i in range(len(slides))], *map(list, zip(*slides, strict=True)))


def far_from_zero(model, seed=13):
    """In float64 and evaluation mode, every parameter moved so that none can hide."""
    torch.manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
