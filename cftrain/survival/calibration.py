"""Do predicted probabilities come true? D-calibration over the whole curve, and a calibration curve at one month."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter
from lifelines.exceptions import ConvergenceError, ConvergenceWarning
from numpy.typing import ArrayLike
from scipy.stats import chi2

from cftrain.errors import ConfigError, ShapeError
from cftrain.survival.metrics import kaplan_meier
from cftrain.survival.product_limit import Flags, Floats, follow_up

_EDGE = 1e-6  # probabilities are kept this far from 0 and 1, where log(-log) is infinite
_LEAST_DEATHS = 10  # fewer do not determine the two coefficients of the smooth


@dataclass(frozen=True, eq=False)
class DCalibration:
    """Are survival probabilities at the time of death uniform?

    Parameters
    ----------
    statistic, p_value
        Pearson's chi² of the counts against equal ones, and its upper tail; NaN without patients. A small p
        speaks against calibration.
    counts : [B]
        Patients by survival at their time of death, from [0, 1/B) to [1 - 1/B, 1]; fractions come from the censored.
    """

    statistic: float
    p_value: float
    counts: Floats


@dataclass(frozen=True)
class CalibrationPoint:
    """One group of similar predicted risk.

    Parameters
    ----------
    predicted
        Mean predicted probability to be dead by the horizon.
    observed
        1 - Kaplan-Meier at the horizon; NaN where nobody of the group is followed so long.
    lower, upper
        95 % limits of `observed` (log-log Greenwood); NaN also where it is 0 or 1, where they do not exist.
    n
        Patients of the group.
    """

    predicted: float
    observed: float
    lower: float
    upper: float
    n: int


@dataclass(frozen=True)
class CalibrationCurve:
    """Predicted against observed probability to be dead by a horizon.

    Parameters
    ----------
    points
        Groups by predicted risk, lowest first.
    ici, e50, e90
        Mean, median and 90 % quantile over patients of |smoothed observed - predicted|; NaN where the smooth
        cannot be fitted.
    notes
        What could not be done, and why.
    """

    points: tuple[CalibrationPoint, ...]
    ici: float
    e50: float
    e90: float
    notes: tuple[str, ...]


def d_calibration(survival: ArrayLike, event: ArrayLike, *, bins: int = 10) -> DCalibration:
    """Count patients by the survival predicted for the end of their follow-up, and test that counts are equal.

    If the curves are right, the survival predicted for the time of death is uniform on 0…1. A death counts 1 in
    the bin of its probability s. A patient censored at s would have died at one uniform on 0…s: the bin of s gets
    the part of it below s, each lower bin its width, all divided by s. Follow-up beyond the end of a predicted curve
    is to be cut there, as censored (`cut_at`). The censored are spread evenly whatever the truth, so with many of
    them p is too large: a small p counts, a large one says little.

    Parameters
    ----------
    survival : [P]
        Predicted probability of each patient to live longer than they were followed.
    event : [P] bool
        True where death was observed.
    bins
        How many bins of equal width, at least 2.

    Raises
    ------
    ConfigError
        A survival is no probability, or there are fewer than 2 bins.
    ShapeError
        The inputs disagree on P, or `event` is not bool.

    References
    ----------
    Haider et al. 2020, Effective ways to build and evaluate individual survival distributions, JMLR 21(85).
    """
    reached, happened = np.asarray(survival, dtype=np.float64), np.asarray(event)
    _check_probabilities("survival", reached, happened)
    if bins < 2:
        msg = f"bins is {bins}: a test of equal counts needs at least 2"
        raise ConfigError(msg)
    if not reached.size:
        return DCalibration(math.nan, math.nan, np.zeros(bins))
    counts = _spread(reached[~happened], bins) + np.bincount(_bin_of(reached[happened], bins), minlength=bins)
    expected = reached.size / bins
    statistic = float((np.square(counts - expected) / expected).sum())
    return DCalibration(statistic, _chi2_tail(statistic, bins - 1), counts)


def cut_at(time_months: ArrayLike, event: ArrayLike, horizon: float) -> tuple[Floats, Flags]:
    """Follow-up as if it had ended at the horizon: who was followed for longer is censored there.

    Raises
    ------
    NonFiniteError, ShapeError
        As for `product_limit.follow_up`.
    """
    times, happened = follow_up(time_months, event)
    return np.minimum(times, horizon), happened & (times <= horizon)


def calibration_curve(
    time_months: ArrayLike, event: ArrayLike, dead_by_horizon: ArrayLike, horizon: float, *, groups: int = 5
) -> CalibrationCurve:
    """Compare predicted probabilities to be dead by a horizon with what was observed, in groups and smoothed.

    The groups are cut at quantiles of the predicted probability p, as `pandas.qcut` cuts; equal ones stay together, so
    that there may be fewer groups.
    The smooth is a Cox regression of follow-up, cut at the horizon, on a restricted cubic spline of log(-log(1 - p))
    with knots at its 10, 50 and 90 % quantiles; the probability that it gives each patient to be dead by the horizon
    stands for the observed one. It needs 10 deaths by the horizon and predictions that vary.

    Parameters
    ----------
    time_months : [P]
        Follow-up in months, P at least 1.
    event : [P] bool
        True where death was observed.
    dead_by_horizon : [P]
        Predicted probabilities p; in the smooth kept within 1e-6…1 - 1e-6.
    horizon
        Months.
    groups
        How many groups to cut.

    Raises
    ------
    ConfigError
        A prediction is no probability.
    NonFiniteError
        A time is NaN or infinite.
    ShapeError
        The inputs disagree on P or are empty, or `event` is not bool.

    References
    ----------
    Austin, Harrell & van Klaveren 2020, doi:10.1002/sim.8570. Unlike there, follow-up is cut at the horizon, so that
    hazards need to be proportional up to it only (van Houwelingen 2007, Scandinavian Journal of Statistics 34:70-85).
    """
    times, happened = follow_up(time_months, event)
    predicted = np.asarray(dead_by_horizon, dtype=np.float64)
    _check_probabilities("dead_by_horizon", predicted, happened)
    cuts = np.unique(np.quantile(predicted, np.linspace(0, 1, groups + 1)[1:-1]))
    own = np.searchsorted(cuts, predicted)
    members = [own == group for group in np.unique(own)]
    points = tuple(_point(times[rows], happened[rows], predicted[rows], horizon) for rows in members)
    notes = [
        f"calibration group of mean prediction {point.predicted:.3g}: nobody is followed for {horizon:g} months"
        for point in points
        if math.isnan(point.observed)
    ]
    smoothed, why = _smoothed(*cut_at(times, happened, horizon), predicted, horizon)
    if why:
        notes.append(f"ICI, E50 and E90 are undefined: {why}")
        return CalibrationCurve(points, math.nan, math.nan, math.nan, tuple(notes))
    away = np.abs(smoothed - predicted)
    e50, e90 = np.quantile(away, [0.5, 0.9])
    return CalibrationCurve(points, float(away.mean()), float(e50), float(e90), tuple(notes))


def _point(times: Floats, event: Flags, predicted: Floats, horizon: float) -> CalibrationPoint:
    curve = kaplan_meier(times, event)
    row = int(np.searchsorted(curve.times, horizon, side="right")) - 1
    alive, lower, upper = float(curve.survival[row]), float(curve.lower[row]), float(curve.upper[row])
    if curve.times[-1] < horizon and alive > 0:
        alive = math.nan
    if not 0 < alive < 1:
        lower = upper = math.nan
    return CalibrationPoint(float(predicted.mean()), 1 - alive, 1 - upper, 1 - lower, times.size)


def _smoothed(times: Floats, event: Flags, predicted: Floats, horizon: float) -> tuple[Floats, str]:
    """Smoothed observed probabilities [P] and "", or nothing and the reason."""
    nothing = np.zeros(0)
    if event.sum() < _LEAST_DEATHS:
        return nothing, f"{int(event.sum())} deaths by {horizon:g} months, fewer than {_LEAST_DEATHS}"
    if times.max() < horizon:
        return nothing, f"nobody is followed for {horizon:g} months"
    inside = np.clip(predicted, _EDGE, 1 - _EDGE)
    x = np.log(-np.log1p(-inside))
    knots = np.quantile(x, [0.1, 0.5, 0.9])
    if not (np.diff(knots) > 0).all():
        return nothing, "predictions hardly vary"
    unit = float(x.std())  # lifelines calls columns that hardly vary in their own unit a failure
    table = pd.DataFrame({"linear": x / unit, "bend": _spline(x / unit, knots / unit), "months": times, "died": event})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            cox = CoxPHFitter().fit(table, "months", "died")
        alive = cox.predict_survival_function(table, times=[horizon]).to_numpy(dtype=np.float64)[0]
    except (ConvergenceError, ConvergenceWarning):
        return nothing, "the Cox regression of the smooth does not converge"
    return 1.0 - alive, "" if np.isfinite(alive).all() else "the Cox regression of the smooth diverges"


def _spline(x: Floats, knots: Floats) -> Floats:
    """The non-linear column of a restricted cubic spline with three knots: linear beyond the outer two (Harrell)."""
    first, middle, last = knots
    cubes = np.clip(x[:, None] - knots, 0, None) ** 3
    weights = np.array([1.0, -(last - first) / (last - middle), (middle - first) / (last - middle)])
    return np.asarray(cubes @ weights / (last - first) ** 2)


def _bin_of(reached: Floats, bins: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.minimum((reached * bins).astype(np.int64), bins - 1)


def _spread(reached: Floats, bins: int) -> Floats:
    """Each censored patient, spread evenly over the probabilities below their own: [B]."""
    lower = np.arange(bins) / bins
    below = np.clip(reached[:, None] - lower, 0.0, 1.0 / bins)
    certain = np.eye(1, bins)  # at a survival of 0 all is left to the lowest bin
    part = np.divide(below, reached[:, None], out=np.repeat(certain, reached.size, axis=0), where=reached[:, None] > 0)
    return np.asarray(part.sum(axis=0))


def _chi2_tail(statistic: float, degrees: int) -> float:
    """P(chi² of so many degrees of freedom > statistic)."""
    return float(chi2.sf(statistic, degrees))


def _check_probabilities(name: str, values: Floats, event: Flags) -> None:
    if values.ndim != 1 or event.shape != values.shape or event.dtype != np.bool_:
        found = f"{name} is {values.shape}, event {event.shape} {event.dtype}"
        msg = f"{found}: give a probability and a bool (True = death observed) per patient"
        raise ShapeError(msg)
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        msg = f"{name}: {int(bad.sum())} of {values.size} are no probabilities, the first {values[bad][0]:g}; give 0…1"
        raise ConfigError(msg)
