"""Which clinical columns a survival model may know, and how they enter a regression."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.errors import ShapeError

MAX_LEVELS: Final = 8
MAX_COVARIATES: Final = 50

_LABELS: Final = {"patient_id", "slide_id", "case_id", "time_months", "event", "synthetic"}
# Follow-up in other words, and what came after the diagnosis: as covariates they would know the answer.
_OUTCOME: Final = re.compile(
    r"surviv|censor|death|deceased|vital|follow.?up|last_|recur|progress|relapse|cause_of|respon|outcome|days_to"
    r"|new_(event|neoplasm|tumou?r)|(tumou?r|cancer|disease)_status|(^|[_. ])(os|dss|pfi|pfs|dfi|dfs|rfs|efs)([_. ]|$)",
    re.IGNORECASE,
)
_BOOKKEEPING: Final = re.compile(
    r"^$|^unnamed|^oracle_|consent|obfuscat|freeze|edition|_(rnaseq|cnv|mut)$"
    r"|(^|[_. ])(id|uuid|barcode|file|filename|md5|date)([_. ]|$|_\d+$)",
    re.IGNORECASE,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Column:
    """A coefficient's name and values, NaN where missing; `level`: 1 in the patients of a level, else 0."""

    name: str
    values: Floats
    level: bool = False


def covariates_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of the store's `patients` table that a model of survival may know, by name.

    Left out: identifiers, dates, files, consent and editions of a classification; follow-up, outcomes and events after
    the diagnosis under any of their usual names; planted columns of synthetic cohorts; expression, copy number and
    mutation columns (MCAT's `*_rnaseq`, `*_cnv`, `*_mut`); `cohort` where there is only one.

    Parameters
    ----------
    rows
        Patients as `SELECT * FROM patients` gives them.

    Returns
    -------
    dict
        One value per row, None where the row has none.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    kept = [
        name for name in names if name not in _LABELS and not _OUTCOME.search(name) and not _BOOKKEEPING.search(name)
    ]
    if len({row.get("cohort") for row in rows}) < 2:
        kept = [name for name in kept if name != "cohort"]
    return {name: [row.get(name) for row in rows] for name in kept}


def standardised(risk: ArrayLike, fold: ArrayLike) -> Floats:
    """Risks minus their fold's mean, over its standard deviation (ddof=1): [N]; 0 in a fold where all are equal.

    Risks of different folds come from different models and share no scale; pooled as they are, the folds' offsets
    would drown the ranking.

    Parameters
    ----------
    risk : [N]
        One per patient.
    fold : [N]
        The fold that predicted it.

    Raises
    ------
    ShapeError
        The inputs disagree on N.
    """
    risks, folds = np.asarray(risk, dtype=np.float64), np.asarray(fold)
    if risks.ndim != 1 or folds.shape != risks.shape:
        msg = f"risk is {risks.shape}, fold {folds.shape}: give one of each per patient"
        raise ShapeError(msg)
    found = np.zeros_like(risks)
    for number in np.unique(folds):
        own = folds == number
        if np.ptp(risks[own]) > 0:
            found[own] = (risks[own] - risks[own].mean()) / risks[own].std(ddof=1)
    return found


def encoded(covariates: Mapping[str, Sequence[Any]], n: int) -> tuple[dict[str, tuple[Column, ...]], dict[str, str]]:
    """Columns by covariate, and why the others are left out: the rules are those of `cox_regression`.

    Parameters
    ----------
    covariates
        One value per patient, by name.
    n
        Patients.

    Raises
    ------
    ShapeError
        A covariate has not one value per patient.
    """
    kept: dict[str, tuple[Column, ...]] = {}
    left_out = {}
    for name, values in covariates.items():
        if len(values) != n:
            msg = f"{name}: {len(values)} values for {n} patients; give one per patient"
            raise ShapeError(msg)
        found = _columns(name, [None if _missing(value) else value for value in values])
        if isinstance(found, str):
            left_out[name] = found
        elif len(kept) == MAX_COVARIATES:
            left_out[name] = f"more than {MAX_COVARIATES} covariates"
        else:
            kept[name] = found
    return kept, left_out


def _missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (float, np.floating)) and not math.isfinite(value))


def _columns(name: str, values: Sequence[Any]) -> tuple[Column, ...] | str:
    """A covariate as columns, or why it cannot be one."""
    known = [value for value in values if value is not None]
    absent = len(values) - len(known)
    if 2 * absent > len(values):
        return f"missing in {absent} of {len(values)} patients"
    kinds = {_kind(value) for value in known}
    if len(kinds) > 1 or not kinds <= {"flag", "number", "string"}:
        return f"values of a kind that cannot be used ({', '.join(sorted(kinds))})"
    if len(set(known)) < 2:
        return "constant"
    if kinds == {"flag"}:
        return (Column(f"{name}: true vs false", _numbers(values), level=True),)
    if kinds == {"string"}:
        return _levels(name, values, Counter(known))
    if name.casefold() == "age":
        return (Column(f"{name} (per 10 years)", _numbers(values) / 10),)
    return (Column(name, _numbers(values)),)


def _kind(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "flag"
    if isinstance(value, (int, float, np.number)):
        return "number"
    return "string" if isinstance(value, str) else type(value).__name__


def _numbers(values: Sequence[Any]) -> Floats:
    return np.array([math.nan if value is None else float(value) for value in values])


def _levels(name: str, values: Sequence[Any], counts: Counter[str]) -> tuple[Column, ...] | str:
    if len(counts) > MAX_LEVELS:
        return f"{len(counts)} different values, more than {MAX_LEVELS}"
    reference, *others = sorted(counts, key=lambda level: (-counts[level], level))
    return tuple(
        Column(
            f"{name}: {level} vs {reference}",
            _numbers([None if value is None else value == level for value in values]),
            level=True,
        )
        for level in others
    )
