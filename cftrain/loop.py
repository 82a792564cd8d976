"""Two functions: make an optimiser step, predict. No trainer object.

A step is the mean loss of its visits over all processes. Each forward pass draws its dropout masks from a seed of
its own, and gradients of several passes are added in float64: so the weights after a step are the same, to
the last rounding, for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cftrain.config import TrainConfig
from cftrain.errors import NonFiniteError
from cftrain.models import BagBatch, SurvivalModel
from cftrain.order import Visit
from cftrain.ranks import Ranks
from cftrain.survival import TimeBins
from cftrain.survival.losses import ce_survival, cox_loss, nll_survival

Bags = Callable[[Sequence[Visit]], BagBatch]
"""The batch of a pack, on the device of the model."""
_Parts = tuple[tuple[float, Tensor], ...]
"""What `SurvivalModel.training_logits` gives: weights and logits [B, K]."""


@dataclass(frozen=True)
class Task:
    """Some packs of a step, for one process: the step's visits are those of `packs`, this process does `own`.

    Parameters
    ----------
    seeds
        One for each pack.
    """

    packs: tuple[tuple[Visit, ...], ...]
    own: tuple[int, ...]
    seeds: tuple[int, ...]

    @property
    def visits(self) -> list[Visit]:
        """All visits of the step."""
        return [visit for pack in self.packs for visit in pack]

    def slices(self) -> list[slice]:
        """Where the visits of each pack are among all."""
        ends = np.cumsum([len(pack) for pack in self.packs]).tolist()
        return [slice(end - len(pack), end) for end, pack in zip(ends, self.packs, strict=True)]


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Rate of epoch 0, 1, ...: a cosine between learning_rate and its final fraction.

    With `cosine_epochs` below the number of epochs it falls and rises again, as the released
    code's CosineAnnealingLR does.
    """
    half = config.cosine_epochs or config.epochs
    lowest = config.learning_rate * config.final_learning_rate
    return lowest + (config.learning_rate - lowest) * (1 + math.cos(math.pi * epoch / half)) / 2


def train_step(
    model: SurvivalModel,
    optimizer: torch.optim.Optimizer,
    task: Task,
    bags: Bags,
    bins: TimeBins,
    config: TrainConfig,
    ranks: Ranks,
) -> float:
    """Make one optimiser step; returns the sum of the losses of all its visits (of its events with "cox").

    Raises
    ------
    NonFiniteError
        A loss or a gradient is NaN or Inf; names the slides, and leaves the weights as they were.
    """
    model.train()
    device = model.device
    labels = _Labels.of(task.visits, bins, device)
    slices = task.slices()
    losses = torch.zeros(len(task.visits), device=device)
    factors = _cox_factors(model, task, bags, labels, losses, ranks) if config.loss == "cox" else None
    gradients = _Gradients(model, alone=ranks.world == 1 and len(task.packs) == 1)
    for index in task.own:
        parts = _parts(model, bags(task.packs[index]), task.seeds[index])
        rows = slices[index]
        if factors is None:
            each = _losses(parts, labels, rows, config)
            losses[rows] = each.detach()
            torch.autograd.backward(each.sum() / len(task.visits))
        else:
            along = zip(parts, factors, strict=True)
            torch.autograd.backward([(logits.float()[:, 0] * of[rows]).sum() for (_, logits), of in along])
        gradients.add()
    if factors is None:
        ranks.sum_(losses)
    norm = gradients.collect(ranks)
    total, size = (float(each) for each in torch.stack([losses.double().sum(), norm]).tolist())
    if not (math.isfinite(total) and math.isfinite(size)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(_found(model, task, bags, losses, labels, config, ranks))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def predict(model: SurvivalModel, task: Task, bags: Bags, n_outputs: int, ranks: Ranks) -> Tensor:
    """Logits of all visits, in order: [visits, K] float64 on the CPU; dropout is off.

    Raises
    ------
    NonFiniteError
        A logit is NaN or Inf; names the slide.
    """
    model.eval()
    device = model.device
    logits = torch.zeros(len(task.visits), n_outputs, dtype=torch.float64, device=device)
    slices = task.slices()
    for index in task.own:
        with autocast(device):
            logits[slices[index]] = model(bags(task.packs[index])).logits.double()
    ranks.sum_(logits)
    found = logits.cpu()
    bad = torch.nonzero(~torch.isfinite(found).all(dim=1)).flatten().tolist()
    if bad:
        name = task.visits[bad[0]].example.name
        message = f"slide {name}: the model predicts NaN or Inf; look at its features, or lower train.learning_rate"
        raise NonFiniteError(message)
    return found


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 on a GPU (no loss scaling needed), float32 elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True, eq=False)
class _Labels:
    """Labels of the visits of a step, on the device."""

    time_bin: Tensor
    event: Tensor
    time_months: Tensor

    @classmethod
    def of(cls, visits: Sequence[Visit], bins: TimeBins, device: torch.device) -> _Labels:
        months = np.array([visit.example.time_months for visit in visits])
        event = torch.tensor([visit.example.event for visit in visits], device=device)
        return cls(torch.from_numpy(bins.assign(months)).to(device), event, torch.from_numpy(months).to(device))


def _parts(model: SurvivalModel, batch: BagBatch, seed: int) -> _Parts:
    """Logits with the dropout masks of that seed."""
    torch.manual_seed(seed)
    with autocast(model.device):
        return model.training_logits(batch)


def _losses(parts: _Parts, labels: _Labels, rows: slice, config: TrainConfig) -> Tensor:
    """One for each visit, in nats: [B]."""
    loss = ce_survival if config.loss == "ce" else nll_survival
    time_bin, event = labels.time_bin[rows], labels.event[rows]
    return _weighted((w, loss(logits, time_bin, event, alpha=config.alpha, reduction="none")) for w, logits in parts)


def _weighted(parts: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The weighted sum; nothing is computed where there is one part of weight 1."""
    total, *others = (each if weight == 1 else weight * each for weight, each in parts)
    for other in others:
        total = total + other
    return total


def _cox_factors(model: SurvivalModel, task: Task, bags: Bags, labels: _Labels, losses: Tensor, ranks: Ranks) -> Tensor:
    """The gradient of the step's weighted partial likelihoods by each visit's log hazards: [parts, visits].

    The likelihood compares all slides of the step, which need not fit in one forward pass, or one process: the
    log hazards are computed first, and each pass is made again for its backward, with the same dropout masks.
    """
    own: dict[int, Tensor] = {}
    weights: tuple[float, ...] = ()
    with torch.no_grad():
        for index in task.own:
            parts = _parts(model, bags(task.packs[index]), task.seeds[index])
            weights = tuple(weight for weight, _ in parts)
            own[index] = torch.stack([logits[:, 0].float() for _, logits in parts])
    weights = next(filter(None, ranks.gather(weights)))  # a process without a pack of the step has seen none
    log_hazard = torch.zeros(len(weights), len(task.visits), dtype=torch.float32, device=losses.device)
    slices = task.slices()
    for index, found in own.items():
        log_hazard[:, slices[index]] = found
    ranks.sum_(log_hazard)
    log_hazard.requires_grad_()
    each = (cox_loss(x, labels.time_months, labels.event, reduction="mean") for x in log_hazard)
    loss = _weighted(zip(weights, each, strict=True))
    torch.autograd.backward(loss)
    factors = log_hazard.grad
    assert factors is not None  # noqa: S101 - it is a leaf
    bad = ~torch.isfinite(log_hazard.detach()).all(dim=0)
    losses.masked_fill_(bad, math.nan)
    losses[0] += torch.where(bad.any(), 0.0, loss.detach() * len(task.visits))
    return factors


class _Gradients:
    """The sum over forward passes and processes, in float64; `alone` where there is one of each, and none is needed."""

    def __init__(self, model: SurvivalModel, *, alone: bool) -> None:
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._sum: Tensor | None = None
        if not alone:
            n = sum(weight.numel() for weight in self._weights)
            self._sum = torch.zeros(n, dtype=torch.float64, device=self._weights[0].device)

    def add(self) -> None:
        """Take the gradients of one backward pass."""
        if self._sum is None:
            return
        for weight, part in zip(self._weights, self._parts(), strict=True):
            if weight.grad is not None:
                part.add_(weight.grad)
                weight.grad = None

    def collect(self, ranks: Ranks) -> Tensor:
        """Give the weights their gradients; returns the norm of all, a float64 scalar."""
        if self._sum is not None:
            ranks.sum_(self._sum)
            for weight, part in zip(self._weights, self._parts(), strict=True):
                weight.grad = part.to(weight.dtype)
            norm: Tensor = torch.linalg.vector_norm(self._sum)
            return norm
        grads = [weight.grad for weight in self._weights if weight.grad is not None]
        return torch.nn.utils.get_total_norm(grads).double()

    def _parts(self) -> Sequence[Tensor]:
        assert self._sum is not None  # noqa: S101 - asked for only then
        sizes = [weight.numel() for weight in self._weights]
        return [part.view_as(weight) for part, weight in zip(torch.split(self._sum, sizes), self._weights, strict=True)]


def _found(
    model: SurvivalModel,
    task: Task,
    bags: Bags,
    losses: Tensor,
    labels: _Labels,
    config: TrainConfig,
    ranks: Ranks,
) -> str:
    """What was not finite, and for which slides: each is tried alone, with the weights of the step."""
    names = [visit.example.name for visit in task.visits]
    bad = [name for name, fine in zip(names, torch.isfinite(losses).tolist(), strict=True) if not fine]
    what = "loss"
    if not bad:
        own = [place for index in task.own for place in _alone(model, task, bags, labels, config, index)]
        bad = [names[place] for places in ranks.gather(own) for place in places]
        what = "gradient"
    listed = ", ".join(dict.fromkeys(bad or names))
    return f"the {what} is NaN or Inf on slides {listed}; look at their features, or lower train.learning_rate"


def _alone(model: SurvivalModel, task: Task, bags: Bags, labels: _Labels, config: TrainConfig, index: int) -> list[int]:
    """The visits of a pack, by their place in the step, whose own loss or gradient is not finite."""
    found = []
    rows = task.slices()[index]
    for at, visit in enumerate(task.packs[index]):
        place = rows.start + at
        parts = _parts(model, bags((visit,)), task.seeds[index])
        if config.loss == "cox":
            value = _weighted((weight, logits.float().sum()) for weight, logits in parts)
        else:
            value = _losses(parts, labels, slice(place, place + 1), config).sum()
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(grads) + value.detach()):
            found.append(place)
    model.zero_grad(set_to_none=True)
    return found
