"""What a heatmap shows: where the patches of a slide lie, and a score for each. Loads no torch."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = Literal["attention", "attribution"]

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://pypi.org/project/crossfusion-store/heatmap")
"""Of the ids in files: the same slide, scale and patch have the same id each time."""

LEVEL0 = "level-0 pixels"
FILE_ORDER = "file order"


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the patches of one scale lie.

    Parameters
    ----------
    scale
        Nominal magnification.
    corners : [N, 2]
        Top-left x, y of every patch, in the order of the bag.
    edge
        Length of a patch's side, in the same units.
    unit
        LEVEL0, or FILE_ORDER: no coordinates, corners are places in a square filled row by row in the order of the
        source file, which says nothing of where on the slide they are.
    note
        Where `edge` and the corners come from, one sentence.
    parents : [N] or None
        Row of the patch of the next coarser scale that holds this one, -1 where none does; None where unknown.
    parents_note
        How they were found, one sentence; empty without parents.
    """

    scale: int
    corners: Ints
    edge: float
    unit: str
    note: str
    parents: Ints | None = None
    parents_note: str = ""

    def __len__(self) -> int:
        """The number of patches, N."""
        return len(self.corners)


@dataclass(frozen=True, eq=False)
class Layer:
    """One score for every patch of one scale.

    Parameters
    ----------
    name
        What `--map` calls it, e.g. "fine-cross".
    scale
        Whose patches.
    scores : [N]
        As computed. Attention: the share of the attention that the patch receives, all add up to at most 1.
        Attribution: how much it raises (above 0) or lowers the risk.
    kind
        "attention" is not negative, or hardly so where the model approximates it; "attribution" is signed.
    meaning
        What the score is, one sentence.
    """

    name: str
    scale: int
    scores: Floats
    kind: Kind
    meaning: str

    @cached_property
    def percentile(self) -> Floats:
        """Share of the layer's patches with a lower score, ties counted half: [N], above 0 and below 100."""
        values, place, counts = np.unique(self.scores, return_inverse=True, return_counts=True)
        below = np.cumsum(counts) - counts
        assert len(values)  # noqa: S101 - bags are never empty
        found: Floats = (100 * (below + counts / 2) / len(self.scores))[place]
        return found

    @property
    def signed(self) -> bool:
        """Whether the sign of a score means something."""
        return self.kind == "attribution"

    def top(self, n: int) -> Ints:
        """Rows of the n highest scores (of attribution: those that raise the risk most), highest first."""
        return np.argsort(-self.scores, kind="stable")[:n]


@dataclass(frozen=True, eq=False)
class Heatmap:
    """All maps of one slide.

    Parameters
    ----------
    slide_id
        The slide.
    grids
        By scale, coarse to fine.
    layers
        In the order in which they are shown; names are unique.
    size
        Width, height of level 0 in pixels (of the square in patches where the unit is FILE_ORDER): the slide image's
        where it is known, else as far as the patches reach.
    mpp
        Microns per level-0 pixel, or None.
    about
        What heatmap.json says besides: run, model, folds, risk, notes, ... plain values.
    """

    slide_id: str
    grids: Mapping[int, Grid]
    layers: tuple[Layer, ...]
    size: tuple[int, int]
    mpp: float | None
    about: Mapping[str, Any]

    def layers_of(self, scale: int) -> tuple[Layer, ...]:
        """The maps on the patches of one scale."""
        return tuple(layer for layer in self.layers if layer.scale == scale)
