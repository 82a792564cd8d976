"""What each pass over the cohort visits and when: functions of (seed, epoch), so that a resumed run recomputes them.

Pass 0, 1, ... trains epoch 0, 1, ... of every learner, and validates on the way what the learner was after the
epoch before: its validation slides come by in the same pass, so one reading serves both, and all folds. A last
pass only validates.

A step is done when its last visit has arrived. Neither readers, caches, processes nor what runs beside it come in
here: they change how soon a slide is there, never which one is next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cftrain.examples import Example
from cftrain.folds import FoldExamples
from cftrain.survival import draw, pass_order

_MASKS: Final = 3  # 1 and 2 are the purposes of survival.sampling


@dataclass(frozen=True)
class Visit:
    """An example at its place in a pass; visits of one place share one reading."""

    example: Example
    place: int


@dataclass(frozen=True)
class Step:
    """What is done at once: an optimiser step of `size` visits, or predictions for them.

    Parameters
    ----------
    train
        Whether it trains; otherwise it predicts.
    number
        Among the learner's own steps of the pass, from 0.
    packs
        Its forward passes: visits whose patches are packed together.
    ready
        The last place it needs.
    """

    train: bool
    number: int
    packs: tuple[tuple[Visit, ...], ...]
    ready: int

    @property
    def size(self) -> int:
        """Visits, all packs together."""
        return sum(len(pack) for pack in self.packs)

    @property
    def visits(self) -> list[Visit]:
        """Its visits, pack after pack."""
        return [visit for pack in self.packs for visit in pack]


@dataclass(frozen=True)
class ShardOrder:
    """Where the slides lie: one tuple per shard, in file order.

    `sequential` visits each shard from its beginning to its end; otherwise slides are permuted within it.
    """

    shards: tuple[tuple[str, ...], ...]
    sequential: bool = False

    def places(self, examples: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The shard [n] of each example's first slide, and its place there [n], or None where that does not matter."""
        places = {slide: (number, at) for number, shard in enumerate(self.shards) for at, slide in enumerate(shard)}
        shard, within = np.array([places[each.slide_ids[0]] for each in examples], dtype=np.int64).T
        return shard, within if self.sequential else None


@dataclass(frozen=True, eq=False)
class Schedule:
    """What decides the steps of one learner, besides the places.

    Parameters
    ----------
    seed
        `train.seed`; names weighted draws.
    epochs, accumulate, batch_patches
        Of `TrainConfig`.
    trains
        Whether it has steps to learn from; otherwise it is only validated.
    weights : [len(fold.train)]
        Draw with replacement by these; None visits each example once.
    """

    fold: FoldExamples
    seed: int
    epochs: int
    accumulate: int
    batch_patches: int
    trains: bool = True
    weights: NDArray[np.float64] | None = None


def cohort_places(
    examples: Sequence[Example], seed: int, number: int, shards: ShardOrder | None = None
) -> Mapping[str, int]:
    """The place of every example, by name, in pass `number` over the cohort."""
    shard, within = shards.places(examples) if shards else (None, None)
    rows = pass_order(len(examples), seed=seed, epoch=number, shard=shard, within=within)
    return {examples[row].name: place for place, row in enumerate(rows)}


def steps_of(schedule: Schedule, number: int, places: Mapping[str, int] | None) -> list[Step]:
    """The steps of one learner in pass `number`, in the order in which they become ready.

    Parameters
    ----------
    places
        `cohort_places`: examples come by in that order, and one that is drawn several times is visited as often,
        one visit after the other. None: each draw has a place of its own, in the order of the draws, after the
        validation examples.
    """
    fold = schedule.fold
    val = fold.val if number > 0 else ()
    rows: Sequence[int] = ()
    if schedule.trains and number < schedule.epochs:
        drawn = draw(len(fold.train), weights=schedule.weights, seed=schedule.seed, epoch=number, fold=fold.number)
        rows = drawn.tolist()
    if places is None:
        validated = [Visit(example, place) for place, example in enumerate(val)]
        trained = [Visit(fold.train[row], len(val) + place) for place, row in enumerate(rows)]
    else:
        validated = _by_place([Visit(example, places[example.name]) for example in val])
        trained = _by_place([Visit(fold.train[row], places[fold.train[row].name]) for row in rows])
    found = [(True, visits) for visits in _cut(trained, schedule.accumulate)]
    found += [(False, visits) for visits in _cut(validated, schedule.accumulate)]
    found.sort(key=lambda step: (step[1][-1].place, step[0]))
    return [
        Step(train, own, packed(visits, schedule.batch_patches), visits[-1].place)
        for own, (train, visits) in enumerate(found)
    ]


def packed(visits: Sequence[Visit], batch_patches: int) -> tuple[tuple[Visit, ...], ...]:
    """Consecutive visits together while they hold at most `batch_patches` patches; a larger one alone."""
    groups: list[list[Visit]] = []
    held = 0
    for visit in visits:
        patches = visit.example.total_patches
        if not groups or held + patches > batch_patches:
            groups.append([])
            held = 0
        groups[-1].append(visit)
        held += patches
    return tuple(tuple(group) for group in groups)


def shared_out(packs: Sequence[Sequence[Visit]], world: int) -> list[list[int]]:
    """Which of `world` processes does which packs: the largest first, each to the one with the fewest patches.

    What a pack is does not depend on `world`, so neither do dropout masks, nor any number but for its rounding.
    """
    load, shares = [0] * world, [list[int]() for _ in range(world)]
    patches = [sum(visit.example.total_patches for visit in pack) for pack in packs]
    for index in sorted(range(len(packs)), key=lambda index: (-patches[index], index)):
        rank = load.index(min(load))
        shares[rank].append(index)
        load[rank] += patches[index]
    return [sorted(share) for share in shares]


def pack_seed(seed: int, fold: int, epoch: int, step: int, pack: int) -> int:
    """The seed of dropout in one forward pass: the same on any device, process and after any restart."""
    low, high = np.random.SeedSequence((_MASKS, seed, fold, epoch, step, pack)).generate_state(2)
    return int(high) << 31 | int(low) >> 1


def _by_place(visits: list[Visit]) -> list[Visit]:
    return sorted(visits, key=lambda visit: visit.place)


def _cut(visits: Sequence[Visit], size: int) -> list[Sequence[Visit]]:
    """Steps of `size` visits; what is left over at the end makes a step of its own."""
    return [visits[start : start + size] for start in range(0, len(visits), size)]
