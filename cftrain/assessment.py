"""How good a cross-validated model is: discrimination, error and calibration of its validated patients.

Risks of different folds come from different models and share no scale, so everything that ranks is computed within
folds and summed up over them; probabilities do share one, so calibration pools the folds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cftrain.errors import ConfigError, ShapeError
from cftrain.survival.calibration import calibration_curve, cut_at, d_calibration
from cftrain.survival.curves import survival_at, survival_at_own_time
from cftrain.survival.ipcw import (
    DynamicAUC,
    IntegratedBrier,
    bootstrap_uno_c,
    cumulative_dynamic_auc,
    integrated_brier_score,
    reference_brier_score,
    supported_tau,
    uno_c_index,
)
from cftrain.survival.metrics import PatientLevel, c_index, summarise
from cftrain.survival.resampling import bootstrap_c_index, bootstrap_weights, percentile_interval

Floats = NDArray[np.float64]
Predicted = tuple[Floats, tuple[float, ...], PatientLevel]  # survival, edges, patients of a fold

MONTHS = (12.0, 24.0, 36.0, 60.0)
"""Where AUC and calibration are reported, as far as the data reach."""
_FEW = 5  # dead or alive patients below which an AUC gets a note
_GRID = 100  # points of the integral over the Brier score


@dataclass(frozen=True, eq=False)
class FoldOutcome:
    """What one fold of a cross-validation trained on and predicted.

    Parameters
    ----------
    fold
        Its number.
    train_time : [Q]
        Follow-up in months of the training patients, one row each.
    train_event : [Q] bool
        True where death was observed.
    patients : [P] PatientLevel
        The validated patients with their risk.
    survival : [P, K], optional
        Mean predicted survival after each bin of a patient's slides; None where the model only ranks (Cox loss).
    edges : [K-1]
        Interior edges of the bins in months.
    """

    fold: int
    train_time: Floats
    train_event: NDArray[np.bool_]
    patients: PatientLevel
    survival: Floats | None
    edges: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _Assessed:
    """One fold: its entry in the result, and its concordances on resampled patients."""

    entry: dict[str, Any]
    c_index: Floats
    uno_c: Floats


def assess(folds: Sequence[FoldOutcome], *, replicates: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Assess the validated patients of all folds: plain Python for JSON, except that undefined numbers are NaN.

    Under "folds", for each fold: Harrell's and Uno's C with 95 % intervals, AUC at 12, 24, 36 and 60 months, and the
    integrated Brier score beside that of the training patients' Kaplan-Meier curve. Beside it their means over
    folds; the intervals of the two means come from resampling patients within folds, with the models as they are,
    so they hold the uncertainty of the validated patients and not that of training. Under "calibration", of all
    folds pooled: predicted against observed deaths by the largest of those months that the predicted curves of all
    folds reach, and D-calibration over the whole curves; None where no fold has probabilities.

    Uno's C counts deaths before a fold's `tau` (`supported_tau`), the Brier score is integrated from the fold's
    shortest follow-up to tau or the last interior edge. AUC months supported by half of the folds or fewer are
    left out. What the data do not define is NaN, and "notes" says why, those of a fold in its own.

    Parameters
    ----------
    folds
        At least one.
    replicates
        Resamples for the intervals.
    seed
        Of the resamples, 0 or above; each fold has its own, whatever the others are.

    Returns
    -------
    dict
        Keys "unit", "replicates", "seed", "folds", "c_index", "uno_c", "auc", "auc_mean", "ibs", "calibration",
        "notes".

    Raises
    ------
    ConfigError
        There is no fold, two have one number, or a survival is no probability.
    NonFiniteError
        A time, a risk or a survival is NaN or infinite.
    ShapeError
        Arrays of a fold disagree in length.

    References
    ----------
    Collins et al. 2024 (TRIPOD+AI), doi:10.1136/bmj-2023-078378, on reporting intervals, heterogeneity and
    calibration; each metric names its own.
    """
    _check(folds)
    months, notes = _auc_months(folds)
    assessed = [_assess_fold(outcome, months, replicates, seed) for outcome in folds]
    entries = [one.entry for one in assessed]
    return {
        "unit": "patient",
        "replicates": replicates,
        "seed": seed,
        "folds": entries,
        "c_index": _with_interval([entry["c_index"]["value"] for entry in entries], [one.c_index for one in assessed]),
        "uno_c": _with_interval([entry["uno_c"]["value"] for entry in entries], [one.uno_c for one in assessed]),
        "auc": [_auc_over_folds(entries, row, month) for row, month in enumerate(months)],
        "auc_mean": dict(summarise([entry["auc_mean"] for entry in entries])),
        "ibs": dict(summarise([entry["ibs"]["value"] for entry in entries]))
        | {"kaplan_meier": summarise([entry["ibs"]["kaplan_meier"] for entry in entries])["mean"]},
        "calibration": _calibration(folds),
        "notes": notes,
    }


def _check(folds: Sequence[FoldOutcome]) -> None:
    numbers = [outcome.fold for outcome in folds]
    if not folds or len(set(numbers)) < len(numbers):
        msg = f"folds are {numbers}: give at least one, and each once"
        raise ConfigError(msg)
    for outcome in folds:
        n = outcome.patients.time_months.size
        if outcome.survival is not None and outcome.survival.shape != (n, len(outcome.edges) + 1):
            found = f"fold {outcome.fold}: survival is {outcome.survival.shape}"
            msg = f"{found}, with {n} patients and {len(outcome.edges)} edges; give a row per patient, a column per bin"
            raise ShapeError(msg)


def _assess_fold(outcome: FoldOutcome, months: Floats, replicates: int, seed: int) -> _Assessed:
    who = outcome.patients
    head = {"fold": outcome.fold, "n_patients": int(who.time_months.size), "n_events": int(who.event.sum())}
    if not who.time_months.size:
        return _nothing_to_assess(head, who, months, replicates)
    own_seed = int(np.random.SeedSequence([seed, outcome.fold]).generate_state(1)[0])
    train, test = (outcome.train_time, outcome.train_event), (who.time_months, who.event, who.risk)
    tau = supported_tau(*train, who.time_months)
    notes = [] if head["n_events"] else ["nobody has died: nothing that compares the dead with the living is defined"]
    harrell = bootstrap_c_index(*test, replicates=replicates, seed=own_seed)
    uno, uno_resampled = uno_c_index(*train, *test, tau), np.full(replicates, math.nan)
    if not math.isnan(uno.value):
        weights = bootstrap_weights(who.time_months.size, replicates, own_seed)
        uno_resampled = bootstrap_uno_c(*train, *test, tau, weights)
    auc = cumulative_dynamic_auc(*train, *test, months)
    at_months = _auc_entries(auc, months, who)
    ibs, reference = _integrated_brier(outcome, tau)
    entry = head | {
        "c_index": {"value": c_index(*test)} | _limits(harrell),
        "uno_c": {"value": uno.value} | _limits(uno_resampled) | {"tau": uno.tau},
        "auc": at_months,
        "auc_mean": auc.mean,
        "ibs": _ibs_entry(ibs, reference),
        "notes": list(dict.fromkeys([*notes, *uno.notes, *auc.notes, *_few(at_months), *ibs.notes])),
    }
    return _Assessed(entry, harrell, uno_resampled)


def _nothing_to_assess(head: dict[str, Any], who: PatientLevel, months: Floats, replicates: int) -> _Assessed:
    undefined = IntegratedBrier(math.nan, math.nan, math.nan, ())
    resampled = np.full(replicates, math.nan)
    entry = head | {
        "c_index": {"value": math.nan} | _limits(resampled),
        "uno_c": {"value": math.nan} | _limits(resampled) | {"tau": math.nan},
        "auc": _auc_entries(None, months, who),
        "auc_mean": math.nan,
        "ibs": _ibs_entry(undefined, undefined),
        "notes": ["no patient was validated"],
    }
    return _Assessed(entry, resampled, resampled)


def _auc_months(folds: Sequence[FoldOutcome]) -> tuple[Floats, list[str]]:
    """Months that more than half of the folds support, and a note on the others."""
    count = dict.fromkeys(MONTHS, 0)
    for outcome in folds:
        who = outcome.patients
        if who.time_months.size:
            found = cumulative_dynamic_auc(
                outcome.train_time, outcome.train_event, who.time_months, who.event, who.risk, MONTHS
            )
            for month in found.times:
                count[month] += 1
    kept = np.array([month for month in MONTHS if 2 * count[month] > len(folds)])
    notes = [
        f"AUC at {month:g} months left out: {count[month]} of {len(folds)} folds support it"
        for month in MONTHS
        if month not in kept
    ]
    return kept, notes


def _auc_entries(found: DynamicAUC | None, months: Floats, who: PatientLevel) -> list[dict[str, Any]]:
    """AUC at each month, and how many patients it compares: dead by then, and followed for longer."""
    values = {} if found is None else dict(zip(found.times.tolist(), found.values.tolist(), strict=True))
    return [
        {
            "time_months": month,
            "value": values.get(month, math.nan),
            "n_dead": int((who.event & (who.time_months <= month)).sum()),
            "n_alive": int((who.time_months > month).sum()),
        }
        for month in months.tolist()
    ]


def _few(auc: list[dict[str, Any]]) -> list[str]:
    """A note on each AUC that compares fewer patients than one should trust."""
    return [
        f"AUC at {one['time_months']:g} months rests on {one['n_dead']} dead and {one['n_alive']} alive: read with care"
        for one in auc
        if not math.isnan(one["value"]) and min(one["n_dead"], one["n_alive"]) < _FEW
    ]


def _auc_over_folds(entries: list[dict[str, Any]], row: int, month: float) -> dict[str, Any]:
    return {"time_months": float(month)} | dict(summarise([entry["auc"][row]["value"] for entry in entries]))


def _integrated_brier(outcome: FoldOutcome, tau: float) -> tuple[IntegratedBrier, IntegratedBrier]:
    """Of the model and of the training patients' Kaplan-Meier curve, over the same months."""
    why, first = "", float(outcome.patients.time_months.min())
    last = float(np.min([tau, outcome.edges[-1] if outcome.edges else 0.0]))
    if outcome.survival is None:
        why = "no Brier score: the model ranks and predicts no probabilities"
    elif not first < last:
        why = "integrated Brier score is undefined: no months that follow-up, weights and predicted curves all reach"
    if outcome.survival is None or why:
        undefined = IntegratedBrier(math.nan, math.nan, math.nan, (why,))
        return undefined, undefined
    months = np.linspace(first, last, _GRID)
    data = (outcome.train_time, outcome.train_event, outcome.patients.time_months, outcome.patients.event)
    predicted = survival_at(outcome.survival, outcome.edges, months)
    return integrated_brier_score(*data, predicted, months), reference_brier_score(*data, months)


def _ibs_entry(ibs: IntegratedBrier, reference: IntegratedBrier) -> dict[str, float]:
    months = {"from_months": ibs.from_months, "to_months": ibs.to_months}
    return {"value": ibs.value, "kaplan_meier": reference.value} | months


def _limits(resampled: Floats) -> dict[str, float]:
    lower, upper = percentile_interval(resampled)
    return {"lower": lower, "upper": upper}


def _with_interval(values: list[float], resampled: list[Floats]) -> dict[str, Any]:
    """Mean over folds, and its interval: in each resample the mean of the folds that define it."""
    stacked = np.stack(resampled)
    defined = ~np.isnan(stacked)
    count = defined.sum(axis=0)
    total = np.where(defined, stacked, 0.0).sum(axis=0)
    means = np.divide(total, count, out=np.full(count.shape, math.nan), where=count > 0)
    return dict(summarise(values)) | _limits(means)


def _calibration(folds: Sequence[FoldOutcome]) -> dict[str, Any] | None:
    """Calibration of the pooled patients of the folds with probabilities."""
    able = [
        (outcome.survival, outcome.edges, outcome.patients)
        for outcome in folds
        if outcome.survival is not None and outcome.patients.time_months.size
    ]
    if not able:
        return None
    reach = min(edges[-1] if edges else 0.0 for _, edges, _ in able)
    if reach == 0:
        return _no_calibration("no calibration: with a single time bin no probability is predicted")
    horizon = max((month for month in MONTHS if month <= reach), default=reach)
    whole = d_calibration(*_at_end_of_follow_up(able))
    curve = calibration_curve(
        np.concatenate([who.time_months for _, _, who in able]),
        np.concatenate([who.event for _, _, who in able]),
        np.concatenate([1 - survival_at(survival, edges, [horizon])[:, 0] for survival, edges, _ in able]),
        horizon,
    )
    notes = [*curve.notes, "D-calibration: follow-up beyond a fold's last interior edge counts as censored there"]
    if len(able) < len(folds):
        notes.append(f"{len(folds) - len(able)} of {len(folds)} folds have no probabilities and are left out")
    return {
        "horizon_months": float(horizon),
        "points": [asdict(point) for point in curve.points],
        "ici": curve.ici,
        "e50": curve.e50,
        "e90": curve.e90,
        "d_calibration": {"statistic": whole.statistic, "p_value": whole.p_value, "counts": whole.counts.tolist()},
        "notes": notes,
    }


def _at_end_of_follow_up(able: list[Predicted]) -> tuple[Floats, NDArray[np.bool_]]:
    """Survival predicted for the end of each patient's follow-up, or of the curve, and whether they died there."""
    reached, died = [], []
    for survival, edges, who in able:
        times, event = cut_at(who.time_months, who.event, edges[-1])
        reached.append(survival_at_own_time(survival, edges, times))
        died.append(event)
    return np.concatenate(reached), np.concatenate(died)


def _no_calibration(why: str) -> dict[str, Any]:
    empty = {"statistic": math.nan, "p_value": math.nan, "counts": []}
    undefined = {"ici": math.nan, "e50": math.nan, "e90": math.nan}
    return {"horizon_months": math.nan, "points": []} | undefined | {"d_calibration": empty, "notes": [why]}
