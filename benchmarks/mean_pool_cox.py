"""The floor a bag model must clear: mean-pooled bags in a ridge Cox model (lifelines), on the store's folds.

    python benchmarks/mean_pool_cox.py --store STORE --cohort GBMLGG --encoder vit4k --scale 20

Patients with several slides enter once, with the mean of their slides' means. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter

import cfstore
from cftrain.survival import c_index, summarise


def patient_means(store: cfstore.Store, cohort: cfstore.Cohort, scale: int) -> pd.DataFrame:
    """One row per patient: mean features f0 … fD-1, time, event."""
    reader = store.reader(cohort.encoder, [scale], [slide.slide_id for slide in cohort.slides])
    rows = []
    for slide in cohort.slides:
        mean = reader.read(slide.slide_id).bags[scale].features.astype(np.float64).mean(0)
        rows.append({"patient": slide.patient_id, "time": slide.time_months, "event": slide.event}
                    | {f"f{i}": value for i, value in enumerate(mean)})  # fmt: skip
    return pd.DataFrame(rows).groupby("patient").mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--encoder")
    parser.add_argument("--splits")
    parser.add_argument("--scale", type=int, default=20)
    parser.add_argument("--penalizer", type=float, default=1.0)
    told = parser.parse_args()
    store = cfstore.open(told.store)
    cohort = store.cohort(told.cohort, encoder=told.encoder, scales=[told.scale])
    splits = store.split_set(told.cohort, told.splits or store.split_names(told.cohort)[0])
    table = patient_means(store, cohort, told.scale)
    features = [name for name in table if name.startswith("f")]
    folds = []
    for fold in splits.folds.values():
        train, val = (table[table.index.isin(part)] for part in (fold.train, fold.val))
        mean, spread = train[features].mean(), train[features].std()
        fitted = CoxPHFitter(penalizer=told.penalizer).fit(
            ((train[features] - mean) / spread).assign(time=train.time, event=train.event), "time", "event"
        )
        risk = fitted.predict_log_partial_hazard((val[features] - mean) / spread)
        folds.append(c_index(val.time, val.event.to_numpy().astype(bool), risk))
    print(json.dumps({"model": "mean pool + ridge Cox", "unit": "patient", **summarise(folds)}))


if __name__ == "__main__":
    main()
