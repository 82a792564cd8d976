"""Tasks of a store in a bucket on nodes that share no folder: attempts that die unheard, or live on, count once.

Ray is not needed for that: `Nodes` does what it would do to a task, in this process.
"""

from __future__ import annotations

import pickle
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from remote_writers import download, objects

import cfstore
from cfstore import Derivation, EngineError, Store, derive, ingest, ray_engine
from cfstore.attempts import InOwnSession
from cfstore.processes import StoppedError
from cfstore.ray_engine import check_view
from cfstore.remote.bucket import Bucket

Make = Callable[..., Any]
Tell = Callable[[], None]
SLIDES = ("a", "b", "c")
COUNTS = ("n_slides", "n_bags", "n_without_coords", "n_shards", "problems", "source_bytes", "stored_bytes")
WANTED = (Derivation.mean(20), Derivation.nearest(20), Derivation.parents(20, 5))
LISTED = "SELECT slide_id, derivation, digest, source FROM derived ORDER BY ALL"


class Nodes:
    """Stands for the Ray engine: every attempt has a $TMPDIR of its own, and gets the task as bytes.

    `attempts` is called with a task's attempt, which it may make several times; each gets another $TMPDIR.
    """

    n_slots, patience, n_restarted = 2, 60.0, 0

    def __init__(self, folder: Path, attempts: Callable[[Callable[[Tell], Any], Tell], Any]) -> None:
        self.folder, self.attempts = folder, attempts
        self.given: list[tuple[Any, Any]] = []
        self.stores: list[Path | str] = []
        self.n_attempts = 0

    @contextmanager
    def open(self, name: str, address: str | None, *, store: Path | str, **_: Any) -> Iterator[Nodes]:
        self.stores.append(store)
        yield self

    def __call__(self, function: Any, tasks: Sequence[Any], jobs: int, on_step: Tell) -> Iterator[Any]:
        for task in tasks:
            self.given.append((function, task))
            packed = pickle.dumps((function, task))
            yield self.attempts(lambda tell, packed=packed: self._attempt(packed, tell), on_step)

    def _attempt(self, packed: bytes, tell: Tell) -> Any:
        function, task = pickle.loads(packed)
        own = self.folder / f"attempt{self.n_attempts}"
        self.n_attempts += 1
        own.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(own))
            return function(task, tell)

    def left(self) -> list[Path]:
        """Sessions that attempts left behind."""
        return list(self.folder.glob("attempt*/*/session-*"))


def once(attempt: Callable[[Tell], Any], tell: Tell) -> Any:
    return attempt(tell)


def unheard(attempt: Callable[[Tell], Any], tell: Tell) -> Any:
    """The first attempt dies after its work is done, before it answers."""
    attempt(lambda: None)
    return attempt(tell)


@pytest.fixture
def folder(tmp_path: Path, make_cohort: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ingest, "SLIDES_PER_SHARD", 2)  # two tasks
    make_cohort(tmp_path / "uni", SLIDES)
    return tmp_path / "uni"


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nodes]:
    """Let `engine="ray"` mean such nodes."""

    def make(attempts: Any) -> Nodes:
        nodes = Nodes(tmp_path / f"nodes-{attempts.__name__}", attempts)
        for module in (ingest, derive):
            monkeypatch.setattr(module, "open_engine", nodes.open)
        return nodes

    return make


def bags(store: Store) -> list[dict[str, Any]]:
    query = "SELECT * EXCLUDE (shard, row_start, byte_start, byte_length) FROM bags ORDER BY ALL"
    return store.sql(query).to_pylist()


def copied(port: int, url: str, path: Path) -> Store:
    """What is in the bucket, as Amazon's client gets it, whole, and nothing besides it."""
    assert download(port, url, path)
    store = Store(path)
    assert store.verify(deep=True).findings == ()
    named = {row["shard"] for row in store.sql("SELECT DISTINCT shard FROM bags").to_pylist()}
    assert {"/".join(key.split("/")[:3]) for key in objects(port, url, "features/")} == named
    return store


@pytest.mark.parametrize(
    ("form", "attempts"),
    [
        ("zarr", unheard),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("zarr", once), ("webdataset", unheard))),
    ],
)
def test_a_task_done_again_elsewhere_answers_with_what_the_first_attempt_committed(
    form: Any, attempts: Any, folder: Path, bucket_url: str, s3: FaultyProxy, s3_port: int, tmp_path: Path, use: Any
) -> None:
    options = cfstore.IngestOptions(format=form)
    local = cfstore.open(tmp_path / "local", create=True)
    expected = local.ingest(folder, options)
    store, nodes, steps = cfstore.open(bucket_url, create=True), use(attempts), []  # type: Store, Nodes, list[int]
    n_before = len(s3.log)
    report = store.ingest(folder, options, engine="ray", jobs=2, progress=lambda done, total: steps.append(done))
    assert [getattr(report, name) for name in COUNTS] == [getattr(expected, name) for name in COUNTS]
    assert report.n_recovered == (len(SLIDES) if attempts is unheard else 0)
    assert steps == [1, 2, 3]
    assert nodes.stores == [bucket_url]
    assert all(isinstance(function, InOwnSession) for function, _ in nodes.given)
    assert nodes.n_attempts == 2 * (1 + (attempts is unheard))
    assert nodes.left() == []
    puts = [line.split()[1].rpartition("/")[2] for line in s3.log[n_before:] if line.startswith("PUT")]
    assert puts.count("catalog.parquet") == 1  # of the driver, at the end
    assert puts.count("catalog.duckdb") == 2 + 1  # of each task, and the driver's tables
    assert bags(copied(s3_port, bucket_url, tmp_path / "copy")) == bags(local) == bags(store)


@pytest.mark.parametrize("attempts", [unheard, pytest.param(once, marks=pytest.mark.slow)])
def test_deriving_again_elsewhere_answers_with_what_the_first_attempt_committed(
    attempts: Any, folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, use: Any
) -> None:
    local, store = (cfstore.open(place, create=True) for place in (tmp_path / "local", bucket_url))
    for each in (local, store):
        each.ingest(folder)
    expected, nodes = local.derive(WANTED, jobs=1), use(attempts)
    report = store.derive(WANTED, engine="ray", jobs=2)
    assert (report.done, report.excluded) == (expected.done, expected.excluded)
    assert expected.excluded  # slides too small to tell their edges
    assert report.n_recovered == (report.n_done if attempts is unheard else 0)
    assert nodes.left() == []
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    assert found.sql(LISTED).to_pylist() == local.sql(LISTED).to_pylist()
    named = {row["file"] for row in found.sql("SELECT DISTINCT file FROM derived").to_pylist()}
    assert set(objects(s3_port, bucket_url, "derived/")) == named
    for derivation in {Derivation.parse(row["derivation"]) for row in found.sql(LISTED).to_pylist()}:
        slide = next(r["slide_id"] for r in found.sql(LISTED).to_pylist() if r["derivation"] == derivation.name)
        one, other = (each.derived([derivation], "uni", [slide]).read(slide)[derivation] for each in (local, store))
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_an_attempt_that_was_given_up_but_lives_on_takes_back_what_it_uploaded(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, use: Any
) -> None:
    """Its node was cut off: both write, and the second is the first to commit."""

    def overtaken(attempt: Callable[[Tell], Any], tell: Tell) -> Any:
        before: list[Any] = []

        def tell_late() -> None:
            if not before:
                before.append(attempt(lambda: None))
            tell()

        return attempt(tell_late)

    store = cfstore.open(bucket_url, create=True)
    use(overtaken)
    report = store.ingest(folder, engine="ray", jobs=2)
    assert (report.n_slides, report.n_shards, report.n_recovered) == (3, 2, 3)
    derived = store.derive([Derivation.mean(20)], engine="ray", jobs=2)
    assert derived.n_recovered == derived.n_done == 3
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    named = {row["file"] for row in found.sql("SELECT DISTINCT file FROM derived").to_pylist()}
    assert set(objects(s3_port, bucket_url, "derived/")) == named


@pytest.mark.slow
def test_of_two_attempts_that_commit_at_once_one_counts(
    folder: Path, bucket_url: str, s3_port: int, tmp_path: Path, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later attempt commits when the earlier one has put everything but the catalog."""
    put, again = Bucket.put, []  # type: Any, list[Callable[[], Any]]

    def race(self: Bucket, key: str, content: Any, **condition: Any) -> Any:
        if key == "catalog.duckdb" and again:
            again.pop()()
        return put(self, key, content, **condition)

    def at_once(attempt: Callable[[Tell], Any], tell: Tell) -> Any:
        again.append(lambda: attempt(lambda: None))
        return attempt(tell)

    store = cfstore.open(bucket_url, create=True)
    use(at_once)
    monkeypatch.setattr(Bucket, "put", race)
    report = store.ingest(folder, engine="ray", jobs=2)
    assert again == []
    assert (report.n_slides, report.n_shards, report.n_recovered) == (3, 2, 3)
    derived = store.derive([Derivation.mean(20)], engine="ray", jobs=2)
    assert again == []
    assert derived.n_recovered == derived.n_done == 3
    found = copied(s3_port, bucket_url, tmp_path / "copy")
    named = {row["file"] for row in found.sql("SELECT DISTINCT file FROM derived").to_pylist()}
    left = set(objects(s3_port, bucket_url, "derived/")) - named  # kept for a day: its commit might have won unheard
    assert len(left) == len(named)
    assert all((found.path / file).stat().st_size for file in named)


def test_an_attempt_that_is_stopped_removes_its_session(folder: Path, bucket_url: str, use: Any) -> None:
    def stop() -> None:
        raise StoppedError

    def stopped(attempt: Callable[[Tell], Any], tell: Tell) -> Any:
        return attempt(stop)

    store, nodes = cfstore.open(bucket_url, create=True), use(stopped)
    with pytest.raises(StoppedError):
        store.ingest(folder, engine="ray", jobs=2)
    assert nodes.n_attempts == 1
    assert nodes.left() == []


# -- what a node sees ----------------------------------------------------------------------------


def refused(view: Any) -> str:
    with pytest.raises(EngineError) as raised:
        check_view(view)
    said = str(raised.value)
    assert said.startswith(f"node {socket.gethostname()} ")
    return said


def test_a_node_has_to_reach_the_bucket_and_find_the_same_store(bucket_url: str, folder: Path) -> None:
    cfstore.open(bucket_url, create=True)
    source = folder / "x20" / "h5_files" / "a.h5"
    with ray_engine._shown(bucket_url, [source]) as view:
        check_view(view)
    cfstore.open(f"{bucket_url}/other", create=True)
    assert f"has another store at {bucket_url}/other (" in refused(replace(view, store=f"{bucket_url}/other"))
    said = refused(replace(view, store=f"{bucket_url}/none"))
    assert "does not see the store" in said
    assert "AWS_* in the environment in which its `ray start` ran" in said
    assert "has a copy of the store" in refused(replace(view, probe="2001-01-01 00:00:00+00:00"))
    source.unlink()
    check_view.cache_clear()
    assert f"sees nothing at {source}; the folder must be on storage that all nodes share" in refused(view)
