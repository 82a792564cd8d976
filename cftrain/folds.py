"""Patients of a fold to examples of a fold; leakage is refused, slides in no part are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cfstore import Cohort, Fold, SplitSet
from cftrain.errors import ConfigError, LeakageError
from cftrain.examples import Example

_HELD_OUT: Final = 4  # 1 and 2 are the purposes of survival.sampling, 3 of order


@dataclass(frozen=True)
class FoldExamples:
    """What one fold trains on and what it is validated on; `inner`: both lie within the training part of that fold."""

    number: int
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    inner: bool = False

    @property
    def name(self) -> str:
        """What a person calls it, e.g. "fold 2 inner"."""
        return f"fold {self.number} inner" if self.inner else f"fold {self.number}"


def _check(number: int, fold: Fold, train: Sequence[Example], val: Sequence[Example], name: str) -> None:
    shared = sorted(fold.train & fold.val)
    if shared:
        message = f"splits {name}, fold {number}: patients in both train and val: {', '.join(shared[:5])}"
        raise LeakageError(message)
    if not any(example.event for example in train) or not val:
        message = (
            f"splits {name}, fold {number}: {len(train)} train slides with {sum(each.event for each in train)} "
            f"observed deaths, {len(val)} val slides; a fold needs a death to learn from and a slide to measure on. "
            "Make other folds with `cfstore splits --make`"
        )
        raise ConfigError(message)


def fold_examples(examples: Sequence[Example], splits: SplitSet) -> list[FoldExamples]:
    """The examples of every fold.

    Raises
    ------
    LeakageError
        A patient in train and val of one fold.
    ConfigError
        A fold without an observed death in train, or without a slide in val.
    """
    folds = []
    for number, fold in sorted(splits.folds.items()):
        train = tuple(each for each in examples if each.patient_id in fold.train)
        val = tuple(each for each in examples if each.patient_id in fold.val)
        _check(number, fold, train, val, splits.name)
        folds.append(FoldExamples(number, train, val))
    return folds


def inner_fold(fold: FoldExamples, share: float, seed: int) -> FoldExamples:
    """The training part of a fold, cut in two by patient: what its inner model trains on, and is validated on.

    Patients who died and those who did not are each held out in that share, to the nearest patient; where two died,
    one of them is on either side. Depends on the training patients and their events alone.

    Parameters
    ----------
    share
        Of the training patients to hold out, above 0, at most 0.5.
    seed
        Names the draw, with the fold's number.

    Raises
    ------
    ConfigError
        The fold has a single training patient.
    """
    event = {example.patient_id: example.event for example in fold.train}
    if len(event) < 2:
        message = f"{fold.name} has a single training patient, so train.nested can hold none out; set it to 0"
        raise ConfigError(message)
    order = sorted(event)
    rows = np.random.default_rng(np.random.SeedSequence((_HELD_OUT, seed, fold.number))).permutation(len(order))
    shuffled = [order[row] for row in rows]
    dead, alive = ([patient for patient in shuffled if event[patient] == flag] for flag in (True, False))
    n_dead = max(round(share * len(dead)), 1) if len(dead) > 1 else 0
    n_alive = max(round(share * len(order)), 1) - n_dead
    held_out = {*dead[:n_dead], *alive[: max(n_alive, 0)]}
    train = tuple(example for example in fold.train if example.patient_id not in held_out)
    val = tuple(example for example in fold.train if example.patient_id in held_out)
    return FoldExamples(fold.number, train, val, inner=True)


def unplaced(cohort: Cohort, folds: Mapping[int, Fold]) -> list[str]:
    """Slides whose patient is in no part of any fold."""
    placed = {patient for fold in folds.values() for patient in fold.train | fold.val | fold.test}
    return [slide.slide_id for slide in cohort.slides if slide.patient_id not in placed]
