"""Cox regression of patients on the predicted risk and their clinical columns, one by one and together, by lifelines.

REMARK (doi:10.1093/jnci/dji237) asks of a new marker whether it adds to what is known of the patient: its hazard
ratio beside the standard variables, alone (univariable) and with them (multivariable).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypedDict

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter
from lifelines.exceptions import ConvergenceError, ConvergenceWarning
from numpy.typing import ArrayLike, NDArray

from cftrain.survival.covariates import Column, covariates_of, encoded, standardised
from cftrain.survival.metrics import c_index

__all__ = ["RISK", "CoxTable", "HazardRatio", "covariates_of", "cox_regression", "standardised"]

RISK: Final = "risk (per SD within its fold)"
DEATHS_PER_COEFFICIENT: Final = 5  # Vittinghoff & McCulloch 2007, doi:10.1093/aje/kwk052
_WIDEST: Final = 10.0  # standard error of a log hazard ratio per standard deviation: the likelihood has no peak

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class HazardRatio(TypedDict):
    """One coefficient: hazard ratio with its 95 % Wald limits and p, and the patients and deaths it is from."""

    covariate: str
    hazard_ratio: float
    lower: float
    upper: float
    p_value: float
    n: int
    n_events: int


class CoxTable(TypedDict):
    """Both regressions; `left_out` gives the reason of every covariate that neither has."""

    n: int
    n_events: int
    univariable: list[HazardRatio]
    multivariable: list[HazardRatio]
    multivariable_n: int
    multivariable_n_events: int
    left_out: dict[str, str]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class _Design:
    """The patients and columns of one fit."""

    times: Floats
    event: Flags
    columns: tuple[Column, ...]

    @property
    def matrix(self) -> Floats:
        return np.stack([column.values for column in self.columns], axis=1)

    def of(self, rows: Flags) -> _Design:
        columns = tuple(replace(column, values=column.values[rows]) for column in self.columns)
        return _Design(self.times[rows], self.event[rows], columns)


def cox_regression(
    time_months: ArrayLike, event: ArrayLike, risk_z: ArrayLike, covariates: Mapping[str, Sequence[Any]]
) -> CoxTable:
    """Hazard ratios of the predicted risk and of clinical covariates, each alone and all together.

    Numbers enter as they are (hazard ratio per unit; `age` per 10 years), booleans as true vs false, strings of
    2 to 8 levels against the most frequent one. A covariate is left out where it is constant, missing (None, NaN,
    infinite, an empty string) in more than half of the patients, has more levels, is of another kind, or is past the
    50th that can be used. Each univariable fit uses the patients with a value. Into the multivariable fit go the risk
    and, in the order given, the covariates that had a univariable estimate, each as long as there are still 5 deaths
    per coefficient and at least half of the patients have all values; it uses the patients who have them all.

    A level in which nobody died has no finite hazard ratio: it is NaN, and its patients leave that fit, which is
    the limit of the likelihood. A column that the ones before it determine is NaN in the multivariable fit, which
    goes on without it. A fit that does not converge is NaN throughout. All of these are in `notes`, as are fits
    with fewer than 5 deaths per coefficient.

    Parameters
    ----------
    time_months : [N]
        Follow-up in months.
    event : [N] bool
        True where death was observed.
    risk_z : [N]
        Predicted risk, standardised within its fold (`standardised`), higher = worse.
    covariates
        One value per patient, by name: numbers, bools, strings or None.

    Returns
    -------
    CoxTable
        A plain dict; hazard ratios with 95 % Wald limits, ties by Efron's method.

    Raises
    ------
    NonFiniteError
        A time or a risk is NaN or infinite.
    ShapeError
        The inputs disagree on N, or `event` is not bool.

    References
    ----------
    Cox 1972, doi:10.1111/j.2517-6161.1972.tb00899.x; Efron 1977, doi:10.1080/01621459.1977.10480613.
    """
    c_index(time_months, event, risk_z)  # refuses columns that do not fit
    times, happened = np.asarray(time_months, dtype=np.float64), np.asarray(event)
    risk = np.asarray(risk_z, dtype=np.float64)
    groups, left_out = encoded(covariates, risk.size)
    if risk.size and np.ptp(risk) > 0:
        groups = {"risk": (Column(RISK, risk),)} | groups
    else:
        left_out = {"risk": "constant"} | left_out
    notes: list[str] = []
    univariable: list[HazardRatio] = []
    usable: dict[str, tuple[Column, ...]] = {}
    for name, columns in groups.items():
        rows = _hazard_ratios(_Design(times, happened, columns), name, notes)[0]
        univariable += rows
        if not all(math.isnan(row["hazard_ratio"]) for row in rows):
            usable[name] = columns
    together = _Design(times, happened, _supported(happened, usable, notes))
    multivariable, n, n_events = _hazard_ratios(together, "multivariable", notes)
    return {
        "n": len(times),
        "n_events": int(happened.sum()),
        "univariable": univariable,
        "multivariable": multivariable,
        "multivariable_n": n,
        "multivariable_n_events": n_events,
        "left_out": left_out,
        "notes": notes,
    }


def _supported(event: Flags, groups: Mapping[str, tuple[Column, ...]], notes: list[str]) -> tuple[Column, ...]:
    """The risk, and the covariates for which there are deaths and patients enough together."""
    taken: tuple[Column, ...] = ()
    complete = np.ones(event.shape, dtype=np.bool_)
    without = []
    for name, columns in groups.items():
        known = complete & np.isfinite([column.values for column in columns]).all(axis=0)
        deaths_needed = DEATHS_PER_COEFFICIENT * (len(taken) + len(columns))
        if name == "risk" or (event[known].sum() >= deaths_needed and 2 * known.sum() >= event.size):
            taken, complete = taken + columns, known
        else:
            without.append(name)
    if without:
        reason = "fewer than 5 deaths per coefficient, or values for fewer than half of the patients"
        notes.append(f"multivariable: without {', '.join(without)}: with each, there would be {reason}")
    return taken


def _hazard_ratios(given: _Design, what: str, notes: list[str]) -> tuple[list[HazardRatio], int, int]:
    """Rows of all columns of one fit, its patients and deaths; what could not be estimated is noted."""
    if not given.columns:
        return [], 0, 0
    design = given.of(np.asarray(np.isfinite(given.matrix).all(axis=1)))
    if design.event.any():
        design = _independent(_with_deaths(design, what, notes), what, notes)
    n, n_events = len(design.times), int(design.event.sum())
    if n_events < DEATHS_PER_COEFFICIENT * len(design.columns):
        notes.append(f"{what}: fewer than 5 deaths per coefficient ({n_events} for {len(design.columns)})")
    estimates = _estimates(design, what, notes) if n_events and design.columns else {}
    undefined = (math.nan, math.nan, math.nan, math.nan)
    rows = []
    for column in given.columns:
        ratio, lower, upper, p_value = estimates.get(column.name, undefined)
        rows.append(
            HazardRatio(
                covariate=column.name, hazard_ratio=ratio, lower=lower, upper=upper, p_value=p_value, n=n,
                n_events=n_events,
            )
        )  # fmt: skip
    return rows, n, n_events


def _with_deaths(design: _Design, what: str, notes: list[str]) -> _Design:
    """Without the levels in which nobody died, and without their patients."""
    alive = [c for c in design.columns if c.level and c.values.any() and not c.values[design.event].any()]
    if not alive:
        return design
    inside = np.asarray(np.any([column.values > 0 for column in alive], axis=0))
    names = ", ".join(column.name for column in alive)
    notes.append(f"{what}: nobody died in {names}: no estimate; patients not in the fit: {inside.sum()}")
    kept = tuple(column for column in design.columns if column not in alive)
    return _Design(design.times, design.event, kept).of(~inside)


def _independent(design: _Design, what: str, notes: list[str]) -> _Design:
    """Without the columns that a constant and the columns before them determine."""
    n = len(design.times)
    basis = np.full((n, 1), n**-0.5)  # orthonormal
    kept: list[Column] = []
    for column in design.columns:
        rest = column.values - basis @ (basis.T @ column.values)
        rest -= basis @ (basis.T @ rest)  # once more against rounding
        length = float(np.linalg.norm(rest))
        if length > 1e-6 * np.linalg.norm(column.values):
            basis = np.column_stack([basis, rest / length])
            kept.append(column)
        else:
            notes.append(f"{what}: {column.name} is constant or follows from the columns before it: no estimate")
    return _Design(design.times, design.event, tuple(kept))


def _estimates(design: _Design, what: str, notes: list[str]) -> dict[str, tuple[float, float, float, float]]:
    """Hazard ratio, limits and p by column; nothing where lifelines finds none, with a note."""
    scale = design.matrix.std(axis=0)  # a fit of columns of like size converges; coefficients are scaled back
    frame = pd.DataFrame(design.matrix / scale)
    frame["time"], frame["event"] = design.times, design.event
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # lifelines' ConvergenceWarning is one
            fitted = CoxPHFitter(alpha=0.05).fit(frame, "time", "event")
    except (ConvergenceError, ConvergenceWarning, RuntimeWarning):
        notes.append(f"{what}: the fit does not converge (does a column tell who dies?): no estimate")
        return {}
    found = {}
    spread = fitted.standard_errors_.to_numpy()
    limits = np.column_stack([fitted.params_, fitted.confidence_intervals_]) / scale[:, None]
    for column, error, row, p_value in zip(design.columns, spread, limits, fitted.summary["p"], strict=True):
        if error > _WIDEST:
            notes.append(f"{what}: {column.name} has no finite hazard ratio: no estimate")
        elif np.abs(row).max() > 700:  # exp overflows past 709
            notes.append(f"{what}: a unit of {column.name} is too large a step to write its hazard ratio: no estimate")
        else:
            ratio, lower, upper = (math.exp(value) for value in row)
            found[column.name] = (ratio, lower, upper, float(p_value))
    return found
