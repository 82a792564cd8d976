"""Examples of a fold: by patient, refused where they leak or nothing can be learnt."""

from __future__ import annotations

import pytest

from cfstore import Cohort, CohortSlide, Fold, SplitSet
from cftrain.errors import ConfigError, LeakageError
from cftrain.examples import make_examples
from cftrain.folds import fold_examples, unplaced


def cohort(*slides: tuple[str, str, bool]) -> Cohort:
    listed = tuple(CohortSlide(slide, patient, 12.0, event, {20: 3}) for slide, patient, event in slides)
    return Cohort("C", "uni", 8, (20,), listed, {})


def splits(*folds: tuple[set[str], set[str]]) -> SplitSet:
    return SplitSet("mine", {k: Fold(frozenset(train), frozenset(val)) for k, (train, val) in enumerate(folds)})


FOUR = cohort(("a1", "a", True), ("a2", "a", True), ("b1", "b", False), ("c1", "c", True))
EXAMPLES = make_examples(FOUR.slides, "slide")


def test_all_slides_of_a_patient_go_to_the_patients_part():
    (fold,) = fold_examples(EXAMPLES, splits(({"a", "b"}, {"c"})))
    assert [example.name for example in fold.train] == ["a1", "a2", "b1"]
    assert [example.name for example in fold.val] == ["c1"]


def test_a_patients_slides_become_one_example_where_the_patient_is_the_unit():
    found = make_examples(FOUR.slides, "patient")
    assert [(each.name, each.slide_ids, each.n_patches) for each in found] == [
        ("a", ("a1", "a2"), {20: 6}),
        ("b1", ("b1",), {20: 3}),
        ("c1", ("c1",), {20: 3}),
    ]
    assert [(each.patient_id, each.event) for each in found] == [("a", True), ("b", False), ("c", True)]


def test_patients_of_the_splits_that_have_no_slide_are_no_matter():
    (fold,) = fold_examples(EXAMPLES, splits(({"a", "nobody"}, {"c", "no one"})))
    assert len(fold.train) == 2


def test_a_patient_in_train_and_val_is_refused_by_name():
    with pytest.raises(LeakageError, match=r"mine, fold 0.*\ba\b"):
        fold_examples(EXAMPLES, splits(({"a", "b"}, {"a", "c"})))


@pytest.mark.parametrize(
    ("train", "val"), [({"b"}, {"a"}), ({"a"}, {"nobody"})], ids=["no death to learn", "empty val"]
)
def test_a_fold_that_can_teach_or_measure_nothing_is_refused(train, val):
    with pytest.raises(ConfigError, match="mine, fold 0"):
        fold_examples(EXAMPLES, splits((train, val)))


def test_a_val_part_without_a_death_is_kept_its_c_index_will_be_undefined():
    (fold,) = fold_examples(EXAMPLES, splits(({"a", "c"}, {"b"})))
    assert [example.event for example in fold.val] == [False]


def test_slides_in_no_fold_are_named():
    assert unplaced(FOUR, splits(({"a"}, {"c"})).folds) == ["b1"]
