"""Numbers as words: how a report prints scores, intervals, months, durations, p-values and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

NOTHING = "n/a"


def defined(value: float | None) -> TypeGuard[float]:
    """Whether there is a number: neither null nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> float:
    """NaN in place of null."""
    return math.nan if value is None else float(value)


def score(value: float | None) -> str:
    """A C-index with three decimals; "n/a" where it is undefined."""
    return f"{value:.3f}" if defined(value) else NOTHING


def spread(metric: Mapping[str, Any]) -> str:
    """Mean ± standard deviation over folds."""
    return f"{score(metric['mean'])} ± {score(metric['std'])}" if defined(metric["mean"]) else NOTHING


def limits(estimate: Mapping[str, Any]) -> str:
    """The interval of an estimate with "lower" and "upper"."""
    lower, upper = estimate["lower"], estimate["upper"]
    return f"{lower:.3f}–{upper:.3f}" if defined(lower) and defined(upper) else NOTHING  # noqa: RUF001


def months(value: float | None) -> str:
    """A number of months with one decimal; infinities and undefined ones in words."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.1f}" if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def whole_months(value: float | None) -> str:
    """A number of months, with a decimal only where it has one."""
    return months(value).removesuffix(".0")


def count(value: float | None) -> str:
    """A whole number with separators."""
    return NOTHING if value is None else f"{value:,}"


def counted(n: int, what: str) -> str:
    """How many of a thing there are."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them."""
    if not defined(seconds):
        return NOTHING
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def p_value(value: float | None) -> str:
    """A p-value as journals print it."""
    if not defined(value):
        return f"p {NOTHING}"
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def bare_p(value: float | None) -> str:
    """A p-value for a column that is headed "p"."""
    return p_value(value).removeprefix("p ").removeprefix("= ")


def share(part: float | None, whole: float | None) -> str:
    """A part as whole percent."""
    return f"{part / whole:.0%}".replace("%", " %") if part is not None and whole else NOTHING


def percent(value: float | None) -> str:
    """A share in percent, with a decimal below ten."""
    if not defined(value):
        return NOTHING
    return f"{100 * value:.0f} %" if abs(value) >= 0.0995 else f"{100 * value:.1f} %"


def rate(value: float | None) -> str:
    """Things per second."""
    return f"{value:,.1f}" if defined(value) else NOTHING


def size(n_bytes: float | None) -> str:
    """Bytes in the largest binary unit that leaves a number above one."""
    if not defined(n_bytes):
        return NOTHING
    value, units = float(n_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" or value >= 100 else f"{value:.1f} {units[0]}"


def hazard_ratio(value: float | None, lower: float | None, upper: float | None) -> str:
    """A hazard ratio with its limits, and the decimals that count where the unit of its column is a small step."""
    if not (defined(value) and defined(lower) and defined(upper)):
        return NOTHING
    decimals = next((digits for digits in (2, 4, 6) if upper - lower >= 3 * 10.0**-digits), 8)
    ratio, low, high = (_ratio(each, decimals) for each in (value, lower, upper))
    return f"{ratio} ({low}–{high})"  # noqa: RUF001


def _ratio(value: float, decimals: int) -> str:
    """A ratio with its decimals, or with two or three digits where those would say nothing or too much."""
    if 0 < value < 0.095:
        return f"{value:.2g}"
    return f"{value:.{decimals}f}" if value < 100 else f"{value:.3g}"
