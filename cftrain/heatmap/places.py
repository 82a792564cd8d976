"""Where the patches of a slide lie, at all its scales: from coordinates, or without any from the order of the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from cfstore import Bag, align, patch_edge
from cftrain.heatmap.layers import FILE_ORDER, LEVEL0, Grid, Ints

IN_SOURCE: Final = "corners and patch size from the source files"
_SPACING: Final = (
    "corners from the source files; they do not give the patch size: it is taken from the patches' spacing"
)
_OTHER: Final = (
    "corners from the source files; patch size from the spacing at {}x: too few patches lie side by side here"
)
_GUESS: Final = "corners from the source files; patch size unknown, drawn as 256 pixels at this scale of a 20x slide"
_NONE: Final = "no coordinates: patches in the order of the file on a square, which says nothing of where they are"
_PARTLY: Final = "no coordinates at {}, so that those of the other scales are not used: " + _NONE.partition(": ")[2]
_APART: Final = "its patches are larger than those of the coarser scale, so that no patch of it has a parent"
_GUESSED_EDGE: Final = 256
_FEW: Final = 8  # with fewer patches than these a hole passes for the spacing


class _Edge(NamedTuple):
    """A patch's side in level-0 pixels, and how it is known."""

    pixels: float
    note: str


def grids_of(bags: Mapping[int, Bag], rows: Sequence[Mapping[str, Any]]) -> dict[int, Grid]:
    """Place the patches of one slide.

    Parameters
    ----------
    bags
        By scale.
    rows
        What the catalog says of them: rows of the SQL table `bags` with `scale` and `patch_size_level0`.

    Returns
    -------
    dict
        By scale, coarse to fine, each with its parents in the next coarser one. Where one scale has no coordinates
        none are used: a square of cells in file order per scale, all of about one size.
    """
    scales = sorted(bags)
    lacking = [scale for scale in scales if bags[scale].coords is None]
    if lacking:
        note = _NONE if len(lacking) == len(scales) else _PARTLY.format(", ".join(f"{scale}x" for scale in lacking))
        return {scale: _square(scale, bags[scale].n_patches, scales[-1] // scale, note) for scale in scales}
    known = {row["scale"]: row["patch_size_level0"] for row in rows}
    corners = {scale: np.asarray(bags[scale].coords, dtype=np.int64) for scale in scales}
    edges = _edges(corners, known)
    placed: dict[int, Grid] = {}
    above: Grid | None = None
    for scale in scales:
        placed[scale] = above = _placed(scale, corners[scale], edges[scale], above)
    return placed


def _placed(scale: int, corners: Ints, edge: _Edge, above: Grid | None) -> Grid:
    """The grid of one scale, with its parents where there is a coarser one."""
    if above is None:
        return Grid(scale, corners, edge.pixels, LEVEL0, edge.note)
    if edge.pixels > above.edge:
        return Grid(scale, corners, edge.pixels, LEVEL0, edge.note, None, _APART)
    found = align(corners, edge.pixels, above.corners, above.edge, scales=(scale, above.scale))
    return Grid(scale, corners, edge.pixels, LEVEL0, edge.note, found.parent, found.note)


def _square(scale: int, n_patches: int, edge: int, note: str) -> Grid:
    side = math.isqrt(n_patches - 1) + 1
    row = np.arange(n_patches)
    return Grid(scale, np.stack([row % side, row // side], axis=1) * edge, edge, FILE_ORDER, note)


def _edges(corners: Mapping[int, Ints], known: Mapping[int, int | None]) -> dict[int, _Edge]:
    """The patch size of every scale: as the source says, else from the spacing, here or at the finest scale."""
    spaced = {scale: patch_edge(own) for scale, own in corners.items() if known.get(scale) is None}
    finest = max((scale for scale, edge in spaced.items() if edge is not None), default=None)
    found = {}
    for scale in corners:
        own, told = spaced.get(scale), known.get(scale)
        if told is not None:
            found[scale] = _Edge(told, IN_SOURCE)
        elif finest is None:
            found[scale] = _Edge(_GUESSED_EDGE * 20 / scale, _GUESS)
        else:
            ratio = (spaced[finest] or 0) * finest / scale
            trusted = own is not None and len(corners[scale]) >= _FEW
            found[scale] = _Edge(own, _SPACING) if trusted and own else _Edge(ratio, _OTHER.format(finest))
    return found


def reach(grids: Mapping[int, Grid]) -> tuple[int, int]:
    """Width and height that hold all patches, from 0: level-0 pixels, or cells."""
    far = np.max([(grid.corners + math.ceil(grid.edge)).max(axis=0) for grid in grids.values()], axis=0)
    return int(far[0]), int(far[1])
