"""What a summary says of calibration, in a figure's rows and in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cftrain.report.figures import CurvePoint
from cftrain.report.wording import counted, defined, number, p_value, percent, whole_months

_AGAINST = 0.05
"""A D-calibration p below this speaks against the predicted curves."""


def curve_points(calibration: Mapping[str, Any] | None) -> list[CurvePoint]:
    """The groups of the calibration curve."""
    return [
        CurvePoint(
            predicted=number(point["predicted"]),
            observed=number(point["observed"]),
            lower=number(point["lower"]),
            upper=number(point["upper"]),
            n=point["n"],
        )
        for point in (calibration["points"] if calibration else [])
    ]


def calibration_sentences(calibration: Mapping[str, Any]) -> list[str]:
    """What the numbers mean: how far off at the horizon, to which side, and whether the whole curve fits."""
    said = [_how_far(calibration), _which_side(curve_points(calibration)), _whole_curve(calibration["d_calibration"])]
    return [sentence for sentence in said if sentence]


def _how_far(calibration: Mapping[str, Any]) -> str:
    ici, e50, e90 = (calibration[name] for name in ("ici", "e50", "e90"))
    if not (defined(ici) and defined(e50) and defined(e90)):
        return ""
    return (
        f"Predicted and observed probability of death by {whole_months(calibration['horizon_months'])} months are "
        f"{_points(ici)} percentage points apart on average over patients (ICI), at most {_points(e50)} for half of "
        f"them (E50) and at most {_points(e90)} for nine in ten (E90)."
    )


def _points(difference: float) -> str:
    return percent(difference).removesuffix(" %")


def _which_side(groups: list[CurvePoint]) -> str:
    shown = [group for group in groups if defined(group.observed)]
    if not shown:
        return ""
    fewer = sum(group.observed < group.predicted for group in shown)
    limited = [group for group in shown if defined(group.lower) and defined(group.upper)]
    inside = sum(group.lower <= group.predicted <= group.upper for group in limited)
    within = f"; the 95 % limits hold the prediction in {inside} of {len(limited)}" if limited else ""
    return f"Fewer died than predicted in {fewer} of {counted(len(shown), 'group')}{within}."


def _whole_curve(test: Mapping[str, Any]) -> str:
    p = test["p_value"]
    if not defined(p):
        return ""
    if p < _AGAINST:
        return f"Over the whole follow-up the predicted curves do not fit (D-calibration {p_value(p)})."
    return (
        f"Over the whole follow-up no misfit was found (D-calibration {p_value(p)}); with many censored patients "
        "this test rarely finds one."
    )
