"""Does the risk change without the patches that a map calls important, more than without random ones?

A map that names what the model uses moves the risk when its top patches are taken away; so may any other choice of as
many patches, because a smaller bag is another bag: in CrossFusion the 10x patches behind a missing one move up to other
places of the grid. Random choices of the same number say how much of the movement is that.

Reference: the deletion game of Petsiuk, Das & Saenko 2018, arXiv:1806.07421, at one share, with random choices to
compare. Legend: N patches of the bag at one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.models import BagBatch

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Deletion:
    """The risk of a bag without some of its patches.

    Parameters
    ----------
    n_dropped
        How many patches were left out, each time.
    n_patches
        Of how many that could have been.
    risk
        Of the whole bag.
    without_top
        Without the patches of the highest scores.
    without_random
        Without as many random ones, of each draw.
    """

    n_dropped: int
    n_patches: int
    risk: float
    without_top: float
    without_random: tuple[float, ...]

    @property
    def moved_by_top(self) -> float:
        """How far the risk moves without the top patches; below 0, they had raised it."""
        return self.without_top - self.risk

    @property
    def moved_by_random(self) -> float:
        """Mean distance that the risk moves without random patches, never negative: ups and downs do not cancel."""
        return float(np.mean([abs(each - self.risk) for each in self.without_random]))

    @property
    def more_than_random(self) -> float:
        """Share of the draws that move the risk less far, up or down, than the top patches do; chance is 0.5."""
        top = abs(self.moved_by_top)
        return float(np.mean([abs(each - self.risk) < top for each in self.without_random]))


def deletions(
    risk: Callable[[BagBatch], float],
    batch: BagBatch,
    scale: int,
    scores: Mapping[str, NDArray[np.float64]],
    share: float = 0.05,
    draws: int = 10,
    seed: int = 0,
    rows: Ints | None = None,
) -> dict[str, Deletion]:
    """Leave out the patches that each map scores highest, then random ones, and ask for the risk each time.

    Parameters
    ----------
    risk
        Of a batch of one bag; called 1 + draws times, and once for each map.
    batch
        One bag.
    scale
        Whose patches are left out; the other scales stay whole, and so does the order of those that stay.
    scores
        Maps by name, each [N]; of equal scores the first are left out first.
    share
        How many, as a part of those there are to choose from: rounded, at least 1, at most all but one.
    draws
        Random choices. They depend on seed and numbers of patches alone: all models and maps meet the same, and more
        draws begin with the fewer.
    seed
        Of the random choices.
    rows
        Which patches to choose from, e.g. one slide's of a patient's bag; None: all.

    Returns
    -------
    dict
        By name of the map. Empty where there are fewer than two patches to choose from: nothing would be left of a bag
        of one, and one out of one is no choice.

    Raises
    ------
    ConfigError
        share is not above 0 and below 1, or there are no draws.
    ShapeError
        Several bags, no such scale, or scores and rows that are not those of its patches.
    NonFiniteError
        A score is NaN.
    """
    _check_options(share, draws)
    candidates = _candidates(batch, scale, rows)
    for own in scores.values():
        _check_scores(batch, scale, own, candidates)
    if len(candidates) < 2:
        return {}
    n_dropped = min(max(1, round(share * len(candidates))), len(candidates) - 1)
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(candidates, n_dropped, replace=False) for _ in range(draws)]
    whole = risk(batch)
    without_random = tuple(risk(_without(batch, scale, dropped)) for dropped in chosen)
    found = {}
    for name, own in scores.items():
        top = candidates[np.argsort(-own[candidates], kind="stable")[:n_dropped]]
        without_top = risk(_without(batch, scale, top))
        found[name] = Deletion(n_dropped, len(candidates), whole, without_top, without_random)
    return found


def _check_options(share: float, draws: int) -> None:
    if not 0 < share < 1:
        raise ConfigError(f"the share of patches to leave out must be above 0 and below 1, got {share}")
    if draws < 1:
        raise ConfigError(f"leaving out random patches needs at least 1 draw, got {draws}")


def _candidates(batch: BagBatch, scale: int, rows: Ints | None) -> Ints:
    """The rows to choose from, in ascending order."""
    if len(batch) != 1:
        raise ShapeError(f"patches are left out of one bag at a time, got {len(batch)} bags")
    (slide_id,) = batch.slide_ids
    if scale not in batch.lengths:
        raise ShapeError(f"{slide_id}: no patches at {scale}x to leave out, the batch has {sorted(batch.lengths)}")
    (n_patches,) = batch.lengths[scale]
    candidates = np.arange(n_patches) if rows is None else np.unique(rows)
    if len(candidates) and (candidates[0] < 0 or candidates[-1] >= n_patches):
        raise ShapeError(f"{slide_id}: rows {candidates[0]} to {candidates[-1]} of {n_patches} patches at {scale}x")
    return candidates


def _check_scores(batch: BagBatch, scale: int, scores: NDArray[np.float64], candidates: Ints) -> None:
    (slide_id,), (n_patches,) = batch.slide_ids, batch.lengths[scale]
    if scores.shape != (n_patches,):
        raise ShapeError(f"{slide_id}: scores at {scale}x must be [{n_patches}], got {list(scores.shape)}")
    if np.isnan(scores[candidates]).any():
        raise NonFiniteError(f"{slide_id}: a score at {scale}x is NaN; patches cannot be put in order")


def _without(batch: BagBatch, scale: int, dropped: Ints) -> BagBatch:
    keep = torch.ones(batch.lengths[scale], dtype=torch.bool)
    keep[torch.from_numpy(dropped)] = False
    return batch.keeping(scale, keep)
