"""The predictions of all folds of a run for the same examples, and what they say together.

Risks of different folds come from different models and share no scale: averaged as they are, the fold whose risks
are spread widest would decide. So each is first put on the scale of the fold's own validated slides: minus their
mean, over their standard deviation. Probabilities share a scale and are averaged as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cftrain.config import RunConfig
from cftrain.data import RunData
from cftrain.examples import Example
from cftrain.extras import derive_missing
from cftrain.feed import Feed
from cftrain.loop import Task, predict
from cftrain.models import BagBatch, SurvivalOutput
from cftrain.order import ShardOrder, Visit, packed
from cftrain.prediction.trained import Member
from cftrain.ranks import ALONE
from cftrain.survival.curves import survival_at, survival_at_own_time

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]

RISK_RULE: Final = (
    "mean over folds of (risk - mean) / standard deviation, with mean and deviation of the slides that the fold was "
    "validated on: risks of different folds share no scale"
)
SURVIVAL_RULE: Final = "mean over folds of the probability to live longer"
_BATCH_PATCHES: Final = 8192
_STEP_MONTHS: Final = 6.0


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Predictions for N examples by M folds.

    Parameters
    ----------
    risk : [N]
        By `RISK_RULE`, higher = worse.
    member_risk : [N, M]
        Each fold's risk as it is.
    survival
        Of each fold [N, K]: survival after each of its bins; None where the model only ranks (Cox loss).
    edges
        Of each fold: the interior edges of its bins in months.
    """

    risk: Floats
    member_risk: Floats
    survival: tuple[Floats, ...] | None
    edges: tuple[tuple[float, ...], ...]

    @property
    def reach(self) -> float:
        """Months up to which every fold predicts survival; 0 where none does."""
        return min((own[-1] if own else 0.0) for own in self.edges) if self.survival else 0.0

    @property
    def months(self) -> Floats:
        """Where survival is written down: every 6 months as far as all folds reach, or that end where it is sooner."""
        if self.reach == 0:
            return np.zeros(0)
        n_steps = int(self.reach // _STEP_MONTHS)
        return np.array([_STEP_MONTHS * step for step in range(1, n_steps + 1)] or [self.reach])

    def survival_at(self, months: Floats, rows: Sequence[int] | None = None) -> Floats:
        """Mean over folds of survival at these months: [N or rows, T]; NaN beyond the end of a fold's curve."""
        own = slice(None) if rows is None else list(rows)
        found = [survival_at(each[own], edges, months) for each, edges in self._curves()]
        return np.asarray(np.mean(found, axis=0))

    def survival_at_own_time(self, time_months: Floats, rows: Sequence[int]) -> Floats:
        """The same at one month for each of these rows: [rows]."""
        found = [survival_at_own_time(each[list(rows)], edges, time_months) for each, edges in self._curves()]
        return np.asarray(np.mean(found, axis=0))

    def _curves(self) -> list[tuple[Floats, tuple[float, ...]]]:
        assert self.survival is not None  # noqa: S101 - asked for only then
        return list(zip(self.survival, self.edges, strict=True))


def compute(
    members: Sequence[Member], data: RunData, config: RunConfig, device: torch.device, progress: Progress
) -> list[Tensor]:
    """Logits of every example by every fold: M times [N, K] float64, in the order of `data.examples`.

    Each slide is read once, shard after shard, and shown to all models.

    Raises
    ------
    NonFiniteError
        A model predicts NaN or Inf; names the slide.
    """
    scales = members[0].model.scales
    models = [member.model.to(device) for member in members]
    visits = _visits(data)
    packs = packed(visits, _batch_patches(config, device))
    rows = {example.name: row for row, example in enumerate(data.examples)}
    logits = [torch.zeros(len(rows), config.n_outputs, dtype=torch.float64) for _ in models]
    done = 0
    extras = members[0].model.options.extras()
    derive_missing(data.store, data.cohort.encoder, extras, [slide.slide_id for slide in data.cohort.slides], progress)
    with Feed(data, scales, config.data, device, extras=extras).window(packs) as window:
        for pack in packs:
            bags = partial(_already, window.batch(pack, scales, extras))
            own = [rows[visit.example.name] for visit in pack]
            for model, found in zip(models, logits, strict=True):
                found[own] = predict(model, Task((pack,), (0,), (0,)), bags, config.n_outputs, ALONE)
            window.done(pack)
            done += sum(len(visit.example.slide_ids) for visit in pack)
            progress(done, len(data.cohort.slides))
    return logits


def _already(batch: BagBatch, visits: Sequence[Visit]) -> BagBatch:
    """The batch of a pack, packed once for all models."""
    return batch


def _visits(data: RunData) -> list[Visit]:
    """All examples, shard after shard, each shard from its beginning to its end."""
    listed = data.store.shard_order(data.cohort.encoder, [slide.slide_id for slide in data.cohort.slides])
    examples: Sequence[Example] = data.examples
    shard, within = ShardOrder(tuple(map(tuple, listed)), sequential=True).places(examples)
    order = np.argsort(shard, kind="stable") if within is None else np.lexsort((within, shard))
    return [Visit(examples[row], place) for place, row in enumerate(order.tolist())]


def _batch_patches(config: RunConfig, device: torch.device) -> int:
    """As in training, which needs more memory; on a CPU never what a GPU was given."""
    given = config.train.batch_patches or _BATCH_PATCHES
    return min(given, _BATCH_PATCHES) if device.type == "cpu" else given


def combine(members: Sequence[Member], logits: Sequence[Tensor], loss: str) -> Ensemble:
    """What the logits of all folds mean, alone and together."""
    edges = tuple(member.edges for member in members)
    if loss == "cox":
        risks, survival = [each[:, 0].numpy() for each in logits], None
    else:
        outputs = [SurvivalOutput.from_logits(each) for each in logits]
        risks = [output.risk.numpy() for output in outputs]
        survival = tuple(output.survival.numpy() for output in outputs)
    member_risk = np.stack(risks, axis=1)
    means = np.array([member.risk_mean for member in members])
    spreads = np.array([member.risk_sd for member in members])
    risk = ((member_risk - means) / spreads).mean(axis=1)
    return Ensemble(risk, member_risk, survival, edges)
