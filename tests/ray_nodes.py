"""Ray nodes on this machine, as processes started by `ray start`, that can be killed like machines.

Every cluster has a folder and ports of its own, chosen by the system, and every test process its own token: any
number of clusters run side by side.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# Ray reads these once, when it is loaded
_HOME = Path(tempfile.mkdtemp(prefix="ray-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
(_HOME / "auth_token").write_text("of-the-tests-" * 4)
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = str(_HOME / "auth_token")
os.environ |= {
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill tasks for the memory that other tests use
    "RAY_health_check_failure_threshold": "10",  # seconds: these nodes compute, on a machine that others use
    "RAY_health_check_period_ms": "1000",
}

ROOT = Path(__file__).resolve().parents[1]
START = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
SECONDS = 120.0


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """Children of a process, and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, level = set(), {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= level
    return found


def opened_by(pids: set[int], part: str) -> list[str]:
    """Files whose path holds `part` that any of the processes has open."""
    found = []
    for pid in pids:
        try:
            handles = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        for handle in handles:
            try:
                target = os.readlink(handle)  # noqa: PTH115 - it may name what is no path
            except OSError:
                continue
            if part in target:
                found.append(target)
    return found


class Node:
    """One raylet with its workers (and, of the head, what the cluster needs)."""

    def __init__(self, folder: Path, name: str, head: str | None, num_cpus: int, variables: Mapping[str, str]) -> None:
        place = ["--head", "--port=0", "--include-dashboard=false"] if head is None else [f"--address={head}"]
        ports = ("min-worker-port", "max-worker-port", "node-manager-port", "object-manager-port")
        options = [
            *place,
            "--block",
            "--disable-usage-stats",
            f"--temp-dir={folder}",
            f"--num-cpus={num_cpus}",
            f"--memory={64 << 30}",
            f"--object-store-memory={80 << 20}",
            *(f"--{port}=0" for port in ports),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, "start", *options],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_for("Ray runtime started")

    def _wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.log.read_text():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    @property
    def address(self) -> str:
        """What other nodes join; of the head."""
        found = re.search(r"--address='([^']+)'", self.log.read_text())
        assert found, self.log.read_text()
        return found[1]

    @property
    def processes(self) -> set[int]:
        return {self._process.pid, *descendants(self._process.pid)}

    def kill(self) -> None:
        """As if somebody pulled the plug: no process of the node gets to say anything."""
        doomed = self.processes
        for pid in doomed:  # stopped first, so that none is born meanwhile
            _send(pid, signal.SIGSTOP)
        for pid in doomed | self.processes:
            _send(pid, signal.SIGKILL)
        self._process.wait()
        while any(alive(pid) for pid in doomed):
            time.sleep(0.01)

    def is_alive(self) -> bool:
        return self._process.poll() is None


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Cluster:
    """A head, which drivers on this machine join, and nodes that come and go."""

    def __init__(self, folder: Path, num_cpus: int, variables: Callable[[str], Mapping[str, str]]) -> None:
        self._folder, self._num_cpus, self._variables = folder, num_cpus, variables
        self.head = Node(folder, "head", None, num_cpus, variables("head"))
        self.address = self.head.address
        self.others: list[Node] = []

    def add(self, num_cpus: int | None = None) -> Node:
        """Start one more node."""
        name, num_cpus = f"node{len(self.others)}", self._num_cpus if num_cpus is None else num_cpus
        self.others.append(Node(self._folder, name, self.address, num_cpus, self._variables(name)))
        return self.others[-1]

    def second(self) -> Node:
        """A living node besides the head."""
        living = [node for node in self.others if node.is_alive()]
        return living[0] if living else self.add()

    def stop(self) -> None:
        for node in (*self.others, self.head):
            if node.is_alive():
                node.kill()


@contextmanager
def two_nodes(num_cpus: int = 1, variables: Callable[[str], Mapping[str, str]] = lambda name: {}) -> Iterator[Cluster]:
    """A cluster of two nodes with `num_cpus` each; `Cluster.address` is what `--address` takes.

    `variables`: by name of a node (head, node0, ...), what its environment says besides this process's.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # not pytest's: names of sockets are short
    try:
        cluster = Cluster(folder, num_cpus, variables)
        try:
            cluster.add()
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
