"""Survival at any time from discrete-time predictions.

A model predicts the survival after each of K bins, that is at the K-1 interior edges; survival at 0 is 1. Between
two edges the hazard is taken as constant, so that log survival is a straight line there. The last bin has no end:
beyond the last interior edge the curve is not defined, and NaN. That edge is the horizon of the predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.errors import ConfigError, NonFiniteError, ShapeError

Floats = NDArray[np.float64]
_ROUNDING = 1e-6  # predictions come from float32


def survival_at(survival: ArrayLike, edges: Sequence[float], times: ArrayLike) -> Floats:
    """Survival of every patient at every asked time: [P, T], NaN beyond the last interior edge.

    Where survival falls to 0 within a bin it is 0 from the start of the bin on, the start itself left out.

    Parameters
    ----------
    survival : [P, K]
        Predicted survival after each bin. The last column, survival after a bin without an end, is not read.
    edges : [K-1]
        Interior edges of the bins in months, increasing, above 0.
    times : [T]
        Months, 0 or later.

    Raises
    ------
    ConfigError
        Edges do not increase, a survival is no probability or rises from bin to bin, or a time lies before 0.
    NonFiniteError
        A survival or a time is NaN or infinite.
    ShapeError
        There is not one column per bin, or `times` is not a list.
    """
    asked = np.asarray(times, dtype=np.float64)
    if asked.ndim != 1:
        msg = f"times is {asked.shape}: give a list of months"
        raise ShapeError(msg)
    knots, at_knots = _curve(survival, edges)
    return _interpolated(knots, at_knots, np.broadcast_to(asked, (len(at_knots), asked.size)))


def survival_at_own_time(survival: ArrayLike, edges: Sequence[float], time_months: ArrayLike) -> Floats:
    """Survival of each patient at a time of their own: [P], NaN beyond the last interior edge.

    Parameters
    ----------
    survival, edges
        As for `survival_at`.
    time_months : [P]
        Months, 0 or later.

    Raises
    ------
    ConfigError, NonFiniteError, ShapeError
        As for `survival_at`; also where there is not one time per patient.
    """
    knots, at_knots = _curve(survival, edges)
    own = np.asarray(time_months, dtype=np.float64)
    if own.shape != at_knots.shape[:1]:
        msg = f"survival has {len(at_knots)} rows, time_months is {own.shape}: give one time per patient"
        raise ShapeError(msg)
    return np.asarray(_interpolated(knots, at_knots, own[:, None])[:, 0])


def _interpolated(knots: Floats, at_knots: Floats, times_PT: Floats) -> Floats:
    if not np.isfinite(times_PT).all() or (times_PT < 0).any():
        error = ConfigError if np.isfinite(times_PT).all() else NonFiniteError
        msg = "times: some lie before 0 or are no numbers; survival is asked at months from 0 on"
        raise error(msg)
    found = np.full(times_PT.shape, np.nan)
    if knots.size == 1:  # a single bin has no edge: the curve is known at 0 only
        return np.where(times_PT == 0, 1.0, found)
    end = np.clip(np.searchsorted(knots, times_PT, side="left"), 1, knots.size - 1)
    rows = np.arange(len(at_knots))[:, None]
    share = (times_PT - knots[end - 1]) / (knots[end] - knots[end - 1])
    inside = share <= 1.0
    share = np.where(inside, share, 0.0)
    # a weighted geometric mean is log-linear, and needs no logarithm of a survival of 0
    between = at_knots[rows, end - 1] ** (1.0 - share) * at_knots[rows, end] ** share
    return np.where(inside, between, found)


def _curve(survival: ArrayLike, edges: Sequence[float]) -> tuple[Floats, Floats]:
    """Where curves are known, 0 and the edges: [K]; and survival there: [P, K]."""
    knots, rows = np.array((0.0, *edges)), np.asarray(survival, dtype=np.float64)
    if not (np.isfinite(knots).all() and (np.diff(knots) > 0).all()):
        msg = f"bin edges {edges}: give finite months above 0, each larger than the last"
        raise ConfigError(msg)
    if rows.ndim != 2 or rows.shape[1] != knots.size:
        msg = f"survival is {rows.shape} with {knots.size - 1} edges: give one column per bin, {knots.size} here"
        raise ShapeError(msg)
    at_knots = np.concatenate([np.ones((len(rows), 1)), rows[:, :-1]], axis=1)
    if not np.isfinite(rows).all():
        n_bad = int((~np.isfinite(rows)).any(axis=1).sum())
        msg = f"survival: {n_bad} of {len(rows)} rows hold NaN or infinity; find the predictions they come from"
        raise NonFiniteError(msg)
    if (rows < 0).any() or (rows > 1 + _ROUNDING).any() or (np.diff(rows, axis=1) > _ROUNDING).any():
        msg = "survival: some rows leave 0…1 or rise from bin to bin; give the probability to survive each bin"
        raise ConfigError(msg)
    return knots, np.minimum(at_knots, 1.0)
