"""Clusters of the patches of one slide, by k-means, for attention within each.

The centres come from the slide's own patches and are forgotten with it: nothing is learnt from other slides or from
labels, so that no fold can leak into another. They are the same in every pass: the draw has a generator of its own,
seeded 1 for every slide.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

SEED: Final = 1
_BLOCK_ELEMENTS: Final = 1 << 22
"""Distances held at a time: 16 MiB in float32."""


class Clusters(NamedTuple):
    """Rows, cluster after cluster."""

    order: Tensor
    """int64 [N]; within a cluster as stored."""
    sizes: tuple[int, ...]
    """Rows of each cluster, each at least 1; they add up to N."""


def slide_clusters(
    features: Tensor, coordinates: Tensor | None, *, weight: float, size: int, iterations: int
) -> Clusters:
    """Cluster N patches of one slide by features and place.

    There are n = max(1, N // size) k-means clusters (`kmeans`) of `standardised` rows. A cluster of s >= 2 · size rows
    becomes s // size runs of its rows in stored order, none more than one row longer than another: none is left of
    2 · size rows, so that attention within them takes time for at most 2 · size · N pairs. Centres without rows leave
    no cluster.

    Of tensors without numbers (`without_numbers`), N // size runs of all rows stand for the clusters: attention keeps
    as much of few clusters as of many.

    Parameters
    ----------
    features : [N, D] float
    coordinates : [N, 2], or None
        Of the patches' corners; None clusters features alone.
    weight
        Of coordinates, 0…1.
    size
        Rows of a cluster, on average.
    iterations
        Assignments of rows to centres, at most.
    """
    n_rows, n_clusters = len(features), len(features) // size
    if n_clusters < 2 or without_numbers(features):
        return Clusters(torch.arange(n_rows, device=features.device), _cut(n_rows, size))
    labels = kmeans(standardised(features, coordinates, weight), n_clusters, iterations)
    sizes = torch.bincount(labels, minlength=n_clusters).tolist()
    return Clusters(labels.argsort(stable=True), tuple(run for rows in sizes for run in _cut(rows, size)))


def standardised(features: Tensor, coordinates: Tensor | None, weight: float) -> Tensor:
    """What is clustered: [N, D] features and [N, 2] coordinates to [N, D + 2], or to [N, D] without coordinates.

    (1 - weight) · (f - mean) / std beside weight · (c - mean) / std, with one mean and one standard deviation of all
    entries of f, and one of all entries of c, so that no column counts more for varying less. In float32 at least.
    """
    parts = [(features, 1.0 - weight)] + ([] if coordinates is None else [(coordinates, weight)])
    precision = torch.promote_types(features.dtype, torch.float32)
    return torch.cat([_standardised(part.to(precision)).mul_(share) for part, share in parts], dim=1)


def _standardised(x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x)
    return x.sub(mean).div_(torch.where(std > 0, std, 1))


def kmeans(points: Tensor, n_clusters: int, iterations: int) -> Tensor:
    """The nearest centre of each row of [N, P], as Lloyd's algorithm moves the centres: int64 [N].

    The centres start at n_clusters different rows, drawn with SEED on the CPU, whatever the device. In each iteration
    rows go to the nearest centre, the first of equally near ones, and centres to the mean of their rows; one that has
    none stays where it is. It ends where no row changes its centre, or with the last iteration's assignment.

    Time is O(iterations · N · n_clusters · P), memory that of some blocks of distances.
    """
    drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(SEED))[:n_clusters]
    centres = points[drawn.to(points.device)]
    labels = nearest_centres(points, centres)
    for _ in range(iterations - 1):
        centres = _moved(points, labels, centres)
        before, labels = labels, nearest_centres(points, centres)
        if torch.equal(labels, before):
            break
    return labels


def nearest_centres(points: Tensor, centres: Tensor) -> Tensor:
    """The row of `centres`, [n, P], nearest to each of [N, P], the first of equals: int64 [N]."""
    squares = centres.square().sum(dim=1)
    blocks = torch.split(points, max(1, _BLOCK_ELEMENTS // len(centres)))
    # |x|² is the same for all centres
    return torch.cat([torch.addmm(squares, rows, centres.T, alpha=-2).argmin(dim=1) for rows in blocks])


def _moved(points: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    counts = torch.bincount(labels, minlength=len(centres))
    # sums rows in their order, on a GPU too, where an index_add would not
    means = functional.embedding_bag(labels.argsort(stable=True), points, counts.cumsum(0) - counts, mode="mean")
    return torch.where(counts.unsqueeze(1) > 0, means, centres)


def _cut(n_rows: int, size: int) -> tuple[int, ...]:
    """n_rows as near-equal runs, longer ones first: one below 2 · size, else n_rows // size."""
    if n_rows == 0:
        return ()
    n_runs = max(1, n_rows // size)
    least, longer = divmod(n_rows, n_runs)
    return (least + 1,) * longer + (least,) * (n_runs - longer)


def without_numbers(x: Tensor) -> bool:
    """Whether x has a shape and no data, as where `cftrain.footprint` counts memory."""
    return isinstance(x, FakeTensor)
