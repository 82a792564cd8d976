"""Patients of a fold to slides of a fold; leakage is refused, slides in no part are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cfstore import Cohort, CohortSlide, Fold, SplitSet
from cftrain.errors import ConfigError, LeakageError


@dataclass(frozen=True)
class FoldSlides:
    """The slides of one fold."""

    number: int
    train: tuple[CohortSlide, ...]
    val: tuple[CohortSlide, ...]


def _check(number: int, fold: Fold, train: tuple[CohortSlide, ...], val: tuple[CohortSlide, ...], name: str) -> None:
    shared = sorted(fold.train & fold.val)
    if shared:
        message = f"splits {name}, fold {number}: patients in both train and val: {', '.join(shared[:5])}"
        raise LeakageError(message)
    if not any(slide.event for slide in train) or not val:
        message = (
            f"splits {name}, fold {number}: {len(train)} train slides with {sum(slide.event for slide in train)} "
            f"observed deaths, {len(val)} val slides; a fold needs a death to learn from and a slide to measure on. "
            "Make other folds with `cfstore splits --make`"
        )
        raise ConfigError(message)


def fold_slides(cohort: Cohort, splits: SplitSet) -> list[FoldSlides]:
    """The slides of every fold.

    Raises
    ------
    LeakageError
        A patient in train and val of one fold.
    ConfigError
        A fold without an observed death in train, or without a slide in val.
    """
    folds = []
    for number, fold in sorted(splits.folds.items()):
        train = tuple(slide for slide in cohort.slides if slide.patient_id in fold.train)
        val = tuple(slide for slide in cohort.slides if slide.patient_id in fold.val)
        _check(number, fold, train, val, splits.name)
        folds.append(FoldSlides(number, train, val))
    return folds


def unplaced(cohort: Cohort, folds: Mapping[int, Fold]) -> list[str]:
    """Slides whose patient is in no part of any fold."""
    placed = {patient for fold in folds.values() for patient in fold.train | fold.val | fold.test}
    return [slide.slide_id for slide in cohort.slides if slide.patient_id not in placed]
