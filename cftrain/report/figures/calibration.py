"""Predicted probabilities against what came true."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cftrain.report.svg import Plot, dot, drawing, element, line, px, text, ticks_between, x_axis, y_axis
from cftrain.report.wording import counted, percent, whole_months


@dataclass(frozen=True)
class CurvePoint:
    """A group of patients: predicted and observed probability to be dead, 95 % limits of the observed (NaN: none)."""

    predicted: float
    observed: float
    lower: float
    upper: float
    n: int


def calibration_figure(points: Sequence[CurvePoint], horizon_months: float) -> str:
    """Observed against predicted probability to be dead by the horizon, groups with limits, diagonal: as predicted."""
    shown = [point for point in points if not math.isnan(point.observed)]
    seen = [value for point in shown for value in (point.predicted, point.observed, point.upper)]
    top = min(max(0.2, math.ceil(5 * max((value for value in seen if not math.isnan(value)), default=1.0)) / 5), 1.0)
    plot = Plot(left=62, top=12, width=300, height=300, x_range=(0.0, top), y_range=(0.0, top))
    ticks = ticks_between(0, top, 5)
    by = f"by {whole_months(horizon_months)} months"
    parts = [y_axis(plot, ticks, f"Observed share of deaths {by}"), x_axis(plot, ticks, grid=True)]
    parts.append(line((plot.x(0), plot.y(0)), (plot.x(top), plot.y(top)), "chance"))
    middle = (plot.left + plot.right) / 2
    parts.append(text(middle, plot.bottom + 36, f"Predicted probability of death {by}", anchor="middle"))
    for point in shown:
        x = plot.x(point.predicted)
        if not math.isnan(point.lower + point.upper):
            ends = f"M{px(x - 4)} {px(plot.y(point.lower))}h8M{px(x - 4)} {px(plot.y(point.upper))}h8"
            upright = f"M{px(x)} {px(plot.y(point.lower))}V{px(plot.y(point.upper))}"
            parts.append(element("path", d=upright + ends, class_="mark open low"))
        about = f"{counted(point.n, 'patient')}: predicted {percent(point.predicted)}, {percent(point.observed)} died"
        parts.append(dot(x, plot.y(point.observed), 4.5, "low-fill", title=about))
    groups = "; ".join(f"{percent(point.predicted)}: {percent(point.observed)}" for point in shown)
    described = f"{counted(len(shown), 'group')} of patients. Predicted and observed: {groups or 'none'}."
    return drawing("calibration", f"Calibration {by}", described, (374, plot.bottom + 46), parts)


def deciles_figure(counts: Sequence[float]) -> str:
    """Patients by the survival predicted for the end of their follow-up, beside the equal counts of right curves."""
    expected = sum(counts) / len(counts)
    highest = max(*counts, expected) or 1.0
    plot = Plot(left=62, top=12, width=300, height=300, x_range=(0.0, 1.0), y_range=(0.0, 1.08 * highest))
    parts = [y_axis(plot, ticks_between(0, highest, 6), "Patients"), x_axis(plot, ticks_between(0, 1, 5))]
    for place, count in enumerate(counts):
        left, right = plot.x(place / len(counts)) + 1.5, plot.x((place + 1) / len(counts)) - 1.5
        outline = f"M{px(left)} {px(plot.bottom)}V{px(plot.y(count))}H{px(right)}V{px(plot.bottom)}Z"
        parts.append(element("path", d=outline, class_="bar low-fill"))
    parts.append(line((plot.left, plot.y(expected)), (plot.right, plot.y(expected)), "chance"))
    middle = (plot.left + plot.right) / 2
    parts.append(text(middle, plot.bottom + 36, "Predicted survival at the end of follow-up", anchor="middle"))
    each = ", ".join(f"{count:.1f}" for count in counts)
    about = f"Patients per tenth of predicted survival, from the lowest: {each}; {expected:.1f} expected in each."
    return drawing("deciles", "D-calibration", about, (374, plot.bottom + 46), parts)
