"""Training runs as tables for SQL: `runs` (one row per run directory) and `predictions`.

The files are the contract with cftrain (summary.json and predictions.parquet of a run directory);
nothing of cftrain is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cfstore.errors import SourceError

_RUN_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("cohort", pa.string()),
        ("model", pa.string()),
        ("encoder", pa.string()),
        ("splits", pa.string()),
        ("seed", pa.int64()),
        ("c_index", pa.float64()),
        ("c_index_std", pa.float64()),
        ("c_index_patient", pa.float64()),
        ("c_index_best_epoch", pa.float64()),
        ("log_rank_p", pa.float64()),
        ("n_slides", pa.int64()),
        ("n_patients", pa.int64()),
        ("path", pa.string()),
    ]
)


def _mean(summary: dict[str, Any], metric: str, key: str = "mean") -> float | None:
    value = summary.get(metric, {}).get(key)
    return None if value is None else float(value)


def _row(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    plain = {name: summary.get(name) for name in _RUN_SCHEMA.names if not isinstance(summary.get(name), dict)}
    return plain | {
        "run": folder.name,
        "path": str(folder),
        "c_index": _mean(summary, "c_index"),
        "c_index_std": _mean(summary, "c_index", "std"),
        "c_index_patient": _mean(summary, "c_index_patient"),
        "c_index_best_epoch": _mean(summary, "c_index_best_epoch"),
    }


def read_runs(folder: Path) -> dict[str, pa.Table]:
    """Tables `runs` and `predictions` of every finished run in `folder` (or of `folder` itself).

    Raises
    ------
    SourceError
        No finished run there, or one that cannot be read.
    """
    found = sorted({*folder.glob("summary.json"), *folder.glob("*/summary.json")})
    if not found:
        message = f"{folder}: no finished run here (no summary.json); give the folder that `cftrain run --out` wrote to"
        raise SourceError(message)
    rows, predictions = [], []
    for path in found:
        try:
            rows.append(_row(path.parent, json.loads(path.read_text())))
            table = pq.read_table(path.parent / "predictions.parquet")
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            message = f"{path.parent}: not a readable run ({error}); run it again, or move it out of {folder}"
            raise SourceError(message) from error
        predictions.append(table.add_column(0, "run", pa.array([path.parent.name] * len(table), pa.string())))
    return {
        "runs": pa.Table.from_pylist(rows, schema=_RUN_SCHEMA),
        "predictions": pa.concat_tables(predictions, promote_options="default"),
    }
