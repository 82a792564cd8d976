"""The figures of a report: survival, C-index over folds, training over epochs, risk by outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cftrain.report.groups import RiskGroup, risk_table
from cftrain.report.svg import Plot, dot, drawing, element, padded, polyline, px, text, ticks_between, x_axis, y_axis

MONTH_STEPS = (1, 2, 3, 6, 12, 24, 36, 60, 120, 240, 480)
GROUP_LABELS = {"high": "High risk", "low": "Low risk"}


@dataclass(frozen=True)
class FoldScores:
    """One row of the overview: a metric's value in every fold (NaN: undefined) and their mean and spread."""

    label: str
    kind: str
    mean: float
    std: float
    folds: Sequence[float]


@dataclass(frozen=True)
class Line:
    """One line of a panel over epochs: `kind` is its colour, `values` may hold NaN."""

    label: str
    kind: str
    values: Sequence[float]


@dataclass(frozen=True)
class Marks:
    """What a panel over epochs points out: the reported epoch, the best one, the value that chance reaches."""

    last: int
    best: int | None = None
    chance: float | None = None


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
        died = f"{_count(group.time_months.size, 'patient')}, {_count(int(group.event.sum()), 'death')}"
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
        f"{GROUP_LABELS[group.name]} starts with {_count(group.time_months.size, 'patient')} and ends at "
        f"{group.curve.survival[-1]:.0%} survival after {group.curve.times[-1]:.0f} months."
        for group in groups
    )
    about = " ".join(["Kaplan-Meier curves with 95 % confidence bands.", *seen, f"{p_value}.", note])
    return drawing("kaplan-meier", title, about, (720, top - 12), parts)


def overview_figure(rows: Sequence[FoldScores]) -> str:
    """The C-index of every fold as a dot, mean and standard deviation as a mark on a line, chance at one half."""
    seen = [value for row in rows for value in (*row.folds, row.mean) if not math.isnan(value)]
    low = math.floor(10 * min([*seen, 0.45])) / 10
    ticks = [tick / 10 for tick in range(round(10 * low), 11)]
    plot = Plot(left=152, top=10, width=394, height=34.0 * len(rows), x_range=(low, 1.0))
    parts = [x_axis(plot, ticks, grid=True)]
    parts.append(element("path", d=f"M{px(plot.x(0.5))} {px(plot.top)}V{px(plot.bottom)}", class_="chance"))
    parts.append(text((plot.left + plot.right) / 2, plot.bottom + 36, "C-index (0.5 is chance)", anchor="middle"))
    for place, row in enumerate(rows):
        y = plot.top + 34 * place + 17
        parts.append(text(plot.left - 12, y + 4, row.label, anchor="end"))
        parts += [dot(plot.x(value), y, 4, f"dot {row.kind}-fill") for value in row.folds if not math.isnan(value)]
        if math.isnan(row.mean):
            parts.append(text(plot.left + 6, y + 4, "n/a", css="soft"))
            continue
        spread = 0.0 if math.isnan(row.std) else row.std
        ends = [(plot.x(max(row.mean - spread, low)), y), (plot.x(min(row.mean + spread, 1.0)), y)]
        parts.append(element("path", d=polyline(ends), class_=f"curve {row.kind}"))
        parts.append(element("path", d=f"M{px(plot.x(row.mean))} {px(y - 9)}v18", class_=f"curve {row.kind}"))
    about = "; ".join(f"{row.label}: {_number(row.mean)}" for row in rows)
    return drawing("overview", "C-index of every fold", f"Mean C-index: {about}.", (560, plot.bottom + 46), parts)


def epochs_figure(name: str, heading: str, lines: Sequence[Line], y_range: tuple[float, float], marks: Marks) -> str:
    """One fold's lines over its epochs, the first of them with a dot at the last epoch and a ring at the best one."""
    n_epochs = max(len(line.values) for line in lines)
    plot = Plot(left=38, top=28, width=244, height=130, x_range=(1.0, max(n_epochs, 2)), y_range=y_range)
    parts = [y_axis(plot, ticks_between(*y_range, 6)), x_axis(plot, _epoch_ticks(n_epochs))]
    parts.append(text(plot.left, 16, heading, css="strong"))
    parts.append(text(plot.right, plot.bottom + 33, "Epoch", anchor="end", css="soft"))
    if marks.chance is not None:
        chance = f"M{px(plot.left)} {px(plot.y(marks.chance))}H{px(plot.right)}"
        parts.append(element("path", d=chance, class_="chance"))
    for line in reversed(lines):
        parts += _epoch_line(plot, line)
    first = lines[0]
    for epoch, css in ((marks.best, "ring {}"), (marks.last, "{}-fill")):
        if epoch and epoch <= len(first.values) and math.isfinite(first.values[epoch - 1]):
            parts.append(dot(plot.x(epoch), plot.y(first.values[epoch - 1]), 4.5, css.format(first.kind)))
    ends = "; ".join(f"{line.label}: {_number(line.values[-1])}" for line in lines)
    about = f"{_count(n_epochs, 'epoch')}. After the last one, {ends}."
    return drawing(name, heading, about, (290, plot.bottom + 40), parts)


def risk_figure(
    slide_id: NDArray[np.str_], fold: NDArray[np.int64], event: NDArray[np.bool_], risk: NDArray[np.float64]
) -> str:
    """Risk of every slide as a dot: one strip of deaths and one of censored slides per fold, each with its median."""
    folds = [int(each) for each in np.unique(fold)]
    low, high = padded(float(risk.min()), float(risk.max()))
    plot = Plot(left=148, top=8, width=554, height=84.0 * len(folds), x_range=(low, high))
    parts = [x_axis(plot, ticks_between(low, high, 8), grid=True)]
    parts.append(
        text((plot.left + plot.right) / 2, plot.bottom + 36, "Predicted risk (higher = worse)", anchor="middle")
    )
    medians = []
    for place, each in enumerate(folds):
        top = plot.top + 84 * place
        if place:
            parts.append(element("path", d=f"M0 {px(top)}H{px(plot.right)}", class_="grid"))
        parts.append(text(0, top + 46, f"Fold {each}", css="strong"))
        for died, y in ((True, top + 24), (False, top + 60)):
            rows = (fold == each) & (event == died)
            word = "died" if died else "censored"
            parts.append(text(plot.left - 12, y + 4, f"{word} ({rows.sum()})", anchor="end"))
            if rows.any():
                parts += _strip(plot, y, slide_id[rows], risk[rows], died=died)
                medians.append(f"fold {each} {word} {np.median(risk[rows]):.2f}")
    about = f"{_count(risk.size, 'slide')}. Median risk: {', '.join(medians)}."
    return drawing("risk", "Predicted risk by outcome", about, (720, plot.bottom + 46), parts)


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


def _epoch_line(plot: Plot, line: Line) -> list[str]:
    """A line broken where a value is undefined; a value alone between two gaps becomes a dot."""
    parts, run = [], list[tuple[float, float]]()
    for epoch, value in enumerate([*line.values, math.nan], start=1):
        if math.isfinite(value):
            run.append((plot.x(epoch), plot.y(value)))
            continue
        if len(run) == 1:
            parts.append(dot(*run[0], 2, f"{line.kind}-fill"))
        elif run:
            parts.append(element("path", d=polyline(run), class_=f"curve {line.kind}"))
        run = []
    return parts


def _strip(plot: Plot, y: float, names: NDArray[np.str_], risks: NDArray[np.float64], *, died: bool) -> list[str]:
    """Dots side by side where they would overlap, each with its slide's name, and a tick at their median."""
    css = "dot second-fill" if died else "open plain"
    columns = np.round(np.array([plot.x(risk) for risk in risks]) / 6).astype(int)
    parts = []
    seen: dict[int, int] = {}
    for name, risk, column in sorted(zip(names.tolist(), risks.tolist(), columns.tolist(), strict=True)):
        place = seen[column] = seen.get(column, -1) + 1
        step = min(6.5, 26 / max(int((columns == column).sum()) - 1, 1))
        up = (place + 1) // 2 * step * (1 if place % 2 else -1)
        parts.append(dot(plot.x(risk), y + up, 3, css, title=f"{name}: {risk:.3f}"))
    median = plot.x(float(np.median(risks)))
    parts.append(element("path", d=f"M{px(median)} {px(y - 16)}v32", class_=f"curve {'second' if died else 'plain'}"))
    return parts


def _epoch_ticks(n_epochs: int) -> list[float]:
    """Whole epochs, the first and (room allowing) round ones."""
    step = next(
        step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if n_epochs / step <= 6
    )
    return [1.0, *(float(epoch) for epoch in range(step, n_epochs + 1, step) if epoch > 1)]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "n/a"
