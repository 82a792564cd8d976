"""Metrics that weigh the dead by 1 / P(under observation): Uno's C, AUC over time, the Brier score.

Harrell's C depends on how patients were censored; these do not, as long as censoring has nothing to do with the
risk. The weights come from the training patients, by `censoring_survival`. They exist only where training
follow-up reaches, so every function takes what the data support, drops the rest and says so in `notes`; it never
raises for want of follow-up, and a number without support is NaN. Where scikit-survival gives a number, it is this
one (risks within 1e-8 apart: there a tie, here not).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.survival.product_limit import Flags, Floats, StepFunction, censoring_survival, event_survival, follow_up


@dataclass(frozen=True)
class UnoC:
    """Concordance of deaths before `tau`: 0…1 or NaN; `tau` is what the data support of the one asked for."""

    value: float
    tau: float
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class DynamicAUC:
    """AUC at each supported time, and their mean, each weighted by the deaths since the time before."""

    times: Floats
    values: Floats
    mean: float
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class BrierScores:
    """Mean squared error of the survival predicted for each supported time: 0 is perfect, 0.25 always saying 1/2."""

    times: Floats
    values: Floats
    notes: tuple[str, ...]


@dataclass(frozen=True)
class IntegratedBrier:
    """The Brier score's mean over the months from `from_months` to `to_months`; NaN where undefined."""

    value: float
    from_months: float
    to_months: float
    notes: tuple[str, ...]


def supported_tau(
    train_time: ArrayLike, train_event: ArrayLike, test_time: ArrayLike | None = None, *, quantile: float = 0.8
) -> float:
    """The month up to which concordance and Brier scores can be trusted, or NaN.

    The least of three: the last training month with G > 0, where weights exist; the 80 % quantile of the training
    months of death, as the few deaths after it would have the largest weights; and, of the test patients, the last
    month that somebody outlives, as nothing can be compared after it.

    Parameters
    ----------
    train_time, train_event : [Q]
        Follow-up in months and bool (True = death) of the training patients.
    test_time : [P], optional
        Follow-up in months of the patients to assess.
    quantile
        Which quantile of the months of death, 0…1, interpolated linearly.

    Returns
    -------
    float
        NaN where no training patient died or was observed, or all test patients have one follow-up.

    Raises
    ------
    NonFiniteError, ShapeError
        As for `censoring_survival`.
    """
    times, happened = follow_up(train_time, train_event)
    observed = censoring_survival(times, happened)
    limits = [float(observed.times[observed.values > 0].max(initial=-math.inf))]
    limits.append(float(np.quantile(times[happened], quantile)) if happened.any() else -math.inf)
    if test_time is not None:
        followed = np.asarray(test_time, dtype=np.float64)
        limits.append(float(followed[followed < followed.max(initial=-math.inf)].max(initial=-math.inf)))
    return min(limits) if math.isfinite(min(limits)) else math.nan


def uno_c_index(
    train_time: ArrayLike, train_event: ArrayLike, time: ArrayLike, event: ArrayLike, risk: ArrayLike, tau: float
) -> UnoC:
    """Uno's C: Harrell's pairs whose earlier death comes before tau, each weighted by 1 / G(time of that death)².

    Parameters
    ----------
    train_time, train_event : [Q]
        Follow-up in months and bool (True = death) of the training patients.
    time, event, risk : [P]
        Follow-up, event and risk (higher = worse) of the patients to assess.
    tau
        Deaths from this month on are not counted, see `supported_tau`. Lowered to the first death whose weight
        training follow-up does not give; infinity asks for all that have one.

    Raises
    ------
    NonFiniteError
        A time or a risk is NaN or infinite.
    ShapeError
        Inputs that belong together differ in length or are empty, or an event is not bool.

    References
    ----------
    Uno et al. 2011, doi:10.1002/sim.4154.
    """
    points, pairs, supported = _uno_pairs(train_time, train_event, time, event, risk, tau)
    notes = []
    if supported < tau:
        notes.append(
            f"Uno's C counts deaths before {supported:g} months: training follow-up gives later ones no weight"
        )
    if not pairs.any():
        notes.append("Uno's C is undefined: no pair of patients whose earlier death comes before tau")
        return UnoC(math.nan, supported, tuple(notes))
    return UnoC(float(points.sum() / pairs.sum()), supported, tuple(notes))


def bootstrap_uno_c(
    train_time: ArrayLike,
    train_event: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    tau: float,
    weights_RP: Floats,
) -> Floats:
    """Uno's C of resampled patients: [R], NaN where a resample has no pair. The training patients stay the same.

    Parameters
    ----------
    train_time, train_event, time, event, risk, tau
        As for `uno_c_index`.
    weights_RP : [R, P]
        How often each patient is in each resample, see `resampling.bootstrap_weights`.

    Raises
    ------
    NonFiniteError, ShapeError
        As for `uno_c_index`.
    """
    points, pairs, _ = _uno_pairs(train_time, train_event, time, event, risk, tau)
    above = ((weights_RP @ points) * weights_RP).sum(axis=1)
    below = ((weights_RP @ pairs) * weights_RP).sum(axis=1)
    return np.asarray(np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0))


def cumulative_dynamic_auc(
    train_time: ArrayLike,
    train_event: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    times: ArrayLike,
) -> DynamicAUC:
    """How well risks tell those who died by a month from those alive after it, for each of several months.

    The dead are weighted by 1 / G(time of death); who was censored before the month is not used. The mean weighs
    each month by the fall of the test patients' Kaplan-Meier curve since the month before.

    Parameters
    ----------
    train_time, train_event, time, event, risk
        As for `uno_c_index`.
    times : [T]
        Months, increasing. Supported are those with G > 0, within follow-up of the test patients (the longest one
        left out), and with a death before.

    Raises
    ------
    ConfigError
        `times` do not increase.
    NonFiniteError, ShapeError
        As for `uno_c_index`.

    References
    ----------
    Uno et al. 2007, doi:10.1198/016214507000000149; Lambert & Chevret 2016, doi:10.1177/0962280213515571.
    """
    observed, own, happened, risks = _columns(train_time, train_event, time, event, risk)
    asked, notes = _supported("AUC", observed, own, times)
    with_case = (asked[:, None] >= own[happened]).any(axis=1)
    notes += [f"AUC at {month:g} months left out: nobody has died by then" for month in asked[~with_case]]
    asked = asked[with_case]
    if not asked.size:
        notes.append("AUC is undefined: no month is supported")
    dead_TP = (own <= asked[:, None]) & happened
    alive_TP = own > asked[:, None]
    weight_TP = np.where(dead_TP, _inverse(observed, own), 0.0)
    won = ((weight_TP @ _points(risks)) * alive_TP).sum(axis=1)
    values = won / (weight_TP.sum(axis=1) * alive_TP.sum(axis=1))
    mean = _mean_by_deaths(values, event_survival(own, happened).at(asked))
    return DynamicAUC(asked, values, mean, tuple(notes))


def brier_scores(
    train_time: ArrayLike,
    train_event: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    survival_PT: ArrayLike,
    times: ArrayLike,
) -> BrierScores:
    """Squared error of predicted survival at each time, weighted for censoring.

    Who died by the month should have had survival 0, with weight 1 / G(time of death); who lived longer 1, with
    weight 1 / G(month); who was censored before has weight 0. The sum is divided by the number of patients.

    Parameters
    ----------
    train_time, train_event, time, event
        As for `uno_c_index`.
    survival_PT : [P, T]
        Predicted probability to live longer than each of `times`; a time where one is NaN is not supported.
    times : [T]
        Months, increasing. Supported are those with G > 0 and within follow-up of the test patients, the longest
        one left out.

    Raises
    ------
    ConfigError
        `times` do not increase.
    NonFiniteError
        A time of follow-up is NaN or infinite.
    ShapeError
        Inputs that belong together differ in length or are empty, or an event is not bool.

    References
    ----------
    Graf et al. 1999, doi:10.1002/(SICI)1097-0258(19990915/30)18:17/18<2529::AID-SIM274>3.0.CO;2-5.
    """
    observed, own, happened, _ = _columns(train_time, train_event, time, event)
    predicted, asked = np.asarray(survival_PT, dtype=np.float64), np.asarray(times, dtype=np.float64)
    if predicted.shape != (own.size, asked.size):
        msg = f"survival is {predicted.shape}: give a row for each of {own.size} patients, a column for each time"
        raise ShapeError(msg)
    kept, notes = _supported("Brier score", observed, own, asked)
    known = np.isin(asked, kept) & ~np.isnan(predicted).any(axis=0)
    if known.sum() < kept.size:
        notes.append(
            f"Brier score from {asked[~known & np.isin(asked, kept)][0]:g} months on left out: "
            "predictions do not reach so far"
        )
    months, predicted = asked[known], predicted[:, known]
    dead = (own[:, None] <= months) & happened[:, None]
    alive = own[:, None] > months
    weight = np.where(dead, _inverse(observed, own)[:, None], 0.0) + np.where(alive, _inverse(observed, months), 0.0)
    return BrierScores(months, np.mean(weight * np.square(alive - predicted), axis=0), tuple(notes))


def integrated_brier_score(
    train_time: ArrayLike,
    train_event: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    survival_PT: ArrayLike,
    times: ArrayLike,
) -> IntegratedBrier:
    """Mean of `brier_scores` over the supported times, by the trapezoidal rule; NaN with fewer than two of them.

    Parameters, errors and source are those of `brier_scores`.
    """
    scores = brier_scores(train_time, train_event, time, event, survival_PT, times)
    if scores.times.size < 2:
        why = "integrated Brier score is undefined: fewer than two supported times"
        return IntegratedBrier(math.nan, math.nan, math.nan, (*scores.notes, why))
    first, last = float(scores.times[0]), float(scores.times[-1])
    value = float(np.trapezoid(scores.values, scores.times)) / (last - first)
    return IntegratedBrier(value, first, last, scores.notes)


def reference_brier_score(
    train_time: ArrayLike, train_event: ArrayLike, time: ArrayLike, event: ArrayLike, times: ArrayLike
) -> IntegratedBrier:
    """`integrated_brier_score` of telling everybody the Kaplan-Meier curve of the training patients.

    A model is worth something where its score is lower. Parameters, errors and source are those of `brier_scores`.
    """
    own, asked = np.asarray(time, dtype=np.float64), np.asarray(times, dtype=np.float64)
    curve = event_survival(train_time, train_event).at(asked)
    told = np.broadcast_to(curve, (own.size, asked.size))
    return integrated_brier_score(train_time, train_event, own, event, told, asked)


def _mean_by_deaths(values: Floats, alive: Floats) -> float:
    """Mean of values, each weighted by how far survival fell since the one before; NaN of none."""
    fall = -np.diff(alive, prepend=1.0)
    return float((values * fall).sum() / fall.sum()) if values.size else math.nan


def _uno_pairs(
    train_time: ArrayLike, train_event: ArrayLike, time: ArrayLike, event: ArrayLike, risk: ArrayLike, tau: float
) -> tuple[Floats, Floats, float]:
    """Weighted points and weighted pairs, [P, P] with the earlier death in rows; and the supported tau."""
    observed, own, happened, risks = _columns(train_time, train_event, time, event, risk)
    weight = np.square(_inverse(observed, own))
    supported = float(own[happened & np.isnan(weight)].min(initial=tau))
    earlier = happened & (own < supported)
    comparable = (own[:, None] < own) | ((own[:, None] == own) & ~happened)
    pairs = np.where(earlier[:, None] & comparable, weight[:, None], 0.0)
    return pairs * _points(risks), pairs, supported


def _points(risks: Floats) -> Floats:
    """1 where the row's risk is above the column's, 1/2 where equal."""
    return np.asarray((risks[:, None] > risks) + 0.5 * (risks[:, None] == risks))


def _inverse(observed: StepFunction, times: Floats) -> Floats:
    """1 / G, NaN where G is 0 or unknown."""
    probability = observed.at(times)
    return np.asarray(np.divide(1.0, probability, out=np.full(times.shape, np.nan), where=probability > 0))


def _supported(what: str, observed: StepFunction, own: Floats, times: ArrayLike) -> tuple[Floats, list[str]]:
    """Times that training weights and test follow-up reach, and a note for each other one."""
    asked = np.asarray(times, dtype=np.float64)
    if asked.ndim != 1 or not np.isfinite(asked).all() or not (np.diff(asked) > 0).all():
        msg = f"times are {asked}: give months that increase"
        raise ConfigError(msg)
    reasons = {
        "training follow-up ends before": ~(observed.at(asked) > 0),
        "no patient is followed for longer": asked >= own.max(),
        "every patient is followed for longer": asked < own.min(),
    }
    dropped: NDArray[np.bool_] = np.any(list(reasons.values()), axis=0)
    notes = []
    for row in np.flatnonzero(dropped):
        reason = next(reason for reason, holds in reasons.items() if holds[row])
        notes.append(f"{what} at {asked[row]:g} months left out: {reason}")
    return asked[~dropped], notes


def _columns(
    train_time: ArrayLike, train_event: ArrayLike, time: ArrayLike, event: ArrayLike, risk: ArrayLike | None = None
) -> tuple[StepFunction, Floats, Flags, Floats]:
    """G of the training patients; rows of the test patients, checked; without risks, zeros."""
    observed = censoring_survival(train_time, train_event)
    own, happened = follow_up(time, event)
    risks = np.zeros(own.size) if risk is None else np.asarray(risk, dtype=np.float64)
    if risks.shape != own.shape:
        msg = f"time is {own.shape}, risk {risks.shape}: give one of each per patient"
        raise ShapeError(msg)
    if not np.isfinite(risks).all():
        msg = f"risk: {int((~np.isfinite(risks)).sum())} of {risks.size} are NaN or infinite; find their rows"
        raise NonFiniteError(msg)
    return observed, own, happened, risks
