"""Hours of an ingest and of a sweep on machines that we do not have, by a model checked against runs that we can make.

First the check: constants are measured here (`calibration`), the schedule model predicts real ingests and real sweeps
at 1, 2 and 4 workers, and the ratio of predicted to measured seconds is in the result. Ingests read from the page
cache and write to a local disk, so shared storage is not part of the check; tests hold the model's storage to closed
forms. Then the same model with the same constants for a million slides, on clusters and storages of several sizes.
Commits are as slow as `catalog_scale.json` has measured them at that number of slides.

    python benchmarks/simulate.py --root /scratch/bench --out benchmarks/results/simulate.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import calibration
import harness
import numpy as np
from calibration import IngestConstants, ingest_constants, make_folder, rounded, run_alone, train_command
from schedule_model import Lock, Shared, Step, Task, ingest_tasks, makespan, sweep_makespan

import cfstore
from cfstore.halves import WORTH_TORCH
from cfstore.ingest import _batches
from cfstore.plan import IngestPlan
from cfstore.synth import synthesize

WORKERS: Final = (1, 2, 4)
MILLION: Final = 1_000_000
SLIDE_BYTES: Final = (895 + 3_449 + 13_496) * 1024 * 4
SHARD_SLIDES: Final = 58  # of average size, in 2 GiB of float16
STORED: Final = 0.434  # of float32, benchmarks/results/read-vit.json
CORES: Final = 16  # of a machine
STREAM: Final = 1.0e9  # bytes a second that one process gets of shared storage, at most
MACHINES: Final = (1, 4, 16, 64)
STORAGE: Final = (1e9, 5e9, 20e9, 100e9)
SWEEP_MODELS: Final = ("abmil", "dsmil")
CATALOG: Final = Path(__file__).parent / "results" / "catalog_scale.json"
PACKAGES: Final = ("numpy", "h5py", "duckdb", "numcodecs", "torch")


def commit_seconds(catalog: Path) -> Callable[[int], float]:
    """Seconds of a commit by the number of slides that the catalog has, on straight lines between the measured ones."""
    sizes = json.loads(catalog.read_text())["sizes"]
    slides = [0, *(size["slides"] for size in sizes)]
    seconds = [size["commit"]["seconds"]["commit"] for size in sizes]
    return lambda n: float(np.interp(n, slides, [seconds[0], *seconds]))


def shard_bytes(plan: IngestPlan, jobs: int) -> list[float]:
    """Bytes of the source that each shard of an ingest takes, in the order in which they are given out."""
    sizes = [sum(s.path.stat().st_size for job in batch for s in job.sources) for batch in _batches(plan, jobs)]
    return sorted(map(float, sizes), reverse=True)


def predicted_ingest(constants: IngestConstants, sizes: Sequence[float], workers: int) -> float:
    """Seconds of an ingest of these shards of float32 on this machine, from the page cache."""
    by = "torch" if sum(sizes) / workers > WORTH_TORCH else "numpy"
    work = [(size, size / 1e9 * constants.core_seconds_per_gb[by], size * constants.stored) for size in sizes]
    resources: dict[str, Shared | Lock] = {
        "read": Shared(),
        "cores": Shared(constants.cores[workers], 1.0),
        "write": Shared(constants.write_bytes_per_s),
        "commit": Lock(),
    }
    tasks = ingest_tasks(work, constants.commit_seconds)
    return makespan(tasks, workers, resources, constants.start_seconds[by][workers])


def check_ingest(root: Path, slides: int, rounds: int) -> dict[str, Any]:
    """Predicted and measured seconds of real ingests."""
    small = make_folder(root / "small", max(4, slides // 4), "calibration")
    folder = make_folder(root / "cohort", slides, "cohort")
    store = root / "store"
    shutil.rmtree(store, ignore_errors=True)
    constants = ingest_constants(small, store, WORKERS)
    rows = []
    for workers in WORKERS * rounds:
        shutil.rmtree(store)
        opened = cfstore.open(store, create=True)
        plan = opened.plan(folder, calibration.OPTIONS)
        predicted = predicted_ingest(constants, shard_bytes(plan, workers), workers)
        sample = harness.measure(lambda: opened.ingest(folder, calibration.OPTIONS, plan=plan, jobs=workers))  # noqa: B023
        rows.append(
            {
                "workers": workers, "predicted": predicted, "measured": sample.result.seconds,
                "gb": sample.result.source_bytes / 1e9, "other_cores": sample.other_cores,
            }
        )  # fmt: skip
        print(f"ingest, {rounded(rows[-1])}", file=sys.stderr)
    shutil.rmtree(store)
    return {"constants": constants.as_json(), "runs": summarised(rows), "rounds": rows}


def summarised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By workers, the medians, and how many times as fast as one worker."""
    found: list[dict[str, Any]] = []
    for workers in WORKERS:
        own = [row for row in rows if row["workers"] == workers]
        predicted, measured = (float(np.median([row[key] for row in own])) for key in ("predicted", "measured"))
        first = found[0] if found else {"predicted": predicted, "measured": measured}
        found.append(
            {
                "workers": workers, "predicted": predicted, "measured": measured, "ratio": predicted / measured,
                "predicted_speedup": first["predicted"] / predicted, "speedup": first["measured"] / measured,
            }
        )  # fmt: skip
    return found


def run_side_by_side(commands: Sequence[list[str]], workers: int) -> float:
    """Seconds that processes take, given out in turn to so many workers."""
    todo, running = list(commands), list[subprocess.Popen[bytes]]()
    quiet, environment = subprocess.DEVNULL, calibration.train_environment()
    started = time.perf_counter()
    while todo or running:
        while todo and len(running) < workers:
            running.append(subprocess.Popen(todo.pop(0), env=environment, stdout=quiet, stderr=quiet))
        ended = [process for process in running if process.poll() is not None]
        for process in ended:
            if process.returncode:
                sys.exit(f"exit code {process.returncode} of {process.args}")
        running = [process for process in running if process not in ended]
        time.sleep(0.02)
    return time.perf_counter() - started


def check_sweep(root: Path, slides: int, epochs: int, seeds: int, rounds: int) -> dict[str, Any]:
    """Predicted and measured seconds of a real sweep: a process for each run, one thread each."""
    store, runs = root / "train-store", root / "runs"
    if not store.exists():
        synthesize(root / "demo", slides=slides, patches=400, dim=64)
        cfstore.open(store, create=True).ingest(root / "demo")
    shutil.rmtree(runs, ignore_errors=True)
    alone = {
        model: run_alone(train_command(store, runs / f"alone-{model}", model, 99, epochs)) for model in SWEEP_MODELS
    }
    cores = {n: n * calibration.busy_seconds(1) / calibration.busy_seconds(n) if n > 1 else 1.0 for n in WORKERS}
    jobs = [(model, seed) for model in SWEEP_MODELS for seed in range(seeds)]
    rows = []
    for number, workers in enumerate(WORKERS * rounds):
        tasks: list[Task] = [(Step("cores", alone[model]),) for model, _ in jobs]
        predicted = makespan(tasks, workers, {"cores": Shared(cores[workers], 1.0)})
        commands = [
            train_command(store, runs / f"{number}-{model}-{seed}", model, seed, epochs) for model, seed in jobs
        ]
        sample = harness.measure(lambda: run_side_by_side(commands, workers))  # noqa: B023 - called at once
        rows.append(
            {"workers": workers, "predicted": predicted, "measured": sample.result, "other_cores": sample.other_cores}
        )
        print(f"sweep, {rounded(rows[-1])}", file=sys.stderr)
    shutil.rmtree(runs)
    constants = {"seconds_alone": alone, "cores": cores, "jobs": len(jobs)}
    return {"constants": constants, "runs": summarised(rows), "rounds": rows}


def million(
    constants: IngestConstants, commit: Callable[[int], float], machines: int, storage: float
) -> dict[str, Any]:
    """A million slides on so many machines, and a storage of so many bytes a second."""
    workers, n_shards = machines * CORES, -(-MILLION // SHARD_SLIDES)
    source = SLIDE_BYTES * SHARD_SLIDES
    work = (source, source / 1e9 * constants.core_seconds_per_gb["torch"], source * STORED)
    lock = Lock(lambda n: commit(n * SHARD_SLIDES))
    disk = {"read": Shared(storage, STREAM), "write": Shared(storage, STREAM)}
    resources: dict[str, Shared | Lock] = {**disk, "cores": Shared(workers, 1.0), "commit": lock}
    seconds = makespan(ingest_tasks([work] * n_shards, 0.0), workers, resources)
    parts = {
        "storage": source * n_shards / storage,
        "cores": work[1] * n_shards / workers,
        "commits": lock.served,
    }
    return {
        "machines": machines, "storage_gb_per_s": storage / 1e9, "hours": seconds / 3600,
        "bound_by": max(parts, key=lambda name: parts[name]), "longest_wait_for_a_commit_s": lock.longest,
    }  # fmt: skip


def sweeps() -> list[dict[str, Any]]:
    """Six cohorts x thirteen models x five seeds, folds fused: a log-normal half an hour each, on GPUs and parts."""
    hours = np.random.default_rng(0).lognormal(np.log(0.5), 0.6, 6 * 13 * 5)
    rows = []
    for gpus in (1, 8, 32, 128):
        for part, gain in ((1.0, 1.0), (0.25, 1.0), (0.25, 2.0)):
            taken = sweep_makespan([float(each) for each in hours], gpus, part, gain)
            best = float(hours.sum()) / gpus / gain
            rows.append({"gpus": gpus, "part": part, "gain": gain, "hours": taken, "busy": best / taken})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder for data and stores")
    parser.add_argument("--out", type=Path, help="JSON file [default: stdout]")
    parser.add_argument("--slides", type=int, default=480, help="of the cohort that is ingested")
    parser.add_argument("--train-slides", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    told.root.mkdir(parents=True, exist_ok=True)
    load, others = os.getloadavg(), calibration.other_cores()
    ingest = check_ingest(told.root / "simulate-ingest", told.slides, told.rounds)
    sweep = check_sweep(told.root / "simulate-sweep", told.train_slides, told.epochs, told.seeds, told.rounds)
    constants, commit = IngestConstants(**ingest["constants"]), commit_seconds(CATALOG)
    result = {
        "what": "seconds predicted by the schedule model and measured; hours predicted for a million slides",
        "machine": harness.machine(),
        "versions": harness.versions(PACKAGES),
        **harness.commit(),
        "load": load,
        "cores_used_by_others": others,
        "parameters": {name: value for name, value in vars(told).items() if name not in ("root", "out")},
        "ingest": ingest,
        "sweep": sweep,
        "million": {
            "slides": MILLION, "bytes_of_a_slide": SLIDE_BYTES, "cores_of_a_machine": CORES, "stored": STORED,
            "stream_gb_per_s": STREAM / 1e9,
            "rows": [million(constants, commit, m, storage) for storage in STORAGE for m in MACHINES],
        },
        "sweeps": sweeps(),
    }  # fmt: skip
    harness.write_result(rounded(result), told.out)


if __name__ == "__main__":
    main()
