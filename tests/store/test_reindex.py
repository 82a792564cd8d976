"""The catalog is disposable: made anew from shards and imported tables it is the same, row for row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from cfstore import IngestOptions, Store, StoreFormatError
from cfstore.cli import main
from cfstore.shards import published_shards

Make = Callable[..., Any]


def everything(store: Store) -> dict[str, list[Any]]:
    """Every row of every table, also those that users' SQL does not see, and the snapshot."""
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{store.path / 'catalog.duckdb'}' AS s (READ_ONLY)")
        query = "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 's' ORDER BY ALL"
        names = connection.execute(query).fetchall()
        rows = {
            f"{schema}.{table}": connection.execute(f"SELECT * FROM s.{schema}.{table} ORDER BY ALL").fetchall()
            for schema, table in names
        }
    return {**rows, "snapshot": pq.read_table(store.path / "catalog.parquet").to_pylist()}


@pytest.fixture
def full(tmp_path: Path, store: Store, make_cohort: Make, make_clam_h5: Make) -> Store:
    """Two encoders, three ingests, both formats, a clinical table, splits, a skipped and a removed slide."""
    make_cohort(tmp_path / "uni", ("a", "b", "c"))
    (tmp_path / "uni" / "t.csv").write_text(
        "case_id,slide_id,survival_months,censorship,grade\n"
        + "".join(f"p{s},{s}.svs,{i},0,G{i}\n" for i, s in enumerate("abcdef", 3))
    )
    store.ingest(tmp_path / "uni")
    make_cohort(tmp_path / "more", ("d", "e"))
    bad = tmp_path / "more" / "x20" / "h5_files" / "bad.h5"
    make_clam_h5(bad, dim=9)
    store.ingest(tmp_path / "more", IngestOptions(encoder="uni", format="webdataset"), on_error="skip")
    make_cohort(tmp_path / "conch", ("a", "b", "f"), scales=(10, 20), dim=16)
    store.ingest(tmp_path / "conch", IngestOptions(dtype="int8", cohort="uni"))
    store.make_splits(2, "uni")
    store.remove(["b", "e"])
    store.remove(["a"], encoder="conch")
    return store


def lose(store: Store, *names: str) -> None:
    for name in names or ("catalog.duckdb", "catalog.parquet"):
        (store.path / name).unlink()


def test_a_catalog_made_anew_equals_the_old_one(full: Store) -> None:
    before = everything(full)
    assert len(before["main.skipped"]) == 1
    assert len(before["main.splits"]) == 2 * len({row[3] for row in before["main.splits"]})
    lose(full)
    report = full.reindex()
    assert everything(full) == before
    assert (report.n_shards, report.n_slides, report.n_bags, report.gone) == (3, 4, 3 * 3 + 2, ())
    assert full.verify(deep=True).findings == ()


def test_also_after_compaction(full: Store) -> None:
    full.compact()
    before = everything(full)
    assert full.verify(deep=True).findings == ()
    lose(full)
    full.reindex()
    assert everything(full) == before


def test_also_when_the_old_one_is_there_or_is_rubbish(full: Store) -> None:
    before = everything(full)
    full.reindex()
    assert everything(full) == before
    (full.path / "catalog.duckdb").write_bytes(b"\0" * 5000)
    with pytest.raises(StoreFormatError, match="`cfstore reindex` rebuilds it"):
        full.sql("SELECT 1")
    full.reindex()
    assert everything(full) == before


@pytest.mark.parametrize("suffix", [".zarr", ".tar"])
def test_a_damaged_shard_is_named_and_the_old_catalog_stays(suffix: str, full: Store) -> None:
    shard = next(shard for shard in published_shards(full.path) if shard.endswith(suffix))
    path = full.path / shard
    path = path / "zarr.json" if path.is_dir() else path
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"n_patches": ', b'"n_patches": 1', 1))
    before = {name: (full.path / name).read_bytes() for name in ("catalog.duckdb", "catalog.parquet")}
    result = CliRunner().invoke(main, ["reindex", "--store", str(full.path)])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert shard in result.output
    assert "The catalog stays as it was" in result.output
    assert {name: (full.path / name).read_bytes() for name in before} == before
    assert not list(full.path.glob(".catalog*"))


def test_a_damaged_table_is_named_and_the_old_catalog_stays(full: Store) -> None:
    before = (full.path / "catalog.duckdb").read_bytes()
    path = full.path / "tables" / "patients-uni.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreFormatError, match=r"patients-uni\.parquet: damaged.*import its table again"):
        full.reindex()
    assert (full.path / "catalog.duckdb").read_bytes() == before


def test_shards_that_are_gone_are_said(full: Store, tmp_path: Path) -> None:
    [gone] = [shard for shard in published_shards(full.path) if shard.endswith(".tar")]
    (full.path / gone).rename(tmp_path / "aside")
    result = CliRunner().invoke(main, ["reindex", "--json", "--store", str(full.path)])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["gone"] == [gone]
    assert f"{gone}: was in the catalog, is not on disk" in result.stderr
    assert full.verify().findings == ()
    (tmp_path / "aside").rename(full.path / gone)
    full.reindex()
    assert [row["slide_id"] for row in full.sql("SELECT slide_id FROM slides ORDER BY 1").to_pylist()] == list("acdf")
