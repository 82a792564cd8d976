"""How sure a concordance is: bootstrap over patients, and two models compared on the same resamples.

The C-index of a resample needs no rows copied. With B[i, j] = 1 where patient i is known to die before j, A[i, j] the
points that a risk wins on that pair, and w how often each patient was drawn, it is (w A w) / (w B w); all resamples
at once are two products of matrices. Copies of one patient form no pair, as their times and events are equal.
Every sum is a whole or a half number, so the quotients are those of lifelines to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.errors import ConfigError, ShapeError
from cftrain.survival.metrics import c_index

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedBootstrap:
    """Two risks of the same patients compared.

    Parameters
    ----------
    difference
        C-index of the first risk minus that of the second, on the patients as they are.
    lower, upper
        Percentile interval of the resampled differences.
    p_value
        Two-sided: twice the smaller share of resamples with a difference at or below 0, or at or above 0, each
        counted with one resample more, so that it is never 0; at most 1. NaN with fewer than two defined resamples.
    n_resamples
        Resamples that define the difference.
    """

    difference: float
    lower: float
    upper: float
    p_value: float
    n_resamples: int


def bootstrap_weights(n: int, replicates: int, seed: int | np.random.Generator) -> Floats:
    """How often each of n rows is drawn in each resample of n draws with replacement: [replicates, n] float64.

    Parameters
    ----------
    n, replicates
        At least 1 each.
    seed
        A number, or a generator to draw on with.

    Raises
    ------
    ConfigError
        `n` or `replicates` is below 1.

    References
    ----------
    Efron 1979, doi:10.1214/aos/1176344552.
    """
    if n < 1 or replicates < 1:
        msg = f"{replicates} resamples of {n} rows: give at least one of each"
        raise ConfigError(msg)
    drawn = np.random.default_rng(seed).integers(0, n, size=(replicates, n))
    cells = drawn + n * np.arange(replicates)[:, None]
    return np.bincount(cells.ravel(), minlength=replicates * n).reshape(replicates, n).astype(np.float64)


def bootstrap_c_index(
    time_months: ArrayLike, event: ArrayLike, risk: ArrayLike, *, replicates: int = 1000, seed: int = 0
) -> Floats:
    """Harrell's C of each resample of the rows: [replicates], NaN where no pair of a resample is comparable.

    Rows should be patients: slides of one patient are not independent, and their interval would be too narrow.

    Parameters
    ----------
    time_months : [N]
        Follow-up in months.
    event : [N] bool
        True where death was observed.
    risk : [N]
        Higher = worse.
    replicates
        Resamples. 1000 of 600 patients take some 0.1 s; memory grows as 24 N² bytes.
    seed
        Of the draws.

    Raises
    ------
    ConfigError
        `replicates` is below 1.
    NonFiniteError
        A time or a risk is NaN or infinite.
    ShapeError
        The inputs disagree on N or are empty, or `event` is not bool.
    """
    times, happened, risks = _rows(time_months, event, np.asarray(risk)[None])
    return np.asarray(_weighted_c(times, happened, risks, bootstrap_weights(times.size, replicates, seed))[0])


def weighted_c_index(time_months: ArrayLike, event: ArrayLike, risks: ArrayLike, weights: ArrayLike) -> Floats:
    """Harrell's C of rows counted as often as each row of weights says: [M, R], NaN where no pair is comparable.

    Parameters
    ----------
    time_months, event
        As for `bootstrap_c_index`.
    risks : [M, N]
        M risks for each patient, higher = worse.
    weights : [R, N]
        How often each patient counts, as from `bootstrap_weights`; or ones, for the patients as they are.

    Raises
    ------
    NonFiniteError, ShapeError
        As for `bootstrap_c_index`.
    """
    times, happened, columns = _rows(time_months, event, risks)
    counts = np.asarray(weights, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[1] != times.size:
        msg = f"weights are {counts.shape} for {times.size} patients: give [resamples, patients]"
        raise ShapeError(msg)
    return _weighted_c(times, happened, columns, counts)


def percentile_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle `level` of the resampled values, NaN left out.

    Parameters
    ----------
    values : [R]
        One per resample.
    level
        Above 0, below 1.

    Returns
    -------
    tuple of float
        (lower, upper), interpolated linearly between values; both NaN with fewer than two defined.

    Raises
    ------
    ConfigError
        `level` is no share.

    References
    ----------
    Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    if not 0 < level < 1:
        msg = f"level is {level}: give a share between 0 and 1, as 0.95"
        raise ConfigError(msg)
    given = np.asarray(values, dtype=np.float64)
    defined = given[~np.isnan(given)]
    if defined.size < 2:
        return math.nan, math.nan
    lower, upper = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def paired_test(difference: float, resampled: ArrayLike) -> PairedBootstrap:
    """What resampled differences say of the observed one: interval and two-sided p, as in `PairedBootstrap`.

    Parameters
    ----------
    difference
        On the patients as they are.
    resampled : [R]
        On each resample; NaN where undefined.
    """
    given = np.asarray(resampled, dtype=np.float64)
    defined = given[~np.isnan(given)]
    lower, upper = percentile_interval(defined)
    p_value = math.nan
    if defined.size > 1:
        rarer = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
        p_value = min(1.0, 2 * (rarer + 1) / (defined.size + 1))
    return PairedBootstrap(difference, lower, upper, p_value, int(defined.size))


def _weighted_c(times: Floats, event: NDArray[np.bool_], risks: Floats, weights: Floats) -> Floats:
    """C-index of every risk under every row of weights: [M, R]."""
    before = (times[:, None] < times) | ((times[:, None] == times) & ~event)
    comparable = (event[:, None] & before).astype(np.float64)
    pairs = _both_drawn(comparable, weights)
    found = np.full((len(risks), len(weights)), math.nan)
    for own, risk in zip(found, risks, strict=True):
        points = comparable * ((risk[:, None] > risk) + 0.5 * (risk[:, None] == risk))
        np.divide(_both_drawn(points, weights), pairs, out=own, where=pairs > 0)
    return found


def _both_drawn(pairs: Floats, weights: Floats) -> Floats:
    """w P w of every row w of the weights: [R]."""
    return np.asarray(np.einsum("rn,rn->r", weights @ pairs, weights))


def mean_of_defined(values: Floats) -> Floats:
    """Mean over the first axis without NaN; NaN where nothing is defined."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, math.nan), where=count > 0))


def _rows(time_months: ArrayLike, event: ArrayLike, risks: ArrayLike) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Rows as arrays; `c_index` refuses columns that do not fit."""
    times, happened = np.asarray(time_months, dtype=np.float64), np.asarray(event)
    columns = np.asarray(risks, dtype=np.float64)
    if columns.ndim != 2:
        msg = f"time_months is {times.shape}, risks {columns.shape}: give [risks, patients]"
        raise ShapeError(msg)
    if not columns.size:
        msg = "no rows: give at least one patient and one risk"
        raise ShapeError(msg)
    for risk in columns:
        c_index(times, happened, risk)
    return times, happened, columns
