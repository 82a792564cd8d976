"""Dropout rates in 256ths."""

from __future__ import annotations

from cfkernels.errors import RateError


def threshold(dropout_p: float) -> int:
    """The rate in 256ths, 0 to 255.

    Raises
    ------
    RateError
        The rate is outside [0, 1), or above 0 but too small for a 256th.
    """
    if not 0 <= dropout_p < 1:
        raise RateError(f"a dropout rate must be at least 0 and below 1, got {dropout_p}")
    rounded = min(round(256 * dropout_p), 255)
    if dropout_p > 0 and rounded == 0:
        raise RateError(f"dropout acts in 256ths; {dropout_p} would not act at all, use 0 or at least 0.002")
    return rounded


def rescale(threshold: int) -> float:
    """What kept elements are multiplied with."""
    return 256 / (256 - threshold)
