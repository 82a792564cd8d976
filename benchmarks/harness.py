"""What every benchmark needs: one sample with its surroundings, buffers, peak memory, the machine, a table.

A sample is wall time, own CPU time (with that of child processes), the cores that others used meanwhile and the
bytes that came from the device: a reader of the numbers can tell a quiet machine and a warm cache from others.
"""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import os
import platform
import queue
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """One timed call."""

    wall: float
    cpu: float
    other_cores: float
    device_bytes: int
    result: Any


def _busy() -> float:
    """CPU seconds of the whole machine that were not idle."""
    ticks = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS


def _descendants() -> list[list[str]]:
    """PID and the fields of /proc/PID/stat from `state` on, of living children, of their children, and so on."""
    processes: dict[str, list[str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            processes[stat.parent.name] = [stat.parent.name, *stat.read_text().rpartition(")")[2].split()]
    found, parents = [], {str(os.getpid())}
    while parents:
        children = [fields for fields in processes.values() if fields[2] in parents]
        found += children
        parents = {fields[0] for fields in children}
    return found


def _own_cpu() -> float:
    """CPU seconds of this process and of all that it started, living or waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(int(ticks) for fields in _descendants() for ticks in fields[12:16])  # own, and of those waited for
    return time.process_time() + ended.ru_utime + ended.ru_stime + living / _TICKS


def _device_bytes() -> int:
    """Bytes that this process and all that it started had fetched from a device."""
    total = 0
    for pid in ["self", *(fields[0] for fields in _descendants())]:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    return total


def measure(work: Callable[[], Any]) -> Sample:
    """Call `work` once."""
    device, busy, cpu, start = _device_bytes(), _busy(), _own_cpu(), time.perf_counter()
    result = work()
    wall = time.perf_counter() - start
    cpu = _own_cpu() - cpu
    other = max(0.0, _busy() - busy - cpu) / max(wall, 1e-3)
    return Sample(wall, cpu, other, _device_bytes() - device, result)


@contextmanager
def call_times(owner: Any, name: str) -> Iterator[list[float]]:
    """Seconds that each call of `owner.name` takes in this process."""
    taken: list[float] = []
    function = getattr(owner, name)

    def clocked(*words: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*words)
        finally:
            taken.append(time.perf_counter() - started)

    setattr(owner, name, clocked)
    try:
        yield taken
    finally:
        setattr(owner, name, function)


def page_buffer(nbytes: int) -> NDArray[np.uint8]:
    """Page-aligned memory, every page touched: what pinned memory is like to a reader.

    `np.empty` begins 16 bytes into a page, and its first write faults every page in: both slow a read down.
    """
    memory = mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    buffer[:] = 0
    return buffer


def reset_peak() -> None:
    """Let VmHWM start anew from the memory now in use."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """VmHWM: the most memory this process had at any one time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`, or of the file `folder`."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def quartiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles, rounded to four significant digits."""
    if not values:
        return None
    found = np.percentile(values, (25, 50, 75))
    return dict(zip(("q1", "median", "q3"), (significant(float(x)) for x in found), strict=True))


def significant(value: float, digits: int = 4) -> float:
    """`value` with so many significant digits."""
    return float(f"{value:.{digits}g}")


def machine() -> dict[str, Any]:
    """Hardware and kernel; no names of hosts or folders."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(memory / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
    }


def version_of(package: str) -> str:
    """The installed version, else "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's and the packages' versions."""
    return {"python": platform.python_version(), **{package: version_of(package) for package in packages}}


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether files differ from it."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows as aligned text on stderr; a missing value is a dash."""
    cells = [list(columns)]
    cells += [["-" if row.get(column) is None else str(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        first, *rest = (cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True)))  # fmt: skip
        print("  ".join([first, *rest]), file=sys.stderr)


def write_result(result: Mapping[str, Any], out: Path | None) -> None:
    """The result as JSON, into a file or on stdout."""
    text = json.dumps(result, indent=1)
    if out:
        out.write_text(text + "\n")
    else:
        print(text)


class Ring:
    """Buffers that threads take, fill and give back: the destination of every read."""

    def __init__(self, nbytes: int, threads: int = 4) -> None:
        self._free: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        for _ in range(threads):
            self._free.put(page_buffer(nbytes))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ring")

    @contextmanager
    def buffer(self) -> Iterator[NDArray[np.uint8]]:
        """One buffer, for as long as the block runs."""
        taken = self._free.get()
        try:
            yield taken
        finally:
            self._free.put(taken)

    def each(self, work: Callable[[int, NDArray[np.uint8]], Any], items: Iterable[int], threads: int) -> None:
        """`work(item, buffer)` for every item, by this thread or by all of the ring's."""

        def one(item: int) -> None:
            with self.buffer() as taken:
                work(item, taken)

        if threads == 1:
            for item in items:
                one(item)
        else:
            list(self._pool.map(one, items))
