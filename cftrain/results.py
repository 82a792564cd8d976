"""What a fold's training yields, and from all folds predictions.parquet and summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cfstore import CohortSlide
from cftrain.config import RunConfig, TrainConfig
from cftrain.data import RunData
from cftrain.feed import Work
from cftrain.folds import FoldSlides
from cftrain.loop import Evaluation
from cftrain.provenance import device_name
from cftrain.survival import TimeBins, c_index, log_rank_median_split, patient_level, summarise

BEST_EPOCH_RULE: Final = "best epoch on the reported fold (the paper's rule; optimistic)"
_ORACLES: Final = {"oracle": "oracle_risk", "5x alone": "oracle_5x", "20x alone": "oracle_20x"}


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl; C-indices are of the validation fold, NaN where undefined."""

    epoch: int
    train_loss: float
    val_loss: float
    c_index: float
    c_index_patient: float
    lr: float
    seconds: float


@dataclass(frozen=True, eq=False)
class FoldResult:
    """A trained fold: its epochs, and predictions under both selection rules."""

    slides: FoldSlides
    bins: TimeBins
    epochs: tuple[Epoch, ...]
    best: int
    last_prediction: Evaluation
    best_prediction: Evaluation
    seconds: float
    work: Work

    @property
    def last_epoch(self) -> Epoch:
        return self.epochs[-1]

    @property
    def best_epoch(self) -> Epoch:
        return self.epochs[self.best]


def scores(slides: Sequence[CohortSlide], risk: Any) -> tuple[float, float]:
    """C-index per slide, and per patient (mean risk of the patient's slides)."""
    times = np.array([slide.time_months for slide in slides])
    event = np.array([slide.event for slide in slides])
    patients = patient_level([slide.patient_id for slide in slides], times, event, risk)
    return c_index(times, event, risk), c_index(patients.time_months, patients.event, patients.risk)


def without_nan(value: Any) -> Any:
    """JSON has no NaN: undefined numbers become null, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def last_epoch_rule(train: TrainConfig) -> str:
    """How the honest number was chosen, in words."""
    if train.patience:
        return f"last epoch, {train.patience} after the best on the reported fold at the latest (no fixed schedule)"
    return f"last epoch of a schedule fixed beforehand ({train.epochs} epochs)"


def write_predictions(out: Path, results: Sequence[FoldResult]) -> None:
    """One row per validated slide: labels, risk under both rules, and survival per bin (last epoch)."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("slide_id", "patient_id", "fold", "time_months", "event", "risk", "risk_best_epoch")
    }
    for result in results:
        for i, slide in enumerate(result.slides.val):
            row = (
                slide.slide_id,
                slide.patient_id,
                result.slides.number,
                slide.time_months,
                slide.event,
                result.last_prediction.risk[i],
                result.best_prediction.risk[i],
            )
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    survival = np.concatenate([result.last_prediction.survival for result in results])
    table = pa.table(columns | {f"survival_{k + 1}": survival[:, k] for k in range(survival.shape[1])})
    pq.write_table(table, out / "predictions.parquet")


def _log_rank(results: Sequence[FoldResult]) -> dict[str, Any]:
    """Patients split at the median risk of their own fold (risks of different models share no scale), then pooled."""
    times, event, centred = [], [], []
    for result in results:
        slides = result.slides.val
        patients = patient_level(
            [slide.patient_id for slide in slides],
            [slide.time_months for slide in slides],
            np.array([slide.event for slide in slides]),
            result.last_prediction.risk,
        )
        times.append(patients.time_months)
        event.append(patients.event)
        centred.append(np.where(patients.risk >= np.median(patients.risk), 1.0, -1.0))
    groups = np.concatenate(centred)
    split = log_rank_median_split(np.concatenate(times), np.concatenate(event), groups)
    return {
        "p": split.p_value,
        "n_high": int((groups > 0).sum()),
        "n_low": int((groups < 0).sum()),
        "split": "risk at or above the median of its fold",
        "unit": "patient",
    }


def _metric(results: Sequence[FoldResult], value: Callable[[FoldResult], float], rule: str) -> dict[str, Any]:
    return {**summarise([value(result) for result in results]), "rule": rule}


def _reference(data: RunData, results: Sequence[FoldResult]) -> dict[str, Any] | None:
    """C-index of a synthetic cohort's planted risks on the same patients of the same folds."""
    rows = data.patients
    if not all(row.get(column) is not None for row in rows.values() for column in _ORACLES.values()):
        return None  # also where real patients lie beside synthetic ones
    found: dict[str, Any] = {}
    for name, column in _ORACLES.items():
        folds = []
        for result in results:
            people = {slide.patient_id: slide for slide in result.slides.val}
            risk = np.array([float(rows[patient][column]) for patient in people])
            times = [slide.time_months for slide in people.values()]
            folds.append(c_index(times, np.array([slide.event for slide in people.values()]), risk))
        found[name] = dict(summarise(folds))
    single = max(("5x alone", "20x alone"), key=lambda name: found[name]["mean"])
    return {"oracle": found["oracle"], "best_single_scale": {**found[single], "scale": int(single.split("x")[0])}}


def _fold_row(result: FoldResult) -> dict[str, Any]:
    slides, last, best = result.slides, result.last_epoch, result.best_epoch
    people = {slide.patient_id: slide.event for slide in slides.val}
    return {
        "fold": slides.number,
        "epochs": len(result.epochs),
        "best_epoch": best.epoch,
        "n_train_slides": len(slides.train),
        "n_val_slides": len(slides.val),
        "n_val_patients": len(people),
        "n_val_events": sum(people.values()),
        "bin_edges": list(result.bins.edges),
        "c_index": last.c_index,
        "c_index_patient": last.c_index_patient,
        "c_index_best_epoch": best.c_index,
        "c_index_patient_best_epoch": best.c_index_patient,
        "seconds": result.seconds,
        "data_wait_seconds": result.work.wait_seconds,
    }


def write_summary(
    out: Path,
    config: RunConfig,
    data: RunData,
    results: Sequence[FoldResult],
    seconds: float,
    n_parameters: int,
    device: torch.device,
) -> dict[str, Any]:
    """Write and return summary.json: every C-index with the rule that chose its epoch."""
    honest, slides = last_epoch_rule(config.train), data.cohort.slides
    people = {slide.patient_id: slide.event for slide in slides}
    log_rank = _log_rank(results)
    summary: dict[str, Any] = {
        "cohort": data.cohort.name,
        "where": config.data.where or None,
        "model": config.model.name,
        "encoder": data.cohort.encoder,
        "scales": list(data.cohort.scales),
        "synthetic": any(row.get("synthetic") for row in data.patients.values()),
        "preset": config.preset,
        "unit": "slide",
        "seed": config.train.seed,
        "c_index": _metric(results, lambda r: r.last_epoch.c_index, honest),
        "c_index_patient": _metric(results, lambda r: r.last_epoch.c_index_patient, honest),
        "c_index_best_epoch": _metric(results, lambda r: r.best_epoch.c_index, BEST_EPOCH_RULE),
        "c_index_patient_best_epoch": _metric(results, lambda r: r.best_epoch.c_index_patient, BEST_EPOCH_RULE),
        "std_ddof": 1,
        "selection": {"c_index": honest, "c_index_best_epoch": BEST_EPOCH_RULE},
        "log_rank_p": log_rank["p"],
        "log_rank": log_rank,
        "reference": _reference(data, results),
        "n_slides": len(slides),
        "n_patients": len(people),
        "n_events": sum(people.values()),
        "excluded": {reason: len(ids) for reason, ids in data.excluded.items()},
        "splits": data.splits.name,
        "bins_from": "train fold" if config.bins.fitted_on == "train" else "cohort",
        "feature_dim": data.cohort.dim,
        "n_parameters": n_parameters,
        "device": device_name(device),
        "folds": [_fold_row(result) for result in results],
        "seconds": seconds,
        "slides_per_second": sum(result.work.n_slides for result in results) / seconds,
        "patches_per_second": sum(result.work.n_patches for result in results) / seconds,
        "bytes_read": sum(result.work.bytes_read for result in results),
        "data_wait_seconds": sum(result.work.wait_seconds for result in results),
    }
    summary = without_nan(summary)
    text = json.dumps(summary, indent=2, allow_nan=False)
    temporary = out / ".summary.json"
    temporary.write_text(text + "\n")
    temporary.replace(out / "summary.json")
    return summary


def excluded_lines(excluded: Mapping[str, Sequence[str]]) -> list[str]:
    """Slides left out of a run, by reason, a few of them named."""
    return [
        f"{len(ids)} slides left out: {reason} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
        for reason, ids in excluded.items()
    ]
