"""Two functions: train one epoch, evaluate. No trainer object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfstore import CohortSlide
from cftrain.config import TrainConfig
from cftrain.errors import NonFiniteError
from cftrain.feed import Feed
from cftrain.models import SurvivalModel
from cftrain.order import packed, training_batches
from cftrain.survival import TimeBins, nll_survival


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions for N slides: risk [N], survival [N, K], and the mean loss (alpha 0)."""

    risk: NDArray[np.float64]
    survival: NDArray[np.float64]
    loss: float


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Rate of epoch 0, 1, ...: a cosine between learning_rate and its final fraction.

    With `cosine_epochs` below the number of epochs it falls and rises again, as the released
    code's CosineAnnealingLR does.
    """
    half = config.cosine_epochs or config.epochs
    lowest = config.learning_rate * config.final_learning_rate
    return lowest + (config.learning_rate - lowest) * (1 + math.cos(math.pi * epoch / half)) / 2


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 on a GPU (no loss scaling needed), float32 elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def _labels(slides: Sequence[CohortSlide], bins: TimeBins, device: torch.device) -> tuple[Tensor, Tensor]:
    time_bin = bins.assign(np.array([slide.time_months for slide in slides]))
    event = torch.tensor([slide.event for slide in slides], device=device)
    return torch.from_numpy(time_bin).to(device), event


def train_epoch(
    model: SurvivalModel,
    optimizer: torch.optim.Optimizer,
    feed: Feed,
    slides: Sequence[CohortSlide],
    bins: TimeBins,
    config: TrainConfig,
    *,
    first_step: int = 0,
) -> float:
    """One pass over `slides` in the given order; returns the mean loss.

    Every `accumulate` slides make one step on their mean loss; what is left over at the end
    makes a step of its own. From `first_step` on an epoch goes as if the steps before it had been
    made here; the loss is the mean of what was done here.

    Raises
    ------
    NonFiniteError
        The loss of a batch is NaN or Inf; names its slides.
    """
    model.train()
    total = 0.0
    plan = training_batches(slides, config.accumulate, config.batch_patches, first_step=first_step)
    batches = feed.batches([batch.slides for batch in plan])
    for (bags, group), batch in zip(batches, plan, strict=True):
        time_bin, event = _labels(group, bins, feed.device)
        with _autocast(feed.device):
            logits = model(bags).logits
        loss = nll_survival(logits, time_bin, event, alpha=config.alpha, reduction="sum")
        value = float(loss.detach())
        if not math.isfinite(value):
            named = ", ".join(slide.slide_id for slide in group[:5])
            message = f"loss is {value} on slides {named}; lower train.learning_rate, or look at their features"
            raise NonFiniteError(message)
        torch.autograd.backward(loss / batch.step_size)
        total += value
        if batch.last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return total / sum(len(batch.slides) for batch in plan)


@torch.no_grad()
def evaluate(
    model: SurvivalModel, feed: Feed, slides: Sequence[CohortSlide], bins: TimeBins, batch_patches: int
) -> Evaluation:
    """Risk and survival of every slide, in order; dropout is off.

    Raises
    ------
    NonFiniteError
        A prediction is NaN or Inf; names the slide.
    """
    model.eval()
    risk, survival, loss = [], [], 0.0
    for bags, group in feed.batches(packed(slides, batch_patches)):
        time_bin, event = _labels(group, bins, feed.device)
        with _autocast(feed.device):
            output = model(bags)
        loss += float(nll_survival(output.logits, time_bin, event, reduction="sum"))
        risk.append(output.risk.double().cpu().numpy())
        survival.append(output.survival.double().cpu().numpy())
    found = Evaluation(np.concatenate(risk), np.concatenate(survival), loss / len(slides))
    bad = np.flatnonzero(~np.isfinite(found.risk))
    if len(bad):
        message = f"slide {slides[bad[0]].slide_id}: the predicted risk is {found.risk[bad[0]]}"
        raise NonFiniteError(message)
    return found
