"""Which slides an epoch visits, in which order: pure functions, so that a resumed run recomputes them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.errors import ConfigError, ShapeError

_DRAWS: Final = 1
_PASSES: Final = 2


def class_weights(time_bin: ArrayLike, event: ArrayLike) -> NDArray[np.float64]:
    """Weigh each slide by N / n, n counting the slides of its own (bin, event) class: [N] float64.

    Every class present then has the same total weight, N; a class that is absent has no slide to weigh.

    Parameters
    ----------
    time_bin : [N] int, 0…K-1
        Interval of the last follow-up.
    event : [N] bool
        True where death was observed.

    Raises
    ------
    ShapeError
        The inputs disagree on N, `time_bin` is not of integers at or above 0, or `event` is not bool.
    """
    bins, happened = np.asarray(time_bin), np.asarray(event)
    _check_classes(bins, happened)
    _, own, count = np.unique(2 * bins.astype(np.int64) + happened, return_inverse=True, return_counts=True)
    return bins.size / count[own].astype(np.float64)


def draw(n: int, *, weights: ArrayLike | None = None, seed: int, epoch: int, fold: int) -> NDArray[np.int64]:
    """Rows that a fold trains on in one epoch: [n] int64, the same for the same arguments, whatever ran before.

    Without weights a permutation of 0…n-1. With weights n draws with replacement, each row in proportion to
    its weight: some rows come more than once, others wait for another epoch.

    Parameters
    ----------
    n
        How many rows there are to choose from, and how many are drawn.
    weights : [n]
        Relative weights, not negative, not all 0; None takes every row once.
    seed, epoch, fold
        Name the draws, each at or above 0. No global random state is read or changed.

    Raises
    ------
    ConfigError
        There is no row, `seed`, `epoch` or `fold` is negative, or the weights cannot be drawn from.
    ShapeError
        `weights` is not [n].
    """
    _check_rows(n)
    rng = _generator(_DRAWS, seed=seed, fold=fold, epoch=epoch)
    p = None if weights is None else _probabilities(weights, n)
    return rng.permutation(n) if p is None else rng.choice(n, size=n, replace=True, p=p)


def pass_order(
    n: int, *, seed: int, epoch: int, shard: ArrayLike | None = None, within: ArrayLike | None = None
) -> NDArray[np.int64]:
    """The order in which one pass visits the n rows of a cohort: a permutation, [n] int64.

    Restricted to the rows of a fold it is a random order of that fold, so that one pass serves all folds.
    With shards the rows of one shard come together, shards in random order.

    Parameters
    ----------
    seed, epoch
        Name the order, each at or above 0. No global random state is read or changed.
    shard : [n] int, at or above 0
        The shard each row lies in; None mixes them.
    within : [n]
        Places of the rows in their shard, visited in ascending order; None visits them in random order.

    Raises
    ------
    ConfigError
        There is no row, or `seed` or `epoch` is negative.
    ShapeError
        `shard` or `within` is not [n].
    """
    _check_rows(n)
    rng = _generator(_PASSES, seed=seed, epoch=epoch)
    order = rng.permutation(n)
    if shard is None:
        return order
    shards, places = np.asarray(shard), np.zeros(n) if within is None else np.asarray(within)
    if shards.shape != (n,) or places.shape != (n,):
        msg = f"shard is {shards.shape}, within {places.shape}: give one for each of the {n} rows"
        raise ShapeError(msg)
    rank = rng.permutation(int(shards.max()) + 1)
    return order[np.lexsort((places[order], rank[shards[order]]))]


def _check_rows(n: int) -> None:
    if n < 1:
        msg = f"{n} rows to draw an epoch from: give the training part at least one slide"
        raise ConfigError(msg)


def _generator(purpose: int, **key: int) -> np.random.Generator:
    """Random numbers that belong to a purpose and a key; the purpose comes first because trailing zeros are nothing
    to NumPy's seeds.
    """
    for name, value in key.items():
        if value < 0:
            msg = f"{name} {value}: give a whole number at or above 0"
            raise ConfigError(msg)
    return np.random.default_rng(np.random.SeedSequence((purpose, *key.values())))


def _probabilities(weights: ArrayLike, n: int) -> NDArray[np.float64]:
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (n,):
        msg = f"weights are {w.shape}: give one for each of the {n} rows"
        raise ShapeError(msg)
    total = w.sum()
    if not (np.isfinite(total) and total > 0 and (w >= 0).all()):
        msg = f"weights run from {w.min():g} to {w.max():g}: give finite ones, none negative, not all 0"
        raise ConfigError(msg)
    return np.asarray(w / total, dtype=np.float64)


def _check_classes(bins: NDArray[Any], happened: NDArray[Any]) -> None:
    whole = np.issubdtype(bins.dtype, np.integer) and bins.ndim == 1 and not (bins < 0).any()
    if not whole or happened.shape != bins.shape or happened.dtype != np.bool_:
        msg = (
            f"time_bin is {bins.dtype} {bins.shape}, event {happened.dtype} {happened.shape}: "
            "give one bin 0…K-1 and one bool (True = death observed) per slide"
        )
        raise ShapeError(msg)
