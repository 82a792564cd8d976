"""From a patch to those that hold it, scale by scale."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from cftrain.heatmap.layers import FILE_ORDER, Grid


def chain(grids: Mapping[int, Grid], scale: int, row: int) -> list[int]:
    """The patch's row, then the row of the patch that holds it on each coarser scale, -1 where none does.

    By `Grid.parents` where they are known, else the patch that the middle of the finer one lies in. Without
    coordinates no patch is known to hold another.

    Returns
    -------
    list of int
        One for every scale from `scale` to the coarsest.
    """
    scales = sorted((each for each in grids if each <= scale), reverse=True)
    start = grids[scale]
    middle = start.corners[row] + start.edge / 2
    rows = [row]
    for finer, coarser in itertools.pairwise(scales):
        rows.append(_parent(grids[finer], grids[coarser], rows[-1], middle))
    return rows


def _parent(finer: Grid, coarser: Grid, row: int, middle: np.typing.NDArray[np.float64]) -> int:
    if FILE_ORDER in (finer.unit, coarser.unit):
        return -1
    if row >= 0 and finer.parents is not None:
        return int(finer.parents[row])
    return holding(coarser, middle)


def holding(grid: Grid, point: np.typing.NDArray[np.float64]) -> int:
    """Row of the patch that a point [2] lies in, of several the one whose middle is nearest; -1 where none does."""
    inside = np.flatnonzero(((grid.corners <= point) & (point < grid.corners + grid.edge)).all(axis=1))
    if not len(inside):
        return -1
    away = np.abs(grid.corners[inside] + grid.edge / 2 - point).max(axis=1)
    return int(inside[np.argmin(away)])
