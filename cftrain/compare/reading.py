"""Finished runs, found in folders and read."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cftrain.config import RESUMABLE
from cftrain.errors import ConfigError, NonFiniteError, RunError
from cftrain.survival import PatientLevel, patient_level

# Each metric of summary.json in words, and the column of predictions.parquet that it is from.
METRICS: Final = {
    "c_index_patient": ("C-index per patient (mean risk of the patient's slides)", "risk"),
    "c_index": ("C-index per slide", "risk"),
    "c_index_patient_best_epoch": ("C-index per patient (mean risk of the patient's slides)", "risk_best_epoch"),
    "c_index_best_epoch": ("C-index per slide", "risk_best_epoch"),
    "c_index_patient_nested": ("C-index per patient (mean risk of the patient's slides)", "risk_nested"),
    "c_index_nested": ("C-index per slide", "risk_nested"),
}
_NESTED: Final = "train.nested"

_NO_EXPERIMENT: Final = {
    *RESUMABLE,
    *(f"data.{name}" for name in ("cohort", "where", "shards", "encoder", "splits", "folds", "order_seed")),
    *("train.seed", "train.batch_patches", "model.name"),
}


@dataclass(frozen=True, eq=False)
class Run:
    """What a comparison needs of one run.

    Parameters
    ----------
    folder
        The run directory.
    cohort
        Its name, with the condition that chose its slides, if any.
    model, encoder, preset
    settings
        Those of config.toml that make another experiment: not seeds, data, or what changes no number.
    seed
        None where the summary has none.
    synthetic
        Whether the cohort is invented.
    folds
        The metric in each fold, NaN where undefined.
    rule
        How the epoch of the metric was chosen.
    patients
        Patients of each validation fold, with the mean risk of their slides at that epoch.
    """

    folder: Path
    cohort: str
    model: str
    encoder: str
    preset: str
    settings: dict[str, str]
    seed: int | None
    synthetic: bool
    folds: tuple[float, ...]
    rule: str
    patients: dict[int, PatientLevel]

    @property
    def labels(self) -> dict[str, tuple[float, bool]]:
        """Follow-up and event of every patient."""
        return {
            patient: (time, event)
            for fold in self.patients.values()
            for patient, time, event in zip(
                fold.patient_id.tolist(), fold.time_months.tolist(), fold.event.tolist(), strict=True
            )
        }

    @property
    def partition(self) -> frozenset[frozenset[str]]:
        """Which patients were validated together, whatever the folds are called."""
        return frozenset(frozenset(fold.patient_id.tolist()) for fold in self.patients.values())


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run directories among the folders, and one or two levels below those that are none.

    Raises
    ------
    RunError
        A folder does not exist, or neither is a finished run nor holds one.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            msg = f"{folder}: no such folder; name run directories, or a folder of them"
            raise RunError(msg)
        here = [folder / "summary.json"] if (folder / "summary.json").is_file() else []
        summaries = here or sorted([*folder.glob("*/summary.json"), *folder.glob("*/*/summary.json")])
        if not summaries:
            msg = (
                f"{folder}: no finished run in it (no summary.json down to two levels); "
                "finish one with `cftrain run --resume --out RUN`"
            )
            raise RunError(msg)
        found |= {path.parent.resolve(): path.parent for path in summaries}
    if not found:
        msg = "no runs to compare; name run directories, or a folder of them"
        raise RunError(msg)
    return list(found.values())


def unfinished_runs(folders: Sequence[Path]) -> list[Path]:
    """The run directories one or two levels below the folders that were begun and are not finished."""
    below = (
        path.parent for folder in folders for level in ("*", "*/*") for path in folder.glob(f"{level}/config.toml")
    )
    return list({path.resolve(): path for path in sorted(below) if not (path / "summary.json").is_file()}.values())


def read_run(folder: Path, metric: str) -> Run:
    """Read one finished run.

    Parameters
    ----------
    folder
        The run directory.
    metric
        One of `METRICS`.

    Raises
    ------
    RunError
        A file is missing or unreadable, or lacks what a finished run has.
    """
    missing = [name for name in ("summary.json", "predictions.parquet") if not (folder / name).is_file()]
    if missing:
        msg = f"{folder}: no {missing[0]}: not a finished run; finish it with `cftrain run --resume --out {folder}`"
        raise RunError(msg)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found = summary[metric]
        where = summary.get("where")
        return Run(
            folder=folder,
            cohort=f"{summary['cohort']} ({where})" if where else str(summary["cohort"]),
            model=str(summary["model"]),
            encoder=str(summary["encoder"]),
            preset=str(summary.get("preset") or ""),
            settings=_settings(folder / "config.toml", metric),
            seed=summary.get("seed"),
            synthetic=bool(summary.get("synthetic")),
            folds=tuple(math.nan if value is None else float(value) for value in found["folds"]),
            rule=_rule(summary, metric),
            patients=_patients(folder / "predictions.parquet", METRICS[metric][1]),
        )
    except KeyError as error:
        msg = f"{folder}: the run has no {error.args[0]}; run `cftrain run` again"
        raise RunError(msg) from error
    except (OSError, ValueError, TypeError, AttributeError, NonFiniteError, pa.ArrowException) as error:
        msg = f"{folder}: the run cannot be read ({error}); run `cftrain run` again"
        raise RunError(msg) from error


def with_metric(folders: Sequence[Path], metric: str) -> tuple[list[Path], list[Path]]:
    """The folders of finished runs that a metric can be read of, and those that were trained without its rule.

    Raises
    ------
    RunError
        None has it.
    """
    if not metric.endswith("nested"):
        return list(folders), []
    lacking = [folder for folder in folders if metric not in _names_in(folder / "summary.json")]
    if len(lacking) == len(folders):
        msg = f"{lacking[0]}: the run has no {metric}; train with `cftrain run --nested` for it"
        raise RunError(msg)
    return [folder for folder in folders if folder not in lacking], lacking


def _names_in(path: Path) -> Iterable[str]:
    """The names in a summary; where it cannot be read, reading the run will say why."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return METRICS
    return found if isinstance(found, dict) else METRICS


def _settings(path: Path, metric: str) -> dict[str, str]:
    """The settings of a run that tell it from others of the same model; none where it has no config.toml.

    What nested validation holds out is another experiment to its own metrics, and changes no other number.
    """
    if not path.is_file():
        return {}
    sections = tomllib.loads(path.read_text(encoding="utf-8"))
    flat = {
        f"{section}.{name}": json.dumps(value).strip('"')
        for section, values in sections.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    passed_over = _NO_EXPERIMENT if metric.endswith("nested") else {*_NO_EXPERIMENT, _NESTED}
    return {key: value for key, value in flat.items() if key not in passed_over}


def _rule(summary: dict[str, Any], metric: str) -> str:
    """How the epoch was chosen: as the metric says, else as the selection of its kind does."""
    kind = metric.replace("c_index_patient", "c_index")
    return str(summary[metric].get("rule") or summary["selection"][kind])


def _patients(path: Path, risk: str) -> dict[int, PatientLevel]:
    with pq.ParquetFile(path) as file:
        table = file.read()
    missing = {"patient_id", "fold", "time_months", "event", risk} - set(table.column_names)
    if missing or not table.num_rows:
        msg = f"{path.name} has no {', '.join(sorted(missing)) or 'slide'}"
        raise ConfigError(msg)
    folds = np.asarray(table["fold"].to_numpy(), dtype=np.int64)
    ids: NDArray[np.str_] = np.asarray(table["patient_id"].to_pylist(), dtype=np.str_)
    times, risks = table["time_months"].to_numpy(), table[risk].to_numpy()
    events = np.asarray(table["event"].to_pylist(), dtype=np.bool_)
    found = {}
    for fold in np.unique(folds).tolist():
        own = folds == fold
        found[fold] = patient_level(ids[own], times[own], events[own], risks[own])
    return found
