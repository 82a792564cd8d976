"""Patients in two risk groups, and what survival analysis counts in each."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.report.reading import Predictions
from cftrain.survival.metrics import KMCurve, PatientLevel, kaplan_meier, numbers_at_risk, patient_level

CSV_HEADER = ("time_months", "group", "survival", "lower", "upper", "at_risk")


@dataclass(frozen=True, eq=False)
class RiskGroup:
    """Patients on one side of the median risk of their fold, all folds together.

    Parameters
    ----------
    name
        "high" or "low".
    time_months : [P]
        Follow-up in months.
    event : [P] bool
        True where death was observed.
    curve
        Their Kaplan-Meier estimate.
    """

    name: str
    time_months: NDArray[np.float64]
    event: NDArray[np.bool_]
    curve: KMCurve


@dataclass(frozen=True, eq=False)
class RiskTable:
    """Where the patients of a group are at each asked time; the three always add up to the group.

    Parameters
    ----------
    at_risk : [T] int64
        Followed at least until then.
    censored, events : [T] int64
        Left alive, or died, before then.
    """

    at_risk: NDArray[np.int64]
    censored: NDArray[np.int64]
    events: NDArray[np.int64]


def patients_by_fold(predictions: Predictions) -> list[PatientLevel]:
    """Every fold's patients, each with the mean risk of their slides in that fold."""
    of_fold = [predictions.fold == fold for fold in np.unique(predictions.fold)]
    return [
        patient_level(
            predictions.patient_id[rows], predictions.time_months[rows], predictions.event[rows], predictions.risk[rows]
        )
        for rows in of_fold
    ]


def split_by_risk(folds: Sequence[PatientLevel]) -> list[RiskGroup]:
    """Pool folds into patients below and at or above the median risk of their own fold; an empty group is left out.

    Each fold has its own model, so risks of different folds share no scale and only their order within a fold counts.
    """
    time = np.concatenate([fold.time_months for fold in folds])
    event = np.concatenate([fold.event for fold in folds])
    high = np.concatenate([fold.risk >= np.median(fold.risk) for fold in folds])
    sides = [(name, rows) for name, rows in (("low", ~high), ("high", high)) if rows.any()]
    return [RiskGroup(name, time[rows], event[rows], kaplan_meier(time[rows], event[rows])) for name, rows in sides]


def risk_table(group: RiskGroup, at: ArrayLike) -> RiskTable:
    """Count a group at the asked months (KMunicate: at risk, censored, events)."""
    at_risk = numbers_at_risk(group.time_months, at)
    died = group.time_months[group.event]
    events = died.size - numbers_at_risk(died, at)
    return RiskTable(at_risk, group.time_months.size - at_risk - events, events)


def median_time(curve: KMCurve) -> float:
    """First time at which at most half remain; NaN where more than half always do."""
    reached = np.flatnonzero(curve.survival <= 0.5)
    return float(curve.times[reached[0]]) if reached.size else math.nan


def median_follow_up(patients: PatientLevel) -> float:
    """Median follow-up in months by reverse Kaplan-Meier (Schemper & Smith 1996): death ends it, it is not an event."""
    return median_time(kaplan_meier(patients.time_months, ~patients.event))


def curves_csv(groups: Sequence[RiskGroup]) -> str:
    """Every step of every curve as CSV, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for group in groups:
        curve = group.curve
        columns = (curve.times, curve.survival, curve.lower, curve.upper, curve.at_risk)
        for time, *rest in zip(*(column.tolist() for column in columns), strict=True):
            writer.writerow((time, group.name, *rest))
    return out.getvalue()
