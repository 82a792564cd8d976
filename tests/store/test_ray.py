"""Ingest and derive on two Ray nodes, either of which may die: the same store, the same report, nothing twice."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ray_nodes import ROOT, Cluster, opened_by, two_nodes

import cfstore
from cfstore import Derivation, EngineError, Store, derive, ingest, ray_connection, ray_engine
from cfstore.errors import NonFiniteError
from cfstore.ingest import prepare
from cfstore.ray_engine import RETRIES

Make = Callable[..., Any]
Tell = Callable[[], None]
SLIDES = tuple(f"s{i:02d}" for i in range(12))  # of `slow_cohort`, too
COUNTS = ("n_slides", "n_bags", "n_without_coords", "n_present", "problems", "source_bytes")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]  # one cluster at a time, for all


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as made:
        yield made


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """Functions of this module are sent as they are: nodes cannot import it."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, Store]:
    return {name: cfstore.open(tmp_path / name, create=True) for name in ("local", "ray")}


def bags(store: Store) -> list[dict[str, Any]]:
    """Every column but the places: which slides share a shard may differ, and with it where a bag begins."""
    query = "SELECT * EXCLUDE (shard, row_start, byte_start, byte_length) FROM bags ORDER BY slide_id, scale, encoder"
    return store.sql(query).to_pylist()


def check_same(stores: dict[str, Store]) -> None:
    local, ray = stores["local"], stores["ray"]
    assert bags(ray) == bags(local) != []
    for table in ("slides", "patients", "splits", "skipped"):
        query = f"SELECT * FROM {table} ORDER BY ALL"
        assert ray.sql(query).to_pylist() == local.sql(query).to_pylist()
    for slide in sorted({row["slide_id"] for row in bags(local)}):
        for scale, bag in local.slide(slide).bags.items():
            other = ray.slide(slide).bags[scale]
            assert bag.features.tobytes() == other.features.tobytes()
            np.testing.assert_array_equal(bag.coords, other.coords)
    assert ray.verify(deep=True).findings == ()


def n_shards(store: Store) -> int:
    return len(list(store.path.glob("features/*/[0-9]*")))


def temporary(store: Store) -> list[Path]:
    return [*store.path.rglob(".writing-*"), *store.path.glob(".probe-*"), *store.path.glob(".catalog*")]


def until(true: Callable[[], Any], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_half_the_cluster_is_killed_while_it_writes_and_the_store_is_the_local_one(
    cluster: Cluster, slow_cohort: Path, stores: dict[str, Store]
) -> None:
    local = stores["local"].ingest(slow_cohort)
    store, doomed = stores["ray"], cluster.second()
    was_writing: list[str] = []

    def kill() -> None:
        until(lambda: n_shards(store) >= 3)
        until(lambda: opened_by(doomed.processes, "/.writing-"))
        was_writing.extend(opened_by(doomed.processes, "/.writing-"))
        doomed.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    seen: list[tuple[int, int]] = []
    report = store.ingest(
        slow_cohort, engine="ray", address=cluster.address, jobs=12, progress=lambda *step: seen.append(step)
    )
    killer.join()
    assert was_writing
    assert temporary(store) == []
    assert report.n_restarted >= 1
    assert not doomed.is_alive()
    assert [getattr(report, name) for name in COUNTS] == [getattr(local, name) for name in COUNTS]
    assert report.n_shards == n_shards(store) == 12
    assert seen == [(i, len(SLIDES)) for i in range(1, len(SLIDES) + 1)]
    check_same(stores)
    prepare(store.path)
    assert temporary(store) == []
    again = store.ingest(slow_cohort, engine="ray", address=cluster.address)
    assert (again.n_slides, again.n_present) == (0, len(SLIDES))


def die_once(folder: Path, after: Callable[[Any, Tell], Any]) -> Callable[[Any, Tell], Any]:
    """The first two workers are killed when their work is done and registered, before they can say so."""

    def run(task: Any, tell: Tell) -> Any:
        done = after(task, tell)
        if not (folder / f"died-{task.name}").exists() and len(list(folder.glob("died-*"))) < 2:
            (folder / f"died-{task.name}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return run


def test_workers_that_die_between_registering_and_answering_are_answered_for(
    cluster: Cluster,
    tmp_path: Path,
    stores: dict[str, Store],
    make_cohort: Make,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    with h5py.File(tmp_path / "uni" / "x20" / "h5_files" / "s07.h5", "a") as file:
        file["features"][-1, 3] = np.nan
    local = stores["local"].ingest(tmp_path / "uni", on_error="skip")
    cluster.second()
    monkeypatch.setattr(ingest, "write_shard", die_once(tmp_path, ingest.write_shard))
    seen: list[int] = []
    report = stores["ray"].ingest(
        tmp_path / "uni",
        on_error="skip",
        engine="ray",
        address=cluster.address,
        jobs=3,
        progress=lambda done, total: seen.append(done),
    )
    n_dead = len(list(tmp_path.glob("died-*")))
    assert n_dead >= 2
    assert capfd.readouterr().out == ""  # where commands print JSON
    assert [getattr(report, name) for name in COUNTS if name != "problems"] == [
        getattr(local, name) for name in COUNTS if name != "problems"
    ]
    assert [str(problem.error) for problem in report.problems] == [str(problem.error) for problem in local.problems]
    assert report.n_shards == 3
    assert report.n_restarted == n_dead
    assert 0 < report.n_recovered < len(SLIDES)
    assert seen == list(range(1, len(SLIDES) + 1))
    assert temporary(stores["ray"]) == []
    check_same(stores)


def test_deriving_on_two_nodes_with_dying_workers_gives_what_one_machine_gives(
    cluster: Cluster, tmp_path: Path, make_cohort: Make, stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    for store in stores.values():
        store.ingest(tmp_path / "uni")
    wanted = [Derivation.nearest(20), Derivation.similar(10), Derivation.mean(5), Derivation.parents(20, 5)]
    local = stores["local"].derive(wanted)
    cluster.second()
    monkeypatch.setattr(derive, "write_derived", die_once(tmp_path, derive.write_derived))
    report = stores["ray"].derive(wanted, engine="ray", address=cluster.address, jobs=2)
    assert report.n_restarted == len(list(tmp_path.glob("died-*"))) >= 2
    assert (report.done, report.excluded, report.n_held) == (local.done, local.excluded, local.n_held)
    assert 0 < report.n_recovered < report.n_done
    query = "SELECT * EXCLUDE (file, row_group, created) FROM derived ORDER BY slide_id, derivation"
    rows = stores["local"].sql(query).to_pylist()
    assert stores["ray"].sql(query).to_pylist() == rows
    for row in rows:
        derivation = Derivation.parse(row["derivation"])
        one, other = (
            store.derived([derivation], "uni", [row["slide_id"]]).read(row["slide_id"])[derivation]
            for store in stores.values()
        )
        np.testing.assert_array_equal(one, other)
    assert stores["ray"].verify(deep=True).findings == ()
    assert temporary(stores["ray"]) == []


def test_a_bad_file_is_raised_as_on_one_machine(
    cluster: Cluster, tmp_path: Path, stores: dict[str, Store], make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    with h5py.File(tmp_path / "uni" / "x20" / "h5_files" / "s07.h5", "a") as file:
        file["features"][-1, 3] = np.nan
    with pytest.raises(NonFiniteError) as local:
        stores["local"].ingest(tmp_path / "uni")
    with pytest.raises(NonFiniteError) as raised:
        stores["ray"].ingest(tmp_path / "uni", engine="ray", address=cluster.address, jobs=3)
    assert type(raised.value) is type(local.value)
    assert str(raised.value) == str(local.value)
    assert "s07" not in {row["slide_id"] for row in bags(stores["ray"])} if n_shards(stores["ray"]) else True
    assert temporary(stores["ray"]) == []


def test_nodes_with_other_code_refuse(
    cluster: Cluster, tmp_path: Path, stores: dict[str, Store], make_cohort: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "uni", SLIDES[:2])
    monkeypatch.setattr(ray_engine, "code_version", lambda: "9.9+other")
    with pytest.raises(
        EngineError, match=r"^node \S+ has crossfusion-store \S+, the command runs 9\.9\+other; install"
    ):
        stores["ray"].ingest(tmp_path / "uni", engine="ray", address=cluster.address)
    assert n_shards(stores["ray"]) == 0


def five_steps(task: Path, tell: Tell) -> str:
    for step in range(5):
        tell()
        if step == 3 and not task.exists():
            task.touch()
            time.sleep(0.5)  # so that the steps are told
            os.kill(os.getpid(), signal.SIGKILL)
    return task.name


def always_dies(task: int, tell: Tell) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_steps_that_are_done_again_are_counted_once(cluster: Cluster, tmp_path: Path, store: Store) -> None:
    cluster.second()
    steps: list[int] = []
    with ray_engine.ray_engine(store.path, cluster.address, files=[], memory=1 << 20, need="test") as engine:
        assert engine.n_slots == 2
        tasks = [tmp_path / name for name in ("a", "b", "c")]
        assert sorted(engine(five_steps, tasks, 2, lambda: steps.append(1))) == ["a", "b", "c"]
        assert len(steps) == 15
        with pytest.raises(EngineError, match=rf"worker died {RETRIES + 1} times .*WorkerCrashedError.* fewer --jobs"):
            list(engine(always_dies, [1], 1, lambda: None))
    assert not list(store.path.glob(".probe-*"))


def test_a_task_that_fits_on_no_node_is_refused_at_once(cluster: Cluster, store: Store) -> None:
    with (
        pytest.raises(EngineError, match=r"no node of the Ray cluster has a CPU and 1024\.0 GiB .*1 CPUs, 64\.0 GiB"),
        ray_engine.ray_engine(store.path, cluster.address, files=[], memory=1 << 40, need="test"),
    ):
        pass


def begins(task: Path, tell: Tell) -> None:
    task.touch()
    time.sleep(600)


def test_where_the_last_node_for_the_work_is_lost_the_command_ends_and_says_so(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would wait for another, for ever and in silence."""
    monkeypatch.setattr(ray_connection, "ROOM_SECONDS", 3.0)
    with two_nodes(num_cpus=0) as bare:
        only = bare.add(num_cpus=1)
        begun = tmp_path / "begun"
        thread = threading.Thread(target=lambda: (until(begun.exists), only.kill()), daemon=True)
        thread.start()
        with (
            pytest.raises(
                EngineError, match=r"no node of the Ray cluster .* Nodes were lost; what was finished is kept"
            ),
            ray_engine.ray_engine(store.path, bare.address, files=[], memory=1 << 20, need="test") as engine,
        ):
            list(engine(begins, [begun], 1, lambda: None))
        thread.join(10)


def test_ctrl_c_ends_the_tasks_and_leaves_the_store_clean(
    cluster: Cluster, slow_cohort: Path, stores: dict[str, Store]
) -> None:
    store = stores["ray"]
    cluster.second()
    # what a script starts with & ignores Ctrl-C, and so would the command if these tests were started like that
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom cfstore.cli import main; main()"
    )
    command = ["-c", code, "ingest", str(slow_cohort), "--store", str(store.path)]
    command += ["--engine", "ray", "--address", cluster.address, "--jobs", "12"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    process = subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: n_shards(store) >= 1 and any(store.path.rglob(".writing-*")))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 1
    assert "Aborted!" in said
    assert "Traceback" not in said
    assert temporary(store) == []  # before anything sweeps
    assert 0 < n_shards(store) < 12
    assert store.verify().findings == ()
    done = subprocess.run(
        [sys.executable, *command, "--json"], env=environment, capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert (report["n_slides"] + report["n_present"], report["n_recovered"]) == (12, 0)
    assert len(bags(store)) == 36


def test_who_never_used_ray_gets_a_token_even_where_ray_was_loaded_before(tmp_path: Path) -> None:
    """Ray reads its settings when it is loaded: without the token it could not talk to what it started."""
    code = "import ray, cfstore\nwith cfstore.ray_cluster(): print(ray.get(ray.remote(lambda: 7).remote()))"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = plain | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "7\n", done.stderr
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_a_cluster_lets_nobody_in_with_another_token(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("of-somebody-else" * 4)
    code = "import sys, cfstore\nwith cfstore.ray_cluster(sys.argv[1], need='this'): pass"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
    }
    command = [sys.executable, "-c", code, cluster.address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"EngineError: this: no connection to Ray at {cluster.address}" in done.stderr
    assert "the same token (~/.ray/auth_token)" in done.stderr


def test_one_machine_without_a_cluster_starts_its_own_ray_and_ends_it(
    tmp_path: Path, stores: dict[str, Store], make_cohort: Make
) -> None:
    import ray

    make_cohort(tmp_path / "uni", SLIDES[:4])
    stores["local"].ingest(tmp_path / "uni")
    with cfstore.ray_cluster() as started:
        assert started.cluster_resources()["CPU"] == len(os.sched_getaffinity(0))
        stores["ray"].ingest(tmp_path / "uni", engine="ray", jobs=2)  # in the Ray that is there
        assert ray.is_initialized()
        with pytest.raises(EngineError, match=r"connected to Ray at \S+, not 10\.0\.0\.5:6379"):
            stores["ray"].derive(engine="ray", address="10.0.0.5:6379")
    assert not ray.is_initialized()
    check_same(stores)
