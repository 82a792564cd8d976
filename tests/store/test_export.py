"""Slides leave the store with their labels and folds, and come back the same."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import cfstore
from cfstore import IngestOptions, QueryError, SlideNotFoundError, SourceError, Store, StoreError
from cfstore.cli import main
from cfstore.export import _check_file_name
from cfstore.render import plain
from cfstore.selection import select_slides, shard_order

Make = Callable[..., Any]
SLIDES = ("P1-a", "P1-b.x", "P2-1", "P3 ü", "P4")
CLINICAL = (
    "cohort,patient_id,time_months,event,age,sex,site,note,score\n"
    "AA,P1,12.5,1,61,female,05,\"a, b\",0.1\n"
    "AA,P2,3,0,40,male,06,,\n"
    "BB,P3 ü,7.25,0,52,,05,x,2\n"
    "BB,P9,1,1,33,male,05,y,3\n"
)  # fmt: skip


@pytest.fixture(params=["zarr", "webdataset"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def filled(tmp_path: Path, make_cohort: Make, form: str) -> Store:
    """Five slides of two cohorts; P4 has no label, and two sets of folds are there."""
    return fill(tmp_path, make_cohort, form)


def fill(tmp_path: Path, make_cohort: Make, form: str = "zarr", dtype: str = "float16") -> Store:
    make_cohort(tmp_path / "h5", slides=SLIDES)
    (tmp_path / "h5" / "clinical.csv").write_text(CLINICAL)
    made = cfstore.open(tmp_path / "store", create=True)
    made.ingest(tmp_path / "h5", IngestOptions(encoder="uni", format=form, dtype=dtype))  # type: ignore[arg-type]
    made.make_splits(2, "AA", seed=3)
    made.make_splits(2, "AA", seed=4, name="again")
    return made


def same_bags(one: Store, other: Store, slide_ids: Any = SLIDES) -> None:
    for slide_id in slide_ids:
        ours, theirs = one.slide(slide_id).bags, other.slide(slide_id).bags
        assert ours.keys() == theirs.keys()
        for scale, bag in ours.items():
            np.testing.assert_array_equal(bag.features, theirs[scale].features)
            np.testing.assert_array_equal(bag.coords, theirs[scale].coords)  # type: ignore[arg-type]


def rows(store: Store, query: str) -> list[dict[str, Any]]:
    return store.sql(query).to_pylist()  # type: ignore[no-any-return]


# --- WebDataset ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float16-rounded", "float32", "int8"])
@pytest.mark.parametrize("form", ["zarr", "webdataset"], indirect=True)
def test_a_store_exported_as_tars_opens_as_the_same_store(tmp_path, make_cohort, dtype, form):
    store = fill(tmp_path, make_cohort, form, dtype)
    report = store.export(tmp_path / "tars", shard_slides=2)
    assert (report.n_slides, report.n_bags, report.n_files, report.n_without_label) == (5, 15, 3, 1)
    tars = cfstore.open_tars(tmp_path / "tars")
    same_bags(store, tars)
    for query in (
        "FROM slides ORDER BY ALL",
        "FROM splits ORDER BY ALL",
        "SELECT * FROM patients WHERE patient_id <> 'P9' ORDER BY ALL",
        "SELECT * EXCLUDE (shard, row_start, byte_start, byte_length, codec, source), parse_filename(source) AS file "
        "FROM bags ORDER BY slide_id, scale",
    ):
        assert rows(tars, query) == rows(store, query)
    assert not any("/" in row["source"] for row in rows(tars, "FROM bags"))  # nor anybody's folders
    for cohort in ("AA", "BB"):
        assert tars.cohort(cohort) == store.cohort(cohort)
    assert tars.split_set("AA", "again") == store.split_set("AA", "again")


def test_tars_opened_by_themselves_are_only_read(tmp_path, filled):
    filled.export(tmp_path / "tars")
    tars = cfstore.open_tars(tmp_path / "tars")
    for change in (tars.reindex, tars.compact, tars.verify, lambda: tars.remove(["P1-b.x"]), lambda: tars.ingest("x")):
        with pytest.raises(StoreError, match="only read; `cfstore ingest` makes a store"):
            change()
    assert len(rows(tars, "FROM slides")) == 5


def test_a_samples_json_has_labels_folds_and_record(tmp_path, filled):
    filled.export(tmp_path / "tars", where="slide_id = 'P1-b.x'")
    with tarfile.open(tmp_path / "tars" / "000000.tar") as archive:
        assert archive.getnames()[-1] == "P1-b%2Ex.json"
        content = json.load(archive.extractfile("P1-b%2Ex.json"))  # type: ignore[arg-type]
    assert [content[name] for name in ("slide_id", "cohort", "patient_id", "time_months", "event")] == [
        "P1-b.x", "AA", "P1", 12.5, True,
    ]  # fmt: skip
    assert content["patient"]["note"] == "a, b"
    assert set(content["splits"]) == {"made2-seed3", "again"}
    assert set(content["splits"]["again"]) == {"0", "1"}


def test_a_slide_without_labels_has_none_in_its_json(tmp_path, filled):
    filled.export(tmp_path / "tars", where="slide_id = 'P4'")
    tars = cfstore.open_tars(tmp_path / "tars")
    assert tars.sql("FROM patients").num_rows == 0
    assert rows(tars, "FROM slides") == rows(filled, "FROM slides WHERE slide_id = 'P4'")


def test_values_that_json_lacks_become_null():
    assert plain({"odd": [float("inf"), float("nan"), 1.5]}) == {"odd": [None, None, 1.5]}


def test_tar_shards_copied_out_of_a_store_open_without_labels(tmp_path, make_cohort):
    store = fill(tmp_path, make_cohort, "webdataset")
    shards = [str(store.path / row["shard"]) for row in rows(store, "SELECT DISTINCT shard FROM bags")]
    tars = cfstore.open_tars(shards)
    same_bags(store, tars)
    assert {row["cohort"] for row in rows(tars, "FROM slides")} == {"h5"}
    assert tars.cohort("h5").excluded == {"no label": SLIDES}


# --- HDF5 ---------------------------------------------------------------------------------------


def test_an_exported_h5_folder_ingests_to_the_same_values_and_labels(tmp_path, filled):
    report = filled.export(tmp_path / "out", format="h5")
    assert report.n_files == 16
    with h5py.File(tmp_path / "out" / "x20" / "h5_files" / "P1-b.x.h5") as file:
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
    again = cfstore.open(tmp_path / "again", create=True)
    again.ingest(tmp_path / "out", IngestOptions(encoder="uni"))
    same_bags(filled, again)
    for cohort in ("AA", "BB"):
        assert again.cohort(cohort) == filled.cohort(cohort)
    known = "SELECT * FROM patients WHERE patient_id <> 'P9' ORDER BY ALL"
    assert rows(again, known) == rows(filled, known)


def test_int8_is_exported_to_h5_as_the_numbers_it_stands_for(tmp_path, make_cohort):
    store = fill(tmp_path, make_cohort, dtype="int8")
    store.export(tmp_path / "out", format="h5", cohort="AA")
    with h5py.File(tmp_path / "out" / "x10" / "h5_files" / "P2-1.h5") as file:
        np.testing.assert_array_equal(file["features"][:], store.slide("P2-1").bags[10].features)


@pytest.mark.parametrize("slide_id", ["a/b", "..", ".hidden", "a\0b", "a.svs", " a", "x" * 260])
def test_a_slide_id_that_is_no_file_name_is_refused(slide_id):
    with pytest.raises(SourceError, match="cannot be the name of a file"):
        _check_file_name(slide_id)


# --- the folder ---------------------------------------------------------------------------------


def test_a_folder_that_holds_files_is_refused(tmp_path, filled):
    filled.export(tmp_path / "tars")
    with pytest.raises(SourceError, match="holds files already"):
        filled.export(tmp_path / "tars")


def test_an_export_that_fails_leaves_nothing(tmp_path, filled):
    for file in sorted(filled.path.glob("features/*/*.tar")) + sorted(filled.path.glob("features/*/*/features/c/0/0")):
        data = bytearray(file.read_bytes())
        data[len(data) // 4 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 4)
        file.write_bytes(bytes(data))
    with pytest.raises(StoreError):
        filled.export(tmp_path / "tars")
    assert list((tmp_path / "tars").iterdir()) == []


def test_what_a_killed_export_left_is_swept_away_by_the_next(tmp_path, filled):
    (tmp_path / "tars" / ".writing-dead").mkdir(parents=True)
    (tmp_path / "tars" / ".writing-dead" / "000000.tar").write_bytes(b"half")
    filled.export(tmp_path / "tars")
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["000000.tar"]


def test_several_encoders_are_not_mixed_unasked(tmp_path, make_cohort):
    store = fill(tmp_path, make_cohort)
    make_cohort(tmp_path / "other", slides=SLIDES[:2])
    store.ingest(tmp_path / "other", IngestOptions(encoder="gigapath"))
    with pytest.raises(SlideNotFoundError, match="name one with --encoder"):
        store.export(tmp_path / "tars", cohort="AA")
    store.export(tmp_path / "tars" / "gigapath", encoder="gigapath", cohort="AA")
    store.export(tmp_path / "tars" / "uni", encoder="uni", cohort="AA")
    both = cfstore.open_tars([tmp_path / "tars" / "uni", tmp_path / "tars" / "gigapath"])
    assert both.encoders_of("AA") == store.encoders_of("AA")


# --- choosing slides ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "cohort", "expected"),
    [
        ("cohort = 'AA' AND age > 50", None, ["P1-a", "P1-b.x"]),
        ("age < 60 -- a comment", None, ["P2-1", "P3 ü"]),
        ("event IS NULL", None, ["P4"]),
        ("NOT event", "BB", ["P3 ü"]),
        ("slide_id IN (SELECT slide_id FROM bags WHERE scale = 20 AND n_patches > 15)", None, ["P2-1"]),
        (None, "AA", ["P1-a", "P1-b.x", "P2-1"]),
    ],
)
def test_a_condition_chooses_slides(tmp_path, make_cohort, where, cohort, expected):
    assert select_slides(fill(tmp_path, make_cohort).path, where, cohort) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("aeg > 3", "no column 'aeg'; near: age"),
        ("cohort = AA", "Text goes into single quotes"),
        ("1=1) UNION SELECT 'P4' WHERE (1=1", "syntax error"),
        ("1=1) UNION SELECT 'P4' --", "syntax error"),
        ("1=1; DROP TABLE slides", "more than one statement"),
        ("", "SELECT clause without"),
        ("age > 1, age > 2", "single expression"),
        ("slide_id IN (SELECT column0 FROM read_csv('/etc/passwd'))", "refused|disabled"),
        ("count(*) > 1", "aggregates"),
    ],
)
def test_anything_but_one_condition_is_refused(tmp_path, make_cohort, where, message):
    with pytest.raises(QueryError, match=message) as caught:
        select_slides(fill(tmp_path, make_cohort).path, where)
    assert "\n" not in str(caught.value)


def test_a_condition_that_matches_nothing_says_so(filled):
    with pytest.raises(SlideNotFoundError, match="matches no slide of cohort AA"):
        select_slides(filled.path, "age > 200", "AA")
    with pytest.raises(SlideNotFoundError, match="cohorts here: AA, BB, h5"):
        select_slides(filled.path, None, "CC")


def test_a_cohort_of_a_condition_is_called_like_its_only_cohort_or_custom(filled):
    assert filled.cohort(None, where="age > 50 AND cohort = 'AA'").name == "AA"
    spanning = filled.cohort(None, where="age > 1")
    assert (spanning.name, spanning.n_patients) == ("custom", 3)
    assert [slide.cohort for slide in spanning.slides] == ["AA", "AA", "AA", "BB"]
    with pytest.raises(SlideNotFoundError, match="has the cohorts AA, BB, h5"):
        filled.cohort(None)


def shared_patient(tmp_path: Path, make_cohort: Make, patient: str, months: tuple[int, int]) -> Store:
    store = cfstore.open(tmp_path / "store", create=True)
    for cohort, time in zip("AB", months, strict=True):
        make_cohort(tmp_path / cohort, slides=(f"{patient}-{cohort}",))
        (tmp_path / cohort / "c.csv").write_text(f"patient_id,time_months,event\n{patient},{time},1\n")
        store.ingest(tmp_path / cohort, IngestOptions(encoder="uni", cohort=cohort))
    return store


def test_an_id_that_two_cohorts_share_is_two_patients_unless_it_is_a_tcga_barcode(tmp_path, make_cohort):
    apart = shared_patient(tmp_path / "1", make_cohort, "7", (3, 3)).cohort(None, where="true")
    assert [slide.patient_id for slide in apart.slides] == ["A/7", "B/7"]
    one = shared_patient(tmp_path / "2", make_cohort, "TCGA-AA-0001", (3, 3)).cohort(None, where="true")
    assert one.n_patients == 1
    with pytest.raises(QueryError, match="another follow-up in each of the cohorts A, B"):
        shared_patient(tmp_path / "3", make_cohort, "TCGA-AA-0001", (3, 4)).cohort(None, where="true")


def test_slides_come_in_the_order_of_their_shards(tmp_path, filled):
    filled.export(tmp_path / "tars", shard_slides=2)
    tars = cfstore.open_tars(tmp_path / "tars")
    assert shard_order(tars.path, "uni", SLIDES) == [["P1-a", "P1-b.x"], ["P2-1", "P3 ü"], ["P4"]]
    assert tars.shard_order("uni", ["P4", "P1-b.x"]) == [["P1-b.x"], ["P4"]]
    assert filled.shard_order("uni", SLIDES) == [list(SLIDES)]
    with pytest.raises(SlideNotFoundError, match="nobody: no features of encoder uni"):
        filled.shard_order("uni", ["nobody"])


def test_export_prints_what_it_wrote(tmp_path, filled):
    call = ["export", str(tmp_path / "out"), "--where", "cohort = 'BB'", "--json", "--store", str(filled.path)]
    done = CliRunner().invoke(main, call)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["n_slides"] == 1
    refused = CliRunner().invoke(main, ["export", str(tmp_path / "out"), "--store", str(filled.path)])
    assert refused.exit_code == 1
    assert "holds files already" in refused.output
