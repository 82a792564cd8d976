"""The floor a bag model must clear: mean-pooled bags in a ridge Cox model (lifelines), on the store's folds.

    python benchmarks/mean_pool_cox.py --store STORE --cohort GBMLGG --encoder vit4k --scale 20 --out runs/mean-pool

Patients with several slides enter once, with the mean of their slides' means. Prints one JSON object; `--out` also
writes what `cftrain compare` reads of a run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from lifelines import CoxPHFitter

import cfstore
from cftrain.survival import c_index, summarise

RULE = "no epochs: one fit"


def patient_means(store: cfstore.Store, cohort: cfstore.Cohort, scale: int) -> pd.DataFrame:
    """One row per patient: mean features f0 … fD-1, time, event."""
    reader = store.reader(cohort.encoder, [scale], [slide.slide_id for slide in cohort.slides])
    rows = []
    for slide in cohort.slides:
        mean = reader.read(slide.slide_id).bags[scale].features.astype(np.float64).mean(0)
        rows.append({"patient": slide.patient_id, "time": slide.time_months, "event": slide.event}
                    | {f"f{i}": value for i, value in enumerate(mean)})  # fmt: skip
    grouped = pd.DataFrame(rows).groupby("patient")
    return grouped.mean().assign(time=grouped.time.first(), event=grouped.event.first())


def predicted(table: pd.DataFrame, fold: cfstore.Fold, penalizer: float) -> pd.DataFrame:
    """The validated patients of a fold: patient_id, time_months, event, risk."""
    features = [name for name in table if name.startswith("f")]
    train, val = (table[table.index.isin(part)] for part in (fold.train, fold.val))
    mean, spread = train[features].mean(), train[features].std()
    fitted = CoxPHFitter(penalizer=penalizer).fit(
        ((train[features] - mean) / spread).assign(time=train.time, event=train.event), "time", "event"
    )
    risk = fitted.predict_log_partial_hazard((val[features] - mean) / spread)
    labels = {"patient_id": val.index, "time_months": val.time.to_numpy(), "event": val.event.to_numpy().astype(bool)}
    return pd.DataFrame(labels | {"risk": risk.to_numpy()})


def write_run(out: Path, cohort: cfstore.Cohort, folds: dict[int, pd.DataFrame], metric: dict[str, Any]) -> None:
    """summary.json and predictions.parquet, as far as `cftrain compare` reads them; every number is per patient."""
    out.mkdir(parents=True)
    about = {"cohort": cohort.name, "model": "mean pool + ridge Cox", "encoder": cohort.encoder, "seed": None}
    kinds = ("c_index", "c_index_patient", "c_index_best_epoch", "c_index_patient_best_epoch")
    numbers = {kind: {**metric, "rule": RULE} for kind in kinds}
    (out / "summary.json").write_text(json.dumps({**about, **numbers}, indent=2) + "\n")
    rows = pd.concat([frame.assign(fold=number) for number, frame in folds.items()])
    rows = rows.assign(slide_id=rows.patient_id, risk_best_epoch=rows.risk)
    pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), out / "predictions.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--encoder")
    parser.add_argument("--splits")
    parser.add_argument("--scale", type=int, default=20)
    parser.add_argument("--penalizer", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="a folder to write")
    told = parser.parse_args()
    store = cfstore.open(told.store)
    cohort = store.cohort(told.cohort, encoder=told.encoder, scales=[told.scale])
    splits = store.split_set(told.cohort, told.splits or store.split_names(told.cohort)[0])
    table = patient_means(store, cohort, told.scale)
    folds = {number: predicted(table, fold, told.penalizer) for number, fold in splits.folds.items()}
    metric = summarise([c_index(each.time_months, each.event, each.risk) for each in folds.values()])
    print(json.dumps({"model": "mean pool + ridge Cox", "unit": "patient", **metric}))
    if told.out:
        write_run(told.out, cohort, folds, dict(metric))


if __name__ == "__main__":
    main()
