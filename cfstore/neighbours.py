"""The nearest other patches of every patch, by place or by features, exactly.

Both list the others by (distance, row): on a grid nearly every k-th place is tied, and then the row decides.
Candidates come from something fast with a bound on its error; exact distances put them in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from cfstore.errors import ShapeError
from cfstore.halves import widened
from cfstore.types import Bag

Indices = NDArray[np.int32]
Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BLOCK_BYTES: Final = 64 << 20
"""Of distances that are held at once."""
_SPARE: Final = 8  # candidates beyond k that are asked for at first
_ROUNDING: Final = 2.0**-24  # of one float32 operation
_GROUP: Final = 64  # columns of which only the smallest distance is looked at first
_PAIRS: Final = 2**21  # candidates that are put in order at once
_TINY: Final = 1e-36  # more than is lost below the smallest normal number
_SPAN: Final = 2**31 - 1  # whose squares still add up within int64


def nearest_patches(coords: NDArray[Any], k: int) -> Indices:
    """The `k` other patches nearest to each, by Euclidean distance between top-left corners.

    Distances are compared as whole numbers, so the order is exact: by distance, then by row. Patches at the
    same place are at distance 0 of each other.

    Parameters
    ----------
    coords : [N, 2] whole numbers
        Top-left x, y in level-0 pixels.
    k
        How many.

    Returns
    -------
    [N, k] int32
        Rows; -1 at the end where there are fewer than `k` others.

    Raises
    ------
    ShapeError
        Coordinates are not [N, 2], or farther apart than 2^31 - 1 pixels.
    """
    coords = np.asarray(coords)
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ShapeError(f"coords has shape {coords.shape}; expected [N, 2], top-left x, y in level-0 pixels")
    places = coords.astype(np.int64)
    if len(places) and int(np.ptp(places, axis=0).max()) > _SPAN:
        raise ShapeError("coords: patches are farther apart than 2^31 - 1 pixels; no slide is as large")
    found = np.full((len(places), k), -1, np.int32)
    from scipy.spatial import cKDTree  # 26 MB and a third of a second that ingest and SQL do not need

    group, rank = _equal_rows(places)
    todo = _fill_equals(found, group)
    columns = np.flatnonzero(rank <= k)  # of many patches at one place only the first can be anybody's neighbours
    tree = cKDTree(places[columns].astype(np.float64))
    asked = k + 1 + _SPARE
    while len(todo):
        asked = min(asked, len(columns))
        left = [_nearest_of(found, places, columns, tree, todo[part], asked) for part in _slices(len(todo), 64 * asked)]
        todo, asked = np.concatenate(left), 2 * asked
    return found


def _nearest_of(found: Indices, places: Ints, columns: Ints, tree: Any, rows: Ints, asked: int) -> Ints:
    """Fill `found` for `rows` from `asked` candidates each; returns the rows for which more have to be looked at."""
    far, near = tree.query(places[rows].astype(np.float64), k=np.arange(1, asked + 1))
    near = columns[near]
    squares = ((places[near] - places[rows][:, None]) ** 2).sum(axis=2)
    squares[near == rows[:, None]] = np.iinfo(np.int64).max  # itself comes last
    order = np.lexsort((near, squares), axis=1)[:, : found.shape[1]]
    near, squares = np.take_along_axis(near, order, axis=1), np.take_along_axis(squares, order, axis=1)
    done = np.full(len(rows), True)
    if asked < len(columns):  # what was not returned is at least as far as the last that was
        done = squares[:, -1] < far[:, -1] ** 2 * (1 - 1e-14)
    found[rows[done], : order.shape[1]] = np.where(near == rows[:, None], -1, near)[done]
    left: Ints = rows[~done]
    return left


def similar_patches(bag: Bag, k: int) -> Indices:
    """The `k` other patches whose features are nearest, by Euclidean distance between the stored values.

    Exact. Candidates come from a float32 matrix product over centred features. How far its distances may be off
    is bounded, whatever the order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
    §3.1): every patch that may be among the k nearest within that bound is a candidate. Candidates are put in
    order by distances in float64, then by row. So none is missed; only where distances differ by less than the
    rounding of float64 sums, two may change places.

    Time grows with N^2 D, and with the pairs of patches that float32 cannot tell apart: 20,000 nearly blank ones
    cost as much again. Memory beyond the bag: its features as float32, and about 0.4 GB.

    Parameters
    ----------
    bag
        As stored: float16, float32, or uint8 with `affine`.
    k
        How many.

    Returns
    -------
    [N, k] int32
        Rows; -1 at the end where there are fewer than `k` others.
    """
    found = np.full((bag.n_patches, k), -1, np.int32)
    group, rank = _equal_rows(bag.features)
    rows = _fill_equals(found, group)
    columns = np.flatnonzero(rank <= k)  # of equal patches only the first can be anybody's neighbours
    if len(columns) < 2 or not len(rows):
        return found
    features = _centred(bag, columns)
    slices = list(_slices(len(columns), 8 * bag.dim))
    squares = np.concatenate(
        [np.einsum("nd,nd->n", features[part], features[part], dtype=np.float64) for part in slices]
    )
    search = _Search(features, columns, squares, _error_share(bag.dim))
    step = max(1, BLOCK_BYTES // (4 * len(columns)))
    for at in range(0, len(rows), step):
        block = rows[at : at + step]
        for owner, near in search.candidates(block, k):
            _put_in_order(found, bag, block[owner], columns[near])
    return found


def _values(bag: Bag, rows: Ints | slice) -> NDArray[Any]:
    """Features of some rows, as numbers."""
    return widened(Bag(bag.features[rows], None, bag.affine).dequantised().features)


def _centred(bag: Bag, columns: Ints) -> Floats:
    """The features of `columns` less their mean, scaled by a power of two to at most 1: [M, D] float32."""
    features = np.empty((len(columns), bag.dim), np.float32)
    total = np.zeros(bag.dim)
    slices = list(_slices(len(columns), 8 * bag.dim))
    for part in slices:
        features[part] = _values(bag, columns[part])
        total += features[part].sum(axis=0, dtype=np.float64)
    features -= (total / len(columns)).astype(np.float32)
    most = max(float(features.max()), -float(features.min()))
    if most > 0:
        np.ldexp(features, -math.frexp(most)[1], out=features)
    return features


def _error_share(dim: int) -> float:
    """How far |y|^2 - 2 x y may be off in float32, as a share of |x|^2 + |y|^2.

    The product is off by at most γ |x| |y| with γ = D u / (1 - D u) and u = 2^-24, so twice that by γ (|x|^2 + |y|^2);
    centring rounds each value once, which moves the squared distance by at most 4 u (|x|^2 + |y|^2); squares and two
    sums are rounded once each: 9 u more.
    """
    return dim * _ROUNDING / (1 - dim * _ROUNDING) + 16 * _ROUNDING


@dataclass(frozen=True, eq=False)
class _Search:
    """Centred features [M, D] of the patches that may be found, their rows in the bag, |y|^2, and the error's share."""

    features: Floats
    columns: Ints
    squares: Doubles
    share: float

    def candidates(self, rows: Ints, k: int) -> Iterator[tuple[Ints, Ints]]:
        """(which of `rows`, which column): all pairs that may be among the k nearest, ascending by row."""
        place = np.searchsorted(self.columns, rows)
        distance = self.features[place] @ self.features.T
        distance *= -2
        distance += ((1 + self.share) * self.squares).astype(np.float32)  # no less than the truth, but for x's share
        distance[np.arange(len(rows)), place] = np.inf
        limit = _kth_at_most(distance, k) + 2 * self.share * self.squares[place] + len(self.features[0]) * _TINY
        distance -= (2 * self.share * self.squares).astype(np.float32)  # no more than the truth
        near = distance <= np.nextafter(limit.astype(np.float32), np.float32(np.inf))[:, None]
        block = np.cumsum(np.count_nonzero(near, axis=1)) // _PAIRS
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(block)) + 1):
            owner, column = np.nonzero(near[part])
            yield part[owner], column


def _kth_at_most(distance: Floats, k: int) -> Doubles:
    """No less than the k-th smallest of each row [B, M]; infinite where there are fewer.

    The k-th smallest among the least of disjoint groups is that: far cheaper, and seldom much more. A group takes
    columns from all over, because patches that follow each other are alike.
    """
    n_columns = distance.shape[1]
    n_groups = n_columns // _GROUP
    if n_groups >= 4 * k:
        grouped = distance[:, : n_groups * _GROUP].reshape(len(distance), _GROUP, n_groups)
        distance = grouped.min(axis=1)
    if distance.shape[1] < k:
        return np.full(len(distance), np.inf)
    kth: Doubles = np.partition(distance, k - 1, axis=1)[:, k - 1].astype(np.float64)
    return kth


def _put_in_order(found: Indices, bag: Bag, rows: Ints, others: Ints) -> None:
    """Fill `found` from candidate pairs; `rows` ascend."""
    keep = rows != others
    rows, others = rows[keep], others[keep]
    squares = np.empty(len(rows))
    for pairs in _slices(len(rows), 16 * bag.dim):
        apart = _values(bag, rows[pairs]).astype(np.float64)
        apart -= _values(bag, others[pairs])
        squares[pairs] = np.einsum("nd,nd->n", apart, apart)
    order = np.lexsort((others, squares, rows))
    rows, others = rows[order], others[order]
    number = _number_within(rows)
    first = number < found.shape[1]
    found[rows[first], number[first]] = others[first]


def _number_within(ascending: Ints) -> Ints:
    """Of each entry, how many equal ones come before it."""
    starts = np.flatnonzero(np.diff(ascending, prepend=-1))
    number: Ints = np.arange(len(ascending)) - np.repeat(starts, np.diff(starts, append=len(ascending)))
    return number


def _slices(length: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // 2 // row_bytes)
    return (slice(at, at + step) for at in range(0, length, step))


def _equal_rows(values: NDArray[Any]) -> tuple[Ints, Ints]:
    """Of each row [N]: the group of rows equal to it, and how many of these come before it.

    Rows are told apart by 128 bits of their bytes.
    """
    zero = values.dtype.type(0)  # added to -0 it gives 0
    digests = np.array([xxhash.xxh3_128_digest((row + zero).data) for row in values], dtype="S16")
    _, group = np.unique(digests, return_inverse=True)
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(values), np.int64)
    rank[order] = _number_within(group[order])
    return group.astype(np.int64), rank


def _fill_equals(found: Indices, group: Ints) -> Ints:
    """Give rows that have k equal others those, the first by row; returns the rows that need to look further."""
    k = found.shape[1]
    sizes = np.bincount(group)
    order = np.argsort(group, kind="stable")
    stops = np.cumsum(sizes)
    for number in np.flatnonzero(sizes > k):
        rows = order[stops[number] - sizes[number] : stops[number]]
        found[rows] = rows[:k]
        for place in range(k):  # those leave themselves out
            found[rows[place]] = np.delete(rows[: k + 1], place)
    return np.flatnonzero(sizes[group] <= k)
