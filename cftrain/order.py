"""What a fold's training visits and when: pure functions of `LoaderState`, so that a resumed run recomputes them.

Neither readers nor caches come in here: they change how soon a slide is there, never which one is next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cfstore import CohortSlide
from cftrain.folds import FoldSlides
from cftrain.survival import epoch_order


@dataclass(frozen=True)
class LoaderState:
    """Where the loader of a fold stands: all it needs, with data and settings, to go on exactly there.

    Parameters
    ----------
    seed
        `train.seed`.
    epoch
        From 0.
    step
        Optimiser steps of that epoch that are done.
    """

    seed: int
    epoch: int
    step: int = 0


@dataclass(frozen=True)
class ShardOrder:
    """Where the slides lie: one tuple per shard, in file order.

    `sequential` visits each shard from its beginning to its end; otherwise slides are permuted within it.
    """

    shards: tuple[tuple[str, ...], ...]
    sequential: bool = False

    def in_file_order(self, slides: Sequence[CohortSlide]) -> tuple[CohortSlide, ...]:
        """`slides`, shard after shard."""
        places = self._places()
        return tuple(sorted(slides, key=lambda slide: places[slide.slide_id]))

    def places(self, slides: Sequence[CohortSlide]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The shard [n] of each slide, and its place there [n], or None where that does not matter."""
        places = self._places()
        shard, within = np.array([places[slide.slide_id] for slide in slides], dtype=np.int64).T
        return shard, within if self.sequential else None

    def _places(self) -> dict[str, tuple[int, int]]:
        return {slide_id: (number, at) for number, shard in enumerate(self.shards) for at, slide_id in enumerate(shard)}


@dataclass(frozen=True)
class Batch:
    """Slides of one forward pass, in an optimiser step of `step_size` slides; `last` ends the step."""

    slides: tuple[CohortSlide, ...]
    step_size: int
    last: bool


def epoch_slides(
    state: LoaderState, fold: FoldSlides, weights: ArrayLike | None = None, order: ShardOrder | None = None
) -> list[CohortSlide]:
    """The slides of one epoch of a fold, in order: a pure function of seed, epoch and fold.

    Parameters
    ----------
    state
        Names the epoch; its step does not matter here.
    weights : [len(fold.train)]
        Draw with replacement by these; None visits each slide once.
    order
        Visit shard after shard, shards in random order. Which slides are drawn does not depend on it.
    """
    shard, within = order.places(fold.train) if order else (None, None)
    rows = epoch_order(
        len(fold.train),
        weights=weights,
        seed=state.seed,
        epoch=state.epoch,
        fold=fold.number,
        shard=shard,
        within=within,
    )
    return [fold.train[i] for i in rows]


def training_batches(
    slides: Sequence[CohortSlide], accumulate: int, batch_patches: int, *, first_step: int = 0
) -> list[Batch]:
    """Cut an epoch into optimiser steps of `accumulate` slides, and steps into batches; from `first_step` on.

    What is left over at the end makes a step of its own.
    """
    batches = []
    for start in range(first_step * accumulate, len(slides), accumulate):
        step = slides[start : start + accumulate]
        groups = packed(step, batch_patches)
        batches += [Batch(tuple(group), len(step), i == len(groups) - 1) for i, group in enumerate(groups)]
    return batches


def packed(slides: Sequence[CohortSlide], batch_patches: int) -> list[list[CohortSlide]]:
    """Consecutive slides together while they hold at most `batch_patches` patches; a larger one alone."""
    groups: list[list[CohortSlide]] = []
    held = 0
    for slide in slides:
        patches = sum(slide.n_patches.values())
        if not groups or held + patches > batch_patches:
            groups.append([])
            held = 0
        groups[-1].append(slide)
        held += patches
    return groups
