"""How well risks rank patients, by lifelines: concordance, log-rank, Kaplan-Meier; and a summary over folds.

Risk is higher = worse throughout. A number that the data do not define (no comparable pair, an empty risk
group) is NaN, for the caller to print as "n/a", never 0 or 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test
from lifelines.utils import concordance_index
from numpy.typing import ArrayLike, NDArray

from cftrain.errors import ConfigError, NonFiniteError, ShapeError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PatientLevel:
    """One row per patient, in the order in which patients first appear.

    Parameters
    ----------
    patient_id : [P] str
        Each patient once.
    time_months : [P]
        Follow-up in months.
    event : [P] bool
        True where death was observed.
    risk : [P]
        Mean risk of the patient's slides, higher = worse.
    """

    patient_id: NDArray[np.str_]
    time_months: Floats
    event: Flags
    risk: Floats


@dataclass(frozen=True)
class LogRank:
    """Two risk groups compared.

    Parameters
    ----------
    p_value
        Two-sided log-rank p, 1 degree of freedom; NaN where a group is empty or nobody died.
    threshold
        The median risk; high = risk at or above it.
    n_high, n_low
        Members of each group.
    """

    p_value: float
    threshold: float
    n_high: int
    n_low: int


@dataclass(frozen=True, eq=False)
class KMCurve:
    """A Kaplan-Meier estimate: a step function that keeps survival[i] from times[i] to the next time.

    Parameters
    ----------
    times : [T]
        Months: 0, then every distinct time of death or censoring.
    survival : [T]
        Estimated share of patients alive after each time.
    lower, upper : [T]
        95 % confidence limits, by the exponential Greenwood formula (log-log transform).
    at_risk : [T] int64
        Patients followed at least until each time.
    """

    times: Floats
    survival: Floats
    lower: Floats
    upper: Floats
    at_risk: NDArray[np.int64]


class FoldSummary(TypedDict):
    """Mean and spread of one metric over folds; `folds` keeps every value, NaN included."""

    mean: float
    std: float
    folds: list[float]
    n_undefined: int


def c_index(time_months: ArrayLike, event: ArrayLike, risk: ArrayLike) -> float:
    """Harrell's concordance index: the share of comparable pairs whose earlier death has the higher risk.

    A pair is comparable when the earlier time is a death, or when both times are equal and exactly one is.
    Equal risks count one half.

    Parameters
    ----------
    time_months : [N]
        Follow-up in months.
    event : [N] bool
        True where death was observed.
    risk : [N]
        Higher = worse.

    Returns
    -------
    float
        0…1, or NaN where no pair is comparable (nobody died, or only the last one followed): print "n/a".

    Raises
    ------
    NonFiniteError
        A time or a risk is NaN or infinite.
    ShapeError
        The inputs disagree on N, or `event` is not bool.

    References
    ----------
    Harrell et al. 1996, doi:10.1002/(SICI)1097-0258(19960229)15:4<361::AID-SIM168>3.0.CO;2-4.
    """
    times, happened, risks = _columns(time_months, event, risk)
    try:
        return float(concordance_index(times, -risks, happened))
    except ZeroDivisionError:  # how lifelines says that no pair is comparable
        return math.nan


def patient_level(patient_id: ArrayLike, time_months: ArrayLike, event: ArrayLike, risk: ArrayLike) -> PatientLevel:
    """Give each patient the mean risk of their slides, so that nobody counts twice.

    Parameters
    ----------
    patient_id : [N] str
        Whose slide each row is.
    time_months : [N]
        Follow-up in months, the same on all rows of a patient.
    event : [N] bool
        True where death was observed, the same on all rows of a patient.
    risk : [N]
        Higher = worse.

    Raises
    ------
    ConfigError
        Rows of one patient disagree on time or event.
    NonFiniteError
        A time or a risk is NaN or infinite.
    ShapeError
        The inputs disagree on N, or `event` is not bool.
    """
    times, happened, risks = _columns(time_months, event, risk)
    ids = np.asarray(patient_id, dtype=np.str_)
    if ids.shape != times.shape:
        msg = f"patient_id is {ids.shape}, time_months {times.shape}: give one patient per row"
        raise ShapeError(msg)
    names, first, own = np.unique(ids, return_index=True, return_inverse=True)
    odd = (times != times[first][own]) | (happened != happened[first][own])
    if odd.any():
        msg = f"patient {ids[odd][0]}: slides disagree on time_months or event; give a patient one follow-up"
        raise ConfigError(msg)
    mean = np.bincount(own, weights=risks, minlength=names.size) / np.bincount(own, minlength=names.size)
    order = np.argsort(first)
    rows = first[order]
    return PatientLevel(names[order], times[rows], happened[rows], mean[order])


def log_rank_median_split(time_months: ArrayLike, event: ArrayLike, risk: ArrayLike) -> LogRank:
    """Compare survival at or above the median risk with survival below it.

    Parameters
    ----------
    time_months : [N]
        Follow-up in months, N at least 1.
    event : [N] bool
        True where death was observed.
    risk : [N]
        Higher = worse.

    Raises
    ------
    NonFiniteError
        A time or a risk is NaN or infinite.
    ShapeError
        The inputs disagree on N or are empty, or `event` is not bool.

    References
    ----------
    Mantel 1966, Cancer Chemotherapy Reports 50:163-170; the split is that of the CrossFusion paper.
    """
    times, happened, risks = _columns(time_months, event, risk)
    _check_not_empty(times)
    threshold = float(np.median(risks))
    high = risks >= threshold
    n_high = int(high.sum())
    n_low = high.size - n_high
    p_value = math.nan
    if n_low and happened.any():
        p_value = float(logrank_test(times[high], times[~high], happened[high], happened[~high]).p_value)
    return LogRank(p_value, threshold, n_high, n_low)


def kaplan_meier(time_months: ArrayLike, event: ArrayLike) -> KMCurve:
    """Estimate the survival curve of one group, with 95 % limits and numbers at risk.

    Parameters
    ----------
    time_months : [N]
        Follow-up in months, N at least 1.
    event : [N] bool
        True where death was observed.

    Raises
    ------
    NonFiniteError
        A time is NaN or infinite.
    ShapeError
        The inputs disagree on N or are empty, or `event` is not bool.

    References
    ----------
    Kaplan & Meier 1958, doi:10.1080/01621459.1958.10501452.
    """
    times, happened, _ = _columns(time_months, event)
    _check_not_empty(times)
    fitted = KaplanMeierFitter(alpha=0.05).fit(times, happened)
    at = fitted.survival_function_.index.to_numpy(dtype=np.float64)
    survival = fitted.survival_function_.to_numpy(dtype=np.float64)[:, 0]
    lower, upper = fitted.confidence_interval_.to_numpy(dtype=np.float64).T
    return KMCurve(at, survival, lower, upper, numbers_at_risk(times, at))


def numbers_at_risk(time_months: ArrayLike, at: ArrayLike) -> NDArray[np.int64]:
    """Count the patients still followed at each asked time: int64 of the shape of `at`.

    Parameters
    ----------
    time_months : [N]
        Follow-up in months; one that ends exactly at an asked time still counts there.
    at : any shape
        Months at which to count.

    Raises
    ------
    NonFiniteError
        A time is NaN or infinite.
    """
    times, asked = np.asarray(time_months, dtype=np.float64), np.asarray(at, dtype=np.float64)
    _check_finite("time_months", times)
    _check_finite("at", asked)
    gone = np.searchsorted(np.sort(times), asked, side="left")
    return np.asarray(times.size - gone, dtype=np.int64)


def summarise(folds: Sequence[float]) -> FoldSummary:
    """Sum a metric up over folds: mean and sample standard deviation (ddof=1) of the folds that define it.

    Parameters
    ----------
    folds
        One value per fold. NaN marks a fold that does not define the metric: it stays listed under "folds",
        is counted under "n_undefined" and enters neither mean nor std.

    Returns
    -------
    FoldSummary
        "mean" is NaN without a defined fold, "std" with fewer than two.
    """
    listed = [float(value) for value in folds]
    defined = np.array([value for value in listed if not math.isnan(value)])
    mean = float(defined.mean()) if defined.size else math.nan
    std = float(defined.std(ddof=1)) if defined.size > 1 else math.nan
    return {"mean": mean, "std": std, "folds": listed, "n_undefined": len(listed) - defined.size}


def _columns(time_months: ArrayLike, event: ArrayLike, risk: ArrayLike | None = None) -> tuple[Floats, Flags, Floats]:
    """Rows as arrays, checked; without risks, zeros."""
    times, happened = np.asarray(time_months, dtype=np.float64), np.asarray(event)
    risks = np.zeros_like(times) if risk is None else np.asarray(risk, dtype=np.float64)
    if times.ndim != 1 or happened.shape != times.shape or risks.shape != times.shape:
        found = f"time_months is {times.shape}, event {happened.shape}, risk {risks.shape}"
        msg = f"{found}: give one of each per row"
        raise ShapeError(msg)
    if happened.dtype != np.bool_:
        msg = f"event is {happened.dtype}: give bool, True where death was observed"
        raise ShapeError(msg)
    _check_finite("time_months", times)
    _check_finite("risk", risks)
    return times, happened, risks


def _check_finite(name: str, values: Floats) -> None:
    n_bad = int((~np.isfinite(values)).sum())
    if n_bad:
        msg = f"{name}: {n_bad} of {values.size} are NaN or infinite; find the rows they come from"
        raise NonFiniteError(msg)


def _check_not_empty(times: Floats) -> None:
    if not times.size:
        msg = "no rows: give at least one patient or slide"
        raise ShapeError(msg)
