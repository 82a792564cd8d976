"""Kill -9 at any moment of ingest, rm, compact, reindex: nothing committed is lost, nothing half-written is seen.

Real processes: a server that has imported everything forks one child per round, and the child is
killed after a random part of the time that an unkilled run takes, or as soon as a file appears.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cfstore
from cfstore import Derivation, Store
from cfstore.catalog import read_removed
from cfstore.ingest import prepare
from cfstore.shards import published_shards

Make = Callable[..., Any]
Values = dict[tuple[str, int], bytes]
ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import json, os, sys
import cfstore, cfstore.ingest, cfstore.cli, zarr, h5py, duckdb
cfstore.ingest.SLIDES_PER_SHARD = 2
cfstore.derive.SLIDES_PER_FILE = 3
for line in sys.stdin:
    verb, path, folder, jobs = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        code = 1
        try:
            store = cfstore.open(path)
            {"ingest": lambda: store.ingest(folder, jobs=jobs), "rm": lambda: store.remove(["a", "d"]),
             "compact": store.compact, "reindex": store.reindex,
             "derive": lambda: store.derive(jobs=jobs)}[verb]()
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
VERBS = ("ingest", "rm", "compact", "reindex", "derive")
ROUNDS = 8
MOMENTS: tuple[str, ...] = (
    "features/*/.writing-*", ".catalog.duckdb.*", ".catalog.parquet", "tables/.*.parquet", "features/*/000004-*",
)  # fmt: skip


OF_DERIVE: tuple[str, ...] = (
    "derived/*/*/.writing-*", "derived/*/mean-20x/[0-9a-f]*", ".catalog.duckdb.*", "derived/*/parents-20x-10x/[0-9]*",
)  # fmt: skip


class Server:
    """Runs verbs on stores in processes of their own."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.child = 0

    def _line(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def run(self, verb: str, store: Path, folder: Path, until: Callable[[], bool] | None = None, jobs: int = 1) -> int:
        """Exit code of a verb; it is killed with all its processes as soon as `until` is true."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([verb, str(store), str(folder), jobs]) + "\n")
        self._process.stdin.flush()
        child = self.child = self._line()
        if until:
            while _lives(child):
                if until():
                    os.kill(child, signal.SIGKILL)
                    break
                time.sleep(0.0003)
        code = self._line()
        while _group_lives(child):  # children of its own end when they see that it is gone
            time.sleep(0.005)
        return code

    def stop(self) -> None:
        self._process.communicate()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def pristine(tmp_path: Path, make_cohort: Make) -> tuple[Path, Path, Values]:
    """A store of three small shards with a removed slide, a folder with more slides, and what each bag holds."""
    store = cfstore.open(tmp_path / "pristine", create=True)
    rows: dict[tuple[str, int], Any] = {}
    for slides in (("a", "b"), ("c", "d"), ("e", "x")):
        rows |= make_cohort(tmp_path / slides[0] / "uni", slides)
        store.ingest(tmp_path / slides[0] / "uni")
    store.remove(["x"])
    rows |= make_cohort(tmp_path / "new" / "uni", ("n1", "n2", "n3", "n4", "n5"))
    (tmp_path / "new" / "uni" / "t.csv").write_text("case_id,slide_id,survival_months,censorship\np1,n1.svs,3,0\n")
    return (
        store.path,
        tmp_path / "new" / "uni",
        {key: value[0].astype(np.float16).tobytes() for key, value in rows.items()},
    )


def held(path: Path) -> Values:
    store = cfstore.open(path)
    listed = [tuple(row.values()) for row in store.sql("SELECT slide_id, scale FROM bags ORDER BY ALL").to_pylist()]
    found = {
        (slide, scale): bag.features.tobytes()
        for slide in dict(listed)
        for scale, bag in store.slide(str(slide)).bags.items()
    }
    assert sorted(found) == listed
    return found


def result(path: Path) -> tuple[Any, ...]:
    """What a finished verb leaves, but for names of shards and places in them."""
    store = cfstore.open(path)
    query = "SELECT * EXCLUDE (shard, row_start, byte_start, byte_length) FROM bags ORDER BY ALL"
    tables = [
        store.sql(f"SELECT * FROM {table} ORDER BY ALL").to_pylist() for table in ("slides", "patients", "skipped")
    ]
    removed = sorted(slide for _, slide in read_removed(path))
    derived = store.sql("SELECT slide_id, derivation, digest, source FROM derived ORDER BY ALL").to_pylist()
    return store.sql(query).to_pylist(), tables, removed, derived


def check_no_leftovers(path: Path) -> None:
    left = [*path.rglob(".writing-*"), *path.glob(".catalog*"), *path.glob("tables/.*")]
    assert not left


def check_derived(path: Path) -> None:
    """Whatever is listed can be read."""
    store = cfstore.open(path)
    for row in store.sql("SELECT derivation, list(slide_id) AS ids FROM derived GROUP BY ALL").to_pylist():
        one = Derivation.parse(row["derivation"])
        reader = store.derived([one], "uni", row["ids"])
        assert all(reader.read(slide)[one].size for slide in row["ids"])


def check_after_kill(path: Path, verb: str, before: Values, truth: Values) -> None:
    """Right after the kill, and again when any writing command has begun."""
    for repaired in (False, True):
        if repaired:
            prepare(path)
            assert cfstore.open(path).verify().findings == ()
            check_no_leftovers(path)
        now = held(path)
        assert all(truth[key] == value for key, value in now.items())
        check_derived(path)
        lost = {slide for slide, _ in set(before) - set(now)}
        assert lost in ((set(), {"a", "d"}) if verb == "rm" else (set(),))
        assert all((slide, scale) in now for slide, _ in now for scale in (5, 10, 20))
        if verb != "ingest":
            assert set(now) <= set(before)


def moments(verb: str, seconds: float, path: Path) -> Iterator[Callable[[], bool]]:
    rng = np.random.default_rng(VERBS.index(verb))
    for number in range(ROUNDS):
        patterns = OF_DERIVE if verb == "derive" else MOMENTS
        pattern = patterns[number // 2 % len(patterns)]
        if number % 2:
            yield lambda pattern=pattern: any(path.glob(pattern))  # type: ignore[misc]
        else:
            end = time.monotonic() + float(rng.uniform(0, seconds))
            yield lambda end=end: time.monotonic() > end  # type: ignore[misc]


@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_any_moment_nothing_is_lost_and_run_again_it_is_done(
    verb: str, server: Server, tmp_path: Path, pristine: tuple[Path, Path, Values]
) -> None:
    origin, folder, truth = pristine
    before, path, whole = held(origin), tmp_path / "store", tmp_path / "whole"
    shutil.copytree(origin, whole)
    started = time.monotonic()
    assert server.run(verb, whole, folder) == 0
    seconds, expected = time.monotonic() - started, result(whole)
    n_shards, killed = len(published_shards(whole)), 0
    for moment in moments(verb, seconds, path):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(origin, path)
        code = server.run(verb, path, folder, moment)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        check_after_kill(path, verb, before, truth)
        assert server.run(verb, path, folder) == 0
        assert result(path) == expected
        assert verb == "ingest" or len(published_shards(path)) == n_shards
        check_no_leftovers(path)
        assert cfstore.open(path).verify(deep=True).findings == ()
    assert killed >= ROUNDS // 3, "the verb was over before the kill"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["parent", "child"])
def test_an_ingest_in_two_processes_may_lose_either(
    victim: str, server: Server, tmp_path: Path, pristine: tuple[Path, Path, Values]
) -> None:
    origin, folder, truth = pristine
    before, path = held(origin), tmp_path / "store"
    for number in range(3):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(origin, path)

        def kill(wanted: int = number) -> bool:
            if not any(path.glob(MOMENTS[wanted])):
                return False
            if victim == "child":
                for process in Path("/proc").glob("[0-9]*"):
                    try:
                        words = (process / "cmdline").read_text()
                        group = os.getpgid(int(process.name))
                    except OSError:
                        continue
                    if "spawn_main" in words and group == server.child:
                        os.kill(int(process.name), signal.SIGKILL)
                        break
                return False
            return True

        code = server.run("ingest", path, folder, kill, jobs=2)
        assert code in (0, 1, -signal.SIGKILL)
        check_after_kill(path, "ingest", before, truth)
        assert server.run("ingest", path, folder) == 0
        assert held(path).items() <= truth.items()
        assert len(held(path)) == len(before) + 15
        check_no_leftovers(path)


def test_a_clinical_import_cut_off_before_the_catalog_knew_is_taken_over_by_the_next_command(
    tmp_path: Path, pristine: tuple[Path, Path, Values]
) -> None:
    store = Store(pristine[0])
    names = ("catalog.duckdb", "catalog.parquet")
    before = {name: (store.path / name).read_bytes() for name in names}
    (tmp_path / "t.csv").write_text("case_id,slide_id,survival_months,censorship\np1,a.svs,3,0\n")
    store.import_clinical(tmp_path / "t.csv", "uni")
    for name, content in before.items():
        (store.path / name).write_bytes(content)
    assert store.verify().findings
    store.compact()
    assert store.sql("SELECT patient_id FROM slides WHERE slide_id = 'a'")[0][0].as_py() == "p1"
    assert store.verify().findings == ()
