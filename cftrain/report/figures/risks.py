"""Risk of every slide by outcome."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cftrain.report.svg import Plot, dot, drawing, element, padded, px, text, ticks_between, x_axis
from cftrain.report.wording import counted


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
    about = f"{counted(risk.size, 'slide')}. Median risk: {', '.join(medians)}."
    return drawing("risk", "Predicted risk by outcome", about, (720, plot.bottom + 46), parts)


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
