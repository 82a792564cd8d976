"""SVG as text: elements, a plot's rectangle, axes, colours. No plotting library, no script.

Colours come by class, so that dark mode works: on the page from its style sheet, in a file from `standalone`.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LIGHT = {
    "ink": "#1b1f24", "soft": "#5b6570", "line": "#d5dae0", "paper": "#ffffff",
    "high": "#c04f00", "low": "#0067a5", "second": "#7a3e9d", "plain": "#6b7580",
}  # fmt: skip
DARK = {
    "ink": "#e8eaed", "soft": "#a3adb8", "line": "#3a424c", "paper": "#14181d",
    "high": "#ff9a52", "low": "#66bdf5", "second": "#cf9df0", "plain": "#97a2ad",
}  # fmt: skip
"""Vermillion, blue and purple after Okabe & Ito and Tol: told apart with any colour vision, on either ground."""

FIGURE_CSS = """
svg text { font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; font-size: 12px;
  fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .soft { fill: var(--soft); }
svg .strong { font-weight: 600; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .chance { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; fill: none; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .band { fill-opacity: 0.16; }
svg .dot { fill-opacity: 0.55; }
svg .ring { fill: var(--paper); stroke-width: 2; }
svg .high { stroke: var(--high); } svg .high-fill { fill: var(--high); }
svg .low { stroke: var(--low); } svg .low-fill { fill: var(--low); }
svg .second { stroke: var(--second); } svg .second-fill { fill: var(--second); }
svg .plain { stroke: var(--plain); } svg .plain-fill { fill: var(--plain); }
svg .open { fill: none; stroke-width: 1.3; stroke-opacity: 0.8; }
svg .mark { stroke-width: 1.6; }
svg .ground { fill: var(--paper); }
svg .bar { fill-opacity: 0.5; }
"""


MARGIN = 16
"""White around a figure in a file of its own, in pixels."""


@dataclass(frozen=True)
class Plot:
    """A rectangle of the drawing, in pixels, and the data ranges that fill it."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float] = (0.0, 1.0)

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.top + self.height

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.left + self.width

    def x(self, value: float) -> float:
        """Where a value lies from the left."""
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Where a value lies from the top."""
        low, high = self.y_range
        return self.bottom - self.height * (value - low) / (high - low)


def drawing(name: str, title: str, about: str, size: tuple[float, float], parts: Sequence[str]) -> str:
    """A whole figure: `name` makes its ids, `title` and `about` are read aloud, `size` is its box in pixels."""
    head = element("title", title, id=f"{name}-title") + element("desc", about, id=f"{name}-desc")
    box = f"0 0 {px(size[0])} {px(size[1])}"
    labels = f"{name}-title {name}-desc"
    return element("svg", raw=head + "".join(parts), viewBox=box, role="img", aria_labelledby=labels)


def text(x: float, y: float, text: str, *, anchor: str = "", css: str = "", transform: str = "") -> str:
    """Words at a point; `anchor` is start (the default), middle or end."""
    return element("text", text, x=px(x), y=px(y), text_anchor=anchor, class_=css, transform=transform)


def dot(x: float, y: float, radius: float, css: str, title: str = "") -> str:
    """A circle; `title` is what hovering shows."""
    inside = element("title", title) if title else ""
    return element("circle", raw=inside, cx=px(x), cy=px(y), r=px(radius), class_=css)


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """Path data through points."""
    return "M" + "L".join(f"{px(x)} {px(y)}" for x, y in points)


def element(tag: str, text: str = "", *, raw: str = "", **attributes: str) -> str:
    """An element with its text and attributes escaped; empty attributes are left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for name, value in attributes.items() if value
    )
    return f"<{tag}{written}>{html.escape(text)}{raw}</{tag}>"


def px(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def x_axis(plot: Plot, ticks: Sequence[float], *, grid: bool = False, labels: Sequence[str] = ()) -> str:
    """The lower axis with ticks and their values (or other `labels`), on request with lines up through the plot."""
    parts = [element("path", d=f"M{px(plot.left)} {px(plot.bottom)}H{px(plot.right)}", class_="axis")]
    for tick, value in zip(ticks, labels or _labels(ticks), strict=True):
        x = plot.x(tick)
        if grid:
            parts.append(element("path", d=f"M{px(x)} {px(plot.top)}V{px(plot.bottom)}", class_="grid"))
        parts.append(element("path", d=f"M{px(x)} {px(plot.bottom)}v5", class_="axis"))
        parts.append(text(x, plot.bottom + 18, value, anchor="middle", css="soft"))
    return "".join(parts)


def y_axis(plot: Plot, ticks: Sequence[float], label: str = "") -> str:
    """Lines across the plot with their values on the left, and what they measure."""
    parts = []
    for tick, value in zip(ticks, _labels(ticks), strict=True):
        y = plot.y(tick)
        parts.append(element("path", d=f"M{px(plot.left)} {px(y)}H{px(plot.right)}", class_="grid"))
        parts.append(text(plot.left - 8, y + 4, value, anchor="end", css="soft"))
    if label:
        x, y = plot.left - 46, plot.top + plot.height / 2
        parts.append(text(x, y, label, anchor="middle", transform=f"rotate(-90 {px(x)} {px(y)})"))
    return "".join(parts)


def whisker(x: tuple[float, float], y: float, css: str) -> str:
    """A level line from one x to another with a small upright at either end."""
    (start, end), half = x, 4
    path = f"M{px(start)} {px(y)}H{px(end)}M{px(start)} {px(y - half)}v{2 * half}M{px(end)} {px(y - half)}v{2 * half}"
    return element("path", d=path, class_=f"mark open {css}")


def line(start: tuple[float, float], end: tuple[float, float], css: str) -> str:
    """A straight line."""
    return element("path", d=polyline([start, end]), class_=css)


def ticks_between(low: float, high: float, at_most: int) -> list[float]:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) inside a range."""
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def padded(low: float, high: float) -> tuple[float, float]:
    """A range a little wider than its data, and never empty."""
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def standalone(svg: str) -> str:
    """A figure as a file of its own: namespace, white ground, light colours written out (editors know no variables)."""
    css = re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found.group(1)], FIGURE_CSS)
    opening, rest = svg.split(">", 1)
    width, height = (float(side) + 2 * MARGIN for side in re.findall(r"[\d.]+", opening)[2:4])
    box = f'viewBox="{-MARGIN} {-MARGIN} {px(width)} {px(height)}" width="{px(width)}" height="{px(height)}"'
    opening = re.sub(r'viewBox="[^"]*"', f'xmlns="http://www.w3.org/2000/svg" {box}', opening)
    title, drawing = rest.split("</desc>", 1)
    ground = f'<rect x="{-MARGIN}" y="{-MARGIN}" width="100%" height="100%" fill="{LIGHT["paper"]}"/>'
    return f"{opening}>{title}</desc><style>{css}</style>{ground}{drawing}\n"


def palette_css(colours: Mapping[str, str]) -> str:
    """Colours as CSS variables."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def _labels(ticks: Sequence[float]) -> list[str]:
    """Values with as many decimals as the one that needs most."""
    decimals = max((len(f"{tick:g}".partition(".")[2]) for tick in ticks), default=0)
    return [f"{tick:.{decimals}f}" for tick in ticks]
