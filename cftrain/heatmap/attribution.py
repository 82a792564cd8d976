"""What moves the risk: a score for every patch from gradients, a second opinion beside attention.

Attention says where a model looks, not whether what it sees there raises or lowers the risk. Both methods here ask how
the risk answers to a patch's features x, and compare with the bag's mean patch m of that scale:

    gradient:    (x - m) · ∂risk/∂x                                          at the bag as it is
    integrated:  (x - m) · mean over t of ∂risk/∂x at m + t (x - m)          t from 0 to 1 for all patches at once

References: Sundararajan, Taly & Yan 2017, arXiv:1703.01365 (integrated gradients, and their completeness).

The mean patch stands for "nothing special here", zeros do not: no patch has zeros as its features, and those of ReLU
networks share a large part that is the same everywhere, of which each patch would otherwise get its portion. With the
mean, the parts that all patches share cancel, and a patch like the slide's others scores near 0.

Legend: N patches of one scale, D features, K time bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cftrain.errors import ConfigError, ShapeError
from cftrain.models import BagBatch, SurvivalModel, SurvivalOutput

RiskOf = Callable[[Tensor], Tensor]
"""Logits [1, K] to risk [1], higher = worse."""

_Rows = dict[int, Tensor]
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each patch of one bag raises (above 0) or lowers the risk, in units of the risk.

    Parameters
    ----------
    scores
        Scale to [N] float64 on the CPU, for the scales that the model reads.
    risk
        Of the bag.
    baseline_risk
        Of the bag whose patches are all the mean patch; None where the method does not ask.
    gap
        What the scores of all scales miss of risk - baseline_risk: the error of the integral. None without one.
    """

    scores: Mapping[int, Tensor]
    risk: float
    baseline_risk: float | None
    gap: float | None


def risk_of(loss: str) -> RiskOf:
    """What a model trained with this loss means by risk: "cox", its one logit; else minus the sum of survival."""
    return _log_hazard if loss == "cox" else _summed_survival


def _log_hazard(logits: Tensor) -> Tensor:
    return logits[:, 0]


def _summed_survival(logits: Tensor) -> Tensor:
    return SurvivalOutput.from_logits(logits).risk


def gradient(model: SurvivalModel, batch: BagBatch, risk: RiskOf) -> Attribution:
    """Gradient of the risk, times each patch's difference from the mean patch: one forward and backward pass.

    Parameters
    ----------
    model
        Asked in evaluation mode; its parameters collect no gradients, and it is left as it was. Best asked outside
        autocast: bfloat16 leaves two digits of a gradient.
    batch
        One bag, on the model's device.
    risk
        As `risk_of` gives it; its logits are float64.

    Raises
    ------
    ShapeError
        The batch has several bags, or is none of the model's.
    MissingScaleError
        The batch lacks one of the model's scales.
    """
    rows = _rows(model, batch)
    with _frozen(model):
        found, gradients = _gradients(model, batch, rows, risk)
    scores = {scale: _products(gradients[scale], rows[scale], _mean(rows[scale])) for scale in rows}
    return Attribution(scores, found, None, None)


def integrated(model: SurvivalModel, batch: BagBatch, risk: RiskOf, steps: int = 16) -> Attribution:
    """Integrated gradients from the bag of mean patches, by the midpoint rule.

    The scores of all scales together add up to risk - baseline_risk, up to `gap`. Memory is that of one step.

    Parameters
    ----------
    model, batch, risk
        As for `gradient`.
    steps
        Points on the line, one forward and backward pass each. `gap` falls with the square of their number,
        in models with ReLUs, which bend, more slowly.

    Raises
    ------
    ConfigError
        Fewer than one step.
    ShapeError
        The batch has several bags, or is none of the model's.
    MissingScaleError
        The batch lacks one of the model's scales.
    """
    if steps < 1:
        raise ConfigError(f"integrated gradients need at least 1 step, got {steps}")
    rows = _rows(model, batch)
    means = {scale: _mean(own) for scale, own in rows.items()}
    scores = {scale: torch.zeros(len(own), dtype=torch.float64) for scale, own in rows.items()}
    with _frozen(model):
        found, baseline = (
            _risk(model, batch, at, risk) for at in (rows, {scale: _between(means, rows, scale, 0.0) for scale in rows})
        )
        for step in range(steps):
            at = {scale: _between(means, rows, scale, (step + 0.5) / steps) for scale in rows}
            _, gradients = _gradients(model, batch, at, risk)
            for scale, own in gradients.items():
                scores[scale] += _products(own, rows[scale], means[scale]) / steps
    gap = found - baseline - float(sum(own.sum() for own in scores.values()))
    return Attribution(scores, found, baseline, gap)


def _rows(model: SurvivalModel, batch: BagBatch) -> _Rows:
    """The features of one bag in the precision of the model's parameters, float32 as a rule."""
    if len(batch) != 1:
        raise ShapeError(f"attribution is for one bag at a time, got {len(batch)}: {', '.join(batch.slide_ids[:3])}")
    return {scale: model.rows(batch, scale).detach() for scale in model.scales}


@contextmanager
def _frozen(model: SurvivalModel) -> Iterator[None]:
    """Evaluation mode, with parameters that need no gradients: a backward pass then makes none of theirs."""
    collecting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in collecting:
        parameter.requires_grad_(False)
    try:
        with model.evaluating():
            yield
    finally:
        for parameter in collecting:
            parameter.requires_grad_(True)


def _risk(model: SurvivalModel, batch: BagBatch, rows: _Rows, risk: RiskOf) -> float:
    with torch.no_grad():
        return float(_risk_at(model, batch, rows, risk))


def _gradients(model: SurvivalModel, batch: BagBatch, rows: _Rows, risk: RiskOf) -> tuple[float, _Rows]:
    """The risk, and its gradient with respect to every row; the graph is gone afterwards."""
    with torch.enable_grad():
        leaves = {scale: own.detach().requires_grad_() for scale, own in rows.items()}
        found = _risk_at(model, batch, leaves, risk)
        gradients = torch.autograd.grad(found, list(leaves.values()))
    return float(found.detach()), dict(zip(leaves, gradients, strict=True))


def _risk_at(model: SurvivalModel, batch: BagBatch, rows: _Rows, risk: RiskOf) -> Tensor:
    features = {**batch.features, **rows}  # of all scales: extras may name rows of one that the model does not read
    return risk(model.logits(replace(batch, features=features)).cpu().double())[0]


def _mean(rows: Tensor) -> Tensor:
    return rows.mean(dim=0, keepdim=True)


def _between(means: _Rows, rows: _Rows, scale: int, t: float) -> Tensor:
    """All patches a part t of the way from the mean patch to themselves: [N, D]."""
    return torch.lerp(means[scale], rows[scale], t)


def _products(gradients: Tensor, rows: Tensor, mean: Tensor) -> Tensor:
    """Σ over D of gradient · (x - m), block by block: no second [N, D] is made. [N] float64."""
    blocks = zip(torch.split(gradients, _BLOCK), torch.split(rows, _BLOCK), strict=True)
    return torch.cat([(own * (x - mean)).sum(dim=1, dtype=torch.float64) for own, x in blocks]).cpu()
