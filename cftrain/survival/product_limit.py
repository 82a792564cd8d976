"""Kaplan-Meier curves as step functions to evaluate: of survival, and of staying under observation.

At equal times deaths come before censorings, as in scikit-survival: a patient who dies in a month is not at risk
of being censored in it, one who is censored in it is at risk of dying.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.errors import NonFiniteError, ShapeError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class StepFunction:
    """1 before the first time, then value[i] from times[i] to the next time.

    Parameters
    ----------
    times : [T]
        Distinct months, increasing.
    values : [T]
        Not increasing, 0…1.
    """

    times: Floats
    values: Floats

    def at(self, times: ArrayLike) -> Floats:
        """The function at the asked months, in their shape: beyond the last time 0 if it ended at 0, else NaN."""
        asked = np.asarray(times, dtype=np.float64)
        values = np.concatenate([[1.0], self.values])[np.searchsorted(self.times, asked, side="right")]
        return np.where(asked > self.times[-1], 0.0 if self.values[-1] == 0 else np.nan, values)


def censoring_survival(time_months: ArrayLike, event: ArrayLike) -> StepFunction:
    """Kaplan-Meier estimate of G(t), the probability to be under observation after t.

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
    """
    times, at_risk, died, censored = _table(*follow_up(time_months, event))
    return _product_limit(times, censored, at_risk - died)


def event_survival(time_months: ArrayLike, event: ArrayLike) -> StepFunction:
    """Kaplan-Meier estimate of S(t), the probability to be alive after t; arguments as for `censoring_survival`."""
    times, at_risk, died, _ = _table(*follow_up(time_months, event))
    return _product_limit(times, died, at_risk)


def follow_up(time_months: ArrayLike, event: ArrayLike) -> tuple[Floats, Flags]:
    """Rows as float64 and bool, checked.

    Raises
    ------
    NonFiniteError
        A time is NaN or infinite.
    ShapeError
        The inputs disagree on N or are empty, or `event` is not bool.
    """
    times, happened = np.asarray(time_months, dtype=np.float64), np.asarray(event)
    if times.ndim != 1 or not times.size or happened.shape != times.shape or happened.dtype != np.bool_:
        found = f"time_months is {times.shape}, event {happened.shape} {happened.dtype}"
        msg = f"{found}: give at least one patient, and a time and a bool (True = death observed) for each"
        raise ShapeError(msg)
    if not np.isfinite(times).all():
        msg = f"time_months: {int((~np.isfinite(times)).sum())} of {times.size} are NaN or infinite; leave them out"
        raise NonFiniteError(msg)
    return times, happened


def _table(times: Floats, event: Flags) -> tuple[Floats, Floats, Floats, Floats]:
    """Distinct times; patients at risk, deaths and censorings at each."""
    distinct, own = np.unique(times, return_inverse=True)
    died = np.bincount(own, weights=event).astype(np.float64)
    censored = np.bincount(own, weights=~event).astype(np.float64)
    gone = np.cumsum(died + censored)
    return distinct, times.size - np.concatenate([[0.0], gone[:-1]]), died, censored


def _product_limit(times: Floats, hit: Floats, at_risk: Floats) -> StepFunction:
    share = np.divide(hit, at_risk, out=np.zeros(times.size), where=hit > 0)
    return StepFunction(times, np.cumprod(1.0 - share, dtype=np.float64))
