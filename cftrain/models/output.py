"""`SurvivalOutput`: what every model returns. B slides, K time bins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class SurvivalOutput(NamedTuple):
    """Discrete-time survival of B slides, in float32 (float64 where the logits are)."""

    logits: Tensor
    """[B, K]; log-odds of the hazards."""
    hazards: Tensor
    """[B, K]; probability of death in bin k of those alive at its start."""
    survival: Tensor
    """[B, K]; probability of being alive after bin k: the running product of 1 - hazard."""
    risk: Tensor
    """[B]; minus the sum of survival, higher = worse."""

    @classmethod
    def from_logits(cls, logits: Tensor) -> SurvivalOutput:
        """Derive hazards, survival and risk from [B, K] logits.

        The product is a sum of log(1 - h) = logsigmoid(-logit): no rounding of 1 - h where h is near 1,
        and no product whose gradient looks for zeros.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        survival = functional.logsigmoid(-logits).cumsum(dim=1).exp()
        return cls(logits, torch.sigmoid(logits), survival, -survival.sum(dim=1))
