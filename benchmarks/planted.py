"""Does CrossFusion find a planted signal that needs two scales? Is it at chance where labels are permuted?

    python benchmarks/planted.py --seed 1 --jobs 4 --out benchmarks/results/planted_1.json
    python benchmarks/planted.py --seed 1 --jobs 4 --models all --slides 500 --patches 128 --dim 16 --epochs 12 \\
        --set train.accumulate=4 --set train.learning_rate=1e-3 --out benchmarks/results/planted_all.json
    python benchmarks/planted.py --seed 1 --jobs 4 --permute --out benchmarks/results/planted_1_permuted.json

`cfstore synth` plants fractions of marked patches, one at 5x and one at 20x, drawn independently; the hazard
rises with their product. Printed: C-index per patient after the last epoch on five folds; that of the planted risk and
of the best predictor that knows one scale's fraction exactly, on the same patients; how far from chance to the planted
risk the model came; and the same for ABMIL at 20x, which sees one scale, or for every model of the zoo. `--permute`
deals (time, event) out anew among the patients, so that nothing can be learnt.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from harness import commit, machine, versions

import cfstore
from cfstore.synth import synthesize
from cftrain.config import load_config
from cftrain.experiment import cross_validate
from cftrain.extras import derive_missing
from cftrain.zoo import Extra

TRAINING = ("train.learning_rate=3e-4", "train.accumulate=8")
_FUSION = ("model.embed_dim=64", "model.attention_dropout=0.0")
WIDTHS: dict[str, tuple[str, ...]] = {
    "mean-cox": (),
    "abmil": ("model.hidden_dim=64", "model.attention_dim=32"),
    "dsmil": ("model.attention_dim=32",),
    "transmil": ("model.embed_dim=64", "model.n_heads=4", "model.n_landmarks=32"),
    "deepgraphsurv": ("model.hidden_dim=64",),
    "patch-gcn": ("model.hidden_dim=32",),
    "scmil": ("model.filter_dim=64", "model.attention_dim=32"),
    "protosurv": ("model.embed_dim=48", "model.mlp_dim=32", "model.graph_dim=16", "model.n_prototypes=4"),
    "crossfusion-single": _FUSION,
    "zoommil": ("model.hidden_dim=64", "model.attention_dim=32"),
    "mustmil": ("model.embed_dim=32", "model.attention_dim=32"),
    "csmil": ("model.embed_dim=64", "model.hidden_dim=32"),
    "crossfusion-concat": _FUSION,
    "crossfusion": _FUSION,
}
"""Of every model, for a cohort whose patches have 32 numbers."""


def _extras(model: str) -> tuple[Extra, ...]:
    """What a model reads besides features, so that deriving it is in nobody's seconds."""
    config = load_config(settings=(f"model.name={model}", *WIDTHS[model]))
    return config.extras() + config.fit_extras()


def permute(table: Path, seed: int) -> None:
    """Deal (time, event) out anew among the patients of a clinical table."""
    rows = list(csv.DictReader(table.open(newline="")))
    labels = {row["case_id"]: (row["survival_months"], row["censorship"]) for row in rows}
    patients = list(labels)
    dealt = np.random.default_rng(seed).permutation(len(patients))
    anew = {patient: labels[patients[other]] for patient, other in zip(patients, dealt, strict=True)}
    for row in rows:
        row["survival_months"], row["censorship"] = anew[row["case_id"]]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def train(store: Path, model: str, more: Sequence[str], jobs: int, folder: Path) -> dict[str, Any]:
    """Cross-validate; what is worth keeping of the summary."""
    settings = (*TRAINING, *more, f"model.name={model}", *WIDTHS[model])
    config = load_config(flags={"data.cohort": "DEMO"}, settings=settings)
    summary = cross_validate(config, store, folder / model, device="cpu", jobs=jobs).summary
    planted, single = summary["reference"]["oracle"], summary["reference"]["best_single_scale"]
    found = summary["c_index_patient"]
    return {
        "settings": settings,
        "c_index_patient": found,
        "interval": [summary["assessment"]["c_index"][end] for end in ("lower", "upper")],
        "planted_risk": planted,
        "best_single_scale_predictor": single,
        "share_of_the_way": (found["mean"] - 0.5) / (planted["mean"] - 0.5),  # of a planted risk, so not if permuted
        "n_patients": summary["n_patients"],
        "n_events": summary["n_events"],
        "seconds": summary["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1, help="of the cohort")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--models", default="crossfusion,abmil", help="names, or all")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="key=value, of all models")
    parser.add_argument("--permute", action="store_true", help="labels dealt out anew")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="new folder for the cohort and the runs, for planted_maps.py")
    told = parser.parse_args()
    with contextlib.nullcontext(told.keep) if told.keep else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthesize(folder / "h5", slides=told.slides, patches=told.patches, dim=told.dim, seed=told.seed)
        if told.permute:
            permute(folder / "h5" / "clinical.csv", told.seed)
        store = cfstore.open(folder / "store", create=True)
        store.ingest(folder / "h5", cfstore.IngestOptions(encoder="synthetic"))
        more = (f"train.epochs={told.epochs}", *told.settings)
        names = list(WIDTHS) if told.models == "all" else told.models.split(",")
        extras = sorted({extra for name in names for extra in _extras(name)})
        slide_ids = [row["slide_id"] for row in store.sql("SELECT slide_id FROM slides").to_pylist()]
        derive_missing(store, "synthetic", extras, slide_ids, lambda done, total: None)
        models = {name: train(store.path, name, more, told.jobs, folder) for name in names}
    result = {
        "synthetic": True,
        "cohort": {key: getattr(told, key) for key in ("slides", "patches", "dim", "seed", "epochs", "permute")},
        "models": models,
        "machine": machine(),
        "versions": versions(["torch", "numpy", "lifelines"]),
        **commit(),
    }
    text = json.dumps(result, indent=1)
    if told.out:
        told.out.write_text(text + "\n")
    for model, row in models.items():
        found = row["c_index_patient"]
        print(
            f"{model}: {found['mean']:.3f} +- {found['std']:.3f}, interval {row['interval'][0]:.3f} to "
            f"{row['interval'][1]:.3f}; planted risk {row['planted_risk']['mean']:.3f}, best single scale "
            f"{row['best_single_scale_predictor']['mean']:.3f}; {row['share_of_the_way']:.2f} of the way",
        )


if __name__ == "__main__":
    main()
