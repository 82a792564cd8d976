"""Two tiny cohorts in one store, plans of three tiny models on them, and what to compare of the runs."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import load_file

import cfstore
from cfstore.synth import synthesize

MODELS = """
[set]
train.epochs = {epochs}
train.accumulate = 4
train.select_from = 1
train.checkpoint_minutes = 0
train.batch_patches = 200
data.readers = 1

[model.abmil]
hidden_dim = 8
attention_dim = 4
dropout = 0.3

[model.dsmil]
attention_dim = 4

[model.crossfusion]
embed_dim = 8
n_heads = 2
"""


def two_cohorts(folder):
    """A store with cohorts ONE and TWO, 20 synthetic slides each; returns its path."""
    store = cfstore.open(folder / "store", create=True)
    for seed, cohort in enumerate(("ONE", "TWO")):
        files = folder / cohort
        synthesize(files, slides=20, patches=48, dim=8, seed=seed)
        for path in sorted(path for path in files.rglob("*") if path.is_file()):
            if path.suffix in (".csv", ".json"):
                path.write_text(path.read_text().replace("DEMO", cohort))
            if "DEMO" in path.name:
                path.rename(path.with_name(path.name.replace("DEMO", cohort)))
        store.ingest(files, cfstore.IngestOptions(encoder="toy"))
    return folder / "store"


def write_plan(
    path, store, *, cohorts=("ONE", "TWO"), models=("abmil", "dsmil"), seeds=(7, 8), epochs=2, folds="fused", more=""
):
    """A plan.toml beside which the runs are written to `runs`; one thread per job."""
    lines = [
        f"store = {str(store)!r}",
        'out = "runs"',
        f"cohorts = {list(cohorts)}",
        f"models = {list(models)}",
        f"seeds = {list(seeds)}",
        f"folds = {folds!r}",
    ]
    tables = MODELS.split("\n\n")
    kept = [table for table in tables if "[model." not in table or table.split("[model.")[1].split("]")[0] in models]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n" + "\n\n".join(kept).format(epochs=epochs) + "\n[resources]\n"
                    "cpus = 1\ngpus = 0\n" + more)  # fmt: skip
    return path


def contents(out):
    """By run: the bytes of every tensor of its weights, and its predictions."""
    return {
        run.name: (
            {
                f"{path.parent.name}/{path.name}": _bytes(path)
                for path in sorted(run.glob("fold_*/*_epoch.safetensors"))
            },
            pq.read_table(run / "predictions.parquet").to_pydict(),
        )
        for run in sorted(path.parent for path in Path(out).glob("*/summary.json"))
    }  # fmt: skip


def _bytes(path):
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


def written(out):
    """When each file of the runs was last written."""
    return {path: path.stat().st_mtime_ns for path in sorted(Path(out).glob("*/**/*")) if path.is_file()}
