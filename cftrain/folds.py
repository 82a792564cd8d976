"""Patients of a fold to examples of a fold; leakage is refused, slides in no part are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cfstore import Cohort, Fold, SplitSet
from cftrain.errors import ConfigError, LeakageError
from cftrain.examples import Example


@dataclass(frozen=True)
class FoldExamples:
    """What one fold trains on and what it is validated on."""

    number: int
    train: tuple[Example, ...]
    val: tuple[Example, ...]


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


def unplaced(cohort: Cohort, folds: Mapping[int, Fold]) -> list[str]:
    """Slides whose patient is in no part of any fold."""
    placed = {patient for fold in folds.values() for patient in fold.train | fold.val | fold.test}
    return [slide.slide_id for slide in cohort.slides if slide.patient_id not in placed]
