"""Slides of a fold: by patient, refused where they leak or nothing can be learnt."""

from __future__ import annotations

import pytest

from cfstore import Cohort, CohortSlide, Fold, SplitSet
from cftrain.errors import ConfigError, LeakageError
from cftrain.folds import fold_slides, unplaced


def cohort(*slides: tuple[str, str, bool]) -> Cohort:
    listed = tuple(CohortSlide(slide, patient, 12.0, event, {20: 3}) for slide, patient, event in slides)
    return Cohort("C", "uni", 8, (20,), listed, {})


def splits(*folds: tuple[set[str], set[str]]) -> SplitSet:
    return SplitSet("mine", {k: Fold(frozenset(train), frozenset(val)) for k, (train, val) in enumerate(folds)})


FOUR = cohort(("a1", "a", True), ("a2", "a", True), ("b1", "b", False), ("c1", "c", True))


def test_all_slides_of_a_patient_go_to_the_patients_part():
    (fold,) = fold_slides(FOUR, splits(({"a", "b"}, {"c"})))
    assert [slide.slide_id for slide in fold.train] == ["a1", "a2", "b1"]
    assert [slide.slide_id for slide in fold.val] == ["c1"]


def test_patients_of_the_splits_that_have_no_slide_are_no_matter():
    (fold,) = fold_slides(FOUR, splits(({"a", "nobody"}, {"c", "no one"})))
    assert len(fold.train) == 2


def test_a_patient_in_train_and_val_is_refused_by_name():
    with pytest.raises(LeakageError, match=r"mine, fold 0.*\ba\b"):
        fold_slides(FOUR, splits(({"a", "b"}, {"a", "c"})))


@pytest.mark.parametrize(
    ("train", "val"), [({"b"}, {"a"}), ({"a"}, {"nobody"})], ids=["no death to learn", "empty val"]
)
def test_a_fold_that_can_teach_or_measure_nothing_is_refused(train, val):
    with pytest.raises(ConfigError, match="mine, fold 0"):
        fold_slides(FOUR, splits((train, val)))


def test_a_val_part_without_a_death_is_kept_its_c_index_will_be_undefined():
    (fold,) = fold_slides(FOUR, splits(({"a", "c"}, {"b"})))
    assert [slide.event for slide in fold.val] == [False]


def test_slides_in_no_fold_are_named():
    assert unplaced(FOUR, splits(({"a"}, {"c"})).folds) == ["b1"]
