"""What was derived counts for the bags it was derived of, whoever writes to the store and whatever else lies there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from grids import grid

import cfstore
from cfstore import (
    Derivation,
    DerivationError,
    IngestOptions,
    NotDerivedError,
    SlideNotFoundError,
    Store,
    StoreBusyError,
    StoreFormatError,
    catalog,
    derived_tables,
    prototypes,
)
from cfstore.catalog import editing
from cfstore.catalog.internal import create_tables
from cfstore.cli import main
from cfstore.derive_job import patch_edges
from cfstore.derived_files import DerivedFile, read_file
from cfstore.errors import StoreWriteError
from cfstore.neighbours import similar_patches
from cfstore.shards.files import BLANK_DIGEST, sign
from cfstore.types import Bag

Make = Callable[..., Any]
NEAR, MEAN, UP = Derivation.nearest(20, 3), Derivation.mean(20), Derivation.parents(20, 10)
UNI = IngestOptions(encoder="uni")


@pytest.fixture
def filled(tmp_path: Path, store: Store, make_clam_h5: Make) -> Store:
    """Two slides, 8 x 8 patches at 20x and 4 x 4 at 10x."""
    for slide in ("s1", "s2"):
        for scale in (20, 10):
            path = tmp_path / "uni" / f"x{scale}" / "h5_files" / f"{slide}.h5"
            make_clam_h5(
                path, n_patches=(2 * scale // 5) ** 2, coords=grid(2 * scale // 5, 2 * scale // 5, 5120 // scale)
            )
    store.ingest(tmp_path / "uni")
    return store


@contextmanager
def an_older_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Knows nothing of derived files, as cfstore did not before it had them."""
    with monkeypatch.context() as patch:
        for name in ("load", "follow", "follow_slides"):
            patch.setattr(derived_tables, name, lambda *_: None)
        patch.setattr(derived_tables, "is_behind", lambda *_: False)
        patch.setattr(editing, "published_files", lambda root: sorted(file_names(root)))
        yield


def file_names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.glob("derived/*/*/*.parquet")}


def ingest_other_values(store: Store, base: Path, make_clam_h5: Make) -> None:
    store.remove(["s1"])
    for scale in (20, 10):
        make_clam_h5(base / f"x{scale}" / "h5_files" / "s1.h5", 9, coords=grid(3, 3, 5120 // scale))
    store.ingest(base, UNI)


def test_rows_that_an_older_version_left_behind_do_not_count(
    tmp_path: Path, filled: Store, make_clam_h5: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.derive([NEAR])
    with an_older_version(monkeypatch):
        ingest_other_values(filled, tmp_path / "new", make_clam_h5)
    behind = filled.sql("SELECT n_rows FROM derived WHERE slide_id = 's1'")["n_rows"].to_pylist()
    assert behind == [64]  # the bag has 9
    assert filled.underived([NEAR], "uni", ["s1", "s2"]) == {NEAR: ["s1"]}
    assert [row["n_slides"] for row in filled.info().derived] == [1]
    with pytest.raises(NotDerivedError, match="slide s1"):
        filled.derived([NEAR], "uni", ["s1"])
    assert filled.derive([NEAR]).done == {NEAR.name: 1}
    assert filled.sql("SELECT n_rows FROM derived ORDER BY slide_id")["n_rows"].to_pylist() == [9, 64]
    assert filled.verify(deep=True).findings == ()


def test_the_next_command_that_writes_mends_what_an_older_version_left_behind(
    tmp_path: Path, filled: Store, make_clam_h5: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.derive([NEAR])
    filled.prototypes("uni", 20, ["s1", "s2"], 3)
    with an_older_version(monkeypatch):
        ingest_other_values(filled, tmp_path / "new", make_clam_h5)
    filled.remove(["s2"])
    assert filled.sql("SELECT * FROM derived").num_rows == 0
    assert filled.sql("SELECT * FROM prototypes").num_rows == 0
    assert filled.verify().findings == ()


def test_open_readers_keep_to_the_bags_they_were_made_for_or_say_that_these_are_gone(
    tmp_path: Path, filled: Store, make_clam_h5: Make
) -> None:
    filled.derive([NEAR])
    derived, bags = filled.derived([NEAR], "uni", ["s1", "s2"]), filled.reader("uni", [20], ["s1", "s2"])
    of_one = filled.derived([NEAR], "uni", ["s1"])
    ingest_other_values(filled, tmp_path / "new", make_clam_h5)
    filled.derive([NEAR])
    assert len(derived.read("s1")[NEAR]) == 64  # its file holds s2 too
    filled.compact()
    with pytest.raises(SlideNotFoundError, match=r"slide s1: .* other values"):
        bags.read("s1")
    assert bags.read("s2").bags[20].n_patches == 64
    for path in filled.path.glob("derived/uni/*/*.parquet"):
        path.unlink()
    filled.derive([NEAR])
    with pytest.raises(NotDerivedError, match=r"slide s1 .* other values .* start again with a new one"):
        of_one.read("s1")
    assert len(derived.read("s2")[NEAR]) == 64


# -- patch edges ---------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [0, -512])
def test_a_declared_edge_that_is_none_counts_as_not_declared(
    declared: int, tmp_path: Path, store: Store, make_trident_h5: Make
) -> None:
    for scale in (10, 20):
        folder = tmp_path / "t" / f"{scale}x_256px_0px_overlap" / "features_uni_v1"
        make_trident_h5(folder / "s.h5", scale, (2 * scale // 5) ** 2)
        with h5py.File(folder / "s.h5", "r+") as file:
            file["coords"][:] = grid(2 * scale // 5, 2 * scale // 5, 5120 // scale)
            file["coords"].attrs["patch_size_level0"] = declared
    store.ingest(tmp_path / "t")
    assert store.derive([UP]).n_done == 1
    edges = store.sql("SELECT fine_edge, coarse_edge FROM derived").to_pylist()
    assert edges == [{"fine_edge": 256.0, "coarse_edge": 512.0}]
    assert store.verify(deep=True).findings == ()


def test_of_few_patches_the_scale_that_lies_closest_says_the_edges() -> None:
    """Four patches at 20x with gaps of one patch: their spacing, 512, is twice their edge."""
    places = {20: grid(2, 2, 512), 10: grid(3, 3, 512)}
    assert patch_edges(places, {}) == {20: 256.0, 10: 512.0}
    assert patch_edges({20: grid(2, 2, 256), 10: grid(2, 2, 1024)}, {}) == {20: 256.0, 10: 512.0}


# -- prototypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StoreBusyError("busy"), StoreFormatError("catalog.duckdb: cannot be read")])
def test_prototypes_that_cannot_be_kept_are_given_all_the_same(
    error: Exception, filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(root: Path) -> None:
        raise error

    kept = filled.prototypes("uni", 20, ["s1"], 3)
    [path] = filled.path.glob("derived/uni/prototypes*/*.parquet")
    path.unlink()
    monkeypatch.setattr(catalog, "reconcile", refuse)
    np.testing.assert_array_equal(filled.prototypes("uni", 20, ["s1"], 3), kept)
    assert file_names(filled.path) == set()


def test_prototypes_of_bags_that_change_while_they_are_read_are_refused(
    tmp_path: Path, filled: Store, make_clam_h5: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = prototypes.sample_patches

    def sample_others(*arguments: Any) -> Any:
        ingest_other_values(filled, tmp_path / "new", make_clam_h5)
        return sample(*arguments)

    monkeypatch.setattr(prototypes, "sample_patches", sample_others)
    with pytest.raises(DerivationError, match="s1: ingested with other values"):
        filled.prototypes("uni", 20, ["s1", "s2"], 3)
    assert file_names(filled.path) == set()


# -- files that cannot be read, stores that cannot be written --------------------------------------


def test_a_file_that_cannot_be_read_stops_no_command_and_verify_names_it(
    tmp_path: Path, filled: Store, make_clam_h5: Make
) -> None:
    filled.derive([NEAR])
    stray = filled.path / "derived" / "uni" / NEAR.name / "stray.parquet"
    stray.write_bytes(b"PAR1 cut short")
    ingest_other_values(filled, tmp_path / "new", make_clam_h5)
    assert filled.derive([NEAR]).done == {NEAR.name: 1}
    filled.reindex()
    filled.compact()
    assert filled.underived([NEAR], "uni", ["s1", "s2"]) == {}
    [finding] = filled.verify().findings
    assert (finding.shard, "delete it" in finding.message) == (stray.relative_to(filled.path).as_posix(), True)


def test_derive_names_the_files_that_it_ignores(filled: Store) -> None:
    assert filled.derive([NEAR]).unread == {}
    folder = filled.path / "derived" / "uni" / NEAR.name
    names = [f"stray{number}.parquet" for number in range(9)]
    for name in names:
        (folder / name).write_bytes(b"PAR1 cut short")
    for derivation in (MEAN, MEAN):  # one run that writes, and one that finds all of it there
        report = filled.derive([derivation])
        assert [Path(file).name for file in report.unread] == names
        for file, reason in report.unread.items():
            assert reason.startswith(f"{filled.path / file}: damaged")
            assert "delete it" in reason
    said = CliRunner().invoke(main, ["derive", MEAN.name, "--store", str(filled.path)]).output
    ignored = [line for line in said.splitlines() if line.startswith("ignored    ")]
    assert f"{folder / 'stray0.parquet'}: damaged" in ignored[0]
    n_named = len([line for line in ignored if "stray" in line])
    assert ignored[-1].startswith(f"ignored    {9 - n_named} more such files")
    told = CliRunner().invoke(main, ["derive", MEAN.name, "--store", str(filled.path), "--json"]).stdout
    assert [Path(file).name for file in json.loads(told)["unread"]] == names


def test_files_that_are_whole_and_only_not_registered_yet_are_not_called_unreadable(filled: Store) -> None:
    filled.derive([NEAR])
    [path] = filled.path.glob("derived/uni/*/*.parquet")
    shutil.copy(path, path.with_name("again.parquet"))
    assert filled.derive([NEAR]).unread == {}


def test_a_file_of_a_newer_version_is_not_called_damaged(filled: Store) -> None:
    filled.derive([NEAR])
    [path] = filled.path.glob("derived/uni/*/*.parquet")
    table, metadata = pq.read_table(path), pq.ParquetFile(path).metadata.metadata
    about = json.loads(metadata[b"cfstore.derived"]) | {"format": 99, "signature": BLANK_DIGEST}
    pq.write_table(table.replace_schema_metadata({"cfstore.derived": sign(json.dumps(about))}), path)
    [finding] = filled.verify().findings
    assert "written by a newer version of cfstore" in finding.message
    assert "damaged" not in finding.message


def test_where_nothing_is_missing_a_store_that_cannot_be_written_will_do(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.derive([NEAR, MEAN])

    def refuse(root: Path) -> None:
        raise StoreWriteError(f"{root}: read-only")

    monkeypatch.setattr("cfstore.derive.prepare", refuse)
    assert filled.derive([NEAR, MEAN]).n_held == 4
    with pytest.raises(StoreWriteError):
        filled.derive([UP])


def test_a_slide_whose_bags_change_while_it_is_computed_is_not_counted(
    tmp_path: Path, filled: Store, make_clam_h5: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearest = cfstore.derive_job.nearest_patches

    def nearest_after_a_change(coords: Any, k: int) -> Any:
        monkeypatch.setattr("cfstore.derive_job.nearest_patches", nearest)
        ingest_other_values(filled, tmp_path / "new", make_clam_h5)
        return nearest(coords, k)

    monkeypatch.setattr("cfstore.derive_job.nearest_patches", nearest_after_a_change)
    report = filled.derive([NEAR], jobs=1)
    assert report.done == {NEAR.name: 1}
    assert report.excluded == {"its bags changed meanwhile; run this again": ("s1",)}
    [file] = file_names(filled.path)
    held = read_file(filled.path, file)
    assert isinstance(held, DerivedFile)
    # these bytes are in files that were written earlier
    marked = [entry.slide_id for entry in held.entries if entry.source == "its bags changed meanwhile; run this again"]
    assert marked == ["s1"]
    assert filled.underived([NEAR], "uni", ["s1", "s2"]) == {NEAR: ["s1"]}


def test_a_seed_without_prototypes_is_refused(filled: Store) -> None:
    done = CliRunner().invoke(main, ["derive", "--seed", "3", "--store", str(filled.path)])
    assert (done.exit_code, "--prototypes" in done.output) == (2, True)


def test_minus_zero_is_zero_among_similar_patches() -> None:
    """All at distance 0 of each other: the first rows are the neighbours."""
    features = np.zeros((6, 4), np.float16)
    features[::2] = -0.0
    found = similar_patches(Bag(features, None), 2)
    assert found.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]


def test_fifty_thousand_rows_are_behind_until_they_are_listed_and_not_after(tmp_path: Path) -> None:
    with duckdb.connect(tmp_path / "c.duckdb") as connection:
        create_tables(connection)
        assert not derived_tables.is_behind(connection)
        connection.execute(
            "INSERT INTO bags BY NAME SELECT 's' || n AS slide_id, 'uni' AS encoder, 20 AS scale, 'd' || n AS digest "
            "FROM range(50000) AS t(n)"
        )
        connection.execute(
            "INSERT INTO internal.derivations BY NAME SELECT 's' || n AS slide_id, 'uni' AS encoder, 20 AS scale, "
            "'mean-20x' AS derivation, 1 AS version, 'd' || n AS source, 'f' AS file, n AS row_group "
            "FROM range(50000) AS t(n)"
        )
        assert derived_tables.is_behind(connection)
        connection.execute(f"INSERT INTO derived BY NAME {derived_tables.derived_now()}")
        assert connection.execute("SELECT count(*) FROM derived").fetchall() == [(50000,)]
        assert not derived_tables.is_behind(connection)
