"""Heatmaps of the largest slide: time and peak memory of `cftrain heatmap` on a machine without a GPU.

    python benchmarks/heatmap.py --out benchmarks/results/heatmap.json
    python benchmarks/heatmap.py --patches 2000 --dim 64 --embed-dim 32        # does the script work?

One slide of 137,990 patches at 20x (34,498 at 10x, 8,625 at 5x; D = 1,024), CrossFusion of the published width. Its
weights come from one epoch on a few tiny slides: what a map costs does not depend on them. Every case is the whole
command in a process of its own: reading the store, the forward pass, the maps, every file and the viewer. Peak memory
is the most that the process had resident. As a yardstick: the released code's table of fine attention alone would be
heads x 34,498 x 137,990 numbers of bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from harness import commit, folder_bytes, machine, print_table, significant, versions, write_result
from numpy.typing import NDArray

from cfstore.synth import synthesize

LARGEST = 137_990
SLIDE = "LARGEST"
HEADS = 4
EDGE = {5: 1024, 10: 512, 20: 256}
CASES = {
    "attention": ("coarse-cross", "fine-cross", "source", "fused"),
    "attention and gradient": ("all",),
}


def grids(n_patches: int) -> dict[int, NDArray[np.int64]]:
    """Corners of nested grids in a disc, with `n_patches` at 20x and a quarter, a sixteenth at 10x and 5x."""
    n_coarse = -(-n_patches // 16)
    side = int(np.ceil(np.sqrt(n_coarse * 1.4)))
    cells = np.argwhere(np.ones((side, side), bool))
    near = np.argsort(((cells - side / 2) ** 2).sum(axis=1), kind="stable")[:n_coarse]
    coarse = cells[np.sort(near)][:, ::-1]
    found = {5: coarse}
    quarters = np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
    for scale in (10, 20):
        found[scale] = (2 * found[scale // 2][:, None] + quarters).reshape(-1, 2)
    sizes = {5: n_coarse, 10: -(-n_patches // 4), 20: n_patches}
    return {scale: found[scale][:n] * EDGE[scale] for scale, n in sizes.items()}


def write_largest(folder: Path, n_patches: int, dim: int) -> dict[int, int]:
    """Feature files of the one slide, as TRIDENT writes them; its patches by scale."""
    rng = np.random.default_rng(0)
    counts = {}
    for scale, corners in grids(n_patches).items():
        path = folder / f"{scale}x_256px_0px_overlap" / "features_synthetic" / f"{SLIDE}.h5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            features = rng.standard_normal((len(corners), dim), dtype=np.float32).astype(np.float16)
            file.create_dataset("features", data=features, chunks=(min(1024, len(corners)), dim))
            places = file.create_dataset("coords", data=corners)
            places.attrs.update({"patch_size": 256, "patch_size_level0": EDGE[scale], "level0_magnification": 20})
        counts[scale] = len(corners)
    return counts


def command(package: str, *words: str) -> list[str]:
    """A command of ours with this Python."""
    return [sys.executable, "-c", f"from {package}.cli import main; main()", *words]


def call(*words: str) -> None:
    """Run it; stop where it fails."""
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def prepare(folder: Path, told: argparse.Namespace) -> dict[int, int]:
    """A trained run, and a store with the largest slide."""
    synthesize(folder / "h5", slides=25, patches=16, dim=told.dim, seed=0)
    call("cfstore", "ingest", str(folder / "h5"), "--encoder", "synthetic", "--store", str(folder / "store"))
    call(
        "cftrain", "run", "--cohort", "DEMO", "--store", str(folder / "store"), "--out", str(folder / "run"),
        "--set", "train.epochs=1", "--set", "train.select_from=1", "--set", f"model.embed_dim={told.embed_dim}",
    )  # fmt: skip
    counts = write_largest(folder / "large", told.patches, told.dim)
    call("cfstore", "ingest", str(folder / "large"), "--encoder", "synthetic", "--store", str(folder / "large-store"))
    return counts


def measured(folder: Path, case: str, maps: tuple[str, ...]) -> dict[str, Any]:
    """One case: the command's seconds, its share of explaining, the most memory it had, the bytes it wrote."""
    out = folder / case.replace(" ", "-")
    words = command("cftrain", "heatmap", str(folder / "run"), "--slide", SLIDE, "--store", str(folder / "large-store"))
    words += [word for name in maps for word in ("--map", name)] + ["--fold", "0", "--out", str(out), "--device", "cpu"]
    started = time.monotonic()
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if child.returncode:
        sys.exit(f"{case}: exit code {child.returncode}")
    about = json.loads((out / "heatmap.json").read_text())
    return {
        "case": case,
        "maps": list(about["maps"]),
        "seconds": significant(seconds),
        "explaining_seconds": significant(about["seconds"]["explaining"]),
        "peak_gib": significant(usage.ru_maxrss * 1024 / 2**30),
        "written_mib": significant(folder_bytes(out) / 2**20),
        "attention_adds_up_to": {
            name: facts["sum"] + facts["attention_elsewhere"]
            for name, facts in about["maps"].items()
            if facts["kind"] == "attention"
        },
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=LARGEST, help="at 20x")
    parser.add_argument("--dim", type=int, default=1024, help="width of the features")
    parser.add_argument("--embed-dim", type=int, default=512, help="width of the model")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = prepare(folder, told)
        rows = [measured(folder, case, CASES[case]) for case in told.cases.split(",")]
    result = {
        "machine": machine(),
        "versions": versions(["torch", "numpy", "h5py"]),
        **commit(),
        "patches": counts,
        "dim": told.dim,
        "embed_dim": told.embed_dim,
        "table_of_fine_attention_gib": significant(HEADS * counts[10] * counts[20] * 2 / 2**30),
        "cases": rows,
    }
    print_table(rows, ["case", "seconds", "explaining_seconds", "peak_gib", "written_mib"])
    write_result(result, told.out)


if __name__ == "__main__":
    main()
