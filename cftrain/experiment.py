"""Cross-validation: every fold trained and evaluated, one run directory written.

Both selection rules are recorded for every fold: the last epoch of a schedule that was fixed
beforehand (honest), and the epoch that scored best on the very fold that is reported (the
paper's rule, which even random predictions pass with flattering numbers).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfstore import CohortSlide
from cftrain.checkpoints import save_weights
from cftrain.config import RunConfig, to_toml
from cftrain.data import Feed, RunData, load_data
from cftrain.errors import ConfigError, RunError
from cftrain.folds import FoldSlides
from cftrain.loop import Evaluation, evaluate, learning_rate, train_epoch
from cftrain.models import SurvivalModel, build
from cftrain.provenance import collect
from cftrain.results import Epoch, FoldResult, scores, without_nan, write_predictions, write_summary
from cftrain.survival import TimeBins, class_weights, epoch_order, fit_bins


@dataclass(frozen=True)
class Watcher:
    """What the caller wants to hear while a run goes on; all may stay silent."""

    on_data: Callable[[RunData, int], None] = lambda data, n_parameters: None
    on_epoch: Callable[[FoldSlides, Epoch], None] = lambda fold, epoch: None
    on_fold: Callable[[FoldResult], None] = lambda result: None


@dataclass(frozen=True)
class FinishedRun:
    """Where a run was written, and its summary.json."""

    path: Path
    summary: Mapping[str, Any]


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one.

    Raises
    ------
    ConfigError
        No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"--device {name}: not available here ({str(error).splitlines()[0]}); use cpu, cuda or auto"
        raise ConfigError(message) from error
    return device


def cross_validate(
    config: RunConfig, store: Path, out: Path, *, device: str = "auto", command: Sequence[str] = (), watch: Watcher
) -> FinishedRun:
    """Train and evaluate every fold and write the run directory `out`.

    Raises
    ------
    RunError
        `out` holds files already.
    ConfigError, MissingScaleError, LeakageError, StoreError
        The data do not allow this run; raised before any feature is read.
    NonFiniteError
        Training diverged; names the slides.
    """
    chosen = choose_device(device)
    scales = _model(config, feature_dim=2).scales
    data = load_data(store, config.data, config.model.name, scales, config.train.seed)
    toml = to_toml(config)
    _begin(out, toml, collect(data, chosen, command, toml))
    feed = Feed(data, scales, config.data, chosen)
    n_parameters = sum(weight.numel() for weight in _model(config, data.cohort.dim).parameters())
    watch.on_data(data, n_parameters)
    started = time.perf_counter()
    results = []
    for fold in data.folds:
        result = _train_fold(config, data, feed, fold, out / f"fold_{fold.number}", watch)
        results.append(result)
        watch.on_fold(result)
    seconds = time.perf_counter() - started
    write_predictions(out, results)
    summary = write_summary(out, config, data, feed, results, seconds, n_parameters)
    return FinishedRun(out, summary)


def _model(config: RunConfig, feature_dim: int) -> SurvivalModel:
    return build(config.model.name, feature_dim, **{**config.model.options, "n_bins": config.bins.count})


def _begin(out: Path, toml: str, provenance: Mapping[str, Any]) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        message = f"{out}: holds files already; name another run directory with --out"
        raise RunError(message)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.toml").write_text(toml)
        (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    except OSError as error:
        message = f"{out}: cannot write the run directory ({error.strerror})"
        raise RunError(message) from error


def _fit_bins(config: RunConfig, data: RunData, fold: FoldSlides) -> TimeBins:
    """Bins from the patients of the training fold, or as the paper's code: from all slides of the cohort."""
    if config.bins.fitted_on == "train":
        labels = list({slide.patient_id: (slide.time_months, slide.event) for slide in fold.train}.values())
    else:
        labels = [(slide.time_months, slide.event) for slide in data.cohort.slides]
    times = np.array([months for months, _ in labels])
    return fit_bins(times, np.array([event for _, event in labels]), config.bins.count)


def _order(config: RunConfig, fold: FoldSlides, weights: Any, epoch: int) -> list[CohortSlide]:
    order = epoch_order(len(fold.train), weights=weights, seed=config.train.seed, epoch=epoch, fold=fold.number)
    return [fold.train[i] for i in order]


def _weights(config: RunConfig, fold: FoldSlides, bins: TimeBins) -> Any:
    if config.train.sampling == "uniform":
        return None
    time_bin = bins.assign(np.array([slide.time_months for slide in fold.train]))
    return class_weights(time_bin, np.array([slide.event for slide in fold.train]))


def _selectable(epoch: Epoch, best: Epoch | None, select_from: int, epochs: int) -> bool:
    """Whether `epoch` is the best so far, among those that may be selected."""
    if epoch.epoch < min(select_from, epochs):
        return False
    return best is None or (math.isfinite(epoch.c_index) and not epoch.c_index <= best.c_index)


def _train_fold(
    config: RunConfig, data: RunData, feed: Feed, fold: FoldSlides, out: Path, watch: Watcher
) -> FoldResult:
    out.mkdir()
    started, waited = time.perf_counter(), feed.wait_seconds
    torch.manual_seed(config.train.seed * 1000 + fold.number)
    bins = _fit_bins(config, data, fold)
    weights = _weights(config, fold, bins)
    model = _model(config, data.cohort.dim).to(feed.device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay
    )
    epochs: list[Epoch] = []
    best: Epoch | None = None
    prediction = best_prediction = None
    with (out / "metrics.jsonl").open("w") as log:
        for number in range(config.train.epochs):
            rate = learning_rate(config.train, number)
            for group in optimizer.param_groups:
                group["lr"] = rate
            order = _order(config, fold, weights, number)
            epoch, prediction = _run_epoch(config, feed, fold, model, optimizer, bins, order, number + 1)
            epochs.append(epoch)
            log.write(json.dumps(without_nan(asdict(epoch))) + "\n")
            log.flush()
            watch.on_epoch(fold, epoch)
            if _selectable(epoch, best, config.train.select_from, config.train.epochs):
                best, best_prediction = epoch, prediction
                save_weights(model, out / "best_epoch.safetensors", epoch=str(epoch.epoch))
            if config.train.patience and best and epoch.epoch - best.epoch >= config.train.patience:
                break
    assert best is not None and prediction is not None and best_prediction is not None  # noqa: S101, PT018 - at least one epoch ran
    save_weights(model, out / "last_epoch.safetensors", epoch=str(epochs[-1].epoch))
    return FoldResult(
        slides=fold,
        bins=bins,
        epochs=tuple(epochs),
        best=best.epoch - 1,
        last_prediction=prediction,
        best_prediction=best_prediction,
        seconds=time.perf_counter() - started,
        wait_seconds=feed.wait_seconds - waited,
    )


def _run_epoch(
    config: RunConfig,
    feed: Feed,
    fold: FoldSlides,
    model: SurvivalModel,
    optimizer: torch.optim.Optimizer,
    bins: TimeBins,
    order: Sequence[CohortSlide],
    number: int,
) -> tuple[Epoch, Evaluation]:
    started = time.perf_counter()
    train_loss = train_epoch(model, optimizer, feed, order, bins, config.train)
    prediction = evaluate(model, feed, fold.val, bins, config.train.batch_patches)
    per_slide, per_patient = scores(fold.val, prediction.risk)
    epoch = Epoch(
        epoch=number,
        train_loss=train_loss,
        val_loss=prediction.loss,
        c_index=per_slide,
        c_index_patient=per_patient,
        lr=optimizer.param_groups[0]["lr"],
        seconds=time.perf_counter() - started,
    )
    return epoch, prediction
