"""One fold, from fresh weights to predictions under both selection rules."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cfstore import CohortSlide
from cftrain.checkpoints import save_weights
from cftrain.config import RunConfig
from cftrain.data import RunData
from cftrain.feed import Feed
from cftrain.folds import FoldSlides
from cftrain.loop import Evaluation, evaluate, learning_rate, train_epoch
from cftrain.models import SurvivalModel, build
from cftrain.order import LoaderState, epoch_slides
from cftrain.results import Epoch, FoldResult, scores, without_nan
from cftrain.survival import TimeBins, class_weights, fit_bins


def make_model(config: RunConfig, feature_dim: int) -> SurvivalModel:
    """The configured model with fresh weights."""
    return build(config.model.name, feature_dim, **{**config.model.options, "n_bins": config.bins.count})


def _fit_bins(config: RunConfig, data: RunData, fold: FoldSlides) -> TimeBins:
    """Bins from the patients of the training fold, or as the paper's code: from all slides of the cohort."""
    if config.bins.fitted_on == "train":
        labels = list({slide.patient_id: (slide.time_months, slide.event) for slide in fold.train}.values())
    else:
        labels = [(slide.time_months, slide.event) for slide in data.cohort.slides]
    times = np.array([months for months, _ in labels])
    return fit_bins(times, np.array([event for _, event in labels]), config.bins.count)


def _weights(config: RunConfig, fold: FoldSlides, bins: TimeBins) -> NDArray[np.float64] | None:
    if config.train.sampling == "uniform":
        return None
    time_bin = bins.assign(np.array([slide.time_months for slide in fold.train]))
    return class_weights(time_bin, np.array([slide.event for slide in fold.train]))


def _selectable(epoch: Epoch, best: Epoch | None, select_from: int, epochs: int) -> bool:
    """Whether `epoch` is the best so far, among those that may be selected."""
    if epoch.epoch < min(select_from, epochs):
        return False
    return best is None or (math.isfinite(epoch.c_index) and not epoch.c_index <= best.c_index)


def train_fold(
    config: RunConfig,
    data: RunData,
    feed: Feed,
    fold: FoldSlides,
    out: Path,
    on_epoch: Callable[[FoldSlides, Epoch], None],
) -> FoldResult:
    """Train and evaluate one fold; writes its metrics.jsonl and weights into `out`.

    Raises
    ------
    NonFiniteError
        Training diverged; names the slides.
    """
    out.mkdir()
    started, before = time.perf_counter(), feed.work
    torch.manual_seed(config.train.seed * 1000 + fold.number)
    bins = _fit_bins(config, data, fold)
    weights = _weights(config, fold, bins)
    model = make_model(config, data.cohort.dim).to(feed.device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
    )
    epochs: list[Epoch] = []
    best: Epoch | None = None
    prediction = best_prediction = None
    with (out / "metrics.jsonl").open("w") as log:
        for number in range(config.train.epochs):
            rate = learning_rate(config.train, number)
            for group in optimizer.param_groups:
                group["lr"] = rate
            order = epoch_slides(LoaderState(config.train.seed, number), fold, weights, data.order)
            epoch, prediction = _run_epoch(config, feed, fold, model, optimizer, bins, order, number + 1)
            epochs.append(epoch)
            log.write(json.dumps(without_nan(asdict(epoch))) + "\n")
            log.flush()
            on_epoch(fold, epoch)
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
        work=feed.work.since(before),
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
