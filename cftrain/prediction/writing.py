"""predictions.parquet and prediction.json of a prediction, in a directory that is complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cftrain.errors import RunError
from cftrain.prediction.ensemble import Ensemble
from cftrain.prediction.slides import Target
from cftrain.prediction.trained import TrainedRun
from cftrain.results import SlideRows


def table(target: Target, trained: TrainedRun, ensemble: Ensemble) -> pa.Table:
    """One row per slide; a patient's bag gives its predictions to each of its slides."""
    rows = SlideRows.of(target.data.examples)
    unlabelled = np.isnan(rows.time_months)
    columns = {
        "slide_id": pa.array(rows.slide_id, pa.string()),
        "patient_id": pa.array([target.patients[slide] for slide in rows.slide_id], pa.string()),
        "time_months": pa.array(rows.time_months, mask=unlabelled),
        "event": pa.array(rows.event, mask=unlabelled),
        "risk": pa.array(ensemble.risk[rows.example]),
    }
    for place, member in enumerate(trained.members):
        columns[f"risk_fold_{member.fold}"] = pa.array(ensemble.member_risk[rows.example, place])
    months = ensemble.months
    if months.size:
        survival = ensemble.survival_at(months)[rows.example]
        columns |= {f"survival_{month:g}": pa.array(survival[:, at]) for at, month in enumerate(months)}
    return pa.table(columns)


def check_new(out: Path) -> None:
    """Refuse what is there already: RunError."""
    if out.exists():
        message = f"{out}: is there already; name another directory with --out, or remove it"
        raise RunError(message)


def write(out: Path, rows: pa.Table, summary: Mapping[str, Any]) -> None:
    """Write both files aside and rename their directory; RunError where that cannot be done."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        pq.write_table(rows, aside / "predictions.parquet")
        (aside / "prediction.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        check_new(out)
        aside.rename(out)
    except OSError as error:
        message = f"{out}: cannot write the predictions ({error.strerror}); name another directory with --out"
        raise RunError(message) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
