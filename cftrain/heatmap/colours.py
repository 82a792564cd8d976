"""Scores to colours, the same in every file: attention by its percentile, attribution with 0 in the middle."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap
from numpy.typing import NDArray

from cftrain.heatmap.layers import Floats, Kind, Layer
from cftrain.report.svg import LIGHT

Codes = NDArray[np.uint8]
Rgb = NDArray[np.uint8]

NONE = 0
"""The code of a place without a score; 1 to 255 are shades, lowest to highest."""

PERCENTILE = "percentile: share of the map's patches on this slide with a lower score, in percent, ties counted half"
_SHADES = 255
_LIMIT_PERCENTILE = 99


def limit(layer: Layer) -> float:
    """Where an attribution's colours end, on either side of 0: the 99th percentile of |score|; above 0."""
    sizes = np.abs(layer.scores[np.isfinite(layer.scores)])
    if not sizes.size or not sizes.max():
        return 1.0
    return float(np.percentile(sizes, _LIMIT_PERCENTILE)) or float(sizes.max())


def shares(layer: Layer) -> Floats:
    """How far along its colour scale every patch is: [N], 0 to 1, NaN where the score is no number."""
    if layer.signed:
        return np.clip(0.5 + layer.scores / (2 * limit(layer)), 0, 1)
    return np.where(np.isfinite(layer.scores), layer.percentile / 100, np.nan)


def codes(shares: NDArray[np.floating]) -> Codes:
    """Shares of the scale as one of 255 shades, NaN as NONE: [...]."""
    shades = 1 + np.minimum(np.nan_to_num(shares) * _SHADES, _SHADES - 1).astype(np.uint8)
    return np.where(np.isnan(shares), NONE, shades).astype(np.uint8)


def palette(kind: Kind, ground: tuple[int, int, int]) -> Rgb:
    """The colour of every code: [256, 3]; `ground` is that of NONE."""
    shades = colour_map(kind)((np.arange(_SHADES) + 0.5) / _SHADES)[:, :3]
    return np.vstack([[ground], np.rint(255 * shades)]).astype(np.uint8)


def colour_map(kind: Kind) -> Colormap:
    """The scale of one kind, told apart with any colour vision and in grey.

    Attention: viridis from blue to yellow, without the purple that it begins with and that stained tissue has too.
    Attribution: the reports' blue for lower and vermillion for higher risk, white in the middle.
    """
    if kind == "attention":
        return LinearSegmentedColormap.from_list("attention", mpl.colormaps["viridis"](np.linspace(0.22, 1, 64)))
    lower, higher = ["#003a61", LIGHT["low"], "#5f9fcb", "#b9d3e5"], ["#f0c9a7", "#e08f52", LIGHT["high"], "#7a3000"]
    return LinearSegmentedColormap.from_list("risk", [*lower, "#f5f3f0", *higher])


def normalisation(layer: Layer) -> str:
    """What the colours of a map stand for, one sentence."""
    if not layer.signed:
        return PERCENTILE
    ends = f"{limit(layer):.3g}, the {_LIMIT_PERCENTILE}th percentile of the score's size"
    return f"score, 0 in the middle; colours end at plus and minus {ends}"
