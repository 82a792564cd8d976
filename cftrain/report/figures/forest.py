"""Hazard ratios with their limits on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cftrain.report.svg import Plot, dot, drawing, element, line, px, text, x_axis
from cftrain.report.wording import hazard_ratio

TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Limits beyond the outermost of these end in an arrow."""
LONGEST_LABEL = 30
_ROW = 34


@dataclass(frozen=True)
class HazardBar:
    """A hazard ratio with its 95 % limits; NaN where there is no estimate."""

    hazard_ratio: float
    lower: float
    upper: float

    @property
    def estimated(self) -> bool:
        """Whether there is an estimate."""
        return not math.isnan(self.hazard_ratio + self.lower + self.upper)


@dataclass(frozen=True)
class HazardRow:
    """A covariate alone, and beside the others (None: it is not in that fit)."""

    covariate: str
    alone: HazardBar | None
    together: HazardBar | None


def forest_figure(rows: Sequence[HazardRow]) -> str:
    """Every covariate's hazard ratio alone (open) above the one beside the others (filled), on a logarithmic axis."""
    ticks = _ticks(rows)
    plot = Plot(left=212, top=6, width=468, height=_ROW * len(rows), x_range=(math.log(ticks[0]), math.log(ticks[-1])))
    parts = [x_axis(plot, [math.log(tick) for tick in ticks], grid=True, labels=[f"{tick:g}" for tick in ticks])]
    parts.append(line((plot.x(0.0), plot.top), (plot.x(0.0), plot.bottom), "axis"))
    parts.append(
        text((plot.left + plot.right) / 2, plot.bottom + 36, "Hazard ratio (above 1: dies sooner)", anchor="middle")
    )
    for place, row in enumerate(rows):
        y = plot.top + _ROW * (place + 0.5)
        parts.append(_label(plot.left - 12, y + 4, row.covariate))
        if row.alone:
            parts += _bar(plot, y - 6, row.alone, "plain", filled=False)
        if row.together:
            parts += _bar(plot, y + 6, row.together, "low", filled=True)
    about = "; ".join(f"{row.covariate}: {_said(row.alone)} alone, {_said(row.together)} together" for row in rows)
    return drawing("forest", "Hazard ratios", f"Cox regression. {about}.", (690, plot.bottom + 46), parts)


def _ticks(rows: Sequence[HazardRow]) -> list[float]:
    """The part of TICKS that holds all limits, at least from 0.5 to 2."""
    bars = [bar for row in rows for bar in (row.alone, row.together) if bar and bar.estimated]
    low = min([0.5, *(bar.lower for bar in bars)])
    high = max([2.0, *(bar.upper for bar in bars)])
    first = max((tick for tick in TICKS if tick <= low), default=TICKS[0])
    last = min((tick for tick in TICKS if tick >= high), default=TICKS[-1])
    return [tick for tick in TICKS if first <= tick <= last]


def _label(x: float, y: float, name: str) -> str:
    """The covariate's name, without its middle where it is long; hovering shows all of it."""
    half = LONGEST_LABEL // 2
    shown = name if len(name) <= LONGEST_LABEL else f"{name[: half - 1].rstrip()}…{name[-half:].lstrip()}"
    inside = element("title", name) if shown != name else ""
    return element("text", shown, raw=inside, x=px(x), y=px(y), text_anchor="end")


def _bar(plot: Plot, y: float, bar: HazardBar, css: str, *, filled: bool) -> list[str]:
    if not bar.estimated:
        return [text(plot.x(0.0) + 6, y + 4, "no estimate", css="soft")]
    low, high = plot.x_range
    ends = [min(max(_log(each), low), high) for each in (bar.lower, bar.upper)]
    start, end = plot.x(ends[0]), plot.x(ends[1])
    parts = [element("path", d=f"M{px(start)} {px(y)}H{px(end)}", class_=f"mark open {css}")]
    if _log(bar.lower) < low:
        parts.append(_arrow(start, y, 6, css))
    if _log(bar.upper) > high:
        parts.append(_arrow(end, y, -6, css))
    if low <= _log(bar.hazard_ratio) <= high:
        x = plot.x(_log(bar.hazard_ratio))
        parts.append(dot(x, y, 4, f"{css}-fill" if filled else f"ring {css}"))
    return parts


def _arrow(x: float, y: float, back: float, css: str) -> str:
    return element(
        "path", d=f"M{px(x + back)} {px(y - 4)}L{px(x)} {px(y)}L{px(x + back)} {px(y + 4)}", class_=f"mark open {css}"
    )


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else -math.inf


def _said(bar: HazardBar | None) -> str:
    return "not fitted" if bar is None else hazard_ratio(bar.hazard_ratio, bar.lower, bar.upper)
