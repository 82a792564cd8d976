"""`predict_run`: a trained run applied to a store, and what comes of it written down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cftrain.config import to_toml
from cftrain.device import choose_device
from cftrain.prediction.ensemble import RISK_RULE, SURVIVAL_RULE, combine, compute
from cftrain.prediction.measures import measure
from cftrain.prediction.slides import Target, find_target
from cftrain.prediction.trained import TrainedRun, Weights, read_trained
from cftrain.prediction.writing import check_new, table, write
from cftrain.provenance import collect
from cftrain.results import without_nan
from cftrain.run_directory import stored_provenance

_OF_TRAINING = (
    "started",
    "store",
    "store_uuid",
    "shards",
    "data_digest",
    "splits_digest",
    "config_digest",
    "git_commit",
)


@dataclass(frozen=True)
class PredictionWatcher:
    """What the caller wants to hear: what is applied to what, before it is; and slides done, of how many."""

    on_target: Callable[[TrainedRun, Target], None] = lambda trained, target: None
    on_slides: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class FinishedPrediction:
    """Where predictions were written, and their prediction.json."""

    path: Path
    summary: Mapping[str, Any]


def predict_run(
    run: Path,
    store: Path | str | None,
    out: Path | None = None,
    *,
    cohort: str | None = None,
    where: str | None = None,
    encoder: str | None = None,
    shards: str | None = None,
    weights: Weights = "last",
    device: str = "auto",
    allow_training_patients: bool = False,
    replicates: int = 1000,
    seed: int = 0,
    command: Sequence[str] = (),
    watch: PredictionWatcher | None = None,
) -> FinishedPrediction:
    """Apply all folds of a finished run to other slides, and write predictions.parquet and prediction.json.

    Slides need no label; where there are some, C-indices and calibration are in the summary.

    Parameters
    ----------
    run
        A directory that `cftrain run` wrote.
    store, shards
        The slides: a store, or tars in its place.
    out
        A new directory; None: RUN/predictions/STORE-COHORT, with -best for weights of best epochs.
    cohort, where
        Which slides: of a cohort (may be left out where there is one), and those that meet an SQL condition.
    encoder
        Its features; None: the run's encoder, by name.
    weights
        Those of each fold's last epoch, or of its best one.
    device
        "auto", "cpu", "cuda", "cuda:1".
    allow_training_patients
        Predict patients that the run was trained on; the summary says so.
    replicates, seed
        Of the resamples behind the intervals.
    command
        Kept in the summary.
    watch
        What to call on the way.

    Raises
    ------
    RunError
        `run` is not finished or cannot be read, or `out` exists or cannot be written.
    WeightsError
        Weights of the run cannot be read.
    ConfigError, MissingScaleError, ShapeError, StoreError
        The store has no such slides, or not with the features that the models read.
    LeakageError
        Patients are among those that the run was trained on.
    NonFiniteError
        A model predicts NaN or Inf; names the slide.
    """
    started, watch = time.monotonic(), watch or PredictionWatcher()
    chosen = choose_device(device)
    trained = read_trained(run, weights)
    target = find_target(
        trained,
        store,
        cohort=cohort,
        where=where,
        encoder=encoder,
        shards=shards,
        allow_training_patients=allow_training_patients,
    )
    out = out or _default_directory(trained, target, weights)
    check_new(out)
    watch.on_target(trained, target)
    of_target = dataclasses.replace(trained.config.data, where=where or "", shards=shards or "")
    config = dataclasses.replace(trained.config, data=of_target)
    provenance = collect(target.data, config, chosen, command, to_toml(trained.config))
    logits = compute(trained.members, target.data, config, chosen, watch.on_slides)
    ensemble = combine(trained.members, logits, config.train.loss)
    found = None
    if target.labelled:
        examples = target.labelled_examples
        found = measure(examples, target.labelled, ensemble, replicates=replicates, seed=seed)
    summary = without_nan(
        {
            **_applied(trained, target, weights),
            **_measured(trained, found, replicates, seed),
            "survival_months": ensemble.months.tolist(),
            "seconds": time.monotonic() - started,
            "provenance": _provenance(trained, provenance),
        }
    )
    write(out, table(target, trained, ensemble), summary)
    return FinishedPrediction(out, summary)


def _default_directory(trained: TrainedRun, target: Target, weights: Weights) -> Path:
    data = target.data
    where = Path(target.source).parent if target.of_tars else Path(target.source)
    of_best = "-best" if weights == "best" else ""
    return trained.path / "predictions" / f"{where.resolve().name}-{data.cohort.name}{of_best}"


def _applied(trained: TrainedRun, target: Target, weights: Weights) -> dict[str, Any]:
    """What was applied to what."""
    data, of_run = target.data, trained.summary
    cohort, excluded = data.cohort, data.excluded
    own = {slide: patient for slide, patient in target.patients.items() if patient is not None}
    labelled = {each.patient_id: each.event for each in target.labelled_examples}
    return {
        "run": str(trained.path),
        "model": of_run["model"],
        "weights": f"{weights} epoch",
        "rule": trained.rule,
        "trained_on": {key: of_run.get(key) for key in ("cohort", "where", "encoder", "n_slides", "n_patients")},
        "loss": trained.config.train.loss,
        "unit": trained.config.data.unit,
        "cohort": cohort.name,
        "where": target.where,
        "source": target.source,
        "encoder": cohort.encoder,
        "encoder_is_the_runs": cohort.encoder == trained.encoder,
        "feature_dim": cohort.dim,
        "scales": list(trained.scales),
        "synthetic": bool(of_run.get("synthetic")) or any(row.get("synthetic") for row in data.patients.values()),
        "n_slides": len(cohort.slides),
        "n_patients": len(set(own.values())),
        "n_slides_of_unknown_patients": len(cohort.slides) - len(own),
        "n_labelled_slides": sum(len(each.slide_ids) for each in target.labelled_examples),
        "n_labelled_patients": len(labelled),
        "n_events": sum(labelled.values()),
        "excluded": {reason: len(ids) for reason, ids in excluded.items()},
        "excluded_slides": {reason: list(ids) for reason, ids in excluded.items()},
        "n_training_patients": len(target.known),
        "training_patients": list(target.known),
        "risk": RISK_RULE,
        "survival": SURVIVAL_RULE if trained.config.train.loss != "cox" else None,
    }


def _measured(trained: TrainedRun, found: Mapping[str, Any] | None, replicates: int, seed: int) -> dict[str, Any]:
    """What labels say, nothing but None without any; and a row for each fold."""
    of_members = found["members"] if found else [None] * len(trained.members)
    folds = [
        {
            "fold": member.fold,
            "c_index_patient": value,
            "risk_mean": member.risk_mean,
            "risk_sd": member.risk_sd,
            "n_risks": member.n_risks,
            "bin_edges": list(member.edges),
            "weights": str(member.weights.relative_to(trained.path)),
            "digest": member.digest,
        }
        for member, value in zip(trained.members, of_members, strict=True)
    ]
    unknown = {"value": None, "lower": None, "upper": None}
    of_labels = {name: found[name] if found else unknown for name in ("c_index", "c_index_patient")}
    of_labels |= {name: found[name] if found else None for name in ("log_rank", "brier", "calibration")}
    return {**of_labels, "replicates": replicates, "seed": seed, "folds": folds}


def _provenance(trained: TrainedRun, own: Mapping[str, Any]) -> dict[str, Any]:
    """Of the prediction, and what matters of the run's."""
    of_run = stored_provenance(trained.path)
    kept = {key: value for key, value in own.items() if not key.startswith("splits")}
    return {**kept, "run": {key: of_run[key] for key in _OF_TRAINING if key in of_run}}
