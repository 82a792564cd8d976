"""Engines without Ray: what is said where it is missing or out of reach; work that knows its own earlier attempts."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

import cfstore
from cfstore import Derivation, EngineError, Store, derive, ingest, ray_connection, ray_engine
from cfstore.ray_engine import View, check_view
from cfstore.shard_job import ShardTask

Make = Callable[..., Any]
SLIDES = ("a", "b", "c", "d", "e")
TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who never used Ray."""
    for name in TOKENS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return tmp_path


def test_without_ray_an_ingest_says_how_to_install_it_and_writes_nothing(
    tmp_path: Path, store: Store, make_cohort: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"^cfstore ingest --engine ray: .*pip install 'crossfusion-store\[ray\]'"):
        store.ingest(tmp_path / "uni", engine="ray")
    assert store.sql("SELECT count(*) AS n FROM bags").to_pylist() == [{"n": 0}]
    store.ingest(tmp_path / "uni")
    with pytest.raises(EngineError, match=r"^cfstore derive --engine ray: .*pip install 'crossfusion-store\[ray\]'"):
        store.derive(engine="ray")


def test_where_nothing_is_left_to_do_no_engine_is_started(
    tmp_path: Path, store: Store, make_cohort: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    store.ingest(tmp_path / "uni")
    store.derive([Derivation.mean(20)])
    monkeypatch.setitem(sys.modules, "ray", None)
    assert store.ingest(tmp_path / "uni", engine="ray").n_present == len(SLIDES)
    assert store.derive([Derivation.mean(20)], engine="ray").n_held == len(SLIDES)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"engine": "dask"}, "no engine 'dask'; name one of local, ray"),
        ({"address": "10.0.0.5:6379"}, "--address is of --engine ray"),
    ],
)
def test_engines_and_addresses_that_do_not_go_together_are_refused(
    chosen: Any, said: str, tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    with pytest.raises(EngineError, match=said):
        store.ingest(tmp_path / "uni", **chosen)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{port}", r"^cfstore x: nothing answers at 127\.0\.0\.1:\d+ .*`ray start --head`"),
        ("10..0.5:{port}", r"^cfstore x: nothing answers at 10\.\.0\.5:\d+ .*label empty.*`ray start --head`"),
        ("head", r"--address 'head' is not HOST:PORT"),
        ("head:²", r"--address 'head:²' is not HOST:PORT"),
        ("ray://127.0.0.1:10001", r"run this on a node of the cluster"),
    ],
)
def test_an_address_where_no_cluster_is_becomes_one_clear_line(address: str, said: str, home: Path) -> None:
    pytest.importorskip("ray")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("t" * 32)
    with (
        pytest.raises(EngineError, match=said),
        cfstore.ray_cluster(address.format(port=free_port()), need="cfstore x"),
    ):
        pass


def test_nobody_joins_a_cluster_without_its_token(home: Path) -> None:
    pytest.importorskip("ray")
    with (
        pytest.raises(EngineError, match=rf"no token to join Ray at 127\.0\.0\.1:6379.*{home}/\.ray/auth_token"),
        cfstore.ray_cluster("127.0.0.1:6379"),
    ):
        pass


def test_a_token_that_is_made_can_be_read_by_its_owner_alone(home: Path) -> None:
    old = os.umask(0)
    try:
        ray_connection._make_token()
    finally:
        os.umask(old)
    made = home / ".ray" / "auth_token"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    first = made.read_text()
    assert len(first) >= 32
    ray_connection._make_token()
    assert made.read_text() == first


def test_ray_is_told_to_ask_for_tokens_and_to_report_nothing_before_it_is_loaded(tmp_path: Path) -> None:
    """And what the user has set himself stays."""
    (tmp_path / "ray.py").write_text(
        "import os; print(*(os.environ[f'RAY_{n}'] for n in ('AUTH_MODE', 'USAGE_STATS_ENABLED', 'task_oom_retries')))"
    )
    code = (
        "import os; from cfstore.ray_connection import load_ray; assert 'RAY_AUTH_MODE' not in os.environ; load_ray('')"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join((str(tmp_path), *sys.path))
    environment = {**plain, "PYTHONPATH": path, "RAY_task_oom_retries": "9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["token", "0", "9"], done.stderr


def test_the_code_version_follows_the_source_and_a_node_with_another_one_refuses(tmp_path: Path) -> None:
    ours = Path(cfstore.__file__).parents[1]
    for package in ("cfstore", "cftrain", "kernels/cfkernels"):
        shutil.copytree(ours / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = """if True:
        from cfstore.ray_connection import code_version
        print(code_version.__wrapped__())
        with open("cftrain/loop.py", "a") as file:
            file.write("\\n")
        print(code_version.__wrapped__())
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(tmp_path / "kernels")))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    same, other = done.stdout.split()
    assert same == cfstore.code_version() != other
    cfstore.check_code(same)
    with pytest.raises(EngineError) as raised:
        cfstore.check_code(other)
    assert all(part in str(raised.value) for part in (socket.gethostname(), other, cfstore.code_version()))


# -- what a node sees ----------------------------------------------------------------------------


@pytest.fixture
def view(tmp_path: Path, store: Store, make_cohort: Make) -> Iterator[View]:
    make_cohort(tmp_path / "uni", SLIDES)
    with ray_engine._shown(store.path, [tmp_path / "uni" / "x20" / "h5_files" / "a.h5"]) as shown:
        yield shown
    assert not list(store.path.glob(".probe-*"))


def refused(view: View) -> str:
    with pytest.raises(EngineError) as raised:
        check_view(view)
    return str(raised.value)


def test_a_node_that_sees_store_and_files_may_work(view: View) -> None:
    check_view(view)


def test_a_node_without_the_store_refuses_by_name(view: View, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    said = refused(View(tmp_path / "elsewhere", view.uuid, view.probe, view.files))
    assert socket.gethostname() in said
    assert "does not see the store" in said
    assert "storage that all nodes share" in said


def test_a_node_with_a_copy_of_the_store_refuses(view: View, tmp_path: Path) -> None:
    shutil.copytree(view.store, tmp_path / "copy", ignore=shutil.ignore_patterns(".probe-*"))
    assert "has a copy of the store" in refused(View(tmp_path / "copy", view.uuid, view.probe, view.files))


def test_a_node_with_another_store_in_that_place_refuses(view: View, tmp_path: Path) -> None:
    other = cfstore.open(tmp_path / "other", create=True)
    assert f"has another store at {other.path}" in refused(View(other.path, view.uuid, view.probe, view.files))


@pytest.mark.parametrize("there", [True, False])
def test_a_node_with_other_source_files_refuses(there: bool, view: View) -> None:
    path = Path(view.files[0][0])
    if there:
        with path.open("ab") as file:
            file.write(b"x")
    else:
        path.unlink()
    assert f"sees {'other than here' if there else 'nothing'}" in refused(view)


def test_a_probe_that_a_killed_command_left_is_swept_away(store: Store) -> None:
    (store.path / ".probe-0123").touch()
    with ray_engine._shown(store.path, []) as shown:
        ingest.prepare(store.path)
        assert [path.name for path in store.path.glob(".probe-*")] == [shown.probe]


# -- a second attempt at a task ------------------------------------------------------------------


def twice(function: Any, kill: Callable[[Any], None] = lambda task: None) -> Any:
    """As where a worker dies after its work is done, before it answers: everything is done again."""

    def attempt(task: Any, tell: Callable[[], None]) -> Any:
        function(task, lambda: None)
        kill(task)
        return function(task, tell)

    return attempt


@contextmanager
def every_task(attempt: Callable[..., Any], where: Any, name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, attempt(getattr(where, name)))
        yield


def held(store: Store) -> list[dict[str, Any]]:
    return store.sql("SELECT * EXCLUDE (shard) FROM bags ORDER BY slide_id, scale").to_pylist()


COUNTS = ("n_slides", "n_bags", "n_without_coords", "n_shards", "problems", "source_bytes", "stored_bytes")


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_task_done_twice_writes_one_shard_and_answers_as_if_done_once(
    form: Any, tmp_path: Path, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    once, again = (cfstore.open(tmp_path / name, create=True) for name in ("once", "again"))
    expected = once.ingest(tmp_path / "uni", cfstore.IngestOptions(format=form))
    steps: list[int] = []
    with every_task(twice, ingest, "write_shard"):
        report = again.ingest(
            tmp_path / "uni", cfstore.IngestOptions(format=form), progress=lambda done, total: steps.append(done)
        )
    assert [getattr(report, name) for name in COUNTS] == [getattr(expected, name) for name in COUNTS]
    assert (expected.n_recovered, report.n_recovered) == (0, len(SLIDES))
    assert steps == [1, 2, 3, 4, 5]
    assert held(again) == held(once)
    assert again.verify().findings == ()


def test_what_the_first_attempt_left_out_is_found_out_again(tmp_path: Path, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    with h5py.File(tmp_path / "uni" / "x20" / "h5_files" / "c.h5", "a") as file:
        file["features"][-1, 3] = np.nan
    once, again = (cfstore.open(tmp_path / name, create=True) for name in ("once", "again"))
    expected = once.ingest(tmp_path / "uni", on_error="skip")
    steps: list[int] = []
    with every_task(twice, ingest, "write_shard"):
        report = again.ingest(tmp_path / "uni", on_error="skip", progress=lambda done, total: steps.append(done))
    assert [str(problem.error) for problem in report.problems] == [str(each.error) for each in expected.problems]
    assert [problem.slide_id for problem in report.problems] == ["c"]
    assert (report.n_slides, report.n_shards, report.n_recovered) == (4, 1, 4)
    assert steps == [1, 2, 3, 4, 5]
    assert held(again) == held(once)


def test_a_shard_that_was_renamed_but_not_registered_is_registered_by_the_second_attempt(
    tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    before = (store.path / "catalog.duckdb").read_bytes()

    def unregister(task: ShardTask) -> None:
        (store.path / "catalog.duckdb").write_bytes(before)

    with every_task(lambda function: twice(function, unregister), ingest, "write_shard"):
        report = store.ingest(tmp_path / "uni")
    assert (report.n_slides, report.n_shards, report.n_recovered) == (5, 1, 5)
    assert store.verify().findings == ()
    assert len(held(store)) == 15


def test_a_first_attempt_that_was_given_up_but_lives_on_does_not_write_the_slides_again(
    tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    """Its node was cut off: both write, and the second is the first to publish."""
    make_cohort(tmp_path / "uni", SLIDES)

    def overtaken(function: Any) -> Any:
        def attempt(task: Any, tell: Callable[[], None]) -> Any:
            steps = 0

            def tell_late() -> None:
                nonlocal steps
                steps += 1
                if steps == len(SLIDES):
                    assert function(task, lambda: None).n_recovered == 0
                tell()

            return function(task, tell_late)

        return attempt

    with every_task(overtaken, ingest, "write_shard"):
        report = store.ingest(tmp_path / "uni")
    assert (report.n_slides, report.n_shards, report.n_recovered) == (5, 1, 5)
    with every_task(overtaken, derive, "write_derived"):
        derived = store.derive()
    assert derived.n_recovered == derived.n_done == store.sql("SELECT count(*) AS n FROM derived")["n"][0].as_py()
    files = {path.name for path in store.path.rglob("*.parquet") if "derived" in path.parts}
    assert len(files) == 1
    assert store.verify().findings == ()


def test_deriving_twice_answers_as_if_done_once(tmp_path: Path, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    once, again = (cfstore.open(tmp_path / name, create=True) for name in ("once", "again"))
    for store in (once, again):
        store.ingest(tmp_path / "uni")
    expected = once.derive()
    steps: list[int] = []
    with every_task(twice, derive, "write_derived"):
        report = again.derive(progress=lambda done, total: steps.append(done))
    assert (report.done, report.excluded) == (expected.done, expected.excluded)
    assert expected.excluded  # slides too small to tell their edges
    assert (expected.n_recovered, report.n_recovered) == (0, report.n_done)
    assert steps == [1, 2, 3, 4, 5]
    query = "SELECT * EXCLUDE (file, created) FROM derived ORDER BY slide_id, derivation"
    assert again.sql(query).to_pylist() == once.sql(query).to_pylist()
    files = [path for path in (again.path / "derived").rglob("*") if path.is_file()]
    assert len(files) == len([path for path in (once.path / "derived").rglob("*") if path.is_file()])
    assert again.verify().findings == ()


def test_of_the_tasks_to_stop_those_that_wait_for_a_node_are_taken_back_and_those_that_do_not_stop_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "_STOP_SECONDS", 0.0)
    cancelled: list[tuple[str, bool]] = []
    heard = {"ends": 0, "does not end": 1}

    def cancel(ref: str, *, force: bool = False) -> None:
        cancelled.append((ref, force))

    def wait(refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        gone = {"ends", *(ref for ref, _ in cancelled)}
        return [ref for ref in refs if ref in gone], [ref for ref in refs if ref not in gone]

    ray = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=LookupError), get=lambda answer, timeout: answer, wait=wait, cancel=cancel
    )
    mailbox = SimpleNamespace(
        stop=SimpleNamespace(remote=lambda: None), begun=SimpleNamespace(remote=lambda: set(heard.values()))
    )
    engine = ray_engine.RayEngine(ray, View(tmp_path, "", "", ()), 0, 1, ray_connection.RoomWatch(lambda: None))
    engine._stop(mailbox, heard | {"waits": 2})
    assert cancelled == [("waits", False), ("does not end", True)]
