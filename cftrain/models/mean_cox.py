"""Mean pooling and Cox regression: what every model that looks at single patches must beat.

Reference: Cox 1972, doi:10.1111/j.2517-6161.1972.tb00899.x, with the ridge penalty and the baseline hazard (Breslow)
of lifelines' CoxPHFitter. Nothing is learnt by gradient: `fit` is all the training there is.

    z = (mean over the N patches of x_n - m) / s                  standardised by the training slides       [D]
    log hazard = β · z                                            β minimises the penalised partial likelihood
    H_k = baseline hazard added up over time bin k                of the training slides                    [K]
    h_k = 1 - exp(-H_k exp(β · z))                                hazard of bin k; logits are its log-odds   [K]

With one output (a run trained with the Cox loss) it is the log hazard itself.

Legend: B slides, N patches, D features, K time bins.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import pandas as pd
import torch
from lifelines import CoxPHFitter
from numpy.typing import NDArray
from torch import Tensor

from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.fitting import TrainingFold
from cftrain.models.patch_maps import PatchMap
from cftrain.zoo import MeanCoxConfig

_LEAST_HAZARD: Final = 1e-6
"""Of a time bin without a death among the training slides: its log-odds are finite."""
_SAME: Final = 1e-8
"""Standard deviation below which a feature says nothing."""


class MeanCox(SurvivalModel):
    """Ridge Cox regression on the mean patch. Before `fit` it predicts NaN."""

    def __init__(self, feature_dim: int, config: MeanCoxConfig) -> None:
        super().__init__("mean-cox", (config.scale,), feature_dim, config)
        self.penalizer = config.penalizer
        self.centre: Tensor
        self.weight: Tensor
        self.log_baseline: Tensor
        self.register_buffer("centre", torch.zeros(feature_dim))
        self.register_buffer("weight", torch.full((feature_dim,), math.nan))
        self.register_buffer("log_baseline", torch.zeros(config.n_bins))

    def fit(self, fold: TrainingFold) -> None:
        """Standardise, fit β, add the baseline hazard up over the time bins."""
        means = fold.means(self.scales[0]).double().numpy()
        centre, spread = means.mean(axis=0), means.std(axis=0, ddof=1)
        told = spread > _SAME
        columns = pd.DataFrame((means[:, told] - centre[told]) / spread[told]).rename(columns="f{}".format)
        table = columns.assign(time_months=fold.time_months, event=fold.event)
        fitted = CoxPHFitter(penalizer=self.penalizer).fit(table, "time_months", "event")
        weight = np.zeros(len(centre))
        weight[told] = fitted.params_.to_numpy() / spread[told]
        baseline = _added_up(fitted.baseline_cumulative_hazard_.iloc[:, 0], fold.edges, len(self.log_baseline))
        for buffer, values in ((self.centre, centre), (self.weight, weight), (self.log_baseline, np.log(baseline))):
            buffer.copy_(torch.from_numpy(values))

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]; with K = 1 the log hazard."""
        bags = torch.split(self.rows(batch, self.scales[0]), list(batch.lengths[self.scales[0]]))
        means_BD = torch.stack([bag.mean(dim=0) for bag in bags])
        # not a matrix product, which autocast would round to bfloat16: close risks would tie
        log_hazard_B1 = ((means_BD - self.centre) * self.weight).sum(dim=1, keepdim=True)
        if len(self.log_baseline) == 1:
            return log_hazard_B1
        y_BK = (self.log_baseline + log_hazard_B1).exp()
        return y_BK + torch.log(-torch.expm1(-y_BK))  # log(exp(y) - 1), the log-odds of 1 - exp(-y)

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K]; no maps, for every patch weighs the same."""
        with self.evaluating(), torch.no_grad():
            return self.logits(batch), {}


def _added_up(cumulative: pd.Series[float], edges: tuple[float, ...], n_bins: int) -> NDArray[np.float64]:
    """The baseline hazard in each time bin; a jump at an edge belongs to the bin that starts there."""
    months = cumulative.index.to_numpy(dtype=float)
    jumps = np.diff(cumulative.to_numpy(), prepend=0.0)
    bins = np.searchsorted(np.array(edges), months, side="right")
    found = np.bincount(bins, weights=jumps, minlength=n_bins)
    return np.maximum(found[:n_bins], _LEAST_HAZARD)
