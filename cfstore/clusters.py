"""k-means: Lloyd's iterations from k-means++ seeds (Arthur, Vassilvitskii, SODA 2007), the best of a few starts.

SciPy's `kmeans2` keeps every distance in float64 while it seeds and compares each seed with all earlier ones; here
100,000 patches of 1,024 features take one copy in float32 and one matrix product per pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

STARTS: Final = 5
MOST_PASSES: Final = 100
_BLOCK: Final = 8192  # rows looked at together


@dataclass(frozen=True, eq=False)
class Clusters:
    """Centroids [n, D], largest cluster first (of equal ones the lower first coordinate), rows of each [n], and the
    mean squared distance of a row to its centroid."""

    centroids: Floats
    sizes: Ints
    inertia: float


def k_means(rows: Floats, n: int, rng: np.random.Generator) -> Clusters:
    """Centroids of `rows` [P, D], at least `n` of them; the same for the same rows, `n` and state of `rng`.

    A cluster that loses its last row begins anew at the row that is farthest from its own centroid. Of fewer
    different rows than `n`, some centroids are the same; theirs come last, with no rows.

    Raises
    ------
    ValueError
        There are fewer rows than centroids.
    """
    if not 1 <= n <= len(rows):
        raise ValueError(f"{n} centroids of {len(rows)} rows")
    middle = rows.mean(axis=0, dtype=np.float64)
    centred = rows - middle.astype(np.float32)
    lengths = np.concatenate([np.einsum("pd,pd->p", part, part, dtype=np.float64) for part in _blocks(centred)])
    best = min((_one_start(centred, lengths, n, rng) for _ in range(STARTS)), key=lambda made: made[2])
    centroids, sizes, inertia = best
    moved = (centroids + middle.astype(np.float32).astype(np.float64)).astype(np.float32)
    order = np.lexsort((*moved.T[::-1], -sizes))
    return Clusters(moved[order], sizes[order], inertia / len(rows))


def _blocks(rows: Floats) -> Iterator[Floats]:
    return (rows[at : at + _BLOCK] for at in range(0, len(rows), _BLOCK))


def _one_start(rows: Floats, lengths: Doubles, n: int, rng: np.random.Generator) -> tuple[Doubles, Ints, float]:
    centroids = rows[_seeds(rows, lengths, n, rng)].astype(np.float64)
    before = np.full(len(rows), -1)
    for _ in range(MOST_PASSES):
        label, squares = _assign(rows, lengths, centroids)
        if np.array_equal(label, before):
            break
        before = label
        centroids = _means(rows, label, squares, centroids)
    label, squares = _assign(rows, lengths, centroids)
    return centroids, np.bincount(label, minlength=n), float(squares.sum())


def _seeds(rows: Floats, lengths: Doubles, n: int, rng: np.random.Generator) -> Ints:
    """Rows to begin with: each drawn with a chance that grows with its squared distance to those drawn before."""
    chosen = [int(rng.integers(len(rows)))]
    nearest = np.full(len(rows), np.inf)
    while len(chosen) < n:
        last = chosen[-1]
        squares = np.maximum(lengths - 2 * (rows @ rows[last]).astype(np.float64) + lengths[last], 0)
        squares[last] = 0
        nearest = np.minimum(nearest, squares)
        reached = np.cumsum(nearest)
        place = np.searchsorted(reached, rng.random() * reached[-1], side="right")
        chosen.append(int(min(place, len(rows) - 1)))
    return np.array(chosen)


def _assign(rows: Floats, lengths: Doubles, centroids: Doubles) -> tuple[Ints, Doubles]:
    """The nearest centroid of each row, and the squared distance to it."""
    narrow = centroids.astype(np.float32)
    own = (centroids**2).sum(axis=1)
    label, squares = np.empty(len(rows), np.int64), np.empty(len(rows))
    for at, part in zip(range(0, len(rows), _BLOCK), _blocks(rows), strict=True):
        apart = own - 2 * (part @ narrow.T).astype(np.float64)
        here = slice(at, at + len(part))
        label[here] = apart.argmin(axis=1)
        squares[here] = np.maximum(apart.min(axis=1) + lengths[here], 0)
    return label, squares


def _means(rows: Floats, label: Ints, squares: Doubles, centroids: Doubles) -> Doubles:
    """The mean row of each cluster; one without rows moves to the row that is farthest from its centroid."""
    n = len(centroids)
    totals = np.zeros_like(centroids)
    for at, part in zip(range(0, len(rows), _BLOCK), _blocks(rows), strict=True):
        member = (label[at : at + len(part), None] == np.arange(n)).astype(np.float32)
        totals += member.T @ part
    sizes = np.bincount(label, minlength=n)
    means: Doubles = totals / np.maximum(sizes, 1)[:, None]
    empty = np.flatnonzero(sizes == 0)
    far = np.argsort(-squares, kind="stable")[: len(empty)]
    means[empty] = np.where(squares[far, None] > 0, rows[far], centroids[empty])
    return means
