"""Patches to pixels: one cell for each patch, or squares painted on an image. Where patches overlap, their mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cftrain.heatmap.colours import Codes, codes
from cftrain.heatmap.layers import FILE_ORDER, Floats, Grid, Ints

_STEPS = 65_535
_AT_ONCE = 1 << 22  # places painted at a time: their sums, counts and means take 32 bytes each
_ROUNDED = 1.0  # pixels by which tools that round their grid are off it


@dataclass(frozen=True, eq=False)
class Cells:
    """A grid with at most one patch in most of its cells.

    Parameters
    ----------
    column, row : [N]
        The cell of every patch.
    shape
        Rows, columns.
    origin
        x, y of the first cell's top-left corner, in the grid's units.
    pitch
        Length of a cell's side, in the same units.
    moved
        How far the patch that fits its cell worst lies from it, in the same units.
    """

    column: Ints
    row: Ints
    shape: tuple[int, int]
    origin: tuple[float, float]
    pitch: float
    moved: float

    def mean(self, scores: Floats) -> Floats:
        """The mean score of the patches of every cell: [rows, columns], NaN where there is none."""
        places = np.ravel_multi_index((self.row, self.column), self.shape)
        size = math.prod(self.shape)
        counts = np.bincount(places, minlength=size)
        sums = np.bincount(places, weights=scores, minlength=size)
        return np.where(counts, sums / np.maximum(counts, 1), np.nan).reshape(self.shape)

    @property
    def shared(self) -> int:
        """How many patches share their cell with another."""
        counts = np.bincount(np.ravel_multi_index((self.row, self.column), self.shape))
        return int(counts[counts > 1].sum())


def cells(grid: Grid, size: tuple[int, int]) -> Cells:
    """The nearest cell of every patch, on a grid that reaches over all of `size` (width, height of level 0).

    Cells are as far apart as neighbouring patches: by a patch's side, or less where patches overlap. They are laid
    exactly under the patches where one grid holds all, and from 0, 0 where none does (CLAM begins one for each piece
    of tissue).
    """
    pitch = _pitch(grid)
    first = grid.corners.min(axis=0)
    origin = np.where(first % pitch > pitch - _ROUNDED, 0, first % pitch) if grid.unit != FILE_ORDER else np.zeros(2)
    if np.abs(_off(grid.corners - origin, pitch)).max() > _ROUNDED:
        origin = np.zeros(2)
    places = np.rint((grid.corners - origin) / pitch).astype(np.int64)
    before = np.minimum(places.min(axis=0), 0)  # patches that stick out over the left or upper border
    places -= before
    origin = origin + before * pitch
    reach = np.ceil((np.asarray(size) - origin) / pitch - 1e-9).astype(np.int64)
    columns, rows = np.maximum(reach, places.max(axis=0) + 1).tolist()
    moved = float(np.abs(grid.corners - origin - places * pitch).max())
    return Cells(places[:, 0], places[:, 1], (rows, columns), (float(origin[0]), float(origin[1])), pitch, moved)


def paint(grid: Grid, shares: Floats, origin: tuple[float, float], zoom: float, shape: tuple[int, int]) -> Codes:
    """Patches as squares on an image: the shade of the mean share of those over every pixel, NONE where there is none.

    Parameters
    ----------
    shares : [N]
        0 to 1, as in `colours.shares`; kept to 1/65535. Patches with NaN are left out.
    origin
        x, y of the image's top-left corner, in the grid's units.
    zoom
        Pixels per unit of the grid. A patch covers at least one pixel.
    shape
        Height, width of the image.
    """
    known = np.isfinite(shares)
    first = np.rint((grid.corners[known] - origin) * zoom).astype(np.int64)
    last = np.maximum(np.rint((grid.corners[known] + grid.edge - origin) * zoom).astype(np.int64), first + 1)
    limits = shape[1], shape[0]
    first, last = np.clip(first, 0, limits), np.clip(last, 0, limits)
    # between neighbouring borders of patches all pixels are alike: one is computed and then repeated
    xs, ys = (np.unique(np.concatenate([[0, limits[axis]], first[:, axis], last[:, axis]])) for axis in (0, 1))
    steps = np.rint(shares[known] * _STEPS).astype(np.int64)
    columns = np.searchsorted(xs, first[:, 0]), np.searchsorted(xs, last[:, 0])
    rows = np.searchsorted(ys, first[:, 1]), np.searchsorted(ys, last[:, 1])
    at_once = max(_AT_ONCE // len(xs), 1)
    bands = [
        _band(columns, rows, steps, slice(top, min(top + at_once, len(ys) - 1)), len(xs) - 1)
        for top in range(0, len(ys) - 1, at_once)
    ]
    return np.concatenate(bands).repeat(np.diff(ys), axis=0).repeat(np.diff(xs), axis=1)


def _band(columns: tuple[Ints, Ints], rows: tuple[Ints, Ints], steps: Ints, band: slice, width: int) -> Codes:
    """The shades of some rows of the borders' lattice."""
    here = (rows[0] < band.stop) & (rows[1] > band.start)
    top, bottom = np.maximum(rows[0][here], band.start) - band.start, np.minimum(rows[1][here], band.stop) - band.start
    box = columns[0][here], columns[1][here], top, bottom
    shape = band.stop - band.start, width
    counts = _covering(box, np.ones(len(top), np.int64), shape)
    sums = _covering(box, steps[here], shape)
    return codes(np.where(counts > 0, sums / np.maximum(counts, 1) / _STEPS, np.nan))


def _covering(box: tuple[Ints, Ints, Ints, Ints], weights: Ints, shape: tuple[int, int]) -> Ints:
    """The sum of the weights of the boxes over every pixel, from their corners: exact, and no loop over boxes."""
    left, right, top, bottom = box
    height, width = shape
    corners = np.zeros((height + 1) * (width + 1), np.int64)
    for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(corners, y * (width + 1) + x, sign * weights)
    sums = corners.reshape(height + 1, width + 1)
    np.cumsum(sums, axis=0, out=sums)
    np.cumsum(sums, axis=1, out=sums)
    return sums[:height, :width]


def _pitch(grid: Grid) -> float:
    """How far apart neighbours of a row mostly are, where that is less than a patch's side; else the side."""
    x, y = grid.corners[np.lexsort((grid.corners[:, 0], grid.corners[:, 1]))].T
    steps = np.diff(x)[(np.diff(y) == 0) & (np.diff(x) > 0)]
    if steps.size:
        distances, counts = np.unique(steps, return_counts=True)
        usual = float(distances[counts.argmax()])
        if grid.edge / 4 <= usual < grid.edge - _ROUNDED:
            return usual
    return float(grid.edge)


def _off(places: Floats, pitch: float) -> Floats:
    """How far places lie from the nearest multiple of the pitch."""
    return places - pitch * np.rint(places / pitch)
