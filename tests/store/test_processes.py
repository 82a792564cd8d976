"""Ingest in several processes: the same store, progress, and no process or file left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import cfstore
from cfstore import IngestOptions, Store
from cfstore.errors import NonFiniteError, StoreError
from cfstore.processes import side_by_side

Make = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
SLIDES = tuple(f"s{i:02d}" for i in range(11))
PLACES = ("shard", "row_start", "byte_start")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
SCRIPT = """
import sys
import cfstore
print("top level", flush=True)
cfstore.open(sys.argv[1], create=True).ingest(sys.argv[2], jobs=3)
"""


def bags(store: Store, *without: str) -> list[dict[str, Any]]:
    columns = f"EXCLUDE ({', '.join(without)})" if without else ""
    return store.sql(f"SELECT * {columns} FROM bags ORDER BY slide_id, scale, encoder").to_pylist()


def children_of(pid: int) -> set[int]:
    """Processes whose parent is `pid`, but for multiprocessing's resource tracker."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and b"resource_tracker" not in command:
            found.add(int(path.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(true: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """Six slides that take seconds each: gzip-compressed, in chunks of one row."""
    folder = tmp_path / "uni"
    rows = np.random.default_rng(0).normal(size=(8_000, 64)).astype(np.float32)
    for i in range(6):
        path = folder / "x20" / "h5_files" / f"s{i}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i:
            os.link(folder / "x20" / "h5_files" / "s0.h5", path)
            continue
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=rows, chunks=(16, 4), compression="gzip", compression_opts=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_three_processes_make_the_store_that_one_makes(form: Any, tmp_path: Path, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    make_cohort(tmp_path / "uni" / "x20" / "..", ("extra",), scales=(20,))
    stores = {jobs: cfstore.open(tmp_path / f"by{jobs}", create=True) for jobs in (1, 3)}
    reports = {
        jobs: store.ingest(tmp_path / "uni", IngestOptions(format=form), jobs=jobs) for jobs, store in stores.items()
    }
    assert (reports[1].n_processes, reports[3].n_processes) == (1, 3)
    assert reports[3].n_shards >= 3
    for name in ("n_slides", "n_bags", "n_present", "problems", "source_bytes"):
        assert getattr(reports[1], name) == getattr(reports[3], name)
    assert bags(stores[1], *PLACES, "byte_length") == bags(stores[3], *PLACES, "byte_length") != []
    for table in ("slides", "patients", "splits", "skipped"):
        query = f"SELECT * FROM {table} ORDER BY ALL"
        assert stores[1].sql(query).to_pylist() == stores[3].sql(query).to_pylist()
    for slide in (*SLIDES, "extra"):
        for scale, bag in stores[1].slide(slide).bags.items():
            other = stores[3].slide(slide).bags[scale]
            assert bag.features.tobytes() == other.features.tobytes()
            np.testing.assert_array_equal(bag.coords, other.coords)


@pytest.mark.slow
def test_progress_of_several_processes_counts_every_slide_once(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", SLIDES, scales=(20,))
    seen: list[tuple[int, int]] = []
    store.ingest(tmp_path / "uni", jobs=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, len(SLIDES)) for i in range(1, len(SLIDES) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_bad_slide_in_a_process_is_raised_or_skipped_as_in_one(
    on_error: Any, tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", SLIDES)
    with h5py.File(tmp_path / "uni" / "x20" / "h5_files" / "s07.h5", "a") as file:
        file["features"][-1, 3] = np.nan
    if on_error == "stop":
        with pytest.raises(NonFiniteError, match=r"s07\.h5: row \d+ has NaN.*extract the slide again"):
            store.ingest(tmp_path / "uni", jobs=3)
        assert "s07" not in {row["slide_id"] for row in bags(store)}
    else:
        report = store.ingest(tmp_path / "uni", jobs=3, on_error="skip")
        assert [problem.slide_id for problem in report.problems] == ["s07"]
        assert {row["slide_id"] for row in bags(store)} == set(SLIDES) - {"s07"}
        assert store.sql("SELECT slide_id, error FROM skipped").to_pylist() == [
            {"slide_id": "s07", "error": "NonFiniteError"}
        ]
    assert not list(store.path.rglob(".writing-*"))
    assert not children_of(os.getpid())
    assert all(len(store.slide(row["slide_id"]).bags) == 3 for row in bags(store))


@pytest.mark.slow
def test_a_killed_process_is_an_error_that_says_what_to_do(endless: Path, store: Store, make_cohort: Make) -> None:
    def kill_one() -> None:
        until(lambda: any(store.path.glob("features/*/.writing-*")))
        os.kill(min(children_of(os.getpid())), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(StoreError, match=r"a worker process died.*again, with fewer --jobs"):
        store.ingest(endless, jobs=2)
    killer.join()
    assert not children_of(os.getpid())
    for path in sorted((endless / "x20" / "h5_files").iterdir())[1:]:
        path.unlink()
    store.ingest(endless)  # whatever was left is swept away
    assert not list(store.path.rglob(".writing-*"))
    assert "s0" in {row["slide_id"] for row in bags(store)}


@pytest.mark.slow
def test_processes_do_not_outlive_a_parent_that_was_killed(endless: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), str(endless)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    assert until(lambda: any((tmp_path / "store").glob("features/*/.writing-*")))
    children = children_of(parent.pid)
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert until(lambda: not any(alive(child) for child in children), seconds=20), children


@pytest.mark.slow
def test_a_plain_script_that_ingests_is_not_run_again_by_its_processes(tmp_path: Path, make_cohort: Make) -> None:
    """No `if __name__ == "__main__"` is asked of users."""
    make_cohort(tmp_path / "uni", SLIDES, scales=(20,))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "store"), str(tmp_path / "uni")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "top level\n"
    assert len(bags(cfstore.open(tmp_path / "store"))) == len(SLIDES)


def double(task: int, tell: Callable[[], None]) -> int:
    tell()
    if task < 0:
        raise ValueError(task)
    return 2 * task


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_results_of_all_tasks_come_with_their_steps(jobs: int) -> None:
    steps: list[int] = []
    assert sorted(side_by_side(double, range(40), jobs, lambda: steps.append(1))) == list(range(0, 80, 2))
    assert len(steps) == 40


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_task_raises_reaches_the_caller_and_ends_the_processes(jobs: int) -> None:
    with pytest.raises(ValueError, match="-3"):
        list(side_by_side(double, [1, 2, -3, 4], jobs, lambda: None))
    assert not children_of(os.getpid())
