"""Killed, locked out, raced or robbed of its catalog: a store stays whole and says each bag once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import cfstore
from cfstore import Store, StoreFormatError, StoreNotFoundError, catalog, opening, shard_job
from cfstore.errors import DamagedShardError, StoreBusyError, StoreError
from cfstore.ingest import prepare
from cfstore.locks import write_lock

Make = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
INGEST = """
import sys
import cfstore, cfstore.ingest
cfstore.ingest.SLIDES_PER_SHARD = 2
print("ready", flush=True)
if len(sys.argv) > 3:
    sys.stdin.readline()  # both at once
cfstore.open(sys.argv[1], create=True).ingest(sys.argv[2])
"""
SLIDES = tuple(f"s{i:02d}" for i in range(20))


def start(store: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    """A process that ingests; returns when it has imported everything."""
    process = subprocess.Popen(
        [sys.executable, "-c", INGEST, str(store), str(folder), *more],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def check_whole(store: Store, rows: dict[tuple[str, int], Any]) -> None:
    """Every bag of `rows` once, with the right values, in SQL and in the snapshot; no leftovers."""
    found = [tuple(row.values()) for row in store.sql("SELECT slide_id, scale FROM bags ORDER BY 1, 2").to_pylist()]
    assert found == sorted(rows)
    assert store.sql("SELECT slide_id FROM slides").num_rows == len({slide for slide, _ in rows})
    for slide in {slide for slide, _ in rows}:
        for scale, bag in store.slide(slide).bags.items():
            np.testing.assert_array_equal(bag.features, rows[slide, scale][0].astype(np.float16))
            np.testing.assert_array_equal(bag.coords, rows[slide, scale][1])
    snapshot = pq.read_table(store.path / "catalog.parquet", columns=["slide_id", "scale"])
    assert sorted(tuple(row.values()) for row in snapshot.to_pylist()) == found
    assert not list(store.path.rglob(".writing-*"))
    assert not list(store.path.glob(".catalog*"))


# --- killed -------------------------------------------------------------------------------------


def writing(store: Path) -> bool:
    return any(store.glob("features/*/.writing-*"))


def registering(store: Path) -> bool:
    return any(store.glob(".catalog.duckdb.*")) and any(store.glob("features/*/0*.zarr"))


def published(n: int) -> Callable[[Path], bool]:
    return lambda store: sum(1 for _ in store.glob("features/*/0*.zarr")) >= n


@pytest.mark.slow
def test_an_ingest_killed_at_any_moment_is_finished_by_the_next(tmp_path: Path, make_cohort: Make) -> None:
    rows = make_cohort(tmp_path / "uni", SLIDES)
    rng = np.random.default_rng(3)
    for moment in (Path.exists, writing, published(1), registering, published(5)):
        process = start(tmp_path / "store", tmp_path / "uni")
        while process.poll() is None and not moment(tmp_path / "store"):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if (tmp_path / "store" / "catalog.duckdb").exists():  # what is visible is whole, at any moment
            seen = cfstore.open(tmp_path / "store").sql("SELECT slide_id, count(*) AS n FROM bags GROUP BY 1")
            assert set(seen["n"].to_pylist()) <= {3}
    store = cfstore.open(tmp_path / "store", create=True)
    report = store.ingest(tmp_path / "uni")
    assert 0 < report.n_slides < len(SLIDES)
    check_whole(store, rows)


@pytest.mark.parametrize("left", [(), ("features",), ("features", "tables")])
def test_a_process_that_died_making_the_store_leaves_a_place_for_the_next(
    left: tuple[str, ...], tmp_path: Path
) -> None:
    for name in left:
        (tmp_path / "store" / name).mkdir(parents=True)
    assert cfstore.open(tmp_path / "store", create=True).header.format_version == 2


def test_a_folder_of_something_else_is_not_made_a_store(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "mine.h5").write_bytes(b"")
    with pytest.raises(StoreNotFoundError, match="holds files but no store; name an empty or new folder"):
        cfstore.open(tmp_path, create=True)


def test_a_shard_that_was_published_but_not_registered_is_registered_by_the_next_ingest(
    tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    rows = make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    before = {name: (store.path / name).read_bytes() for name in ("catalog.duckdb", "catalog.parquet")}
    rows |= make_cohort(tmp_path / "uni", ("b", "c"))
    store.ingest(tmp_path / "uni")
    for name, content in before.items():  # as if the process had died between the two renames
        (store.path / name).write_bytes(content)
    assert store.ingest(tmp_path / "uni").n_slides == 0
    check_whole(store, rows)


def test_what_a_dead_writer_left_is_swept_away(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    rows = make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    (store.path / "features" / "uni" / ".writing-20260101T000000-dead.zarr" / "features").mkdir(parents=True)
    (store.path / ".catalog.duckdb.dead").write_bytes(b"half a catalog")
    store.ingest(tmp_path / "uni")
    check_whole(store, rows)


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """flock as an NFS client has it (flock(2), nfs(5)): exclusive only of what is open for writing; of folders it is
    the client's own affair, so another machine does not see it."""
    real = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            return
        if operation & fcntl.LOCK_EX and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("nfs")
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_where_only_files_open_for_writing_can_be_locked_work_in_progress_is_left_alone(
    form: Any, tmp_path: Path, store: Store, make_cohort: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "uni", SLIDES[:3])
    write_slide, seen = shard_job._write_slide, []

    def with_another_machine(*arguments: Any) -> Any:
        prepare(store.path)
        seen.extend(path.name for path in store.path.glob("features/*/.writing-*"))
        return write_slide(*arguments)

    monkeypatch.setattr(shard_job, "_write_slide", with_another_machine)
    store.ingest(tmp_path / "uni", cfstore.IngestOptions(format=form))
    assert len(seen) >= 3
    store.derive([cfstore.Derivation.mean(20)])
    assert store.verify().findings == ()
    assert not list(store.path.rglob(".writing-*"))
    (store.path / "features" / "uni" / ".writing-0.zarr").mkdir()
    for name in (".writing-0.zarr.guard", ".writing-1.zarr.guard", ".writing-2.tar"):
        (store.path / "features" / "uni" / name).touch()
    prepare(store.path)
    assert not list(store.path.rglob(".writing-*"))


def test_an_ingest_that_fails_leaves_nothing_half_written(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", ("a", "b"))

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        store.ingest(tmp_path / "uni", progress=stop)
    check_whole(store, {})


# --- several at once -------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ingests_of_one_folder_at_once_take_each_bag_once(tmp_path: Path, make_cohort: Make) -> None:
    rows = make_cohort(tmp_path / "uni", SLIDES[:8])
    both = [start(tmp_path / "store", tmp_path / "uni", "wait") for _ in range(2)]
    for process in both:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    check_whole(cfstore.open(tmp_path / "store"), rows)


def test_a_store_that_another_process_makes_while_one_looks_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ingests into a new folder at once: what the other put there is no file of something else."""
    root, is_blank = tmp_path / "store", opening._is_blank
    root.mkdir()

    def made_meanwhile(folder: Path) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(opening, "_is_blank", is_blank)
            cfstore.open(folder, create=True)
        return is_blank(folder)

    monkeypatch.setattr(opening, "_is_blank", made_meanwhile)
    assert cfstore.open(root, create=True).sql("FROM bags").num_rows == 0


def test_an_open_reader_keeps_its_view_and_causes_no_second_registration(
    tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    """DuckDB hands one process the database it has open, even when its file was replaced meanwhile."""
    rows = make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    count = "SELECT count(*) FROM bags"
    with catalog.connect(store.path) as early:
        for slide in "bc":
            rows |= make_cohort(tmp_path / "uni", (slide,))
            store.ingest(tmp_path / "uni")
            assert early.execute(count).fetchone() == (3,)
            with catalog.connect(store.path) as late:
                assert late.execute(count).fetchone() == (len(rows),)
    check_whole(store, rows)


def test_bags_of_an_open_reader_stay_readable_while_more_come_in(
    tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    rows = make_cohort(tmp_path / "uni", ("a", "b"))
    store.ingest(tmp_path / "uni")
    stream = store.reader("uni", [20], ["a", "b"]).stream(["a", "b"], threads=1, ahead=0)
    first = next(stream)
    make_cohort(tmp_path / "uni", ("c",))
    store.ingest(tmp_path / "uni")
    second = next(stream)
    for slide, bags in (("a", first), ("b", second)):
        np.testing.assert_array_equal(bags.bags[20].features, rows[slide, 20][0].astype(np.float16))


def test_a_writer_waits_for_the_lock_and_says_so_when_it_does_not_come(store: Store) -> None:
    with (
        write_lock(store.path),
        pytest.raises(StoreBusyError, match="another process has been writing"),
        write_lock(store.path, timeout=0.2),
    ):
        pass
    with write_lock(store.path, timeout=0):
        pass


# --- formats and permissions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ({"format_version": 3}, "store format 3, this version reads 2; upgrade"),
        ({"format_version": 1}, "store format 1, this version reads 2; ingest into a new --store"),
        ({"format_version": "2"}, "not of a store.*'2'.*restore it or use a new --store"),
        ({"uuid": None, "format_version": None}, "not of a store.*None.*restore it or use a new --store"),
    ],
)
def test_a_store_of_another_or_unknown_format_is_refused(header: dict[str, Any], found: str, store: Store) -> None:
    path = store.path / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **header}))
    with pytest.raises(StoreFormatError, match=f"{re.escape(str(store.path))}: {found}"):
        cfstore.open(store.path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", "\x00"])
def test_a_damaged_header_is_refused(content: str, store: Store) -> None:
    (store.path / "store.json").write_text(content)
    with pytest.raises(StoreFormatError, match=r"store\.json: not a store header"):
        cfstore.open(store.path, create=True)


def test_a_missing_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"no store here.*cfstore ingest"):
        cfstore.open(tmp_path / "nothing")


@pytest.mark.parametrize(("version", "remedy"), [(3, "upgrade"), (1, "ingest into a new --store")])
def test_a_shard_of_another_format_is_refused_by_name(
    version: int, remedy: str, tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    [metadata] = (store.path / "features").glob("*/*.zarr/zarr.json")
    content = json.loads(metadata.read_text())
    content["attributes"]["cfstore"]["format_version"] = version
    metadata.write_text(json.dumps(content))
    (store.path / "catalog.duckdb").unlink()
    with pytest.raises(StoreFormatError, match=rf"{metadata.parent.name}: store format {version}.*{remedy}"):
        store.ingest(tmp_path / "uni")


@contextmanager
def powerless() -> Iterator[None]:
    """Root may write anywhere: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_store_can_be_read_and_says_why_it_cannot_be_written(tmp_path: Path, make_cohort: Make) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        place = Path(name)
        rows = make_cohort(place / "uni", ("a",))
        store = cfstore.open(place / "store", create=True)
        store.ingest(place / "uni")
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            with powerless():
                bag = store.slide("a").bags[20]
                np.testing.assert_array_equal(bag.features, rows["a", 20][0].astype(np.float16))
                assert store.sql("SELECT * FROM bags").num_rows == 3
                assert len(store.info().encoders) == 3
                with pytest.raises(StoreError, match=r"cannot write to the store.*permissions.*--store"):
                    store.ingest(place / "uni")
                with pytest.raises(StoreError, match=r"cannot be made.*permissions.*--store"):
                    cfstore.open(place / "second", create=True)
        finally:
            for path in (place, *place.rglob("*")):
                path.chmod(0o755)


# --- the catalog is disposable -------------------------------------------------------------------------


def reindex(store: Store) -> None:
    with write_lock(store.path):
        catalog.rebuild(store.path)


@pytest.mark.parametrize("lost", [("catalog.duckdb",), ("catalog.duckdb", "catalog.parquet", ".lock")])
@pytest.mark.parametrize("how", ["reindex", "ingest"])
def test_a_lost_catalog_is_rebuilt_by_reindex_and_by_an_ingest_of_the_same_folder(
    how: str, lost: tuple[str, ...], tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    rows = make_cohort(tmp_path / "uni", ("a", "b"))
    (tmp_path / "uni" / "t.csv").write_text("case_id,slide_id,survival_months,censorship\np1,a.svs,3,0\n")
    store.ingest(tmp_path / "uni")
    tables = ("bags", "slides", "patients", "splits", "skipped")
    before = {table: store.sql(f"SELECT * FROM {table} ORDER BY ALL").to_pylist() for table in tables}
    for name in lost:
        (store.path / name).unlink()
    with pytest.raises(StoreFormatError, match=r"catalog is missing; `cfstore reindex` rebuilds it"):
        store.sql("SELECT 1")
    if how == "ingest":
        assert store.ingest(tmp_path / "uni").n_slides == 0
    else:
        reindex(store)
    assert {table: store.sql(f"SELECT * FROM {table} ORDER BY ALL").to_pylist() for table in tables} == before
    check_whole(store, rows)


def test_a_damaged_catalog_is_named_with_its_remedy_which_works(
    tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    rows = make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    (store.path / "catalog.duckdb").write_bytes(b"\x00" * 5000)
    with pytest.raises(StoreFormatError, match=r"catalog\.duckdb: the catalog cannot be opened.*`cfstore reindex`"):
        store.ingest(tmp_path / "uni")
    reindex(store)
    check_whole(store, rows)
    assert store.ingest(tmp_path / "uni").n_slides == 0


def test_a_store_may_be_moved(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    rows = make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    shutil.move(store.path, tmp_path / "elsewhere")
    check_whole(cfstore.open(tmp_path / "elsewhere"), rows)


def test_a_shard_that_lost_a_file_is_named_when_read(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    [rows] = (store.path / "features").glob("*/*.zarr/features/c/0/0")
    rows.unlink()
    with pytest.raises(DamagedShardError, match=rf"slide a: {re.escape(str(rows))}: missing.*restore the shard"):
        store.slide("a")


def test_a_shard_that_was_cut_short_is_named_when_read_and_when_reindexed(
    tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    [rows] = (store.path / "features").glob("*/*.zarr/features/c/0/0")
    os.truncate(rows, 50)
    with pytest.raises(DamagedShardError, match=rf"slide a: {re.escape(str(rows))}: ends before byte.*restore"):
        store.slide("a")
    before = (store.path / "catalog.duckdb").read_bytes()
    with pytest.raises(DamagedShardError, match=rf"{re.escape(str(rows))}: .*cut short; restore the shard"):
        reindex(store)
    assert (store.path / "catalog.duckdb").read_bytes() == before


def test_a_flipped_byte_in_a_shard_is_noticed_when_read(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", ("a",))
    store.ingest(tmp_path / "uni")
    [file] = (path for path in store.path.glob("features/*/*.zarr/features/c/**/*") if path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(
        DamagedShardError, match=r"slide a: .*\.zarr.*: bytes from \d+ changed after they were written; restore"
    ):
        store.slide("a")
