"""What the catalog costs with a thousand to a million slides: its size, answers, the lookups of a training, a commit.

Stores come from `synthetic_catalog` (without features). Every question is asked by a new process, so that its memory
is its own; the time is that of the question, without imports. A commit is that of one more shard of 64 slides with a
few patches each, ingested by `store.ingest` into the store: while it holds the write lock, other writers wait.

    python benchmarks/catalog_scale.py --root /scratch/bench --out benchmarks/results/catalog_scale.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import h5py
import harness
import numpy as np
from synthetic_catalog import ENCODER, SLIDES_PER_COHORT, make

import cfstore
from cfstore import catalog, shard_job
from cfstore.ingest import prepare
from cfstore.places import find_bags
from cfstore.schema import CATALOG_FILE, FEATURES_DIR, SNAPSHOT_FILE, TABLES_DIR

SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
SQL: Final = {
    "slides of each cohort": "SELECT cohort, count(*) FROM slides GROUP BY cohort",
    "one slide's bags": "SELECT * FROM bags WHERE slide_id = 'TCGA-AA-0007-01Z-00-DX1'",
    "patches at one scale": "SELECT count(*), sum(n_patches) FROM bags WHERE scale = 20",
    "bags of dead patients by cohort": "SELECT slides.cohort, count(*), avg(time_months) FROM bags JOIN slides "
    "USING (slide_id) JOIN patients USING (cohort, patient_id) WHERE event GROUP BY 1 ORDER BY 1",
}
COHORT: Final = "C000"
SCALES: Final = (5, 10, 20)
SHARD_SLIDES: Final = 64
MANY: Final = 100_000
REPEATS: Final = 5
PACKAGES: Final = ("duckdb", "numpy", "pyarrow")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def ask_open(root: Path) -> dict[str, Any]:
    """A store opened, and its first answer."""
    return {"seconds": timed(lambda: cfstore.open(root).sql("SELECT count(*) FROM slides"))[0]}


def ask_sql(root: Path) -> dict[str, Any]:
    """The median of a few times each; the first is not counted."""
    store = cfstore.open(root)
    found = {}
    for name, query in SQL.items():
        seconds = [timed(lambda query=query: store.sql(query))[0] for _ in range(REPEATS + 1)]  # type: ignore[misc]
        found[name] = harness.significant(float(np.median(seconds[1:])), 3)
    return {"seconds": found}


def ask_cohort(root: Path) -> dict[str, Any]:
    """One cohort as `cftrain run` looks it up: encoder, labels, folds, patients."""
    from cftrain.config import DataConfig
    from cftrain.data import load_data

    config = DataConfig(cohort=COHORT, splits="5foldcv")
    seconds, data = timed(lambda: load_data(root, config, {"crossfusion": SCALES}, 0))
    return {"seconds": seconds, "slides": len(data.cohort.slides)}


def ask_fold(root: Path) -> dict[str, Any]:
    """Where the bags of one training fold lie: what a reader asks before it reads."""
    store = cfstore.open(root)
    fold = store.split_set(COHORT, "5foldcv").folds[0]
    ids = [slide.slide_id for slide in store.cohort(COHORT).slides if slide.patient_id in fold.train]
    harness.reset_peak()
    before = harness.peak_bytes()
    seconds, found = timed(lambda: find_bags(root, ENCODER, SCALES, ids))
    return {"seconds": seconds, "slides": len(found), "own_mib": (harness.peak_bytes() - before) >> 20}


def ask_many(root: Path) -> dict[str, Any]:
    """The same for as many slides as a training on everything would ask for; at most MANY."""
    with catalog.connect(root) as connection:
        rows = connection.execute("SELECT slide_id FROM slides ORDER BY hash(slide_id) LIMIT ?", [MANY]).fetchall()
    harness.reset_peak()
    before = harness.peak_bytes()
    seconds, found = timed(lambda: find_bags(root, ENCODER, SCALES, [slide_id for (slide_id,) in rows]))
    return {"seconds": seconds, "slides": len(found), "own_mib": (harness.peak_bytes() - before) >> 20}


def small_files(folder: Path) -> None:
    """One shard's worth of CLAM files with next to nothing in them."""
    chance = np.random.default_rng()
    run = f"{chance.integers(36**3):03d}"
    for slide in range(SHARD_SLIDES):
        for scale, n_patches in zip(SCALES, (2, 8, 32), strict=True):
            path = folder / f"x{scale}" / "h5_files" / f"TCGA-ZZ-{slide:04d}-01Z-00-DX{run}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["features"] = chance.normal(size=(n_patches, 1024)).astype(np.float32)
                file["coords"] = chance.integers(0, 9999, (n_patches, 2)).astype(np.int32)


def ask_commit(root: Path) -> dict[str, Any]:
    """The parts of an ingest that grow with the store: plan, tidying up, one commit, the end."""
    folder = root.parent / "one-shard"
    shutil.rmtree(folder, ignore_errors=True)
    small_files(folder)
    store, options = cfstore.open(root), cfstore.IngestOptions(encoder=ENCODER)
    tidying, _ = timed(lambda: prepare(root))
    planning, plan = timed(lambda: store.plan(folder, options))
    with harness.call_times(shard_job, "commit") as commits:
        whole, report = timed(lambda: store.ingest(folder, options, plan=plan, jobs=1))
    if report.n_slides != SHARD_SLIDES or len(commits) != report.n_shards:
        sys.exit(f"{report.n_slides} slides were ingested, not {SHARD_SLIDES}, in {len(commits)} commits")
    shutil.rmtree(folder)
    seconds = {
        "plan": planning, "prepare": tidying, "commit": commits[0], "beginning and end": whole - report.seconds
    }  # fmt: skip
    return {"seconds": {name: harness.significant(value, 3) for name, value in seconds.items()}}


QUESTIONS: Final = {
    "open": ask_open, "sql": ask_sql, "cohort": ask_cohort, "fold": ask_fold, "many": ask_many, "commit": ask_commit
}  # fmt: skip


def answer(question: str, root: Path) -> dict[str, Any]:
    """In this process, which was started for it: the answer, and the most memory that the process had."""
    found = QUESTIONS[question](root)
    if isinstance(found["seconds"], float):
        found["seconds"] = harness.significant(found["seconds"], 3)
    return {**found, "peak_mib": harness.peak_bytes() >> 20}


def asked(question: str, root: Path) -> dict[str, Any]:
    """The answer of a new process."""
    command = [sys.executable, __file__, "--root", str(root), "--question", question]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{question}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{root.name} {question}: {found}", file=sys.stderr)
    return found


def one_size(root: Path, slides: int) -> dict[str, Any]:
    """A store of so many slides, looked at from all sides, then removed."""
    shutil.rmtree(root, ignore_errors=True)
    seconds, _ = timed(lambda: make(root, slides))
    found: dict[str, Any] = {
        "slides": slides,
        "shards": -(-slides // SHARD_SLIDES),
        "tables": sum(1 for _ in (root / TABLES_DIR).iterdir()),
        "catalog_mib": harness.significant((root / CATALOG_FILE).stat().st_size / 2**20),
        "snapshot_mib": harness.significant((root / SNAPSHOT_FILE).stat().st_size / 2**20),
        "made_in_seconds": harness.significant(seconds, 3),
    }
    found |= {question: asked(question, root) for question in QUESTIONS}
    new = max((root / FEATURES_DIR / ENCODER).iterdir(), key=lambda path: path.stat().st_mtime)
    found["files_per_shard"] = sum(1 for path in new.rglob("*") if path.is_file())
    found["files"] = found["shards"] * found["files_per_shard"] + found["tables"] + 4
    shutil.rmtree(root)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder for the stores, which are removed again")
    parser.add_argument("--out", type=Path, help="JSON file [default: stdout]")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--question", choices=list(QUESTIONS), help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.question:
        print(json.dumps(answer(told.question, told.root)))
        return
    load = os.getloadavg()
    result = {
        "what": "seconds and MiB of a catalog's questions by number of slides; bags of three scales, D = 1,024",
        "machine": harness.machine(),
        "versions": harness.versions(PACKAGES),
        **harness.commit(),
        "load": load,
        "slides_per_cohort": SLIDES_PER_COHORT,
        "sizes": [one_size(told.root / f"slides-{slides}", slides) for slides in told.sizes],
    }
    harness.write_result(result, told.out)


if __name__ == "__main__":
    main()
