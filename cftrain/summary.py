"""summary.json of a finished run: every number with the rule that chose it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from cftrain.assessment import FoldOutcome, assess
from cftrain.config import RunConfig, TrainConfig
from cftrain.data import RunData
from cftrain.feed import Work
from cftrain.nested import nested_rule
from cftrain.provenance import device_name
from cftrain.results import FoldResult, Nested, SlideRows, outcomes, without_nan
from cftrain.survival import c_index, log_rank_median_split, summarise
from cftrain.survival.covariates import covariates_of
from cftrain.survival.regression import CoxTable, cox_regression, standardised

_ORACLES: Final = {"oracle": "oracle_risk", "5x alone": "oracle_5x", "20x alone": "oracle_20x"}


def last_epoch_rule(train: TrainConfig) -> str:
    """How the honest number was chosen, in words."""
    if train.patience:
        return f"last epoch, {train.patience} after the best on the reported fold at the latest (no fixed schedule)"
    return f"last epoch of a schedule fixed beforehand ({train.epochs} epoch{'s' * (train.epochs > 1)})"


def best_epoch_rule(train: TrainConfig) -> str:
    """How the optimistic number was chosen, in words."""
    first = train.first_selectable
    return f"best epoch{f' from epoch {first} on,' * (first > 1)} on the reported fold (the paper's rule; optimistic)"


def _log_rank(results: Sequence[FoldResult]) -> dict[str, Any]:
    """Patients split at the median risk of their own fold (risks of different models share no scale), then pooled."""
    times, event, centred = [], [], []
    for result in results:
        patients = SlideRows.of(result.examples.val).patients(result.last_prediction.risk)
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


def covariate_regression(folds: Sequence[FoldOutcome], rows: Mapping[str, Mapping[str, Any]]) -> CoxTable:
    """Cox regression of all validated patients on the predicted risk (within its fold) and the clinical columns.

    A patient who is in the validation part of several folds enters once, with the first of them.
    """
    risk = np.concatenate([fold.patients.risk for fold in folds])
    number = np.concatenate([np.full(len(fold.patients.risk), fold.fold) for fold in folds])
    ids = np.concatenate([fold.patients.patient_id for fold in folds])
    first = np.unique(ids, return_index=True)[1]
    return cox_regression(
        np.concatenate([fold.patients.time_months for fold in folds])[first],
        np.concatenate([fold.patients.event for fold in folds])[first],
        standardised(risk, number)[first],
        covariates_of([rows[patient] for patient in ids[first].tolist()]),
    )


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
            people = {each.patient_id: each for each in result.examples.val}
            risk = np.array([float(rows[patient][column]) for patient in people])
            times = [each.time_months for each in people.values()]
            folds.append(c_index(times, np.array([each.event for each in people.values()]), risk))
        found[name] = dict(summarise(folds))
    single = max(("5x alone", "20x alone"), key=lambda name: found[name]["mean"])
    return {"oracle": found["oracle"], "best_single_scale": {**found[single], "scale": int(single.split("x")[0])}}


def _fold_row(result: FoldResult) -> dict[str, Any]:
    examples, last, best = result.examples, result.last_epoch, result.best_epoch
    people = {each.patient_id: each.event for each in examples.val}
    return {
        "fold": examples.number,
        "epochs": len(result.epochs),
        "best_epoch": best.epoch,
        "n_train_slides": sum(len(each.slide_ids) for each in examples.train),
        "n_val_slides": sum(len(each.slide_ids) for each in examples.val),
        "n_val_patients": len(people),
        "n_val_events": sum(people.values()),
        "bin_edges": list(result.bins.edges),
        "c_index": last.c_index,
        "c_index_patient": last.c_index_patient,
        "c_index_best_epoch": best.c_index,
        "c_index_patient_best_epoch": best.c_index_patient,
        **(_nested_row(result.nested) if result.nested else {}),
        "skipped_steps": sum(len(epoch.skipped) for epoch in result.epochs),
        "seconds": result.work.compute_seconds + result.work.wait_seconds,
        "data_wait_seconds": result.work.wait_seconds,
    }


def _nested_row(nested: Nested) -> dict[str, Any]:
    return {
        "epoch_nested": nested.epoch,
        "c_index_nested": nested.c_index,
        "c_index_patient_nested": nested.c_index_patient,
        "n_held_out_patients": nested.n_held_out,
        "n_held_out_events": nested.n_held_out_events,
        "c_index_held_out": nested.c_index_held_out,
    }


def _nested(config: RunConfig, results: Sequence[FoldResult]) -> dict[str, Any]:
    """The C-indices after the epochs that inner models chose; nothing without `train.nested`."""
    chosen = [(result.examples.number, result.nested) for result in results if result.nested]
    if not chosen:
        return {}
    rule = nested_rule(config, chosen)
    values = {
        "c_index_nested": [nested.c_index for _, nested in chosen],
        "c_index_patient_nested": [nested.c_index_patient for _, nested in chosen],
    }
    return {name: {**summarise(folds), "rule": rule} for name, folds in values.items()}


def total_work(results: Sequence[FoldResult]) -> Work:
    """What all folds took."""
    total = Work()
    for result in results:
        total = total.plus(result.work)
    return total


@dataclass(frozen=True)
class Effort:
    """What a run took: wall time, the most memory that one of its processes used, and what its feeds delivered."""

    seconds: float
    peak_bytes: int
    work: Work

    def rates(self) -> dict[str, Any]:
        """The part of a summary that says whether the disk or the device was the limit."""
        work = self.work
        busy = work.wait_seconds + work.compute_seconds
        return {
            "seconds": self.seconds,
            "slides_per_second": work.n_slides / self.seconds,
            "patches_per_second": work.n_patches / self.seconds,
            "bytes_read": work.bytes_read,
            "data_wait_seconds": work.wait_seconds,
            "compute_seconds": work.compute_seconds,
            "data_wait_share": work.wait_seconds / busy if busy else None,
            "peak_memory_bytes": self.peak_bytes,
        }


def write_summary(
    out: Path,
    config: RunConfig,
    data: RunData,
    results: Sequence[FoldResult],
    effort: Effort,
    n_parameters: int,
    scales: Sequence[int],
    device: torch.device,
) -> dict[str, Any]:
    """Write and return summary.json: every C-index with the rule that chose its epoch."""
    honest, best, slides = last_epoch_rule(config.train), best_epoch_rule(config.train), data.cohort.slides
    people = {slide.patient_id: slide.event for slide in slides}
    log_rank, nested = _log_rank(results), _nested(config, results)
    assessed = outcomes(results)
    summary: dict[str, Any] = {
        "cohort": data.cohort.name,
        "where": config.data.where or None,
        "model": config.model.name,
        "encoder": data.cohort.encoder,
        "scales": list(scales),
        "synthetic": any(row.get("synthetic") for row in data.patients.values()),
        "preset": config.preset,
        "unit": config.data.unit,
        "loss": config.train.loss,
        "seed": config.train.seed,
        "c_index": _metric(results, lambda r: r.last_epoch.c_index, honest),
        "c_index_patient": _metric(results, lambda r: r.last_epoch.c_index_patient, honest),
        "c_index_best_epoch": _metric(results, lambda r: r.best_epoch.c_index, best),
        "c_index_patient_best_epoch": _metric(results, lambda r: r.best_epoch.c_index_patient, best),
        **nested,
        "std_ddof": 1,
        "selection": {"c_index": honest, "c_index_best_epoch": best}
        | ({"c_index_nested": nested["c_index_nested"]["rule"]} if nested else {}),
        "log_rank_p": log_rank["p"],
        "log_rank": log_rank,
        "assessment": assess(assessed),
        "cox": covariate_regression(assessed, data.patients),
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
        **effort.rates(),
    }
    summary = without_nan(summary)
    text = json.dumps(summary, indent=2, allow_nan=False)
    temporary = out / ".summary.json"
    temporary.write_text(text + "\n")
    temporary.replace(out / "summary.json")
    return summary
