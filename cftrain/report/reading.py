"""What a finished run left behind, read and checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cftrain.errors import RunError

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row per slide, predicted by the model of the fold that did not train on it.

    Parameters
    ----------
    slide_id, patient_id : [N] str
    fold : [N] int64
    time_months : [N]
        Follow-up in months.
    event : [N] bool
        True where death was observed.
    risk : [N]
        Risk after the last epoch, higher = worse.
    """

    slide_id: NDArray[np.str_]
    patient_id: NDArray[np.str_]
    fold: NDArray[np.int64]
    time_months: NDArray[np.float64]
    event: NDArray[np.bool_]
    risk: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Results:
    """The content of a run directory.

    Parameters
    ----------
    summary
        summary.json.
    predictions
        predictions.parquet.
    epochs
        fold_<k>/metrics.jsonl of every fold in the summary, one row per epoch.
    config
        config.toml, as it stands.
    provenance
        provenance.json.
    """

    summary: dict[str, Any]
    predictions: Predictions
    epochs: dict[int, list[Row]]
    config: str
    provenance: dict[str, Any]


def read_results(run: Path) -> Results:
    """Read a finished run.

    Raises
    ------
    RunError
        A file is missing, unreadable, or lacks what a finished run has.
    """
    summary = _read(run, "summary.json", _json_object)
    try:
        folds = [int(fold["fold"]) for fold in summary["folds"]]
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{run}: summary.json does not list its folds; run `cftrain run` again"
        raise RunError(msg) from error
    return Results(
        summary=summary,
        predictions=_read(run, "predictions.parquet", _predictions),
        epochs={fold: _read(run, f"fold_{fold}/metrics.jsonl", _epochs) for fold in folds},
        config=_read(run, "config.toml", lambda path: path.read_text(encoding="utf-8")),
        provenance=_read(run, "provenance.json", _json_object),
    )


def _read(run: Path, name: str, reader: Callable[[Path], T]) -> T:
    """One file of the run, or an error that names it and says what to do."""
    try:
        return reader(run / name)
    except FileNotFoundError as error:
        msg = f"{run}: no {name}: not a finished run; finish it with `cftrain run --resume --out {run}`"
        raise RunError(msg) from error
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        msg = f"{run}: {name} cannot be used ({error}); run `cftrain run` again"
        raise RunError(msg) from error


def _json_object(path: Path) -> dict[str, Any]:
    content = _json(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        msg = f"expected an object, got {type(content).__name__}"
        raise ValueError(msg)
    return content


def _json(text: str) -> Any:
    """JSON as Python writes it; NaN is what null is here, an undefined number."""
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


def _epochs(path: Path) -> list[Row]:
    rows = [_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        msg = "no epoch in it"
        raise ValueError(msg)
    return rows


def _predictions(path: Path) -> Predictions:
    table = pq.read_table(path, columns=["slide_id", "patient_id", "fold", "time_months", "event", "risk"])
    if not table.num_rows:
        msg = "no slide in it"
        raise ValueError(msg)
    return Predictions(
        slide_id=np.asarray(table["slide_id"].to_pylist(), dtype=np.str_),
        patient_id=np.asarray(table["patient_id"].to_pylist(), dtype=np.str_),
        fold=table["fold"].to_numpy().astype(np.int64),
        time_months=table["time_months"].to_numpy().astype(np.float64),
        event=table["event"].to_numpy().astype(np.bool_),
        risk=table["risk"].to_numpy().astype(np.float64),
    )
