"""Ingest throughput by workers and engine; with --remote also whole slides from object storage at a bandwidth cap.

The same synthetic CLAM files (see `calibration.make_folder`: few files under many names, read from the page cache) go
into a new store with 1, 2 and 4 workers: processes of this machine, and tasks on a Ray of this machine where
`crossfusion-store[ray]` is installed. The time is that of the whole ingest, with its processes' start; Ray itself runs
already, as on a cluster. `--remote` runs `remote_read.py` and takes its result in.

    python benchmarks/scale.py --root /scratch/bench --remote --out benchmarks/results/scale.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import harness
import numpy as np
from calibration import OPTIONS, make_folder, other_cores, rounded

import cfstore

WORKERS: Final = (1, 2, 4)
PACKAGES: Final = ("numpy", "h5py", "duckdb", "ray", "torch")


def engines() -> tuple[str, ...]:
    """Those that are installed."""
    return ("local", "ray") if importlib.util.find_spec("ray") else ("local",)


def ingests(folder: Path, store: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Every engine with every number of workers, in turn, `rounds` times."""
    for _ in range(rounds):
        for engine in engines():
            with cfstore.ray_cluster(None) if engine == "ray" else nullcontext():
                for workers in WORKERS:
                    shutil.rmtree(store, ignore_errors=True)
                    opened = cfstore.open(store, create=True)
                    plan = opened.plan(folder, OPTIONS)
                    sample = harness.measure(
                        lambda: opened.ingest(folder, OPTIONS, plan=plan, jobs=workers, engine=engine)  # noqa: B023
                    )
                    report = sample.result
                    yield {
                        "engine": engine, "workers": workers, "seconds": sample.wall,
                        "mb_per_s": report.source_bytes / sample.wall / 1e6, "other_cores": sample.other_cores,
                    }  # fmt: skip


def by_engine(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians and quartiles, and how many times as fast as one worker of that engine."""
    found = []
    for engine in engines():
        alone = 0.0
        for workers in WORKERS:
            speeds = [row["mb_per_s"] for row in rows if (row["engine"], row["workers"]) == (engine, workers)]
            alone = alone or float(np.median(speeds))
            speedup = float(np.median(speeds)) / alone
            found.append(
                {"engine": engine, "workers": workers, "mb_per_s": harness.quartiles(speeds), "speedup": speedup}
            )
    return found


def remote(root: Path) -> dict[str, Any]:
    """What `remote_read.py` finds."""
    out = root / "remote_read.json"
    script = Path(__file__).with_name("remote_read.py")
    subprocess.run([sys.executable, script, "--root", root / "remote", "--out", out], check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder for data and stores")
    parser.add_argument("--out", type=Path, help="JSON file [default: stdout]")
    parser.add_argument("--slides", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--remote", action="store_true", help="also read from object storage: benchmarks/remote_read.py"
    )
    told = parser.parse_args()
    told.root.mkdir(parents=True, exist_ok=True)
    load, others = os.getloadavg(), other_cores()
    folder, store = make_folder(told.root / "scale-cohort", told.slides, "cohort"), told.root / "scale-store"
    rows = []
    for row in ingests(folder, store, told.rounds):
        print(f"ingest, {rounded(row)}", file=sys.stderr)
        rows.append(row)
    shutil.rmtree(store)
    result = {
        "what": "MB/s of source bytes, from folder to catalog, by engine and workers",
        "machine": harness.machine(),
        "versions": harness.versions(PACKAGES),
        **harness.commit(),
        "load": load,
        "cores_used_by_others": others,
        "slides": told.slides,
        "ingest": by_engine(rows),
        "rounds": rows,
        **({"remote": remote(told.root)} if told.remote else {}),
    }
    harness.write_result(rounded(result), told.out)


if __name__ == "__main__":
    main()
