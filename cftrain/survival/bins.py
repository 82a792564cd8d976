"""Time bins: follow-up in months to the interval 0…K-1 that a discrete-time hazard model predicts.

Bin k is [edge_k, edge_{k+1}); the first starts at 0, the last has no end, so every follow-up has a bin, also
one longer than any seen while fitting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.errors import ConfigError, NonFiniteError, ShapeError


@dataclass(frozen=True)
class TimeBins:
    """Half-open intervals of follow-up, known by their interior edges.

    Parameters
    ----------
    edges
        The K-1 interior edges in months, increasing, above 0; () is one bin for all times.

    Raises
    ------
    ConfigError
        The edges do not increase, or one is not a number above 0.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        inner = np.array((0.0, *self.edges))
        if not (np.isfinite(inner).all() and (np.diff(inner) > 0).all()):
            msg = f"bin edges {_listed(self.edges)}: give finite months above 0, each larger than the last"
            raise ConfigError(msg)

    @property
    def n_bins(self) -> int:
        """How many bins: K, one more than there are interior edges."""
        return len(self.edges) + 1

    def assign(self, time_months: ArrayLike) -> NDArray[np.int64]:
        """Put each follow-up into its bin: int64 of the same shape, 0…K-1.

        Parameters
        ----------
        time_months : any shape
            Follow-up in months, compared with the edges in float64. A time equal to an edge belongs to the
            bin that starts there.

        Raises
        ------
        NonFiniteError
            A time is NaN or infinite.
        ConfigError
            A time lies before 0.
        """
        times = _months(time_months)
        return np.searchsorted(np.array(self.edges), times, side="right").astype(np.int64)


def fit_bins(time_months: ArrayLike, event: ArrayLike, n_bins: int = 4) -> TimeBins:
    """Cut follow-up where the observed deaths fall into equal parts.

    The interior edges are the quantiles 1/K … (K-1)/K of the uncensored times among the rows given, linearly
    interpolated: the edges of `pandas.qcut`. Which rows those are is the caller's choice: a trainer passes
    its training fold; the reference code every slide of the cohort, so a patient counts once per slide.

    Parameters
    ----------
    time_months : [N]
        Follow-up in months.
    event : [N] bool
        True where death was observed.
    n_bins
        K, the number of bins; 1 makes no edge.

    Raises
    ------
    ConfigError
        Fewer than one bin is asked for, no row has an event, edges coincide (few events, or many in one
        month; the first and the last death count as edges here), or a time lies before 0.
    NonFiniteError
        A time is NaN or infinite.
    ShapeError
        The inputs disagree on N, or `event` is not bool.

    References
    ----------
    Zadeh & Schmid 2020, doi:10.1109/TPAMI.2020.2979450.
    """
    if n_bins < 1:
        msg = f"bins.count is {n_bins}: ask for at least one bin, e.g. --set bins.count=4"
        raise ConfigError(msg)
    deaths = _observed(time_months, event)
    if not deaths.size:
        msg = (
            f"no event among {np.size(event)} rows: time bins are cut where deaths were observed; "
            "use a cohort or fold that has some"
        )
        raise ConfigError(msg)
    edges = _quantiles(deaths, n_bins)
    if not _distinct(edges):
        raise ConfigError(_coinciding(edges, deaths))
    return TimeBins(tuple(edges[1:-1].tolist()))


def _months(time_months: ArrayLike) -> NDArray[np.float64]:
    times = np.asarray(time_months, dtype=np.float64)
    if not np.isfinite(times).all():
        n_bad = int((~np.isfinite(times)).sum())
        msg = f"time_months: {n_bad} of {times.size} are NaN or infinite; leave out rows without follow-up"
        raise NonFiniteError(msg)
    if (times < 0).any():
        msg = f"time_months: the least is {times.min():g}; correct the follow-up that lies before 0"
        raise ConfigError(msg)
    return times


def _observed(time_months: ArrayLike, event: ArrayLike) -> NDArray[np.float64]:
    """Times of the rows with an event."""
    times, happened = _months(time_months), np.asarray(event)
    if times.ndim != 1 or happened.shape != times.shape or happened.dtype != np.bool_:
        msg = (
            f"time_months is {times.shape}, event {happened.shape} {happened.dtype}: "
            "give one time and one bool (True = death observed) per row"
        )
        raise ShapeError(msg)
    return np.asarray(times[happened], dtype=np.float64)


def _quantiles(deaths: NDArray[np.float64], n_bins: int) -> NDArray[np.float64]:
    """All K+1 edges, from the first to the last death."""
    return np.asarray(np.quantile(deaths, np.linspace(0.0, 1.0, n_bins + 1)), dtype=np.float64)


def _distinct(edges: NDArray[np.float64]) -> bool:
    """Whether no two edges coincide; a single bin has none to speak of."""
    return edges.size <= 2 or bool((np.diff(edges) > 0).all())


def _coinciding(edges: NDArray[np.float64], deaths: NDArray[np.float64]) -> str:
    n_bins = edges.size - 1
    works = next(k for k in range(n_bins - 1, 0, -1) if _distinct(_quantiles(deaths, k)))
    advice = f"--set bins.count={works} works" if works > 1 else "use a cohort or fold with more events"
    found = f"{n_bins} bins of {deaths.size} events have edges {_listed(edges)} months"
    return f"{found}, and some coincide; {advice}"


def _listed(edges: ArrayLike) -> str:
    return "/".join(f"{edge:g}" for edge in np.asarray(edges, dtype=np.float64))
