"""Kaplan-Meier curves of risk groups, with the numbers at risk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cftrain.report.groups import RiskGroup, risk_table
from cftrain.report.svg import Plot, drawing, element, polyline, px, text, x_axis, y_axis
from cftrain.report.wording import counted

MONTH_STEPS = (1, 2, 3, 6, 12, 24, 36, 60, 120, 240, 480)
GROUP_LABELS = {"high": "High risk", "low": "Low risk"}


def kaplan_meier_figure(groups: Sequence[RiskGroup], p_value: str, note: str = "") -> str:
    """Survival of the risk groups with 95 % bands, censoring marks, and the numbers at risk under the time axis.

    `note` stands in the drawing itself, for what must stay with it when it leaves the page.
    """
    last = max(float(group.time_months.max()) for group in groups)
    plot = Plot(left=92, top=56, width=610, height=300, x_range=(0.0, last or 1.0))
    months = month_ticks(last)
    parts = [y_axis(plot, [0, 0.25, 0.5, 0.75, 1], "Survival"), x_axis(plot, months)]
    parts.append(text((plot.left + plot.right) / 2, plot.bottom + 36, "Months of follow-up", anchor="middle"))
    for place, group in enumerate(groups):
        parts += [_band(plot, group), _steps(plot, group), _censor_marks(plot, group)]
        died = f"{counted(group.time_months.size, 'patient')}, {counted(int(group.event.sum()), 'death')}"
        y = 16 + 19 * place
        parts.append(element("path", d=f"M{px(plot.left)} {px(y - 4)}h22", class_=f"curve {group.name}"))
        parts.append(text(plot.left + 30, y, f"{GROUP_LABELS[group.name]}: {died}"))
    parts.append(text(plot.right, 16, p_value, anchor="end"))
    if note:
        parts.append(text(plot.right, 35, note, anchor="end", css="strong"))
    top = plot.bottom + 66
    for group in groups:
        parts.append(_risk_rows(plot, group, months, top))
        top += 76
    title = "Survival of patients with high and low predicted risk"
    seen = (
        f"{GROUP_LABELS[group.name]} starts with {counted(group.time_months.size, 'patient')} and ends at "
        f"{group.curve.survival[-1]:.0%} survival after {group.curve.times[-1]:.0f} months."
        for group in groups
    )
    about = " ".join(["Kaplan-Meier curves with 95 % confidence bands.", *seen, f"{p_value}.", note])
    return drawing("kaplan-meier", title, about, (720, top - 12), parts)


def month_ticks(last: float) -> list[float]:
    """Months from 0 to at most `last`, in calendar steps, at most nine of them."""
    step = next((step for step in MONTH_STEPS if last / step < 9), math.ceil(last / 8))
    return [float(month) for month in range(0, math.floor(last) + 1, step)]


def _band(plot: Plot, group: RiskGroup) -> str:
    curve = group.curve
    upper = _step_points(plot, curve.times, curve.upper)
    lower = _step_points(plot, curve.times, curve.lower)
    return element("path", d=f"{polyline([*upper, *reversed(lower)])}Z", class_=f"band {group.name}-fill")


def _steps(plot: Plot, group: RiskGroup) -> str:
    points = _step_points(plot, group.curve.times, group.curve.survival)
    return element("path", d=polyline(points), class_=f"curve {group.name}")


def _step_points(plot: Plot, times: NDArray[np.float64], values: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Corners of a right-continuous step function that starts at 1."""
    points, before = [], 1.0
    for time, value in zip(times.tolist(), values.tolist(), strict=True):
        points.append((plot.x(time), plot.y(before)))
        if value != before:
            points.append((plot.x(time), plot.y(value)))
        before = value
    return points


def _censor_marks(plot: Plot, group: RiskGroup) -> str:
    """A small tick on the curve wherever somebody was last seen alive."""
    curve = group.curve
    times = np.unique(group.time_months[~group.event])
    values = curve.survival[np.searchsorted(curve.times, times)]
    pairs = zip(times.tolist(), values.tolist(), strict=True)
    ticks = "".join(f"M{px(plot.x(time))} {px(plot.y(value) - 4)}v8" for time, value in pairs)
    return element("path", d=ticks, class_=f"mark {group.name}") if ticks else ""


def _risk_rows(plot: Plot, group: RiskGroup, months: Sequence[float], top: float) -> str:
    table = risk_table(group, months)
    parts = [text(0, top, GROUP_LABELS[group.name], css=f"strong {group.name}-fill")]
    for place, (label, numbers) in enumerate(
        (("At risk", table.at_risk), ("Censored", table.censored), ("Events", table.events))
    ):
        y = top + 18 * (place + 1)
        parts.append(text(0, y, label, css="soft"))
        parts += [
            text(plot.x(month), y, str(number), anchor="middle")
            for month, number in zip(months, numbers.tolist(), strict=True)
        ]
    return "".join(parts)
