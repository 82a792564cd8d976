"""How fast is an ingest, against reading its source files and nothing else?

The competitor is h5py reading every file of the folder once, in as many processes (they are started before the
clock; ours are started by the ingest and count). Both go over the same files: CLAM's layout (chunks of 32 rows) and
TRIDENT's (a chunk per row), from the page cache ("warm") and after the files were dropped from it ("cold", which is
what a cohort of 76 GB is). An ingest reads, checks, converts, measures the error, digests, compresses, writes and
flushes to disk; it is timed from plan to catalog.

    python benchmarks/ingest.py --root /scratch/bench --out benchmarks/results/ingest.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import harness
import numpy as np
from slide_data import SCALES, DataPlan, SlideSet, slide_set

import cfstore

PROFILES = {
    "float16 blosc-zstd": {"dtype": "float16"},
    "float16 none": {"dtype": "float16", "codec": "none"},
    "int8": {"dtype": "int8"},
    "webdataset float16": {"dtype": "float16", "format": "webdataset"},
}
GOAL = 0.7
PACKAGES = ("numpy", "h5py", "numcodecs", "zarr", "duckdb", "torch")


def read_file(path: Path) -> int:
    """Every value of one feature file, by h5py."""
    with h5py.File(path) as file:
        return int(file["features"][()].nbytes + file["coords"][()].nbytes)


def trident(data: SlideSet, slides: int) -> Path:
    """Some slides once more, in chunks of one row, as TRIDENT writes them."""
    folder = data.folder / f"trident-{slides}"
    if (folder / "done").exists():
        return folder
    for i in range(slides):
        for scale in SCALES:
            path = folder / f"x{scale}" / "h5_files" / f"{data.ids[i]}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(data.h5(i, scale)) as source, h5py.File(path, "w") as target:
                for name in ("features", "coords"):
                    rows = source[name][()]
                    target.create_dataset(name, data=rows, chunks=(1, rows.shape[1]), maxshape=(None, rows.shape[1]))
    (folder / "done").touch()
    return folder


def files_of(folder: Path) -> list[Path]:
    """The feature files, largest first so that no process is left with a long one."""
    return sorted(folder.rglob("*.h5"), key=lambda path: -path.stat().st_size)


def forget(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def remember(pool: ProcessPoolExecutor, files: Sequence[Path]) -> None:
    """Have files in the page cache."""
    list(pool.map(read_file, files))


def ingest_once(folder: Path, store: Path, profile: str, jobs: int) -> dict[str, Any]:
    """One ingest into a new store; seconds, and bytes in and out."""
    shutil.rmtree(store, ignore_errors=True)
    started = time.perf_counter()
    options = cfstore.IngestOptions(encoder="bench", **PROFILES[profile])
    report = cfstore.open(store, create=True).ingest(folder, options, jobs=jobs)
    return {
        "seconds": time.perf_counter() - started,
        "ratio": report.stored_bytes / report.source_bytes,
        "n_processes": report.n_processes,
    }


def rounds(told: argparse.Namespace, folder: Path, state: str, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Reading alone and every profile, in random order, `--rounds` times."""
    files = files_of(folder)
    total = sum(path.stat().st_size for path in files)
    speeds: dict[str, list[float]] = {name: [] for name in ("read alone", *told.profiles)}
    ratios: dict[str, list[float]] = {name: [] for name in told.profiles}
    stored: dict[str, float] = {}
    chance = random.Random(told.seed)  # noqa: S311 - the order of rounds
    store = told.root / "ingest-store"
    for _ in range(told.rounds):
        order = list(speeds)
        chance.shuffle(order)
        for name in order:
            if state == "cold":
                forget(files)
            else:
                remember(pool, files)
            if name == "read alone":
                started = time.perf_counter()
                list(pool.map(read_file, files))
                seconds = time.perf_counter() - started
            else:
                done = ingest_once(folder, store, name, told.jobs)
                seconds, stored[name] = done["seconds"], done["ratio"]
            speeds[name].append(total / seconds / 1e6)
            print(f"{folder.name} {state} {name}: {speeds[name][-1]:.0f} MB/s", file=sys.stderr)
        for name in told.profiles:
            ratios[name].append(speeds[name][-1] / speeds["read alone"][-1])
    shutil.rmtree(store, ignore_errors=True)
    return {
        "source_gb": round(total / 1e9, 2),
        "read_alone_mb_per_s": harness.quartiles(speeds["read alone"]),
        "profiles": {
            name: {
                "mb_per_s": harness.quartiles(speeds[name]),
                "of_reading": harness.quartiles(ratios[name]),
                "stored_of_source": round(stored[name], 4),
                "goal_met": bool(np.median(ratios[name]) >= GOAL),
            }
            for name in told.profiles
        },
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder for data; kept and used again")
    parser.add_argument("--out", type=Path, help="JSON file [default: stdout]")
    parser.add_argument("--slides", type=int, default=60)
    parser.add_argument("--trident-slides", type=int, default=12)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--kind", choices=("vit", "resnet"), default="vit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=list(PROFILES))
    return parser.parse_args()


def main() -> None:
    told = arguments()
    data = slide_set(told.root, DataPlan(told.kind, told.slides, told.dim, 0))
    found: dict[str, Any] = {
        "what": "MB/s of source bytes; of_reading: against h5py reading the same files in as many processes",
        "machine": harness.machine(),
        "versions": harness.versions(PACKAGES),
        **harness.commit(),
        "parameters": {k: v for k, v in vars(told).items() if k not in ("root", "out")},
        "goal": GOAL,
    }
    layouts = {"clam": data.folder / "h5", "trident": trident(data, min(told.trident_slides, told.slides))}
    with ProcessPoolExecutor(told.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for layout, folder in layouts.items():
            for state in ("warm", "cold"):
                found[f"{layout} {state}"] = rounds(told, folder, state, pool)
    text = json.dumps(found, indent=1) + "\n"
    if told.out:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        told.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
