"""Survival statistics of the trainer: time bins, the loss, sampling orders and metrics."""

from __future__ import annotations

from cftrain.survival.bins import TimeBins, fit_bins
from cftrain.survival.losses import Reduction, ce_survival, cox_loss, nll_survival
from cftrain.survival.metrics import (
    FoldSummary,
    KMCurve,
    LogRank,
    PatientLevel,
    c_index,
    kaplan_meier,
    log_rank_median_split,
    numbers_at_risk,
    patient_level,
    summarise,
)
from cftrain.survival.sampling import class_weights, draw, pass_order

__all__ = [
    "FoldSummary",
    "KMCurve",
    "LogRank",
    "PatientLevel",
    "Reduction",
    "TimeBins",
    "c_index",
    "ce_survival",
    "class_weights",
    "cox_loss",
    "draw",
    "fit_bins",
    "kaplan_meier",
    "log_rank_median_split",
    "nll_survival",
    "numbers_at_risk",
    "pass_order",
    "patient_level",
    "summarise",
]
