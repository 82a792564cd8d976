"""Folds of patients: as papers publish them, and as `make_folds` deals them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfstore import LeakageError, SplitsError, Store, make_folds
from cfstore.errors import StoreError
from cfstore.splits import Fold, read_splits

Make = Callable[..., Any]


def patient_of(entry: str) -> str:
    return entry.split("-")[0]


def read(tmp_path: Path, text: str) -> Fold:
    (tmp_path / "splits_0.csv").write_text(text)
    return read_splits(tmp_path, patient_of)[0]


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        ",train,val\n0,a,c\n1,b,\n",
        "train,val\na,c\nb\n",
        "train,val\na,c\nb,\n,\n",
        "val,train\nc,a\n,b\n",
        "\ufeff,train,val\r\n0,a,c\r\n1,b,\r\n",
        ",train,val,test\n0,a,c,\n1,b,,\n",
    ],
    ids=["numbered", "ragged", "blank row", "turned", "Windows", "empty test"],
)
def test_ragged_columns_are_read_whatever_the_dialect(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, text) == Fold(frozenset("ab"), frozenset("c"))


def test_clams_test_column_is_kept_apart(tmp_path: Path) -> None:
    fold = read(tmp_path, ",train,val,test\n0,a,c,d\n1,b,,e\n")
    assert fold == Fold(frozenset("ab"), frozenset("c"), frozenset("de"))


def test_slides_stand_for_their_patients_with_or_without_suffix(tmp_path: Path) -> None:
    fold = read(tmp_path, "train,val\na-DX1.4755D138.svs,c-DX1\na-DX2,c-DX2.svs\nb-DX1.ndpi,\n")
    assert fold == Fold(frozenset("ab"), frozenset("c"))


def test_folds_are_numbered_by_their_files_and_clams_other_files_ignored(tmp_path: Path) -> None:
    for name in ("splits_10", "splits_2", "splits_2_bool", "splits_0_descriptor", "other"):
        (tmp_path / f"{name}.csv").write_text("train,val\na,b\n")
    assert list(read_splits(tmp_path, patient_of)) == [2, 10]


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("train,val\na,b\nb,c\n", "1 patients are in both train and val: b"),
        ("train,val\na-DX1,a-DX2\nb,c\n", "both train and val: a"),
        ("train,val,test\na,b,b\n", "both val and test: b"),
        ("train,val,test\na,b,a-DX2.svs\n", "both train and test: a"),
    ],
)
def test_a_patient_on_two_sides_is_refused_by_name(text: str, shared: str, tmp_path: Path) -> None:
    with pytest.raises(LeakageError, match=rf"splits_0\.csv: .*{shared}\. A fold must split patients"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("train,test\na,b\n", "expected columns 'train' and 'val', found train, test"),
        ("", "found no rows"),
        ("train,val\n", "found no rows"),
        ("a,b\nc,d\n", "found a, b"),
        ("train,val\na,\nb,\n", "the val column is empty"),
        ("train,val\n,a\n", "the train column is empty"),
    ],
)
def test_a_file_that_is_no_fold_is_refused_saying_what_it_holds(text: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(SplitsError, match=rf"splits_0\.csv: .*{found}"):
        read(tmp_path, text)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "splits_0.csv").write_bytes(b"train,val\n\xff\xfe,b\n")
    with pytest.raises(SplitsError, match=r"splits_0\.csv: cannot be read"):
        read_splits(tmp_path, patient_of)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_folder_without_splits_is_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(SplitsError, match=r"no splits_<k>\.csv files here.*--make"):
        read_splits(tmp_path / name, patient_of)


# --- in a store ----------------------------------------------------------------------------------


def clinical(path: Path, n: int = 6, slides_per_patient: int = 2) -> Path:
    rows = [
        f"LUAD,p{i},p{i}x{j}.svs,{i + 1},{i % 2}" if j == 0 else f"LUAD,p{i},other{i}_{j}.svs,{i + 1},{i % 2}"
        for i in range(n)
        for j in range(slides_per_patient)
    ]
    path.write_text("\n".join(["cohort,case_id,slide_id,survival_months,censorship", *rows]) + "\n")
    return path


def test_two_slides_of_a_patient_on_two_sides_are_leakage_even_before_the_slides_are_ingested(
    tmp_path: Path, store: Store
) -> None:
    store.import_clinical(clinical(tmp_path / "t.csv"))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "splits_0.csv").write_text("train,val\np0x0,other0_1\np1,p2\n")
    with pytest.raises(LeakageError, match="1 patients are in both train and val: p0"):
        store.import_splits(tmp_path / "splits")
    assert store.split_names("LUAD") == []


def test_imported_splits_are_rows_in_sql_and_folds_in_python(tmp_path: Path, store: Store) -> None:
    store.import_clinical(clinical(tmp_path / "t.csv"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "splits_0.csv").write_text("train,val,test\np0,other1_1.svs,p2\np3x0,,\n")
    store.import_splits(tmp_path / "mine")
    assert store.split_set("LUAD", "mine").folds == {
        0: Fold(frozenset({"p0", "p3"}), frozenset({"p1"}), frozenset({"p2"}))
    }
    rows = store.sql("SELECT cohort, name, fold, patient_id, part FROM splits ORDER BY patient_id").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("LUAD", "mine", 0, "p0", "train"),
        ("LUAD", "mine", 0, "p1", "val"),
        ("LUAD", "mine", 0, "p2", "test"),
        ("LUAD", "mine", 0, "p3", "train"),
    ]
    assert store.info().splits == [{"cohort": "LUAD", "name": "mine", "n_folds": 1, "n_patients": 4}]


def test_split_sets_whose_names_run_together_stay_two(tmp_path: Path, store: Store) -> None:
    (tmp_path / "splits_0.csv").write_text("train,val\na,b\n")
    store.import_splits(tmp_path, cohort="A-B", name="C")
    store.import_splits(tmp_path, cohort="A", name="B-C")
    assert (store.split_names("A-B"), store.split_names("A")) == (["C"], ["B-C"])


def test_importing_a_split_set_again_replaces_it(tmp_path: Path, store: Store) -> None:
    for text in ("train,val\na,b\n", "train,val\nb,a\n"):
        (tmp_path / "splits_0.csv").write_text(text)
        store.import_splits(tmp_path, cohort="LUAD", name="mine")
    assert store.split_set("LUAD", "mine").folds == {0: Fold(frozenset("b"), frozenset("a"))}


def test_a_split_set_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, store: Store) -> None:
    (tmp_path / "splits_0.csv").write_text("train,val\na,b\n")
    store.import_splits(tmp_path, cohort="LUAD", name="mine")
    with pytest.raises(StoreError, match="'yours'; it has: mine"):
        store.split_set("LUAD", "yours")


def test_splits_without_cohort_are_refused_where_several_could_be_meant(tmp_path: Path, store: Store) -> None:
    (tmp_path / "splits_0.csv").write_text("train,val\na,b\n")
    with pytest.raises(SplitsError, match="none yet: name one with --cohort"):
        store.import_splits(tmp_path)


def test_made_folds_are_of_the_labelled_patients_with_slides(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", tuple(f"p{i}x0" for i in range(5)), scales=(20,))
    store.ingest(tmp_path / "uni")
    store.import_clinical(clinical(tmp_path / "t.csv"))
    store.make_splits(2, seed=3)
    folds = store.split_set("LUAD", "made2-seed3").folds
    assert folds[0].val | folds[1].val == {f"p{i}" for i in range(5)}


# --- make_folds ------------------------------------------------------------------------------------


def cohort_of(n: int, n_events: int) -> tuple[list[str], list[bool]]:
    return [f"p{i:03d}" for i in range(n)], [i < n_events for i in range(n)]


@pytest.mark.parametrize(("n", "n_events", "k"), [(2, 1, 2), (7, 3, 3), (53, 11, 5), (100, 100, 10), (41, 0, 4)])
def test_each_patient_is_validated_once_and_events_are_spread_evenly(n: int, n_events: int, k: int) -> None:
    patients, event = cohort_of(n, n_events)
    folds = make_folds(patients, event, k, seed=0)
    dead = {patient for patient, flag in zip(patients, event, strict=True) if flag}
    assert sorted(patient for fold in folds.values() for patient in fold.val) == patients
    for fold in folds.values():
        assert fold.train == set(patients) - fold.val
    for counted in ([len(fold.val & dead) for fold in folds.values()], [len(fold.val) for fold in folds.values()]):
        assert max(counted) - min(counted) <= 1


def test_the_same_seed_makes_the_same_folds_whatever_the_order_of_patients() -> None:
    patients, event = cohort_of(53, 11)
    order = np.random.default_rng(1).permutation(53)
    folds = make_folds(patients, event, 5, seed=4)
    assert make_folds(patients, event, 5, seed=4) == folds
    assert make_folds([patients[i] for i in order], [event[i] for i in order], 5, seed=4) == folds
    assert make_folds(patients, event, 5, seed=5) != folds


@pytest.mark.parametrize(("n", "k"), [(3, 4), (3, 1), (0, 2)])
def test_folds_that_cannot_be_made_are_refused(n: int, k: int) -> None:
    with pytest.raises(SplitsError, match=f"cannot make {k} folds of {n} labelled patients"):
        make_folds(*cohort_of(n, 1), k, seed=0)


def test_a_patient_listed_twice_is_refused() -> None:
    with pytest.raises(SplitsError, match="listed twice"):
        make_folds(["a", "a", "b"], [True, False, True], 2, seed=0)


# --- the paper's ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cohort", "n_unlabelled"),
    [("gbmlgg", "GBMLGG", 0), ("luad", "LUAD", 9), ("coad", "COAD", 0)],
)
def test_the_papers_folds_import_with_the_files_own_patients(
    name: str, cohort: str, n_unlabelled: int, shared: Path, store: Store
) -> None:
    store.import_clinical(shared / "clinical" / f"tcga_{name}_min.csv")
    store.import_splits(shared / "splits" / f"tcga_{name}")
    folds = store.split_set(cohort, f"tcga_{name}").folds
    assert sorted(folds) == [0, 1, 2, 3, 4]
    for number, fold in folds.items():
        path = shared / "splits" / f"tcga_{name}" / f"splits_{number}.csv"
        rows = list(csv.DictReader(path.read_text().splitlines()))
        for part in ("train", "val"):
            expected = {row[part][:12] for row in rows if row[part]}  # a TCGA patient is 12 characters
            assert getattr(fold, part) == expected
            query = f"SELECT * FROM splits WHERE fold = {number} AND part = '{part}'"
            assert store.sql(query).num_rows == len(expected) > 0
    known = store.sql("SELECT patient_id FROM patients")["patient_id"].to_pylist()
    listed = set().union(*(fold.train | fold.val for fold in folds.values()))
    assert len(listed - set(known)) == n_unlabelled  # the paper's folds name patients its table lacks
