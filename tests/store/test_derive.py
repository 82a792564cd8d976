"""What models need besides features: computed once, right for each bag, and never of other bags."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from grids import grid

import cfstore
from cfstore import (
    SCALES,
    Derivation,
    IngestOptions,
    NotDerivedError,
    SlideNotFoundError,
    Store,
    StoreError,
    StoreFormatError,
    align,
    derivation,
    patch_edge,
)
from cfstore.cli import main
from cfstore.neighbours import nearest_patches
from cfstore.synth import synthesize

Make = Callable[..., Any]
NEAR, MEAN, UP = Derivation.nearest(20, 3), Derivation.mean(20), Derivation.parents(20, 10)
SIMILAR = Derivation.similar(10, 2)
ALL = (NEAR, MEAN, UP, SIMILAR)
UNI = IngestOptions(encoder="uni")


@pytest.fixture
def filled(tmp_path: Path, store: Store, make_clam_h5: Make) -> Store:
    """Three slides whose grids nest: 8 x 6 patches at 20x, 4 x 3 at 10x, 2 x 2 at 5x."""
    for slide in ("s1", "s2", "s3"):
        for scale, (width, height) in {20: (8, 6), 10: (4, 3), 5: (2, 2)}.items():
            path = tmp_path / "uni" / f"x{scale}" / "h5_files" / f"{slide}.h5"
            make_clam_h5(path, n_patches=width * height, coords=grid(width, height, 256 * 20 // scale))
    store.ingest(tmp_path / "uni")
    return store


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def counts(store: Store) -> dict[str, int]:
    rows = store.sql("SELECT derivation, count(*) AS n FROM derived GROUP BY ALL").to_pylist()
    return {row["derivation"]: row["n"] for row in rows}


# -- what is computed ----------------------------------------------------------------------------


def test_each_array_is_what_it_says_and_has_its_type(filled: Store) -> None:
    report = filled.derive(ALL)
    assert (report.n_done, report.n_held, report.excluded) == (12, 0, {})
    reader = filled.derived(ALL, "uni", ["s1", "s2", "s3"])
    for slide in ("s2", "s3", "s1"):
        bags, found = filled.slide(slide).bags, reader.read(slide)
        assert {kind: (array.shape, array.dtype) for kind, array in found.items()} == {
            NEAR: ((48, 3), np.int32),
            MEAN: ((8,), np.float32),
            UP: ((48,), np.int32),
            SIMILAR: ((12, 2), np.int32),
        }
        assert found[NEAR][0].tolist() == [1, 8, 9]  # right, below, and below right of the corner
        assert found[NEAR][9].tolist() == [1, 8, 10]
        expected = [4 * (n // 8 // 2) + n % 8 // 2 for n in range(48)]
        assert found[UP].tolist() == expected
        np.testing.assert_allclose(found[MEAN], bags[20].features.astype(np.float64).mean(axis=0), rtol=1e-6)
        wide = bags[10].features.astype(np.float64)
        squares = ((wide[:, None] - wide) ** 2).sum(axis=2)
        np.fill_diagonal(squares, np.inf)
        np.testing.assert_array_equal(found[SIMILAR], squares.argsort(axis=1)[:, :2])
        assert reader.nbytes(slide) == sum(array.nbytes for array in found.values())


@pytest.mark.parametrize("form", [IngestOptions(dtype="int8"), IngestOptions(format="webdataset"), IngestOptions()])
def test_large_bags_are_read_in_blocks_and_give_the_same(
    form: IngestOptions, tmp_path: Path, store: Store, make_clam_h5: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_clam_h5(tmp_path / "uni" / "x20" / "h5_files" / "s.h5", n_patches=1000, dim=32)
    store.ingest(tmp_path / "uni", form)
    monkeypatch.setattr("cfstore.derive_job.BLOCK_BYTES", 5000)
    store.derive([MEAN, Derivation.similar(20), Derivation.nearest(20)])
    bag = store.slide("s").bags[20]
    near = Derivation.nearest(20)
    found = store.derived([MEAN, near], "uni", ["s"]).read("s")
    np.testing.assert_allclose(found[MEAN], bag.features.astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-7)
    assert bag.coords is not None
    np.testing.assert_array_equal(found[near], nearest_patches(bag.coords, 8))
    reader = store.reader("uni", [20], ["s"])
    np.testing.assert_array_equal(reader.read_coords("s", 20), bag.coords)
    assert reader.bytes_read == 0
    assert store.verify(deep=True).findings == ()


@pytest.mark.parametrize("layout", ["trident", "clam"])
def test_parents_of_real_slides_are_those_of_align_with_the_edges_it_is_given(
    layout: str, shared: Path, store: Store
) -> None:
    store.ingest(shared / "h5" / layout)
    [encoder] = store.sql("SELECT DISTINCT encoder FROM bags")["encoder"].to_pylist()
    report = store.derive()
    assert report.excluded == {}
    rows = store.sql("SELECT slide_id, scale, patch_size_level0 FROM bags").to_pylist()
    declared = {(row["slide_id"], row["scale"]): row["patch_size_level0"] for row in rows}
    wanted = [Derivation.parents(20, 10), Derivation.parents(10, 5), Derivation.parents(20, 5)]
    ids = sorted({slide for slide, _ in declared})
    reader = store.derived([*wanted, *(Derivation.nearest(scale) for scale in SCALES)], encoder, ids)
    for slide in ids:
        found, bags = reader.read(slide), store.slide(slide).bags
        edges = {scale: declared[slide, scale] or patch_edge(bags[scale].coords) for scale in SCALES}
        for one in wanted:
            expected = align(bags[one.scale].coords, edges[one.scale], bags[one.coarse].coords, edges[one.coarse])
            np.testing.assert_array_equal(found[one], expected.parent)
        used = store.sql(
            f"SELECT fine_edge, coarse_edge FROM derived WHERE slide_id = '{slide}' AND derivation = 'parents-20x-5x'"
        ).to_pylist()
        assert used == [{"fine_edge": float(edges[20]), "coarse_edge": float(edges[5])}]
    assert store.verify(deep=True).findings == ()


def test_slides_without_coordinates_or_a_scale_are_left_out_with_the_reason(
    tmp_path: Path, filled: Store, make_clam_h5: Make
) -> None:
    import torch

    folder = tmp_path / "more" / "x20"
    folder.mkdir(parents=True)
    torch.save(torch.ones(5, 8), folder / "bare.pt")
    filled.ingest(tmp_path / "more", IngestOptions(encoder="uni", scale=20))
    report = filled.derive(ALL)
    assert report.excluded == {"no bag at 10x": ("bare",), "no coordinates at 20x": ("bare",)}
    assert counts(filled) == {NEAR.name: 3, MEAN.name: 4, UP.name: 3, SIMILAR.name: 3}
    assert filled.underived(ALL, "uni", ["bare", "s1"]) == {NEAR: ["bare"], UP: ["bare"], SIMILAR: ["bare"]}


def test_edges_that_nothing_tells_leave_parents_out(tmp_path: Path, store: Store, make_clam_h5: Make) -> None:
    for scale in (10, 20):
        make_clam_h5(tmp_path / "uni" / f"x{scale}" / "h5_files" / "s.h5", 1, coords=np.zeros((1, 2), np.int32))
    store.ingest(tmp_path / "uni")
    [reason] = store.derive([UP]).excluded
    assert reason.startswith("too few patches at 20x and 10x to tell their edges")


# -- once, and of these bags ---------------------------------------------------------------------


def test_nothing_is_computed_twice(filled: Store) -> None:
    filled.derive([NEAR], slide_ids=["s2"])
    first = filled.derive([NEAR, MEAN])
    assert (first.n_done, first.n_held, first.done, first.held) == (5, 1, {NEAR.name: 2, MEAN.name: 3}, {NEAR.name: 1})
    files = sorted(filled.path.glob("derived/*/*/*"))
    second = filled.derive([NEAR, MEAN])
    assert (second.n_done, second.n_held) == (0, 6)
    assert sorted(filled.path.glob("derived/*/*/*")) == files
    assert filled.underived([NEAR, MEAN], "uni", ["s1", "s2"]) == {}


def test_what_is_missing_is_named_with_the_command_that_computes_it(filled: Store) -> None:
    filled.derive([NEAR], slide_ids=["s1"])
    filled.derived([NEAR], "uni", ["s1"])
    with pytest.raises(NotDerivedError) as caught:
        filled.derived([UP, NEAR], "uni", ["s1", "s2"])
    command = f"cfstore derive {NEAR.name} {UP.name} --encoder uni --store {filled.path}"
    assert f"slide s2: {NEAR.name} of encoder uni has not been derived; run `{command}`" in str(caught.value)
    assert invoke(*command.split()[1:]).exit_code == 0
    reader = filled.derived([UP, NEAR], "uni", ["s1", "s2"])
    with pytest.raises(SlideNotFoundError, match="s3"):
        reader.read("s3")


def test_a_slide_that_is_ingested_with_other_patches_is_derived_anew_and_the_others_are_not(
    tmp_path: Path, filled: Store, make_clam_h5: Make
) -> None:
    filled.derive(ALL)
    filled.remove(["s1"])
    assert set(counts(filled).values()) == {2}
    for scale in SCALES:
        make_clam_h5(tmp_path / "new" / f"x{scale}" / "h5_files" / "s1.h5", 9, coords=grid(3, 3, 5120 // scale))
    filled.ingest(tmp_path / "new", UNI)
    assert filled.underived(ALL, "uni", ["s1", "s2"]) == {kind: ["s1"] for kind in sorted(ALL)}
    with pytest.raises(NotDerivedError, match="s1"):
        filled.derived([NEAR], "uni", ["s1"])
    report = filled.derive(ALL)
    assert (report.n_done, report.n_held) == (4, 8)
    assert filled.derived([NEAR], "uni", ["s1"]).read("s1")[NEAR].shape == (9, 3)


def test_the_same_bag_ingested_again_is_known_again(tmp_path: Path, filled: Store) -> None:
    filled.derive(ALL)
    filled.remove(["s1"])
    filled.ingest(tmp_path / "uni", UNI)
    assert filled.underived(ALL, "uni", ["s1", "s2", "s3"]) == {}


def test_other_patch_edges_of_the_source_make_other_parents(
    tmp_path: Path, store: Store, make_trident_h5: Make
) -> None:
    import h5py

    for scale in (10, 20):
        make_trident_h5(tmp_path / "t" / f"{scale}x_256px_0px_overlap" / "features_uni_v1" / "s.h5", scale, 8)
    store.ingest(tmp_path / "t")
    [encoder] = store.sql("SELECT DISTINCT encoder FROM bags")["encoder"].to_pylist()
    store.derive([UP, NEAR])
    store.remove(["s"])
    for path in (tmp_path / "t").rglob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["coords"].attrs["patch_size_level0"] *= 2
    store.ingest(tmp_path / "t")
    assert store.underived([UP, NEAR], encoder, ["s"]) == {UP: ["s"], NEAR: ["s"]}  # the file went with the slide
    store.derive([UP, NEAR])
    assert store.sql("SELECT fine_edge FROM derived WHERE coarse = 10")["fine_edge"].to_pylist() == [512.0]


def test_compaction_keeps_what_was_derived_and_rm_drops_files_that_nobody_needs(
    tmp_path: Path, filled: Store, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "b", ("x", "y"))
    filled.ingest(tmp_path / "b", UNI)
    filled.derive([NEAR], slide_ids=["s1", "s2", "s3"])
    filled.derive([NEAR], slide_ids=["x", "y"])
    reader = filled.derived([NEAR], "uni", ["s1", "x"])
    before = {slide: reader.read(slide)[NEAR].tolist() for slide in ("s1", "x")}
    assert len(list(filled.path.glob("derived/*/*/*.parquet"))) == 2
    filled.remove(["s2", "y"])
    filled.compact()
    assert len(list(filled.path.glob("derived/*/*/*.parquet"))) == 2
    after = filled.derived([NEAR], "uni", ["s1", "x"])
    assert {slide: after.read(slide)[NEAR].tolist() for slide in ("s1", "x")} == before
    filled.remove(["x"])
    assert len(list(filled.path.glob("derived/*/*/*.parquet"))) == 1
    assert filled.verify(deep=True).findings == ()


def test_another_version_of_an_algorithm_computes_everything_of_its_kind_anew(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.derive([NEAR, MEAN])
    monkeypatch.setitem(derivation.VERSIONS, "nearest", 2)
    assert filled.underived([NEAR, MEAN], "uni", ["s1", "s2", "s3"]) == {NEAR: ["s1", "s2", "s3"]}
    assert filled.derive([NEAR, MEAN]).done == {NEAR.name: 3}
    assert filled.sql("SELECT DISTINCT version FROM derived WHERE k = 3")["version"].to_pylist() == [2]
    filled.compact()
    assert len(list(filled.path.glob("derived/uni/nearest3-20x/*"))) == 1


def test_work_done_twice_is_listed_once(filled: Store) -> None:
    filled.derive([NEAR])
    [path] = filled.path.glob("derived/uni/*/*.parquet")
    shutil.copy(path, path.with_name("0000000000000000.parquet"))
    assert filled.derive([NEAR]).n_held == 3
    assert counts(filled) == {NEAR.name: 3}
    filled.derived([NEAR], "uni", ["s1"]).read("s1")
    filled.compact()
    assert len(list(filled.path.glob("derived/uni/*/*.parquet"))) == 1


def test_a_reader_may_be_used_by_many_threads(filled: Store) -> None:
    filled.derive(ALL)
    reader = filled.derived(ALL, "uni", ["s1", "s2", "s3"])
    expected = {slide: filled.derived(ALL, "uni", [slide]).read(slide) for slide in ("s1", "s2", "s3")}
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(20):
            slide = f"s{1 + (number + turn) % 3}"
            found = reader.read(slide)
            if any(not np.array_equal(found[kind], expected[slide][kind]) for kind in ALL):
                wrong.append(slide)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- the catalog ---------------------------------------------------------------------------------


def test_reindex_finds_everything_again(filled: Store) -> None:
    filled.derive(ALL)
    filled.prototypes("uni", 20, ["s1", "s2"], 3)
    queries = ("SELECT * FROM derived ORDER BY ALL", "SELECT * FROM prototypes ORDER BY ALL")
    before = [filled.sql(query).to_pylist() for query in queries]
    assert len(before[0]) == 12
    for name in ("catalog.duckdb", "catalog.parquet"):
        (filled.path / name).unlink()
    filled.reindex()
    assert [filled.sql(query).to_pylist() for query in queries] == before
    assert filled.verify().findings == ()


def drop_new_tables(store: Store) -> None:
    """The catalog as a version made it that knew nothing of derived files."""
    with duckdb.connect(store.path / "catalog.duckdb") as connection:
        for table in ("derived", "prototypes", *(f"internal.{name}" for name in cfstore.derived_tables.INTERNAL)):
            connection.execute(f"DROP TABLE {table}")


def test_a_catalog_from_before_is_read_and_upgraded_when_it_is_next_written(filled: Store) -> None:
    drop_new_tables(filled)
    store = cfstore.open(filled.path)
    assert store.sql("SELECT * FROM derived").num_rows == 0
    assert store.sql("SELECT key FROM prototypes").num_rows == 0
    assert store.info().derived == []
    assert store.underived([NEAR], "uni", ["s1"]) == {NEAR: ["s1"]}
    assert store.slide("s1").bags[20].n_patches == 48
    assert store.verify(deep=True).findings == ()
    with pytest.raises(NotDerivedError):
        store.derived([NEAR], "uni", ["s1"])
    assert store.compact().n_shards_after == 1
    assert store.derive([NEAR]).n_done == 3
    assert counts(store) == {NEAR.name: 3}
    assert store.verify(deep=True).findings == ()


def test_an_upgraded_catalog_lists_the_same_as_one_made_anew(filled: Store) -> None:
    filled.derive(ALL)
    before = filled.sql("SELECT * FROM derived ORDER BY ALL").to_pylist()
    drop_new_tables(filled)
    assert {finding.shard for finding in filled.verify().findings} == {"catalog.duckdb"}
    filled.compact()
    assert filled.sql("SELECT * FROM derived ORDER BY ALL").to_pylist() == before


# -- verify --------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [pytest.param(400, marks=pytest.mark.slow), 12])
def test_a_flipped_byte_of_a_derived_file_is_found_or_harmless(places: int, filled: Store) -> None:
    """Found by verify, or every array still is what it was: padding and statistics nobody reads."""
    filled.derive([NEAR])
    [path] = filled.path.glob("derived/uni/*/*.parquet")
    content = path.read_bytes()
    slides = ["s1", "s2", "s3"]
    expected = [filled.derived([NEAR], "uni", slides).read(slide)[NEAR].tolist() for slide in slides]
    found = 0
    for place in range(0, len(content), max(1, len(content) // places)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        if filled.verify().findings:
            found += 1
            continue
        reader = filled.derived([NEAR], "uni", slides)
        assert [reader.read(slide)[NEAR].tolist() for slide in slides] == expected, place
    assert found > places // 3
    path.write_bytes(content)
    assert filled.verify().findings == ()


def test_damage_is_named_by_slide_and_gone_after_deleting_and_deriving(filled: Store) -> None:
    filled.derive([NEAR])
    [path] = filled.path.glob("derived/uni/*/*.parquet")
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(2)
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 16
    path.write_bytes(content)
    [finding] = filled.verify().findings
    slides = ("s1", "s2", "s3")
    assert finding.slide_id == slides[1]
    assert "delete it" in finding.message
    with pytest.raises(StoreFormatError, match="delete it"):
        filled.derived([NEAR], "uni", slides).read("s2")
    shown = invoke("verify", "--store", filled.path)
    assert (shown.exit_code, str(path.name) in shown.stdout) == (1, True)
    path.unlink()
    with pytest.raises(NotDerivedError, match="is gone"):
        filled.derived([NEAR], "uni", slides).read("s2")
    assert filled.derive([NEAR]).n_done == 3
    assert filled.verify(deep=True).findings == ()


def test_values_that_the_bags_do_not_give_are_found_deeply(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfstore.derive_job.nearest_patches", lambda coords, k: np.zeros((len(coords), k), np.int32))
    filled.derive([NEAR, MEAN])
    monkeypatch.undo()
    assert filled.verify().findings == ()
    assert {finding.slide_id for finding in filled.verify(deep=True).findings} == {"s1", "s2", "s3"}


# -- processes, tars, the command ----------------------------------------------------------------


@pytest.mark.slow
def test_several_processes_give_what_one_gives(filled: Store, tmp_path: Path) -> None:
    shutil.copytree(filled.path, tmp_path / "copy")
    other = cfstore.open(tmp_path / "copy")
    seen: list[tuple[int, int]] = []
    assert filled.derive(ALL, jobs=2, progress=lambda done, total: seen.append((done, total))).n_done == 12
    assert sorted(seen) == [(1, 3), (2, 3), (3, 3)]
    other.derive(ALL, jobs=1)
    query = "SELECT slide_id, derivation, digest, source FROM derived ORDER BY ALL"
    assert filled.sql(query).to_pylist() == other.sql(query).to_pylist()


@pytest.mark.slow
def test_commands_that_derive_the_same_at_once_do_each_other_no_harm(filled: Store) -> None:
    code = "import sys; from cfstore.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", code, "derive", "--store", str(filled.path), "--jobs", "1"]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all("Error" not in process.communicate()[0] for process in running)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert set(counts(filled).values()) == {3}
    assert filled.derive().n_done == 0
    assert filled.verify(deep=True).findings == ()
    filled.compact()
    assert len(list(filled.path.glob("derived/*/*/*.parquet"))) == 9
    assert filled.derive().n_done == 0


def test_tars_opened_by_themselves_say_what_to_do(tmp_path: Path, filled: Store) -> None:
    filled.export(tmp_path / "tars")
    tars = cfstore.open_tars(tmp_path / "tars")
    for call in (
        lambda: tars.derive([NEAR]),
        lambda: tars.derived([NEAR], "uni", ["s1"]),
        lambda: tars.underived([NEAR], "uni", ["s1"]),
        lambda: tars.prototypes("uni", 20, ["s1"], 2),
    ):
        with pytest.raises(StoreError, match="`cfstore ingest` makes a store"):
            call()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("derive")
    synthesize(base / "h5", slides=12, patches=32, dim=8, seed=5)
    assert invoke("ingest", base / "h5", "--store", base / "store", "--encoder", "toy").exit_code == 0
    return base / "store"


def test_without_a_name_everything_cheap_is_derived_and_said(demo: Path) -> None:
    done = invoke("derive", "--store", demo)
    assert done.exit_code == 0, done.output
    store = cfstore.open(demo)
    names = ["mean-10x", "mean-20x", "mean-5x", "nearest8-10x", "nearest8-20x", "nearest8-5x",
             "parents-10x-5x", "parents-20x-10x", "parents-20x-5x"]  # fmt: skip
    assert counts(store) == dict.fromkeys(names, 12)
    assert "derived    nearest8-20x: 12 slides" in done.stdout
    again = invoke("derive", "--store", demo, "--json")
    report = json.loads(again.stdout)
    assert (report["n_done"], report["n_held"]) == (0, 9 * 12)
    assert "nothing to compute: all of it is in the store already" in again.stderr
    shown = invoke("info", "--store", demo).stdout
    assert "parents-20x-5x" in shown


def test_prototypes_of_every_fold_are_of_its_training_slides_alone(demo: Path) -> None:
    done = invoke("derive", "--prototypes", 4, "--splits", "splits", "--store", demo, "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)["prototypes"]
    store = cfstore.open(demo)
    cohort = store.cohort("DEMO", scales=[20])
    for row in made:
        train = store.split_set("DEMO", "splits").folds[row["fold"]].train
        ids = [slide.slide_id for slide in cohort.slides if slide.patient_id in train]
        assert row["n_slides"] == len(ids) < 12
        n_rows = len(store.sql("SELECT * FROM prototypes"))
        assert store.prototypes("toy", 20, ids, 4).shape == (4, 8)
        assert len(store.sql("SELECT * FROM prototypes")) == n_rows  # it was there


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nearest-20x"], 1, "there are nearest8-20x, similar8-20x"),
        (["mean-20x", "--encoder", "uni"], 1, "it has toy"),
        (["mean-20x", "--cohort", "NOPE"], 1, "NOPE"),
        (["--splits", "splits"], 2, "--prototypes"),
        (["--prototypes", "3", "--splits", "nope"], 1, "nope"),
        (["--prototypes", "100000"], 1, "name fewer prototypes or more slides"),
        (["--prototypes", "0"], 2, "--prototypes"),
    ],
)
def test_what_is_wrong_is_said_with_an_exit_code(arguments: list[str], code: int, message: str, demo: Path) -> None:
    done = invoke("derive", *arguments, "--store", demo)
    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert "Traceback" not in done.output
