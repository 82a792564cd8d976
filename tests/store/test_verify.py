"""A flipped bit anywhere in a shard is found and named by slide; a store that is whole passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import cfstore
from cfstore import IngestOptions, Store, StoreFormatError
from cfstore.cli import main
from cfstore.shards import published_shards, stored_checks

Make = Callable[..., Any]
SLIDES = ("s1", "s2", "s3")
KINDS = {
    "none": IngestOptions(codec="none"),
    "blosc-zstd": IngestOptions(codec="blosc-zstd"),
    "int8": IngestOptions(dtype="int8"),
    "tar": IngestOptions(format="webdataset"),
    "int8 tar": IngestOptions(dtype="int8", format="webdataset"),
}


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path: Path, store: Store, make_cohort: Make) -> Store:
    """A store of one shard of each kind."""
    make_cohort(tmp_path / "uni", SLIDES)
    store.ingest(tmp_path / "uni", KINDS[request.param])
    return store


@pytest.fixture
def plain(tmp_path: Path, store: Store, make_cohort: Make) -> Store:
    make_cohort(tmp_path / "uni", SLIDES)
    store.ingest(tmp_path / "uni")
    return store


def shard_of(store: Store) -> Path:
    [shard] = published_shards(store.path)
    return store.path / shard


def files_of(shard: Path) -> list[Path]:
    return [shard] if shard.is_file() else sorted(path for path in shard.rglob("*") if path.is_file())


def named(store: Store) -> set[str | None]:
    return {finding.slide_id for finding in store.verify().findings}


def is_noticed(store: Store) -> bool:
    """What `verify` asks of a shard's bytes, without the catalog: quick enough for every byte of a file."""
    [shard] = published_shards(store.path)
    try:
        return any(check.look() for check in stored_checks(store.path, shard))
    except StoreFormatError:
        return True


def flips(path: Path, most: int, seed: int) -> Iterator[int]:
    """The file with one bit turned over, at each byte or at `most` random ones; whole again afterwards."""
    whole = path.read_bytes()
    rng = np.random.default_rng(seed)
    places = range(len(whole)) if len(whole) <= most else np.sort(rng.choice(len(whole), most, replace=False))
    for place in map(int, places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        yield place
    path.write_bytes(whole)


# --- every byte of a shard --------------------------------------------------------------------------


@pytest.mark.parametrize("most", [150, pytest.param(20_000, marks=pytest.mark.slow, id="every byte")])
def test_one_flipped_bit_anywhere_is_noticed(most: int, kept: Store) -> None:
    for path in files_of(shard_of(kept)):
        unnoticed = [place for place in flips(path, most, seed=1) if not is_noticed(kept)]
        assert not unnoticed, f"{path.name}: {unnoticed[:10]}"
    assert not is_noticed(kept)


def test_one_flipped_bit_is_named_by_slide_and_mended_it_is_gone(kept: Store) -> None:
    for path in files_of(shard_of(kept)):
        for place in flips(path, 1, seed=2):
            assert named(kept) & set(SLIDES), f"{path.name}: {place}"
    assert kept.verify(deep=True).findings == ()


@pytest.mark.slow
def test_flipped_bits_are_named_by_slide_at_many_places(kept: Store) -> None:
    for path in files_of(shard_of(kept)):
        for place in flips(path, 4, seed=3):
            assert named(kept) & set(SLIDES), f"{path.name}: {place}"


def test_only_the_slide_that_is_damaged_is_named(kept: Store) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{kept.path / 'catalog.duckdb'}' AS s (READ_ONLY)")
        places = connection.execute(
            "SELECT slide_id, byte_start FROM s.bags WHERE scale = 20 ORDER BY slide_id"
        ).fetchall()
    shard = shard_of(kept)
    path = shard if shard.is_file() else shard / "features/c/0/0"
    whole = path.read_bytes()
    for slide_id, start in places:
        damaged = bytearray(whole)
        damaged[start] ^= 1
        path.write_bytes(damaged)
        assert named(kept) == {slide_id}


# --- the shard as a whole ---------------------------------------------------------------------------


def test_a_file_cut_short_missing_or_added_is_found(kept: Store) -> None:
    shard = shard_of(kept)
    for path in files_of(shard):
        whole = path.read_bytes()
        for content in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
            path.write_bytes(content)
            assert is_noticed(kept), f"{path.name}: {len(content)} of {len(whole)} bytes"
        path.unlink()
        assert named(kept) == set(SLIDES), f"{path.name} is missing"
        path.write_bytes(whole)
    if shard.is_dir():
        for name in ("notes.txt", "features/c/0/1", "features/.zarr.json.swp"):
            (shard / name).write_bytes(b"")
            [message] = {finding.message for finding in kept.verify().findings}
            assert f"{name}: not written by cfstore" in message
            (shard / name).unlink()
    assert kept.verify().findings == ()


def test_a_missing_shard_is_said_of_each_slide(kept: Store) -> None:
    shard = shard_of(kept)
    shard.rename(kept.path / "elsewhere")
    findings = kept.verify().findings
    assert {finding.slide_id for finding in findings} >= set(SLIDES)
    assert any("the shard is missing; restore it" in finding.message for finding in findings)


def test_a_shard_of_another_store_in_its_place_is_found(tmp_path: Path, kept: Store, make_cohort: Make) -> None:
    shard = shard_of(kept)
    kind = "webdataset" if shard.is_file() else "zarr"
    other = cfstore.open(tmp_path / "other", create=True)
    make_cohort(tmp_path / "uni2", SLIDES)
    other.ingest(tmp_path / "uni2", IngestOptions(encoder="uni", format=kind))  # type: ignore[arg-type]
    shard.rename(tmp_path / "aside")
    shutil.move(shard_of(other), shard)
    assert named(kept) >= set(SLIDES)
    assert any("otherwise than the shard" in finding.message for finding in kept.verify().findings)


def test_a_link_out_of_the_shard_is_found(kept: Store, tmp_path: Path) -> None:
    for path in files_of(shard_of(kept)):
        aside = tmp_path / "aside"
        path.rename(aside)
        path.symlink_to(aside)
        assert named(kept) >= set(SLIDES), path.name
        path.unlink()
        aside.rename(path)


def test_a_shard_that_is_not_in_the_catalog_is_found(tmp_path: Path, plain: Store, make_cohort: Make) -> None:
    before = (plain.path / "catalog.duckdb").read_bytes()
    make_cohort(tmp_path / "more", ("s4",))
    plain.ingest(tmp_path / "more", IngestOptions(encoder="uni"))
    (plain.path / "catalog.duckdb").write_bytes(before)
    findings = plain.verify().findings
    assert any(f.slide_id == "s4" and "not in the catalog; `cfstore reindex`" in f.message for f in findings)
    plain.reindex()
    assert plain.verify().findings == ()


# --- the catalog ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE bags SET n_patches = n_patches + 1 WHERE slide_id = 's2' AND scale = 5",
        "UPDATE bags SET max_abs_error = 0 WHERE slide_id = 's2'",
        "UPDATE bags SET digest = 'xxh3-128:0' WHERE slide_id = 's2'",
        "DELETE FROM bags WHERE slide_id = 's2'",
        "INSERT INTO bags SELECT * FROM bags WHERE slide_id = 's2' AND scale = 5",
        "INSERT INTO bags BY NAME SELECT * REPLACE ('s2b' AS slide_id) FROM bags WHERE slide_id = 's2'",
        "UPDATE slides SET patient_id = 'somebody' WHERE slide_id = 's2'",
        "UPDATE internal.extents SET byte_start = byte_start + 1 WHERE slide_id = 's2'",
        "UPDATE internal.extents SET digests = NULL WHERE slide_id = 's2'",
        "DELETE FROM internal.extents WHERE slide_id = 's2'",
        "UPDATE internal.shard_slides SET cohort = 'X' WHERE slide_id = 's2'",
    ],
)
def test_a_changed_row_of_the_catalog_is_named_and_reindex_mends_it(tampering: str, plain: Store) -> None:
    with duckdb.connect(plain.path / "catalog.duckdb") as connection:
        connection.execute(tampering)
    findings = plain.verify().findings
    assert {finding.slide_id for finding in findings} & {"s2", "s2b"}
    assert all("`cfstore reindex`" in finding.message for finding in findings)
    plain.reindex()
    assert plain.verify().findings == ()


@pytest.mark.parametrize(
    "tampering",
    [
        "INSERT INTO patients (cohort, patient_id) VALUES ('uni', 'p9')",
        "INSERT INTO splits VALUES ('uni', 'x', 0, 'p', 'train')",
        "UPDATE internal.shards SET chunk_rows = 3",
        "ALTER TABLE bags ADD COLUMN mine INTEGER",
        "DROP TABLE internal.extents",
    ],
)
def test_a_changed_table_of_the_catalog_is_found(tampering: str, plain: Store) -> None:
    with duckdb.connect(plain.path / "catalog.duckdb") as connection:
        connection.execute(tampering)
    try:
        said = [finding.message for finding in plain.verify().findings]
    except StoreFormatError as error:
        said = [str(error)]
    assert said
    assert all("`cfstore reindex`" in message for message in said)
    plain.reindex()
    assert plain.verify().findings == ()


def test_flipped_bits_of_catalog_and_snapshot_never_go_by_with_a_traceback(plain: Store) -> None:
    for name in ("catalog.duckdb", "catalog.parquet"):
        for _ in flips(plain.path / name, 6, seed=4):
            result = CliRunner().invoke(main, ["verify", "--store", str(plain.path)])
            assert result.exit_code == 0 or "`cfstore reindex`" in result.output, result.exception
    assert plain.verify().findings == ()


def test_a_changed_snapshot_is_found(plain: Store) -> None:
    snapshot = plain.path / "catalog.parquet"
    duckdb.sql(
        f"COPY (SELECT * REPLACE (n_patches + 1 AS n_patches) FROM '{snapshot}') TO '{snapshot}.new' (FORMAT parquet)"
    )
    Path(f"{snapshot}.new").replace(snapshot)
    assert named(plain) == set(SLIDES)
    snapshot.unlink()
    [finding] = plain.verify().findings
    assert "catalog.parquet: not what shards and tables/ say; `cfstore reindex`" in finding.message


def test_a_flipped_bit_in_an_imported_table_is_found(tmp_path: Path, plain: Store) -> None:
    (tmp_path / "t.csv").write_text("case_id,slide_id,survival_months,censorship\np1,s1.svs,3,0\np2,s2.svs,4,1\n")
    plain.import_clinical(tmp_path / "t.csv", "uni")
    assert plain.verify().findings == ()
    for path in (plain.path / "tables").glob("*.parquet"):
        for place in flips(path, 6, seed=5):
            try:
                found = bool(plain.verify().findings)
            except StoreFormatError as error:
                found = path.name in str(error)
            assert found, f"{path.name}: {place}"


def test_a_slide_that_was_removed_is_not_reported(kept: Store) -> None:
    kept.remove(["s2"])
    assert kept.verify(deep=True).findings == ()
    assert kept.verify().n_slides == 2


# --- the sources ------------------------------------------------------------------------------------


def change(folder: Path, by: float) -> None:
    with h5py.File(folder / "x10" / "h5_files" / "s2.h5", "r+") as file:
        file["features"][3, 5] += by


def test_a_source_that_changed_is_found_when_compared_deeply(tmp_path: Path, kept: Store) -> None:
    assert kept.verify(deep=True).findings == ()
    change(tmp_path / "uni", 3.0)
    assert kept.verify().findings == ()
    [finding] = kept.verify(deep=True).findings
    assert finding.slide_id == "s2"
    assert "10x: " in finding.message
    assert "s2.h5: rows 0 to" in finding.message


def test_a_source_that_changed_within_the_recorded_error_is_the_same(tmp_path: Path, plain: Store) -> None:
    error = plain.sql("SELECT max_abs_error FROM bags WHERE slide_id = 's2' AND scale = 10")[0][0].as_py()
    with h5py.File(tmp_path / "uni" / "x10" / "h5_files" / "s2.h5", "r+") as file:
        kept = plain.slide("s2").bags[10].features.astype(np.float32)
        file["features"][:] = kept + np.float32(error * 0.9)
    assert plain.verify(deep=True).findings == ()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_source_that_is_no_number_any_more_is_found(value: float, tmp_path: Path, plain: Store) -> None:
    change(tmp_path / "uni", value)
    assert {finding.slide_id for finding in plain.verify(deep=True).findings} == {"s2"}


def test_other_coordinates_rows_or_a_damaged_file_are_found(tmp_path: Path, plain: Store, make_clam_h5: Make) -> None:
    folder = tmp_path / "uni"
    with h5py.File(folder / "x5" / "h5_files" / "s1.h5", "r+") as file:
        file["coords"][0, 1] += 1
    make_clam_h5(folder / "x10" / "h5_files" / "s2.h5", n_patches=99)
    (folder / "x20" / "h5_files" / "s3.h5").write_bytes(b"not HDF5")
    found = {finding.slide_id: finding.message for finding in plain.verify(deep=True).findings}
    assert "other coordinates" in found["s1"]
    assert "has (99, 8) features" in found["s2"]
    assert "s3.h5" in found["s3"]


def test_sources_that_are_gone_are_counted(tmp_path: Path, plain: Store) -> None:
    shutil.rmtree(tmp_path / "uni" / "x5")
    report = plain.verify(deep=True)
    assert (report.findings, report.n_without_source, report.n_bags) == ((), 3, 9)
    result = CliRunner().invoke(main, ["verify", "--deep", "--store", str(plain.path)])
    assert result.exit_code == 0
    assert "3 bags could not be compared: their source files are gone" in result.output


# --- the command ------------------------------------------------------------------------------------


def test_the_command_names_slide_shard_finding_and_remedy(plain: Store) -> None:
    shard = shard_of(plain)
    path = shard / "features/c/0/0"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    result = CliRunner().invoke(main, ["verify", "--store", str(plain.path)])
    assert result.exit_code == 1
    line = next(line for line in result.output.splitlines() if "chunk 0 changed" in line)
    assert line.startswith(f"damaged    s1 in features/uni/{shard.name}: ")
    assert "restore the shard from a copy, or `cfstore rm s1` and ingest it again" in line
    assert "verified   1 shard, 3 slides" in result.output
    as_json = CliRunner().invoke(main, ["verify", "--json", "--store", str(plain.path)])
    assert as_json.exit_code == 1
    assert {finding["slide_id"] for finding in json.loads(as_json.stdout)["findings"]} == {"s1"}


def test_the_remedy_works(tmp_path: Path, kept: Store) -> None:
    shard = shard_of(kept)
    path = shard if shard.is_file() else shard / "features/c/0/0"
    before = kept.slide("s1").bags[20].features.copy()
    content = bytearray(path.read_bytes())
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{kept.path / 'catalog.duckdb'}' AS s (READ_ONLY)")
        query = "SELECT byte_start FROM s.bags WHERE slide_id = 's1' AND scale = 5"
        [(start,)] = connection.execute(query).fetchall()
    content[start] ^= 1
    path.write_bytes(content)
    assert named(kept) == {"s1"}
    kept.remove(["s1"])
    kind = "webdataset" if shard.is_file() else "zarr"
    dtype = kept.sql("SELECT DISTINCT dtype FROM bags")[0][0].as_py()
    kept.ingest(tmp_path / "uni", IngestOptions(dtype=dtype, format=kind))  # type: ignore[arg-type]
    kept.compact()
    assert kept.verify(deep=True).findings == ()
    np.testing.assert_array_equal(kept.slide("s1").bags[20].features, before)
