"""What an ingest puts into a store: the source's rows, where the catalog says, once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
import zarr

import cfstore
import cfstore.ingest
from cfstore import DuplicateBagError, IngestOptions, SourceError, Store
from cfstore.errors import StoreError
from cfstore.labels import Resolver, collect

Make = Callable[..., Any]
Cohort = dict[tuple[str, int], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
SLIDES = ("b", "a", "c", "e", "d")


@pytest.fixture
def cohort(tmp_path: Path, make_cohort: Make) -> Cohort:
    rows: Cohort = make_cohort(tmp_path / "uni", SLIDES)
    return rows


def bag_rows(store: Store) -> list[dict[str, Any]]:
    return store.sql("SELECT * FROM bags ORDER BY shard, row_start").to_pylist()


def column(store: Store, query: str) -> list[Any]:
    table = store.sql(query)
    return table.column(0).to_pylist()


def clinical(path: Path, *rows: str, header: str = "case_id,slide_id,survival_months,censorship") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_in_the_sources_order_at_the_stored_precision(
    dtype: str, tmp_path: Path, store: Store, cohort: Cohort
) -> None:
    report = store.ingest(tmp_path / "uni", IngestOptions(dtype=dtype))
    assert (report.n_slides, report.n_bags, report.n_present) == (5, 15, 0)
    for slide in SLIDES:
        bags = store.slide(slide).bags
        assert list(bags) == [5, 10, 20]
        for scale, bag in bags.items():
            features, coords = cohort[slide, scale]
            assert bag.features.dtype == dtype
            np.testing.assert_array_equal(bag.features, features.astype(dtype))
            np.testing.assert_array_equal(bag.coords, coords)
            if dtype == "float16":
                np.testing.assert_allclose(bag.features, features, rtol=2.0**-11, atol=2.0**-25)


def test_plain_zarr_reads_every_bag_at_the_catalogs_rows(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    store.ingest(tmp_path / "uni")
    rows = bag_rows(store)
    assert {(row["slide_id"], row["scale"]) for row in rows} == set(cohort)
    for row in rows:
        features, coords = cohort[row["slide_id"], row["scale"]]
        group = zarr.open_group(store.path / row["shard"], mode="r")
        here = slice(row["row_start"], row["row_start"] + row["n_patches"])
        np.testing.assert_array_equal(group["features"][here], features.astype(np.float16))
        np.testing.assert_array_equal(group["coords"][here], coords)
        assert group["features"].metadata.zarr_format == 3


def test_digest_and_error_columns_equal_an_independent_computation(
    tmp_path: Path, store: Store, cohort: Cohort
) -> None:
    store.ingest(tmp_path / "uni")
    for row in bag_rows(store):
        with h5py.File(row["source"]) as file:
            exact, coords = file["features"][()].astype(np.float64), file["coords"][()]
        half = exact.astype(np.float32).astype(np.float16)
        error = half.astype(np.float64) - exact
        assert row["max_abs_error"] == np.abs(error).max() > 0
        expected = np.sqrt((error**2).mean() / (exact**2).mean())
        assert row["rms_relative_error"] == pytest.approx(expected, rel=1e-6)  # rows are summed in float32
        whole = half.tobytes() + coords.astype("<i4").tobytes()
        assert row["digest"] == f"xxh3-128:{xxhash.xxh3_128_hexdigest(whole)}"
        assert (row["n_patches"], row["dim"]) == exact.shape
        assert row["bytes"] == half.nbytes
        stat = Path(row["source"]).stat()
        assert (row["source_bytes"], row["source_mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        assert (row["source_dtype"], row["dtype"], row["encoder"]) == ("float32", "float16", "uni")


def test_the_digest_of_a_bag_without_coords_covers_its_features_alone(tmp_path: Path, store: Store, draw: Make) -> None:
    features, _ = draw()
    (tmp_path / "e" / "x20").mkdir(parents=True)
    with h5py.File(tmp_path / "e" / "x20" / "a.h5", "w") as file:
        file["features"] = features
    store.ingest(tmp_path / "e")
    expected = xxhash.xxh3_128_hexdigest(features.astype(np.float16).tobytes())
    assert column(store, "SELECT digest FROM bags") == [f"xxh3-128:{expected}"]


def test_an_all_zero_bag_has_error_zero(tmp_path: Path, store: Store, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / "a.h5", features=np.zeros((7, 8), np.float32))
    store.ingest(tmp_path / "e")
    assert store.sql("SELECT max_abs_error, rms_relative_error FROM bags").to_pylist() == [
        {"max_abs_error": 0.0, "rms_relative_error": 0.0}
    ]


# --- shape of a shard ------------------------------------------------------------------------


def test_a_slide_starts_on_a_chunk_and_lies_in_one_piece_coarse_to_fine(
    tmp_path: Path, store: Store, cohort: Cohort
) -> None:
    store.ingest(tmp_path / "uni")
    for slide in SLIDES:
        rows = sorted(
            (row for row in bag_rows(store) if row["slide_id"] == slide), key=lambda row: int(row["row_start"])
        )
        array = zarr.open_array(store.path / rows[0]["shard"] / "features", mode="r")
        assert len({row["shard"] for row in rows}) == 1
        assert [row["scale"] for row in rows] == [5, 10, 20]
        assert rows[0]["row_start"] % array.chunks[0] == 0
        for before, after in pairwise(rows):
            assert after["row_start"] == before["row_start"] + before["n_patches"]


def test_bags_of_many_chunks_that_end_inside_one_are_whole(
    tmp_path: Path, store: Store, make_clam_h5: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 32 rows, so that one bag spans a hundred of them and ends inside one."""
    monkeypatch.setattr("cfstore.shards.zarr_shard._COMPRESSED_CHUNK", 512)
    written = {
        slide: make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / f"{slide}.h5", n_patches=n)
        for slide, n in {"a": 1, "b": 3333, "c": 1024, "d": 1025}.items()
    }
    store.ingest(tmp_path / "e")
    for slide, (features, coords) in written.items():
        bag = store.slide(slide).bags[20]
        np.testing.assert_array_equal(bag.features, features.astype(np.float16))
        np.testing.assert_array_equal(bag.coords, coords)
    array = zarr.open_array(store.path / bag_rows(store)[0]["shard"] / "features", mode="r")
    assert array.chunks == (32, 8)
    assert array.shards == array.shape == (32 * (1 + 105 + 32 + 33), 8)


def test_an_ingest_of_many_slides_makes_several_shards(
    tmp_path: Path, store: Store, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cfstore.ingest, "SLIDES_PER_SHARD", 2)
    report = store.ingest(tmp_path / "uni")
    assert report.n_shards == 3
    assert sorted(column(store, "SELECT count(DISTINCT slide_id) AS n FROM bags GROUP BY shard")) == [1, 2, 2]
    for (slide, scale), (features, _) in cohort.items():
        np.testing.assert_array_equal(store.slide(slide).bags[scale].features, features.astype(np.float16))


def test_progress_counts_up_to_all_slides(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    seen: list[tuple[int, int]] = []
    store.ingest(tmp_path / "uni", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]


# --- again, and later ----------------------------------------------------------------------------


def test_a_second_ingest_takes_nothing_twice(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    store.ingest(tmp_path / "uni")
    before = bag_rows(store)
    report = store.ingest(tmp_path / "uni")
    assert (report.n_slides, report.n_bags, report.n_present, report.n_shards) == (0, 0, 5, 0)
    assert bag_rows(store) == before
    assert len(list((store.path / "features").glob("*/*.zarr"))) == 1


def test_files_added_later_are_all_that_a_second_ingest_takes(
    tmp_path: Path, store: Store, cohort: Cohort, make_cohort: Make
) -> None:
    store.ingest(tmp_path / "uni")
    before = bag_rows(store)
    make_cohort(tmp_path / "uni", ("new",))
    report = store.ingest(tmp_path / "uni")
    assert (report.n_slides, report.n_present) == (1, 5)
    assert [row for row in bag_rows(store) if row["slide_id"] != "new"] == before


def test_a_scale_added_later_joins_its_slides(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    rows: Cohort = make_cohort(tmp_path / "uni", ("a", "b"), scales=(20,))
    store.ingest(tmp_path / "uni")
    rows |= make_cohort(tmp_path / "uni", ("a", "b"), scales=(5,))
    report = store.ingest(tmp_path / "uni")
    assert report.n_bags == 2
    assert list(store.slide("a").bags) == [5, 20]
    for (slide, scale), (features, _) in rows.items():
        np.testing.assert_array_equal(store.slide(slide).bags[scale].features, features.astype(np.float16))


def test_two_encoders_of_a_slide_live_side_by_side(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    uni: Cohort = make_cohort(tmp_path / "uni", ("a",), dim=8)
    conch: Cohort = make_cohort(tmp_path / "conch", ("a",), dim=16)
    store.ingest(tmp_path / "uni")
    store.ingest(tmp_path / "conch")
    with pytest.raises(cfstore.SlideNotFoundError, match="conch, uni"):
        store.slide("a")
    for encoder, rows in (("uni", uni), ("conch", conch)):
        bag = store.slide("a", encoder).bags[20]
        np.testing.assert_array_equal(bag.features, rows["a", 20][0].astype(np.float16))


def test_a_source_with_other_content_is_refused_and_the_store_keeps_the_first(
    tmp_path: Path, store: Store, cohort: Cohort, make_clam_h5: Make
) -> None:
    store.ingest(tmp_path / "uni")
    path = tmp_path / "uni" / "x10" / "h5_files" / "a.h5"
    make_clam_h5(path, n_patches=len(cohort["a", 10][0]))
    with pytest.raises(DuplicateBagError, match=r"a\.h5: slide a at 10x is in the store with other content.*--store"):
        store.ingest(tmp_path / "uni")
    np.testing.assert_array_equal(store.slide("a").bags[10].features, cohort["a", 10][0].astype(np.float16))


def test_a_touched_but_equal_source_is_accepted(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    store.ingest(tmp_path / "uni")
    os.utime(tmp_path / "uni" / "x10" / "h5_files" / "a.h5", (1, 1))
    assert store.ingest(tmp_path / "uni").n_present == 5


def test_a_copy_of_the_folder_elsewhere_is_accepted(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    store.ingest(tmp_path / "uni")
    for copy in (shutil.copy, shutil.copy2):
        shutil.copytree(tmp_path / "uni", tmp_path / copy.__name__ / "uni", copy_function=copy)
        report = store.ingest(tmp_path / copy.__name__ / "uni")
        assert (report.n_slides, report.n_present) == (0, 5)


def test_other_content_of_the_same_size_elsewhere_is_refused(
    tmp_path: Path, store: Store, cohort: Cohort, make_cohort: Make
) -> None:
    store.ingest(tmp_path / "uni")
    make_cohort(tmp_path / "again" / "uni", SLIDES)  # the same names and sizes, another random draw
    with pytest.raises(DuplicateBagError, match="other content"):
        store.ingest(tmp_path / "again" / "uni")


# --- where a store may lie -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with space", "it's", 'a "quoted" one', "Bücher-日本", "x[1]*", "semi;colon--"])
def test_a_stores_path_may_hold_any_letters(name: str, tmp_path: Path, cohort: Cohort) -> None:
    clinical(tmp_path / "uni" / "c.csv", "p1,a.svs,3,0", "p2,zz.svs,4,1")
    store = cfstore.open(tmp_path / name, create=True)
    store.ingest(tmp_path / "uni")
    assert column(store, "SELECT count(*) AS n FROM bags") == [15]
    assert [row["slide_id"] for row in store.info().labels_without_slide] == ["zz"]
    np.testing.assert_array_equal(store.slide("a").bags[5].features, cohort["a", 5][0].astype(np.float16))


def test_a_store_path_with_a_question_mark_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="DuckDB cannot use a path"):
        cfstore.open(tmp_path / "why?", create=True)
    assert not list(tmp_path.iterdir())


def test_source_names_may_hold_any_letters(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    slides = ("Fall Müller 3", "it's", "100%", 'say "x"')
    make_cohort(tmp_path / "mine", slides, scales=(20,))
    store.ingest(tmp_path / "mine", IngestOptions(encoder="uni"))
    assert column(store, "SELECT slide_id FROM bags ORDER BY 1") == sorted(slides)
    assert all(store.slide(slide).bags[20].n_patches for slide in slides)


def test_an_encoder_named_after_an_odd_folder_asks_for_a_name(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "my features", ("a",), scales=(20,))
    with pytest.raises(SourceError, match=r"encoder 'my features'.*--encoder"):
        store.ingest(tmp_path / "my features")


# --- cohort and patient ----------------------------------------------------------------------------


def owners(store: Store) -> list[tuple[str, str | None, str]]:
    rows = store.sql("SELECT slide_id, patient_id, cohort FROM slides ORDER BY slide_id").to_pylist()
    return [(row["slide_id"], row["patient_id"], row["cohort"]) for row in rows]


def test_without_table_or_option_the_folder_names_the_cohort(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "MYCO", ("a", "TCGA-02-0047-01Z-00-DX1.4755D138"), scales=(20,))
    store.ingest(tmp_path / "MYCO")
    barcode = "TCGA-02-0047"
    assert owners(store) == [(f"{barcode}-01Z-00-DX1.4755D138", barcode, "MYCO"), ("a", None, "MYCO")]


def test_the_cohort_option_stands(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    store.ingest(tmp_path / "uni", IngestOptions(cohort="BLCA"))
    assert {row[2] for row in owners(store)} == {"BLCA"}


def test_the_clinical_table_in_the_folder_names_cohort_and_patients(
    tmp_path: Path, store: Store, cohort: Cohort
) -> None:
    header = "cohort,case_id,slide_id,survival_months,censorship"
    clinical(tmp_path / "uni" / "t.csv", "LUAD,p1,a.svs,3,0", "LUAD,p1,b.svs,3,0", "LUAD,p2,q.svs,4,1", header=header)
    store.ingest(tmp_path / "uni")
    rows = owners(store)
    assert rows[:3] == [("a", "p1", "LUAD"), ("b", "p1", "LUAD"), ("c", None, "uni")]
    info = store.info()
    assert [(row["slide_id"], row["reason"]) for row in info.slides_without_label] == [
        (slide, "no patient known") for slide in "cde"
    ]
    assert [(row["cohort"], row["patient_id"], row["slide_id"]) for row in info.labels_without_slide] == [
        ("LUAD", "p2", "q")
    ]


def test_patients_of_a_table_without_slides_are_missed_by_name(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    clinical(tmp_path / "uni" / "t.csv", "a,3,0", "nobody,4,1", header="patient_id,time_months,event")
    store.ingest(tmp_path / "uni")
    assert [row["patient_id"] for row in store.info().labels_without_slide] == ["nobody"]
    assert owners(store)[0] == ("a", "a", "uni")


def test_an_unlabelled_patient_is_named_as_such(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    clinical(tmp_path / "uni" / "t.csv", *(f"p{s},{s},{'' if s == 'c' else 3},1" for s in SLIDES))
    store.ingest(tmp_path / "uni")
    assert [(row["slide_id"], row["reason"]) for row in store.info().slides_without_label] == [
        ("c", "patient has no follow-up")
    ]


def test_a_cohort_that_cannot_be_a_files_name_is_refused_before_anything_is_written(
    tmp_path: Path, store: Store, make_trident_h5: Make
) -> None:
    make_trident_h5(tmp_path / "my data" / "20x_256px_0px_overlap" / "features_uni" / "a.h5")
    clinical(tmp_path / "my data" / "t.csv", "p1,a.svs,3,0")
    with pytest.raises(SourceError, match=r"cohort 'my data'.*--cohort"):
        store.ingest(tmp_path / "my data")
    assert column(store, "SELECT count(*) AS n FROM bags") == [0]
    store.ingest(tmp_path / "my data", IngestOptions(cohort="MINE"))
    assert owners(store) == [("a", "p1", "MINE")]


@pytest.mark.parametrize("all_present", [True, False])
def test_a_slide_under_another_cohort_is_refused(
    all_present: bool, tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", ("a",), scales=(20,))
    store.ingest(tmp_path / "uni", IngestOptions(cohort="LUAD"))
    if not all_present:
        make_cohort(tmp_path / "uni", ("a",), scales=(10,))
    with pytest.raises(StoreError, match="slide a is in the store with cohort LUAD, not LUSC"):
        store.ingest(tmp_path / "uni", IngestOptions(cohort="LUSC"))
    assert owners(store) == [("a", None, "LUAD")]
    assert column(store, "SELECT scale FROM bags") == [20]


def test_a_cohort_named_too_late_is_refused_rather_than_ignored(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    store.ingest(tmp_path / "uni")
    with pytest.raises(StoreError, match="cohort uni, not LUAD"):
        store.ingest(tmp_path / "uni", IngestOptions(cohort="LUAD"))


def test_a_clinical_table_imported_later_claims_its_slides(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    store.ingest(tmp_path / "uni")
    store.import_clinical(clinical(tmp_path / "t.csv", *(f"p{s},{s}.svs,3,0" for s in SLIDES)), cohort="LUAD")
    assert owners(store) == [(s, f"p{s}", "LUAD") for s in sorted(SLIDES)]


@pytest.mark.parametrize(
    ("slide", "given", "owner"),
    [
        ("TCGA-02-0047-01Z-00-DX1.AB", None, ("TCGA-02-0047", "GBM")),  # barcode that one table knows
        ("TCGA-99-9999-01Z-00-DX1.AB", None, ("TCGA-99-9999", "folder")),  # barcode that none knows
        ("TCGA-99-9999-01Z-00-DX1.AB", "GBM", ("TCGA-99-9999", "GBM")),
        ("case1_A_2", None, ("case1_A", "OWN")),  # the longest patient id that the name starts with
        ("case1_B", None, ("case1", "OWN")),
        ("case10", None, (None, "folder")),  # `case1` is no whole part of it
        ("odd name", None, ("case1", "OWN")),  # as the table lists it
        ("both_1", None, (None, "folder")),  # two cohorts know it: none does
        ("both_1", "GBM", ("both", "GBM")),
    ],
)
def test_patient_and_cohort_follow_the_rules(slide: str, given: str | None, owner: tuple[str | None, str]) -> None:
    patients = [("GBM", "TCGA-02-0047"), ("OWN", "case1"), ("OWN", "case1_A"), ("OWN", "both"), ("GBM", "both")]
    labels = collect(patients, [("OWN", "odd name", "case1")])
    found = Resolver(labels).owner(slide, given, "folder")
    assert (found.patient_id, found.cohort) == owner


# --- what lies beside the features, and what is missing ----------------------------------------------


def test_splits_lying_in_the_folder_are_imported(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    clinical(tmp_path / "uni" / "t.csv", *(f"p{s},{s}.svs,3,0" for s in SLIDES))
    (tmp_path / "uni" / "splits").mkdir()
    (tmp_path / "uni" / "splits" / "splits_0.csv").write_text(",train,val\n0,a,pc\n1,b.svs,pd\n2,pe,\n")
    store.ingest(tmp_path / "uni")
    fold = store.split_set("uni", "splits").folds[0]
    assert (fold.train, fold.val) == ({"pa", "pb", "pe"}, {"pc", "pd"})


def test_splits_of_a_second_cohort_go_to_that_cohort(
    tmp_path: Path, store: Store, cohort: Cohort, make_cohort: Make
) -> None:
    store.ingest(tmp_path / "uni")
    make_cohort(tmp_path / "other", ("x", "y"), scales=(20,))
    (tmp_path / "other" / "splits_0.csv").write_text("train,val\nx,y\n")
    store.ingest(tmp_path / "other")
    assert store.split_names("other") == ["other"]
    assert store.split_names("uni") == []


def test_slides_that_lack_a_scale_are_named_in_plan_and_info(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", ("whole",))
    make_cohort(tmp_path / "uni", ("part",), scales=(20,))
    assert store.plan(tmp_path / "uni").incomplete == {"part": (5, 10)}
    store.ingest(tmp_path / "uni")
    assert store.info().slides_missing_scale == [
        {"cohort": "uni", "encoder": "uni", "slide_id": "part", "missing": [5, 10]}
    ]


def test_a_plan_writes_nothing(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in store.path.rglob("*"))
    plan = store.plan(tmp_path / "uni")
    assert (plan.n_slides, plan.n_present, plan.layout, plan.scales) == (5, 0, "clam", (5, 10, 20))
    assert plan.feature_bytes == sum(features.size * 2 for features, _ in cohort.values())
    assert sorted((path, path.stat().st_mtime_ns) for path in store.path.rglob("*")) == before


def test_the_snapshot_agrees_with_sql_row_for_row(tmp_path: Path, store: Store, cohort: Cohort) -> None:
    clinical(tmp_path / "uni" / "t.csv", "p1,a.svs,3,0", "p2,b.svs,4,1")
    store.ingest(tmp_path / "uni")
    expected = store.sql(
        "SELECT bags.*, slides.cohort, slides.patient_id, patients.* EXCLUDE (cohort, patient_id) FROM bags "
        "JOIN slides USING (slide_id) LEFT JOIN patients USING (cohort, patient_id) "
        "ORDER BY slide_id, encoder, scale"
    )
    snapshot = pq.read_table(store.path / "catalog.parquet")
    assert snapshot.column_names == expected.column_names
    assert snapshot.to_pylist() == expected.to_pylist()
    assert snapshot.num_rows == 15


def test_leaky_folds_lying_in_the_folder_stop_the_ingest_before_anything_is_written(
    tmp_path: Path, store: Store, cohort: Cohort
) -> None:
    clinical(tmp_path / "uni" / "clinical.csv", *(f"P-{slide},{slide}.svs,12,0" for slide in SLIDES))
    folds = tmp_path / "uni" / "splits"
    folds.mkdir()
    (folds / "splits_0.csv").write_text(",train,val\n0,P-a,P-b\n1,P-b,\n")
    with pytest.raises(cfstore.LeakageError, match=r"splits_0\.csv.*P-b"):
        store.ingest(tmp_path / "uni")
    assert bag_rows(store) == []


# --- large slides, in little memory ---------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
import cfstore
store = cfstore.open(sys.argv[1], create=True)
store.ingest(sys.argv[2], cfstore.IngestOptions(dtype=sys.argv[3], format=sys.argv[4]), jobs=1)
[line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(line.split()[1])
"""


@pytest.fixture(scope="module")
def huge_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slide of 60,000 x 1,024 float32, 246 MB, in CLAM's chunks; never whole in memory."""
    folder, rng = tmp_path_factory.mktemp("huge") / "uni", np.random.default_rng(0)
    block = rng.normal(size=(10_000, 1024)).astype(np.float32)
    for scale, n in ((5, 4_000), (20, 60_000)):
        path = folder / f"x{scale}" / "h5_files" / "big.h5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            features = file.create_dataset("features", (n, 1024), "f4", chunks=(32, 1024), maxshape=(None, 1024))
            for start in range(0, n, len(block)):
                features[start : start + len(block)] = block[: n - start]
            file["coords"] = np.zeros((n, 2), np.int32)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("dtype", ["float16", "float16-rounded", "float32", "int8"])
def test_a_slide_of_246_mb_is_ingested_in_less_memory_than_that(
    dtype: str, form: str, tmp_path: Path, huge_slide: Path
) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path / "store"), str(huge_slide), dtype, form]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250_000  # kB; imports alone take about 130,000


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_slide_that_fails_near_its_end_leaves_no_trace_and_the_next_ones_are_right(
    form: Any, dtype: Any, tmp_path: Path, store: Store, make_clam_h5: Make
) -> None:
    rows = {
        (slide, scale): make_clam_h5(tmp_path / "uni" / f"x{scale}" / "h5_files" / f"{slide}.h5", n, 24)
        for slide in ("a", "bad1", "bad2", "c", "d", "z")
        for scale, n in ((5, 33), (20, 9_000 if slide.startswith("bad") else 70))
    }
    for slide in ("bad1", "bad2", "z"):
        with h5py.File(tmp_path / "uni" / "x20" / "h5_files" / f"{slide}.h5", "a") as file:
            file["features"][-1, 3] = np.nan
    report = store.ingest(tmp_path / "uni", IngestOptions(dtype=dtype, format=form), on_error="skip")
    assert [problem.slide_id for problem in report.problems] == ["bad1", "bad2", "z"]
    assert report.n_shards == 1
    found = store.sql("SELECT DISTINCT slide_id FROM bags ORDER BY 1")["slide_id"].to_pylist()
    assert found == ["a", "c", "d"]
    for slide in found:
        for scale, bag in store.slide(slide).bags.items():
            features, coords = rows[slide, scale]
            np.testing.assert_array_equal(bag.coords, coords)
            if dtype == "int8":
                np.testing.assert_allclose(bag.features, features, atol=0.15)
            else:
                np.testing.assert_array_equal(bag.features, features.astype(dtype))
    assert report.stored_bytes < 3 * 103 * (24 * 4 + 8) * 4  # nothing of 18,000 rows that were taken back


def test_int8_keeps_a_zero_of_zeros(tmp_path: Path, store: Store, make_clam_h5: Make) -> None:
    """Features after a ReLU reach down to 0 in every channel; Zarr leaves out chunks that hold nothing else."""
    features = np.abs(np.random.default_rng(3).normal(size=(40, 8))).astype(np.float32)
    features[0] = 0
    make_clam_h5(tmp_path / "uni" / "x20" / "h5_files" / "a.h5", features=features, coords=np.zeros((40, 2), np.int32))
    store.ingest(tmp_path / "uni", IngestOptions(dtype="int8"))
    found = store.slide("a").bags[20].features
    np.testing.assert_allclose(found, features, atol=features.max() / 255 / 2 * 1.01)
    assert store.verify(deep=True).findings == ()
