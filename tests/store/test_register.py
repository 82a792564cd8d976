"""What a commit costs: it looks at the slides of its own shard, however many others there are."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

import cfstore
from cfstore import Store, ingest, labels, locks
from cfstore.catalog import editing, table_rows
from cfstore.errors import StoreError
from cfstore.ingest import prepare
from cfstore.labels import Resolver, collect
from cfstore.locks import write_lock
from cfstore.places import find_bags

Make = Callable[..., Any]


@pytest.fixture
def filled(tmp_path: Path, store: Store, make_cohort: Make) -> Store:
    make_cohort(tmp_path / "uni", ("a", "b", "c"))
    (tmp_path / "uni" / "t.csv").write_text(
        "case_id,slide_id,survival_months,censorship\n" + "".join(f"p{s},{s}.svs,3,0\n" for s in "abcdef")
    )
    store.ingest(tmp_path / "uni")
    return store


def committed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that the catalog puts into their place, as it does."""
    names: list[str] = []
    commit = editing.commit

    def seen(temporary: Path, path: Path) -> None:
        names.append(path.name)
        commit(temporary, path)

    monkeypatch.setattr(editing, "commit", seen)
    return names


def snapshot_of(store: Store) -> set[str]:
    return set(pq.read_table(store.path / "catalog.parquet", columns=["slide_id"])["slide_id"].to_pylist())


def test_a_commit_asks_for_the_owners_of_its_own_slides_only(
    tmp_path: Path, filled: Store, make_cohort: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    loaded: list[str] = []
    owner, load = Resolver.owner, table_rows._load_table
    monkeypatch.setattr(Resolver, "owner", lambda self, slide, *more: asked.append(slide) or owner(self, slide, *more))
    monkeypatch.setattr(table_rows, "_load_table", lambda *words: loaded.append(words[2]) or load(*words))
    make_cohort(tmp_path / "more" / "uni", ("d", "e"))
    filled.ingest(tmp_path / "more" / "uni")
    assert sorted(asked) == ["d", "e"]
    assert set(loaded) == {"skipped"}
    rows = filled.sql("SELECT slide_id, patient_id, cohort FROM slides ORDER BY 1").to_pylist()
    assert [tuple(row.values()) for row in rows] == [(s, f"p{s}", "uni") for s in "abcde"]


def test_a_table_that_changed_meanwhile_is_taken_over_by_the_next_commit(
    tmp_path: Path, filled: Store, make_cohort: Make
) -> None:
    path = filled.path / "tables" / "slides-uni.parquet"
    rows = pq.read_table(path).to_pandas()
    rows.loc[rows["slide_id"] == "a", "patient_id"] = "pb"
    rows.to_parquet(path)  # as if its importer had died before the catalog knew
    make_cohort(tmp_path / "more" / "uni", ("d",))
    filled.ingest(tmp_path / "more" / "uni")
    found = dict(tuple(row.values()) for row in filled.sql("SELECT slide_id, patient_id FROM slides").to_pylist())
    assert found == {"a": "pb", "b": "pb", "c": "pc", "d": "pd"}


def test_the_snapshot_is_written_once_an_ingest(
    tmp_path: Path, filled: Store, make_cohort: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "SLIDES_PER_SHARD", 1)
    names = committed(monkeypatch)
    make_cohort(tmp_path / "more" / "uni", ("d", "e", "f"))
    filled.ingest(tmp_path / "more" / "uni")
    assert names.count("catalog.parquet") == 1
    assert names[-2:] == ["catalog.parquet", "catalog.duckdb"]
    assert snapshot_of(filled) == set("abcdef")


def test_a_snapshot_that_an_ingest_left_behind_is_no_damage_and_is_brought_up_to_date(
    tmp_path: Path, filled: Store, make_cohort: Make, make_clam_h5: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "SLIDES_PER_SHARD", 1)
    make_cohort(tmp_path / "more" / "uni", ("d", "e"))

    def fail(*_: Any) -> None:
        message = "cut off"
        raise StoreError(message)

    with monkeypatch.context() as patch:
        patch.setattr("cfstore.store.tables.write_skipped", fail)
        with pytest.raises(StoreError, match="cut off"):
            filled.ingest(tmp_path / "more" / "uni")
    assert filled.sql("SELECT count(*) AS n FROM slides")["n"].to_pylist() == [5]
    assert snapshot_of(filled) == set("abc")
    assert filled.verify().findings == ()
    prepare(filled.path)
    assert snapshot_of(filled) == set("abcde")
    assert filled.verify().findings == ()


def test_a_catalog_from_before_snapshots_could_trail_is_written_to_like_any_other(
    tmp_path: Path, filled: Store, make_cohort: Make
) -> None:
    with duckdb.connect(filled.path / "catalog.duckdb") as connection:
        connection.execute("DROP TABLE internal.trailing")
    assert filled.verify().findings == ()
    make_cohort(tmp_path / "more" / "uni", ("d",))
    filled.ingest(tmp_path / "more" / "uni")
    assert snapshot_of(filled) == set("abcd")


def test_nothing_is_written_where_nothing_changed(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    names = committed(monkeypatch)
    prepare(filled.path)
    assert names == []


def test_owners_are_looked_up_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    patient_of = labels.CohortLabels.patient_of
    monkeypatch.setattr(
        labels.CohortLabels, "patient_of", lambda self, slide: asked.append(slide) or patient_of(self, slide)
    )
    resolver = Resolver(collect([(f"C{i}", f"p{i}") for i in range(500)], []))
    assert resolver.owner("p77_2", None, "folder").cohort == "C77"
    assert len(asked) == 1


def test_a_reader_of_many_slides_asks_for_those_only(tmp_path: Path) -> None:
    store = cfstore.open(tmp_path / "store", create=True)
    with duckdb.connect(store.path / "catalog.duckdb") as connection:
        connection.execute("""
            INSERT INTO internal.shards SELECT 'features/uni/' || i || '.zarr', 8, [] FROM range(30) t(i);
            INSERT INTO bags BY NAME
                SELECT 's' || i AS slide_id, 20 AS scale, 'uni' AS encoder, 8 AS n_patches, 4 AS dim,
                       'float16' AS dtype, 'none' AS codec, 'features/uni/' || i % 30 || '.zarr' AS shard, 'd' AS digest
                FROM range(3000) t(i);
            INSERT INTO internal.extents
                SELECT 'features/uni/' || i % 30 || '.zarr', 's' || i, 20, 'features', i,
                       CASE WHEN i < 1500 THEN [64] END, 0, []
                FROM range(3000) t(i);
        """)
    found = find_bags(store.path, "uni", [20], [f"s{i}" for i in range(1499, -1, -1)])
    assert [place[20].features.byte_start for place in found.values()] == list(range(1499, -1, -1))
    with pytest.raises(TypeError):  # of the others nothing could be made
        find_bags(store.path, "uni", [20], ["s2000"])


def test_who_waits_long_for_the_lock_says_so_once_and_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_SAY_AFTER", 0.1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with write_lock(store.path):
            held.set()
            done.wait(0.4)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with caplog.at_level(logging.WARNING, "cfstore"), write_lock(store.path):
        pass
    holder.join()
    (record,) = caplog.records
    assert str(store.path) in record.getMessage()
    assert "waiting for them" in record.getMessage()
