"""Discrimination at several months after the start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cftrain.report.svg import Plot, dot, drawing, element, line, px, text, x_axis, y_axis
from cftrain.report.wording import score, whole_months


@dataclass(frozen=True)
class MonthScores:
    """AUC at one month: its value in every fold (NaN: undefined), their mean and standard deviation."""

    time_months: float
    mean: float
    std: float
    folds: Sequence[float]


def over_time_figure(rows: Sequence[MonthScores]) -> str:
    """AUC by month: a dot per fold, the mean as a level mark, one standard deviation either way as an upright line."""
    seen = [value for row in rows for value in (*row.folds, row.mean) if not math.isnan(value)]
    low = math.floor(10 * min([*seen, 0.45])) / 10
    last = max(row.time_months for row in rows)
    plot = Plot(left=58, top=12, width=352, height=210, x_range=(0.0, 1.08 * last), y_range=(low, 1.0))
    step = 1 if low >= 0.4 else 2
    parts = [y_axis(plot, [tick / 10 for tick in range(10, round(10 * low) - 1, -step)][::-1], "AUC")]
    months = [row.time_months for row in rows]
    parts.append(x_axis(plot, months, labels=[whole_months(month) for month in months]))
    parts.append(line((plot.left, plot.y(0.5)), (plot.right, plot.y(0.5)), "chance"))
    parts.append(text((plot.left + plot.right) / 2, plot.bottom + 36, "Months", anchor="middle"))
    for row in rows:
        parts += _month(plot, row)
    about = "; ".join(f"{whole_months(row.time_months)} months: {score(row.mean)}" for row in rows)
    return drawing("auc", "AUC by month", f"Mean AUC over folds at {about}.", (420, plot.bottom + 46), parts)


def _month(plot: Plot, row: MonthScores) -> list[str]:
    x = plot.x(row.time_months)
    parts = [dot(x, plot.y(value), 4, "dot low-fill") for value in row.folds if not math.isnan(value)]
    if math.isnan(row.mean):
        return parts
    spread, (low, high) = 0.0 if math.isnan(row.std) else row.std, plot.y_range
    ends = plot.y(max(row.mean - spread, low)), plot.y(min(row.mean + spread, high))
    parts.append(line((x, ends[0]), (x, ends[1]), "curve low"))
    parts.append(element("path", d=f"M{px(x - 9)} {px(plot.y(row.mean))}h18", class_="curve low"))
    return parts
