"""How well a run does on the labelled among the slides that it was applied to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cftrain.assessment import MONTHS
from cftrain.examples import Example
from cftrain.prediction.ensemble import Ensemble
from cftrain.results import SlideRows, scores
from cftrain.survival import PatientLevel, log_rank_median_split
from cftrain.survival.calibration import calibration_curve, cut_at, d_calibration
from cftrain.survival.ipcw import integrated_brier_score, reference_brier_score, supported_tau
from cftrain.survival.resampling import bootstrap_weights, percentile_interval, weighted_c_index

Floats = NDArray[np.float64]
_GRID: Final = 100  # points of the integral over the Brier score
_WEIGHTS: Final = "censoring weights and the Kaplan-Meier reference are those of the predicted patients themselves"


def measure(
    examples: Sequence[Example], rows: Sequence[int], ensemble: Ensemble, *, replicates: int, seed: int
) -> dict[str, Any]:
    """C-indices with 95 % intervals, log-rank, integrated Brier score and calibration: undefined numbers are NaN.

    Intervals come from resampling patients, with the models as they are; slides go with their patient. Uno's C is
    not computed: its weights are to come from the training patients, whose labels are not in a run directory.

    Parameters
    ----------
    examples
        Those with a label; at least one.
    rows
        Where they are among those of `ensemble`.
    replicates, seed
        Of the resamples.

    Returns
    -------
    dict
        Keys "c_index", "c_index_patient", "members", "log_rank", "brier", "calibration"; the last two None where the
        run predicts no probabilities.
    """
    own, risk = SlideRows.of(examples), ensemble.risk[list(rows)]
    patients = own.patients(risk)
    per_slide, per_patient = scores(examples, risk)
    slides, people = _resampled(own, patients, risk, replicates, seed)
    split = log_rank_median_split(patients.time_months, patients.event, patients.risk)
    probable = ensemble.reach > 0
    return {
        "c_index": _with_limits(per_slide, slides),
        "c_index_patient": _with_limits(per_patient, people),
        "members": [scores(examples, each[list(rows)])[1] for each in ensemble.member_risk.T],
        "log_rank": {
            "p": split.p_value,
            "n_high": split.n_high,
            "n_low": split.n_low,
            "split": "risk at or above the median of the predicted patients",
            "unit": "patient",
        },
        "brier": _brier(own, patients, rows, ensemble) if probable else None,
        "calibration": _calibration(own, patients, rows, ensemble) if probable else None,
    }


def _resampled(
    own: SlideRows, patients: PatientLevel, risk: Floats, replicates: int, seed: int
) -> tuple[Floats, Floats]:
    """The C-index per slide and per patient, each on the same resamples of patients: [replicates] twice."""
    place = {patient: row for row, patient in enumerate(patients.patient_id.tolist())}
    weights = bootstrap_weights(len(place), replicates, seed)
    of_slides = weights[:, [place[patient] for patient in own.patient_id]]
    slides = weighted_c_index(own.time_months, own.event, risk[own.example][None], of_slides)[0]
    people = weighted_c_index(patients.time_months, patients.event, patients.risk[None], weights)[0]
    return slides, people


def _with_limits(value: float, resampled: Floats) -> dict[str, float]:
    lower, upper = percentile_interval(resampled)
    return {"value": value, "lower": lower, "upper": upper}


def _of_patients(own: SlideRows, values: ArrayLike) -> Floats:
    """Means over the slides of each patient: [P, ...] of values of examples [N, ...]."""
    given = np.asarray(values, dtype=np.float64)
    if given.ndim == 1:
        return own.patients(given).risk
    return np.stack([own.patients(column).risk for column in given.T], axis=1)


def _brier(own: SlideRows, patients: PatientLevel, rows: Sequence[int], ensemble: Ensemble) -> dict[str, Any]:
    labels = (patients.time_months, patients.event)
    first, last = float(labels[0].min()), float(np.min([supported_tau(*labels, labels[0]), ensemble.reach]))
    if not first < last:
        why = "integrated Brier score is undefined: no months that follow-up, weights and predicted curves all reach"
        return {"value": math.nan, "kaplan_meier": math.nan, "from_months": math.nan, "to_months": math.nan} | {
            "notes": [why]
        }
    months = np.linspace(first, last, _GRID)
    predicted = _of_patients(own, ensemble.survival_at(months, rows))
    found = integrated_brier_score(*labels, *labels, predicted, months)
    reference = reference_brier_score(*labels, *labels, months)
    return {
        "value": found.value,
        "kaplan_meier": reference.value,
        "from_months": found.from_months,
        "to_months": found.to_months,
        "notes": [_WEIGHTS, *found.notes],
    }


def _calibration(own: SlideRows, patients: PatientLevel, rows: Sequence[int], ensemble: Ensemble) -> dict[str, Any]:
    """Predicted against observed deaths by the largest of 12, 24, 36, 60 months in reach, and D-calibration."""
    reach = ensemble.reach
    horizon = max((month for month in MONTHS if month <= reach), default=reach)
    labels = (patients.time_months, patients.event)
    dead = _of_patients(own, 1 - ensemble.survival_at(np.array([horizon]), rows)[:, 0])
    curve = calibration_curve(*labels, dead, horizon)
    reached = _of_patients(own, ensemble.survival_at_own_time(_times_of_examples(own, reach), rows))
    whole = d_calibration(reached, cut_at(*labels, reach)[1])
    return {
        "horizon_months": float(horizon),
        "points": [asdict(point) for point in curve.points],
        "ici": curve.ici,
        "e50": curve.e50,
        "e90": curve.e90,
        "d_calibration": {"statistic": whole.statistic, "p_value": whole.p_value, "counts": whole.counts.tolist()},
        "notes": [*curve.notes, f"D-calibration: follow-up beyond {reach:g} months counts as censored there"],
    }


def _times_of_examples(own: SlideRows, reach: float) -> Floats:
    """Follow-up of every example, cut at the end of the curves."""
    first = np.unique(own.example, return_index=True)[1]
    return np.minimum(own.time_months[first], reach)
