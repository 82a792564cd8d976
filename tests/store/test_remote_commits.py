"""Ingest into a bucket: killed at any request, raced, unanswered, swept: a reader sees the old state or the new one.

What is in the bucket is judged by Amazon's own client, which copies it into a folder, and by `verify` there.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_proxy import Fault, FaultyProxy
from remote_writers import Executioner, Writers, download, objects

import cfstore
from cfstore import Store, ingest, writing
from cfstore.errors import PreconditionFailedError, RemoteError, StoreFormatError, StoreNotFoundError
from cfstore.remote import bucket as bucket_module
from cfstore.remote import leases, orphans, staging
from cfstore.remote.bucket import Bucket

Make = Callable[..., Any]
Truth = Mapping[tuple[str, int], Any]
SLIDES = ("a", "b", "c")
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _staged_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(ingest, "SLIDES_PER_SHARD", 2)


@pytest.fixture
def folder(tmp_path: Path, make_cohort: Make) -> Path:
    """Three slides (two shards of two slides at most) with a clinical table."""
    make_cohort(tmp_path / "uni", SLIDES)
    (tmp_path / "uni" / "t.csv").write_text("case_id,slide_id,survival_months,censorship\np1,a.svs,3,0\n")
    return tmp_path / "uni"


@pytest.fixture
def executioner(s3: FaultyProxy, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executioner]:
    with Executioner(f"127.0.0.1:{s3_port}") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def writers(executioner: Executioner, tmp_path: Path) -> Iterator[Writers]:
    made = Writers(tmp_path / "temporary")
    yield made
    made.stop()


def content(store: Store) -> tuple[Any, ...]:
    """All rows but for names of shards and places in them."""
    bags = store.sql("SELECT * EXCLUDE (shard, row_start, byte_start, byte_length) FROM bags ORDER BY ALL").to_pylist()
    others = ("slides", "patients", "splits", "skipped")
    return bags, [store.sql(f"SELECT * FROM {table} ORDER BY ALL").to_pylist() for table in others]


def local_content(folder: Path, path: Path) -> tuple[Any, ...]:
    """What an undisturbed ingest into a folder gives."""
    store = cfstore.open(path, create=True)
    store.ingest(folder)
    return content(store)


def copied(port: int, url: str, path: Path) -> Store:
    assert download(port, url, path)
    return Store(path)


def check_whole(store: Store) -> None:
    """Every stored value is what was written and what the sources say; each bag is there once."""
    assert store.verify(deep=True).findings == ()
    counted = store.sql("SELECT slide_id, scale, count(*) AS n FROM bags GROUP BY ALL").to_pylist()
    assert all(row["n"] == 1 for row in counted)


def check_not_torn(port: int, url: str, path: Path) -> None:
    """Whatever a reader sees is whole; only `catalog.parquet` may trail."""
    if download(port, url, path):
        store = Store(path)
        findings = [finding for finding in store.verify().findings if "catalog.parquet" not in str(finding)]
        assert findings == []
        scales = store.sql("SELECT slide_id, list(scale ORDER BY scale) AS scales FROM bags GROUP BY ALL").to_pylist()
        assert all(row["scales"] == [5, 10, 20] for row in scales)


# --- undisturbed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_an_ingest_into_a_bucket_gives_what_one_into_a_folder_gives(
    form: Any, folder: Path, bucket_url: str, s3_port: int, tmp_path: Path
) -> None:
    options = cfstore.IngestOptions(format=form)
    local = cfstore.open(tmp_path / "local", create=True)
    report = local.ingest(folder, options)
    store = cfstore.open(bucket_url, create=True)
    assert store.ingest(folder, options).n_slides == report.n_slides == 3
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    assert content(found) == content(local)
    assert cfstore.open(bucket_url).ingest(folder, options).n_slides == 0
    assert not list((tmp_path / "temporary").glob("*/session-*/features/*/*"))  # uploaded, then removed


def test_tables_splits_and_removals_are_committed_like_shards(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path
) -> None:
    stores = [cfstore.open(place, create=True) for place in (bucket_url, tmp_path / "local")]
    (tmp_path / "other.csv").write_text("case_id,slide_id,survival_months,censorship\np2,b.svs,9,1\np3,c.svs,7,0\n")
    for store in stores:
        store.ingest(folder)
        store.remove(["a"])
        store.import_clinical(tmp_path / "other.csv", "uni")
        store.make_splits(2, "uni")
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    assert found.verify().findings == ()
    assert content(found) == content(stores[1])
    assert (
        len(objects(s3_port, bucket_url, "tables/")) == 4
    )  # patients, slides, splits, removed: what they replaced is deleted


def test_what_is_derived_in_a_bucket_is_what_is_derived_in_a_folder(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path
) -> None:
    wanted = [cfstore.Derivation.mean(20), cfstore.Derivation.nearest(20)]
    listed = "SELECT slide_id, derivation, digest, source FROM derived ORDER BY ALL"
    rows = []
    for place in (bucket_url, tmp_path / "local"):
        store = cfstore.open(place, create=True)
        store.ingest(folder)
        assert store.derive(wanted, jobs=1).n_done == 6
        store.remove(["a"])
        assert store.derive(wanted, jobs=1).n_held == 4
        rows.append(store.sql(listed).to_pylist())
    assert rows[0] == rows[1]
    read = [cfstore.open(place).derived(wanted, "uni", ["b", "c"]).read("b") for place in (bucket_url, store.path)]
    for one in wanted:
        np.testing.assert_array_equal(read[0][one], read[1][one])
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    assert found.verify(deep=True).findings == ()
    assert found.sql(listed).to_pylist() == rows[0]


def test_a_store_that_was_copied_to_a_bucket_is_gone_on_with(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, make_cohort: Make
) -> None:
    local = cfstore.open(tmp_path / "local", create=True)
    local.ingest(folder)
    local.remove(["b"])
    bucket = Bucket(bucket_url)
    for path in local.path.rglob("*"):
        if path.is_file() and path.name != ".lock":
            bucket.put(path.relative_to(local.path).as_posix(), path)
    make_cohort(tmp_path / "more" / "uni", ("d",))
    for store in (local, cfstore.open(bucket_url)):
        store.ingest(tmp_path / "more" / "uni")
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    assert content(found) == content(local)


def test_nothing_but_small_objects_is_ever_written_twice(folder: Path, bucket_url: str, s3: FaultyProxy) -> None:
    for _ in range(2):
        cfstore.open(bucket_url, create=True).ingest(folder)
    puts = [line.split()[1] for line in s3.log if line.startswith("PUT") and "/.probes/" not in line]
    twice = {path.rpartition("/")[2] for path in puts if puts.count(path) > 1}
    assert twice <= {"catalog.duckdb", "catalog.parquet"}


# --- killed -----------------------------------------------------------------------------------------


def n_changes(executioner: Executioner, writers: Writers, url: str, folder: Path) -> int:
    """Requests of an undisturbed ingest that change something."""
    executioner.aim(-1, "before")
    writers.begin(url, folder)
    assert writers.end() == 0
    return executioner.n_changes


def kill_at(executioner: Executioner, writers: Writers, url: str, folder: Path, at: int, when: str) -> None:
    executioner.aim(at, when)
    executioner.victim = writers.begin(url, folder)
    executioner.known.set()
    assert writers.end() == -signal.SIGKILL


def check_killed_at(
    at: int,
    when: str,
    folder: Path,
    url: str,
    executioner: Executioner,
    writers: Writers,
    port: int,
    place: Path,
    expected: Any,
) -> None:
    kill_at(executioner, writers, url, folder, at, when)
    check_not_torn(port, url, place / "right_after")
    executioner.aim(-1, "before")
    cfstore.open(url, create=True).ingest(folder)
    found = copied(port, url, place / "later")
    check_whole(found)
    assert content(found) == expected
    for name in ("right_after", "later"):
        shutil.rmtree(place / name, ignore_errors=True)


def moments(n: int) -> list[tuple[int, str]]:
    return [(at, when) for at in range(n) for when in ("before", "after")]


def test_an_ingest_killed_when_its_first_shard_is_half_uploaded_is_finished_by_the_next(
    folder: Path, bucket_url: str, executioner: Executioner, writers: Writers, s3_port: int, tmp_path: Path
) -> None:
    expected = local_content(folder, tmp_path / "local")
    at = (
        5 + 1 + 1 + 1 + 3
    )  # tried conditions, header, first catalog and its snapshot, three of the shard's five objects
    check_killed_at(at, "after", folder, bucket_url, executioner, writers, s3_port, tmp_path, expected)
    assert len(objects(s3_port, bucket_url, "features/")) > 10  # of two shards, and what was left behind


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_an_ingest_killed_at_any_request_is_finished_by_the_next(
    part: int, folder: Path, bucket_url: str, executioner: Executioner, writers: Writers, s3_port: int, tmp_path: Path
) -> None:
    n = n_changes(executioner, writers, f"{bucket_url}/first", folder)
    assert n > 20
    expected = local_content(folder, tmp_path / "local")
    for number, (at, when) in list(enumerate(moments(n)))[part::8]:
        url = f"{bucket_url}/{number}"
        check_killed_at(at, when, folder, url, executioner, writers, s3_port, tmp_path, expected)


# --- several at once --------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_ingests_at_once_of_overlapping_folders_take_each_slide_once(
    bucket_url: str, executioner: Executioner, s3_port: int, tmp_path: Path, make_cohort: Make
) -> None:
    names = [f"s{number:02d}" for number in range(9)]
    rows = make_cohort(tmp_path / "all" / "uni", tuple(names))
    folders = [tmp_path / "all" / "uni"]
    for name, own in (("early", names[:6]), ("late", names[3:])):
        folders.append(tmp_path / name / "uni")
        for path in (tmp_path / "all" / "uni").rglob("*.h5"):
            if path.stem in own:
                target = folders[-1] / path.relative_to(tmp_path / "all" / "uni")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    several = [Writers(tmp_path / "temporary") for _ in folders]
    try:
        for one, path in zip(several, folders, strict=True):
            one.begin(bucket_url, path)
        assert [one.end() for one in several] == [0, 0, 0]
    finally:
        for one in several:
            one.stop()
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    held = [tuple(row.values()) for row in found.sql("SELECT slide_id, scale FROM bags ORDER BY ALL").to_pylist()]
    assert held == sorted(rows)
    for name in names:
        for scale, bag in found.slide(name).bags.items():
            np.testing.assert_array_equal(bag.features, rows[name, scale][0].astype(np.float16))
    named = {row["shard"] for row in found.sql("SELECT DISTINCT shard FROM bags").to_pylist()}
    uploaded = {"/".join(key.split("/")[:3]) for key in objects(s3_port, bucket_url, "features/")}
    assert uploaded == named  # who lost a race took its uploads back


@pytest.mark.slow
def test_processes_of_one_ingest_commit_one_after_another(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path
) -> None:
    assert cfstore.open(bucket_url, create=True).ingest(folder, jobs=2).n_processes == 2
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    assert content(found) == local_content(folder, tmp_path / "local")


def test_a_lost_race_adds_to_what_the_winner_wrote(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "other" / "uni", ("x",))
    cfstore.open(bucket_url, create=True)
    put, raced = Bucket.put, []

    def race(self: Bucket, key: str, content: Any, **condition: Any) -> Any:
        if key == "catalog.duckdb" and "if_match" in condition and not raced:
            raced.append(key)
            cfstore.open(bucket_url).ingest(tmp_path / "other" / "uni")
        return put(self, key, content, **condition)

    monkeypatch.setattr(Bucket, "put", race)
    cfstore.open(bucket_url).ingest(folder)
    assert raced
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    assert found.sql("SELECT slide_id FROM slides ORDER BY 1")["slide_id"].to_pylist() == ["a", "b", "c", "x"]
    assert ".lease.json" not in objects(s3_port, bucket_url)


# --- unanswered -------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [1, *(pytest.param(skip, marks=pytest.mark.slow) for skip in (0, 2, 3))])
def test_a_commit_whose_answer_was_lost_counts_once(
    skip: int, folder: Path, bucket_url: str, s3: FaultyProxy, s3_port: int, tmp_path: Path
) -> None:
    fault = Fault("lost", r"PUT .*/catalog\.duckdb", skip=skip)
    s3.faults.append(fault)
    report = cfstore.open(bucket_url, create=True).ingest(folder)
    assert fault.hits == 1
    assert (report.n_slides, report.n_shards) == (3, 2)
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    assert content(found) == local_content(folder, tmp_path / "local")


def test_a_commit_whose_answer_was_lost_and_on_which_another_writer_built_keeps_its_shard(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cohort: Make
) -> None:
    """The commit won, yet its writer is told that it lost: it must find its shard named, and not delete it."""
    make_cohort(tmp_path / "other" / "uni", ("x",))
    cfstore.open(bucket_url, create=True).ingest(tmp_path / "other" / "uni")
    put, hit = Bucket.put, []

    def lose(self: Bucket, key: str, content: Any, **condition: Any) -> Any:
        etag = put(self, key, content, **condition)
        if key == "catalog.duckdb" and not hit:
            hit.append(key)
            cfstore.open(bucket_url).remove(["x"])
            raise PreconditionFailedError("too late")
        return etag

    monkeypatch.setattr(Bucket, "put", lose)
    report = cfstore.open(bucket_url).ingest(folder)
    assert (hit, report.n_slides, report.n_shards) == (["catalog.duckdb"], 3, 2)
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    assert found.verify().findings == ()
    assert found.sql("SELECT slide_id FROM slides ORDER BY 1")["slide_id"].to_pylist() == ["a", "b", "c"]


@pytest.mark.slow
def test_requests_that_fail_now_and_then_change_nothing(
    folder: Path, bucket_url: str, s3: FaultyProxy, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module.Retry, "wait", lambda *_: 0.0)
    kinds = ("status", "reset", "lost", "cut")
    s3.faults += [Fault(kinds[number % 4], "", skip=5 * number) for number in range(1, 16)]
    cfstore.open(bucket_url, create=True).ingest(folder)
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    assert content(found) == local_content(folder, tmp_path / "local")


# --- left behind ------------------------------------------------------------------------------------


def leave_behind(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ingest that dies when its first shard is uploaded."""

    class DeadError(Exception):
        pass

    def die(*_: Any) -> Any:
        raise DeadError

    store = cfstore.open(url, create=True)
    with monkeypatch.context() as patch:
        patch.setattr("cfstore.shard_job.commit", die)
        with pytest.raises(DeadError):
            store.ingest(folder)


def test_what_a_dead_writer_uploaded_is_swept_a_day_later_and_not_before(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_behind(bucket_url, folder, monkeypatch)
    left = set(objects(s3_port, bucket_url, "features/"))
    assert len(left) == 5
    store = cfstore.open(bucket_url)
    store.ingest(folder)
    assert left < set(objects(s3_port, bucket_url, "features/"))
    monkeypatch.setattr(orphans, "GRACE", timedelta(seconds=-5))
    store.ingest(folder)
    assert not left & set(objects(s3_port, bucket_url, "features/"))
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    assert content(found) == local_content(folder, tmp_path / "local")


def test_a_shard_whose_objects_were_swept_is_never_committed(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that slept between upload and commit for longer than a day: clocks cannot tell it from a dead one."""
    cfstore.open(bucket_url, create=True)
    commit, slept = writing.commit, []

    def sleep_first(root: Path, change: Any, *patience: float) -> Any:
        if not slept:
            slept.append(root)
            with monkeypatch.context() as patch:
                patch.setattr(orphans, "GRACE", timedelta(seconds=-5))
                with writing.session(Bucket(bucket_url)) as other:
                    ingest.prepare(other)
        return commit(root, change, *patience)

    monkeypatch.setattr("cfstore.shard_job.commit", sleep_first)
    with pytest.raises(RemoteError, match=r"took it for left behind.*run this again"):
        cfstore.open(bucket_url).ingest(folder)
    check_not_torn(s3_port, bucket_url, tmp_path / "torn")
    cfstore.open(bucket_url).ingest(folder)
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    check_whole(found)
    assert content(found) == local_content(folder, tmp_path / "local")


def test_the_sweep_gives_up_nothing_that_was_committed_meanwhile(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "GRACE", timedelta(seconds=-5))
    find, raced = orphans.find, []

    def look_then_let_others_commit(*args: Any) -> Any:
        if not raced:
            raced.append(args)
            cfstore.open(bucket_url).ingest(folder)
            return {"/".join(key.split("/")[:3]): [key] for key in objects(s3_port, bucket_url, "features/")}
        return find(*args)

    cfstore.open(bucket_url, create=True)
    monkeypatch.setattr(orphans, "find", look_then_let_others_commit)
    with writing.session(Bucket(bucket_url)) as root:
        ingest.prepare(root)
    check_whole(copied(s3_port, bucket_url, tmp_path / "copy"))


# --- the rest ---------------------------------------------------------------------------------------


def test_a_server_that_ignores_conditions_is_refused(s3: FaultyProxy, bucket_url: str, folder: Path) -> None:
    s3.dropped = {"If-None-Match", "if-none-match"}
    with pytest.raises(RemoteError, match=r"ignores If-None-Match of a PUT.*use one with conditional writes"):
        cfstore.open(bucket_url, create=True)
    s3.dropped = {"If-Match", "if-match"}
    with pytest.raises(RemoteError, match="ignores If-Match of a PUT"):
        cfstore.open(bucket_url, create=True)


def test_a_prefix_of_something_else_is_not_made_a_store(bucket_url: str) -> None:
    Bucket(bucket_url).put("mine.h5", b"h5")
    with pytest.raises(StoreNotFoundError, match=r"holds mine\.h5 but no store; name an empty or new prefix"):
        cfstore.open(bucket_url, create=True)


def test_a_bucket_that_is_not_there_is_an_error_that_says_so(s3: FaultyProxy) -> None:
    with pytest.raises(RemoteError, match=r"^s3://never-made/store: there is no such bucket; make it first"):
        cfstore.open("s3://never-made/store", create=True)


def test_a_bucket_that_lost_its_catalog_gets_no_empty_one(folder: Path, bucket_url: str) -> None:
    store = cfstore.open(bucket_url, create=True)
    store.ingest(folder)
    Bucket(bucket_url).delete(["catalog.duckdb"])
    with pytest.raises(StoreFormatError, match=r"catalog\.duckdb: missing, though there are shards; restore it"):
        store.ingest(folder)


def test_a_snapshot_that_its_writer_died_before_is_put_by_the_next(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(staging, "put_snapshot", lambda *_: None)
        cfstore.open(bucket_url, create=True).ingest(folder)
    assert "catalog.parquet" not in objects(s3_port, bucket_url)
    cfstore.open(bucket_url).ingest(folder)
    check_whole(copied(s3_port, bucket_url, tmp_path / "copy"))


# --- leases -----------------------------------------------------------------------------------------


def test_a_lease_is_taken_by_one_at_a_time(bucket_url: str) -> None:
    bucket = Bucket(bucket_url)
    one, two = leases.Lease(bucket), leases.Lease(bucket, seconds=0.3)
    assert one.take()
    one.release()
    assert two.take()
    two.release()
    assert bucket.head(leases.LEASE_FILE) is None


def test_a_lease_of_the_dead_is_taken_over_whatever_their_clock_said(bucket_url: str) -> None:
    bucket = Bucket(bucket_url)
    for content in (b'{"writer": "dead", "expires": 1}', b'{"writer": "ahead", "expires": 1e12}', b"nonsense"):
        bucket.put(leases.LEASE_FILE, content)
        lease = leases.Lease(bucket, seconds=0.3)
        assert lease.take()
        lease.release()
