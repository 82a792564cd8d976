"""Survival statistics: time bins, sampling orders and metrics here; the rest by module. Only `losses` loads torch."""

from __future__ import annotations

from cftrain.survival.bins import TimeBins, fit_bins
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
    "TimeBins",
    "c_index",
    "class_weights",
    "draw",
    "fit_bins",
    "kaplan_meier",
    "log_rank_median_split",
    "numbers_at_risk",
    "pass_order",
    "patient_level",
    "summarise",
]
