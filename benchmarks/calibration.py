"""Constants of the schedule model, measured on this machine in the same run that uses them.

Nothing is fitted to the runs that are predicted: work per byte and per commit come from an ingest of another, smaller
cohort in one process; what cores give when several are busy from a converter that works in memory; the start of
workers from workers that do nothing; of training runs, from one run alone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import numpy as np
from harness import call_times, measure

import cfstore
from cfstore import shard_job
from cfstore.codecs import get_codec
from cfstore.convert import BagConverter
from cfstore.halves import prefer_torch
from cfstore.processes import side_by_side
from cfstore.shards.packed import PackedWriter

SCALES: Final = (5, 10, 20)
SIZES: Final = (0.4, 0.7, 1.0, 1.9)  # of slides, in turn; their mean is 1
MEAN_PATCHES: Final = (90, 345, 1_350)
DIM: Final = 1024
OPTIONS: Final = cfstore.IngestOptions(encoder="bench")
_INGESTS: Final = 3
_KERNEL_ROUNDS: Final = 24
_KERNEL_ROWS: Final = 4_096


@dataclass(frozen=True)
class IngestConstants:
    """What an ingest takes here.

    Parameters
    ----------
    core_seconds_per_gb
        Of source, read from the page cache, converted, compressed and handed to the kernel by one process: "torch"
        where it has loaded torch to convert by, "numpy" where so little is to be converted that it has not.
    commit_seconds
        For which a shard's registration holds the write lock, in a small store.
    write_bytes_per_s
        Bytes of shards over the seconds for which one process waits until they are on the disk.
    cores
        By processes that are busy: the cores that they get together, in units of one alone.
    start_seconds
        As above, and by processes: until the last of them has imported what it needs.
    stored
        Bytes written of each byte read.
    """

    core_seconds_per_gb: dict[str, float]
    commit_seconds: float
    write_bytes_per_s: float
    cores: dict[int, float]
    start_seconds: dict[str, dict[int, float]]
    stored: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_folder(folder: Path, slides: int, name: str) -> Path:
    """CLAM files of so many slides; slides of a size are links to one file, so little is written and much is read."""
    chance = np.random.default_rng(len(name))
    for scale, mean in zip(SCALES, MEAN_PATCHES, strict=True):
        kept = folder / f"x{scale}" / "h5_files"
        kept.mkdir(parents=True, exist_ok=True)
        for i in range(slides):
            path, size = kept / f"{name}-{i:05d}.h5", SIZES[i % len(SIZES)]
            first = kept / f"{name}-{i % len(SIZES):05d}.h5"
            if path.exists():
                continue
            if i >= len(SIZES):
                path.hardlink_to(first)
                continue
            n_patches = int(mean * size)
            with h5py.File(path, "w") as file:
                rows = chance.normal(size=(n_patches, DIM)).astype(np.float32)
                file.create_dataset("features", data=rows, chunks=(32, DIM), maxshape=(None, DIM))
                file["coords"] = chance.integers(0, 90_000, (n_patches, 2)).astype(np.int32)
    return folder


def _nothing(load_torch: bool, tell: Callable[[], None]) -> None:
    if load_torch:
        prefer_torch()
    time.sleep(0.2)  # so that no process takes two
    tell()


def start_seconds(processes: int, *, load_torch: bool) -> float:
    """Until `processes` new processes of an ingest have imported what they need, and are gone again."""
    if processes == 1:
        return 0.0
    started = time.perf_counter()
    list(side_by_side(_nothing, [load_torch] * processes, processes, lambda: None))
    return time.perf_counter() - started - 0.2


def _convert(ready: Any, go: Any) -> float:
    """Conversion and compression of rows in memory: the work of an ingest without its files."""
    prefer_torch()
    rows = np.random.default_rng(0).normal(size=(_KERNEL_ROWS, DIM)).astype(np.float32)
    codec = get_codec("blosc-zstd", "float16")
    ready.release()
    go.wait()
    started = time.perf_counter()
    for _ in range(_KERNEL_ROUNDS):
        converter = BagConverter(Path("none.h5"), "float16", DIM, None)
        stored = converter.convert(rows)
        for first in range(0, len(stored), 512):
            codec.encode(np.ascontiguousarray(stored[first : first + 512]))
        converter.finish(None)
    return time.perf_counter() - started


def _convert_into(ready: Any, go: Any, answers: Any) -> None:
    answers.put(_convert(ready, go))


def busy_seconds(processes: int) -> float:
    """Seconds of the same work in each of so many processes at once: their mean."""
    context = multiprocessing.get_context("spawn")
    ready, go, answers = context.Semaphore(0), context.Event(), context.Queue()
    workers = [context.Process(target=_convert_into, args=(ready, go, answers)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    go.set()
    seconds = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(seconds) / processes


class Alone(NamedTuple):
    """Medians of ingests in this process: core-seconds of each GB, seconds of a commit, bytes stored and synced."""

    work: float
    commit: float
    write: float
    stored: float


def _ingests_alone(folder: Path, store: Path) -> Alone:
    found = []
    for _ in range(_INGESTS):
        shutil.rmtree(store, ignore_errors=True)
        opened = cfstore.open(store, create=True)
        with call_times(shard_job, "commit") as commits, call_times(PackedWriter, "finish") as synced:
            report = opened.ingest(folder, OPTIONS, jobs=1)
        if len(commits) != report.n_shards or not synced:
            message = f"{report.n_shards} shards, but {len(commits)} commits and {len(synced)} syncs were clocked"
            raise RuntimeError(message)
        work = (report.seconds - sum(commits) - sum(synced)) / report.source_bytes * 1e9
        stored = report.stored_bytes / report.source_bytes
        found.append(Alone(work, sum(commits) / report.n_shards, report.stored_bytes / sum(synced), stored))
    return Alone(*map(statistics.median, zip(*found, strict=True)))


def ingest_constants(folder: Path, store: Path, workers: tuple[int, ...]) -> IngestConstants:
    """Measure all of them; `folder` is the smaller cohort, `store` a path for a new store. Loads torch."""
    by_numpy = _ingests_alone(folder, store)
    if "torch" in sys.modules:
        message = (
            f"{folder}: is so large that its ingest loaded torch: no measure of one that does not; take fewer slides"
        )
        raise ValueError(message)
    prefer_torch()
    by_torch = _ingests_alone(folder, store)
    alone = busy_seconds(1)
    return IngestConstants(
        core_seconds_per_gb={"numpy": by_numpy.work, "torch": by_torch.work},
        commit_seconds=by_torch.commit,
        write_bytes_per_s=by_torch.write,
        cores={n: n * alone / busy_seconds(n) if n > 1 else 1.0 for n in workers},
        start_seconds={
            name: {n: start_seconds(n, load_torch=name == "torch") for n in workers} for name in ("numpy", "torch")
        },
        stored=by_torch.stored,
    )


def train_command(store: Path, out: Path, model: str, seed: int, epochs: int) -> list[str]:
    """One training run on one core."""
    settings = (f"train.epochs={epochs}", f"train.seed={seed}", f"model.name={model}")
    flags = [word for setting in settings for word in ("--set", setting)]
    return [
        sys.executable, "-m", "cftrain", "run", "--cohort", "DEMO", "--store", str(store), "--out", str(out),
        "--device", "cpu", *flags,
    ]  # fmt: skip


def train_environment() -> dict[str, str]:
    """One thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run_alone(command: list[str]) -> float:
    """Seconds of one training run with nothing beside it."""
    started = time.perf_counter()
    done = subprocess.run(command, env=train_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return time.perf_counter() - started


def other_cores() -> float:
    """Cores that others use, looked at for a second."""
    return round(measure(lambda: time.sleep(1)).other_cores, 2)


def rounded(value: Any) -> Any:
    """Four significant digits, however deep."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
