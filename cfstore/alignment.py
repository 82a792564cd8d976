"""Which patch of a coarser scale lies over a patch of a finer one, by coordinates.

TRIDENT lays one grid per slide, so that four 20x patches make exactly one 10x patch: the grids nest. CLAM lays a
grid per tissue contour and scale, each with its own origin; its patches stick out of the coarser ones, overlap those
of other contours and come twice. There a patch goes with the one that it overlaps most, and `Alignment` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cfstore.errors import ShapeError

Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]

PAIRS: Final = 2**17  # of a fine and a coarse patch looked at together: about 20 MB
DIGITS: Final = 12  # shares that differ less are equal: rounding of fractional edges; a whole pixel's share is far more


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """For every patch of a finer scale the patch of a coarser one that it belongs to.

    Parameters
    ----------
    parent : [N] int64
        Row of the coarser patch, -1 where none touches it.
    overlap : [N] float64
        Share of the finer patch's area that lies within its parent, in (0, 1]; 0 where it has none.
    nests
        There are parents, every finer patch that has one lies wholly inside it, and touches no other.
    note
        One sentence for reports: how good the alignment is, and how many patches have no parent.
    """

    parent: Ints
    overlap: Doubles
    nests: bool
    note: str


@dataclass(frozen=True, slots=True, eq=False)
class _Bands:
    """Coarse patches in horizontal bands as high as a patch, by x within a band.

    `key` is ascending: band times the number of different x's, plus the place of x among these.
    """

    height: int
    xs: Ints
    key: Ints
    order: Ints


def patch_edge(coords: NDArray[Any]) -> int | None:
    """Edge of a slide's patches, from their coordinates: for sources that do not say it.

    It is the step from a patch to the next one in its row or column, because patches are laid edge to edge. Where
    they were cut with overlap the step is smaller than the edge, and nothing in the coordinates shows that.

    Of all steps that occur it is the smallest, if that divides all others and is about as frequent as any: one grid,
    maybe with many gaps. Else it is the commonest (of several the smallest): where patches of two CLAM contours share
    a row, their distance means nothing. Among few patches none may have a neighbour, or contours that share rows may
    look like one grid; then the result is a multiple of the edge, or too small.

    Parameters
    ----------
    coords : [N, 2] whole numbers
        Top-left x, y in level-0 pixels, in any order.

    Returns
    -------
    int or None
        Level-0 pixels; None where no two patches share a row or a column.

    Raises
    ------
    ShapeError
        Not [N, 2], or not whole numbers within int32.
    """
    found = _checked("coords", coords)
    steps, times = np.unique(np.concatenate([_steps(found, 0), _steps(found, 1)]), return_counts=True)
    if not len(steps):
        return None
    most = times.max()
    # in a grid with random gaps no step is commoner than the smallest, but for chance: about the root of a count
    one_grid = not (steps % steps[0]).any() and times[0] + 2 * math.sqrt(most) >= most
    return int(steps[0] if one_grid else steps[times.argmax()])


def align(
    fine: NDArray[Any],
    fine_edge: float,
    coarse: NDArray[Any],
    coarse_edge: float,
    *,
    scales: tuple[int, int] | None = None,
) -> Alignment:
    """For every fine patch the coarse patch that covers most of its area.

    Of several that cover as much, the one whose centre is nearest; then that of the lowest row. Patches that only
    share a border do not touch. Time grows with N log M and the pairs of patches that are near each other, memory
    with N + M.

    Parameters
    ----------
    fine : [N, 2] whole numbers
        Top-left x, y of the finer scale's patches, in level-0 pixels.
    fine_edge
        Edge of these patches in level-0 pixels (`patch_size_level0`, else `patch_edge`); may be fractional.
    coarse : [M, 2] whole numbers
        The same of the coarser scale.
    coarse_edge
        Edge of its patches, at least `fine_edge`.
    scales
        Magnifications of both, as (20, 10), for the words of `note`.

    Raises
    ------
    ShapeError
        Coordinates are not [N, 2], or not whole numbers within int32.
    ValueError
        An edge is not a positive number, or the fine one is larger than the coarse one.
    """
    fine, coarse = _checked("fine", fine), _checked("coarse", coarse)
    _check_edges(fine_edge, coarse_edge)
    bands = _in_bands(coarse, coarse_edge)
    start, count = _candidates(fine, fine_edge, bands, coarse_edge)

    parent, overlap = np.full(len(fine), -1, np.int64), np.zeros(len(fine))
    n_several = 0
    for chunk in _chunks(count.sum(axis=1)):
        owner, place = _expanded(start[chunk], count[chunk])
        row = bands.order[place]
        offset = (coarse[row] - fine[chunk][owner]).astype(np.float64)
        share = _share(offset, fine_edge, coarse_edge)
        n_several += int((np.bincount(owner[share > 0]) > 1).sum())
        best = np.flatnonzero(share > 0)
        for badness in (-share, _distance(offset, fine_edge, coarse_edge), row):
            best = best[_least(owner[best], badness[best])]
        parent[chunk][owner[best]] = row[best]
        overlap[chunk][owner[best]] = share[best]
    has_parent = parent >= 0
    nests = bool(has_parent.any() and (overlap[has_parent] == 1).all() and not n_several)
    return Alignment(parent, overlap, nests, _note(overlap, nests, n_several, scales))


def children_of(alignment: Alignment, n_coarse: int) -> tuple[Ints, Ints]:
    """The fine patches of every coarse one: those of row m are `order[start[m] : start[m + 1]]`, ascending.

    Parameters
    ----------
    alignment
        From `align`.
    n_coarse
        Number of coarse patches, M.

    Returns
    -------
    order : [K] int64
        Rows of the K fine patches that have a parent.
    start : [M + 1] int64
        Where the children of each coarse patch begin.

    Raises
    ------
    ValueError
        A parent's row is not below `n_coarse`.
    """
    parent = alignment.parent
    if len(parent) and parent.max() >= n_coarse:
        raise ValueError(f"the alignment names coarse row {parent.max()}, but n_coarse is {n_coarse}; give its bag's M")
    order = np.argsort(parent, kind="stable")
    order = order[np.count_nonzero(parent < 0) :]
    return order, np.searchsorted(parent[order], np.arange(n_coarse + 1)).astype(np.int64)


def _checked(name: str, coords: NDArray[Any]) -> Ints:
    coords = np.asarray(coords)
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ShapeError(f"{name} has shape {coords.shape}; expected [N, 2], top-left x, y in level-0 pixels")
    if coords.dtype.kind not in "iu":
        raise ShapeError(f"{name} holds {coords.dtype.name}; expected whole level-0 pixels, as integers")
    limits = np.iinfo(np.int32)
    if len(coords) and (coords.min() < limits.min or coords.max() > limits.max):
        raise ShapeError(f"{name} reaches from {coords.min()} to {coords.max()}, beyond any slide's pixels")
    return coords.astype(np.int64)


def _check_edges(fine_edge: float, coarse_edge: float) -> None:
    for name, edge in (("fine_edge", fine_edge), ("coarse_edge", coarse_edge)):
        if not (math.isfinite(edge) and edge > 0):
            raise ValueError(f"{name} must be a positive number of level-0 pixels, got {edge}")
    if fine_edge > coarse_edge:
        message = (
            f"fine_edge {fine_edge:g} is larger than coarse_edge {coarse_edge:g}; give the finer scale first, "
            "or say the edges where they were inferred from few patches"
        )
        raise ValueError(message)


def _steps(coords: Ints, along: int) -> Ints:
    """Distances along one axis between patches that follow each other on one line of it, without 0."""
    line, place = coords[:, 1 - along], coords[:, along]
    order = np.lexsort((place, line))
    same_line = np.diff(line[order]) == 0
    steps: Ints = np.diff(place[order])[same_line]
    return steps[steps > 0]


def _in_bands(coarse: Ints, edge: float) -> _Bands:
    height = math.ceil(edge)  # whole, so that bands are exact
    xs, place = np.unique(coarse[:, 0], return_inverse=True)
    key = coarse[:, 1] // height * len(xs) + place
    order = np.argsort(key, kind="stable")
    return _Bands(height, xs, key[order], order)


def _candidates(fine: Ints, fine_edge: float, bands: _Bands, coarse_edge: float) -> tuple[Ints, Ints]:
    """Where in `bands.order` each fine patch's neighbours begin, and how many they are: both [N, 3], one per band.

    A coarse patch can only overlap one at y if it begins in the band of y, the one above or the one below: it is at
    most a band high, and the fine patch no higher. Along x the neighbours begin in the open interval x - coarse_edge
    to x + fine_edge.
    """
    first = np.searchsorted(bands.xs, fine[:, 0] - coarse_edge, side="right")
    last = np.searchsorted(bands.xs, fine[:, 0] + fine_edge, side="left")
    band = (fine[:, 1] // bands.height)[:, None] + np.array([-1, 0, 1])
    start = np.searchsorted(bands.key, band * len(bands.xs) + first[:, None])
    stop = np.searchsorted(bands.key, band * len(bands.xs) + last[:, None])
    return start, stop - start


def _chunks(n_pairs: Ints) -> Iterator[slice]:
    """Consecutive fine patches that have about PAIRS pairs together; a patch's own pairs are never parted."""
    block = (np.cumsum(n_pairs) - n_pairs) // PAIRS
    cuts = np.flatnonzero(np.diff(block, prepend=-1)).tolist()
    return (slice(begin, end) for begin, end in pairwise([*cuts, len(n_pairs)]))


def _expanded(start: Ints, count: Ints) -> tuple[Ints, Ints]:
    """Ranges [K, 3] one by one: which of the K rows each place belongs to, ascending, and the place."""
    starts, counts = start.ravel(), count.ravel()
    owner = np.repeat(np.arange(len(counts)) // count.shape[1], counts)
    skipped = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - np.repeat(skipped - starts, counts)


def _share(offset: Doubles, fine_edge: float, coarse_edge: float) -> Doubles:
    """Share [P] of the fine patches' area in coarse ones that begin `offset` [P, 2] from them."""
    sides = np.minimum(fine_edge, offset + coarse_edge) - np.maximum(offset, 0)
    sides = np.maximum(sides, 0) / fine_edge
    share: Doubles = np.round(sides[:, 0] * sides[:, 1], DIGITS)
    return share


def _distance(offset: Doubles, fine_edge: float, coarse_edge: float) -> Doubles:
    """Squared distance [P] between the centres, in fine edges."""
    between = (offset + (coarse_edge - fine_edge) / 2) / fine_edge
    squared: Doubles = np.round(between[:, 0] ** 2 + between[:, 1] ** 2, DIGITS)
    return squared


def _least(owner: Ints, badness: NDArray[Any]) -> NDArray[np.bool_]:
    """Which entries are the smallest of their owner's; owners ascend."""
    heads = np.flatnonzero(np.diff(owner, prepend=-1))
    least = np.minimum.reduceat(badness, heads) if len(heads) else badness
    kept: NDArray[np.bool_] = badness == np.repeat(least, np.diff(heads, append=len(owner)))
    return kept


def _note(overlap: Doubles, nests: bool, n_several: int, scales: tuple[int, int] | None) -> str:
    fine, coarse = ("fine", "coarse") if scales is None else (f"{scale}x" for scale in scales)
    shares = overlap[overlap > 0]
    n_patches, n_alone = len(overlap), len(overlap) - len(shares)
    if not len(shares):
        return f"no {fine} patch touches a {coarse} patch"
    alone = f"{n_alone:,} of {n_patches:,} {fine} patches touch none"
    if nests and n_alone:
        return f"the grids nest: every {fine} patch that touches a {coarse} patch lies in that one; {alone}"
    if nests:
        return f"the grids nest: every {fine} patch lies in one {coarse} patch"
    several = f"; {n_several:,} touch more than one" if n_several else ""
    text = (
        f"the grids do not nest: each {fine} patch goes with the {coarse} patch that it overlaps most "
        f"({shares.mean():.2f} of its area on average{several})"
    )
    return f"{text}; {alone}" if n_alone else text
