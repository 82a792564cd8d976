"""A fold's lines over its epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cftrain.report.svg import Plot, dot, drawing, element, polyline, px, text, ticks_between, x_axis, y_axis
from cftrain.report.wording import counted, score


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
    ends = "; ".join(f"{line.label}: {score(line.values[-1])}" for line in lines)
    about = f"{counted(n_epochs, 'epoch')}. After the last one, {ends}."
    return drawing(name, heading, about, (290, plot.bottom + 40), parts)


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


def _epoch_ticks(n_epochs: int) -> list[float]:
    """Whole epochs, the first and (room allowing) round ones."""
    step = next(
        step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if n_epochs / step <= 6
    )
    return [1.0, *(float(epoch) for epoch in range(step, n_epochs + 1, step) if epoch > 1)]
