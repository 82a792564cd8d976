"""The C-index: of every fold with its interval, and over folds by the rule that chose the epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cftrain.report.svg import Plot, dot, drawing, element, line, polyline, px, text, whisker, x_axis
from cftrain.report.wording import NOTHING, limits, score

_HEAD = 24
_FOLD = 22
_RULE = 30
_WIDTH = 706


@dataclass(frozen=True)
class FoldScores:
    """One row of the overview: a metric's value in every fold (NaN: undefined) and their mean and spread."""

    label: str
    kind: str
    mean: float
    std: float
    folds: Sequence[float]


@dataclass(frozen=True)
class Interval:
    """A value with the limits of its interval, each NaN where undefined; `strong` sets a mean apart from its folds."""

    label: str
    value: float
    lower: float
    upper: float
    strong: bool = False


def overview_figure(rows: Sequence[FoldScores], intervals: Sequence[Interval] = (), heading: str = "") -> str:
    """C-index of folds with intervals under their `heading`; below, by rule, folds as dots with mean and deviation."""
    seen = [value for row in rows for value in (*row.folds, row.mean)]
    seen += [value for each in intervals for value in (each.value, each.lower, each.upper)]
    low = math.floor(10 * min([value for value in seen if not math.isnan(value)] + [0.45])) / 10
    above = _HEAD + _FOLD * len(intervals) + 10 if intervals else 0
    plot = Plot(left=152, top=4, width=394, height=above + _HEAD + _RULE * len(rows), x_range=(low, 1.0))
    parts = [x_axis(plot, [tick / 10 for tick in range(round(10 * low), 11)], grid=True)]
    parts.append(line((plot.x(0.5), plot.top), (plot.x(0.5), plot.bottom), "chance"))
    parts.append(text((plot.left + plot.right) / 2, plot.bottom + 36, "C-index (0.5 is chance)", anchor="middle"))
    if intervals:
        parts.append(_heading(plot, 0, heading))
    for place, each in enumerate(intervals):
        parts += _interval(plot, plot.top + _HEAD + _FOLD * (place + 0.5), each)
    parts.append(_heading(plot, above, "Mean and standard deviation over folds, by rule"))
    for place, row in enumerate(rows):
        parts += _row(plot, plot.top + above + _HEAD + _RULE * (place + 0.5), row)
    about = "; ".join([f"{row.label}: {score(row.mean)}" for row in rows])
    spans = "; ".join(f"{each.label}: {_in_words(each)}" for each in intervals)
    described = f"Mean C-index: {about}." + (f" {heading}: {spans}." if spans else "")
    return drawing("overview", "C-index of every fold", described, (_WIDTH, plot.bottom + 46), parts)


def _heading(plot: Plot, below: float, words: str) -> str:
    ground = element("rect", x="0", y=px(plot.top + below), width=px(_WIDTH), height=px(_HEAD - 4), class_="ground")
    return ground + text(0, plot.top + below + 14, words, css="strong")


def _interval(plot: Plot, y: float, each: Interval) -> list[str]:
    css = "strong" if each.strong else ""
    parts = [text(plot.left - 12, y + 4, each.label, anchor="end", css=css)]
    parts.append(text(plot.right + 14, y + 4, _in_words(each), css=css))
    if not math.isnan(each.lower + each.upper):
        parts.append(whisker((plot.x(each.lower), plot.x(each.upper)), y, "low"))
    if not math.isnan(each.value):
        parts.append(_diamond(plot.x(each.value), y) if each.strong else dot(plot.x(each.value), y, 4, "low-fill"))
    return parts


def _diamond(x: float, y: float) -> str:
    return element("path", d=f"M{px(x - 6)} {px(y)}l6 -6l6 6l-6 6Z", class_="low-fill")


def _in_words(each: Interval) -> str:
    span = limits({"lower": each.lower, "upper": each.upper})
    return f"{score(each.value)} ({span})" if not math.isnan(each.value) else NOTHING


def _row(plot: Plot, y: float, row: FoldScores) -> list[str]:
    parts = [text(plot.left - 12, y + 4, row.label, anchor="end")]
    parts += [dot(plot.x(value), y, 4, f"dot {row.kind}-fill") for value in row.folds if not math.isnan(value)]
    if math.isnan(row.mean):
        return [*parts, text(plot.right + 14, y + 4, NOTHING, css="soft")]
    spread, (low, high) = 0.0 if math.isnan(row.std) else row.std, plot.x_range
    ends = [(plot.x(max(row.mean - spread, low)), y), (plot.x(min(row.mean + spread, high)), y)]
    parts.append(element("path", d=polyline(ends), class_=f"curve {row.kind}"))
    parts.append(element("path", d=f"M{px(plot.x(row.mean))} {px(y - 9)}v18", class_=f"curve {row.kind}"))
    return [*parts, text(plot.right + 14, y + 4, f"{score(row.mean)} ± {score(row.std)}")]
