"""A map as a picture for people: over the slide where there is its image, with what the colours mean beneath."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cftrain.heatmap.colours import NONE, Rgb, colour_map, limit, normalisation, palette, shares
from cftrain.heatmap.layers import FILE_ORDER, Heatmap, Layer
from cftrain.heatmap.raster import paint
from cftrain.heatmap.slide_image import SlideImage, check_fits
from cftrain.report.svg import LIGHT

_WIDE, _HIGH = 1540, 1240  # the most that the map itself takes, in pixels
_MARGIN = 30
_LEAST_WIDE = 900  # of the picture: words need room however narrow the slide
_ALPHA = 0.5
_LARGEST_SQUARE = 96  # few patches need no large picture
_GROUND = (214, 219, 225)
_BODY, _TITLE, _SMALL = 17, 27, 15  # heights of letters in pixels
_LETTER = 0.53  # mean width of a letter, in heights
_NICE = (1, 2, 5)


@dataclass(frozen=True)
class _View:
    """What part of the slide is shown, in the grid's units, and at how many pixels per unit."""

    origin: tuple[float, float]
    zoom: float
    width: int
    height: int


def write_picture(heatmap: Heatmap, layer: Layer, path: Path, image: SlideImage | None) -> None:
    """Write one map as a PNG whose longer side is at most about 1,600 pixels.

    Attention is coloured by percentile; attribution by score, blue lowers and orange raises the risk, with limits at
    the 99th percentile of |score|. Overlapping patches show their mean.

    Parameters
    ----------
    image
        The slide, to lay the map on half transparent; without it, or without coordinates, patches lie on light grey.

    Raises
    ------
    ConfigError
        The image is not of this slide, or is damaged.
    """
    grid = heatmap.grids[layer.scale]
    if grid.unit == FILE_ORDER:
        image = None
    if image is not None:
        check_fits(image.size, heatmap)
    view = _view(heatmap, layer, image)
    shades = paint(grid, shares(layer), view.origin, view.zoom, (view.height, view.width))
    colours = palette(layer.kind, _GROUND)[shades]
    pixels = colours if image is None else _over(image, view, shades, colours)
    _page(heatmap, layer, view, pixels).savefig(path, dpi=100)


def _view(heatmap: Heatmap, layer: Layer, image: SlideImage | None) -> _View:
    """All of the image; without one, as far as the patches of any scale reach, and a margin."""
    if image is not None:
        low, high = np.zeros(2), np.asarray(image.size, float)
    else:
        low = np.min([grid.corners.min(axis=0) for grid in heatmap.grids.values()], axis=0).astype(float)
        high = np.max([grid.corners.max(axis=0) + grid.edge for grid in heatmap.grids.values()], axis=0)
        margin = 0.02 * float((high - low).max())
        low, high = low - margin, high + margin
    width, height = high - low
    zoom = min(_WIDE / width, _HIGH / height)
    if image is None:
        zoom = min(zoom, _LARGEST_SQUARE / min(grid.edge for grid in heatmap.grids.values()))
    return _View((low[0], low[1]), zoom, max(round(width * zoom), 1), max(round(height * zoom), 1))


def _over(image: SlideImage, view: _View, shades: NDArray[np.uint8], colours: Rgb) -> Rgb:
    """The map half transparent on the slide, which stays as it is where no patch lies."""
    slide = np.asarray(image.region(0, 0, *image.size, view.width, view.height), np.float32)
    mixed = np.rint(_ALPHA * colours + (1 - _ALPHA) * slide).astype(np.uint8)
    return np.where((shades == NONE)[..., None], slide.astype(np.uint8), mixed)


def _page(heatmap: Heatmap, layer: Layer, view: _View, pixels: Rgb) -> Figure:
    """Title, map, colour bar with the scale bar beside it, notes; everything is placed in pixels."""
    width = max(view.width, _LEAST_WIDE) + 2 * _MARGIN
    head, notes = _head(heatmap, layer), _notes(heatmap, layer, width - 2 * _MARGIN)
    above = _MARGIN + 40 + 24 * (len(head) - 1) + 14
    below = 92 + 21 * len(notes) + _MARGIN // 2
    height = above + view.height + below
    with mpl.rc_context({"font.family": "DejaVu Sans", "axes.unicode_minus": True}):
        figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        page.set_axis_off()
        extent = (_MARGIN, _MARGIN + view.width, above + view.height, above)
        page.imshow(pixels, extent=extent, interpolation="none", aspect="auto")
        page.set(xlim=(0, width), ylim=(height, 0))
        _write_head(page, head, width, synthetic=bool(heatmap.about.get("synthetic")))
        bar_top = above + view.height + 18
        _colour_bar(page, layer, bar_top)
        _scale_bar(page, heatmap, layer, view, width - _MARGIN, bar_top)
        for place, line in enumerate(notes):
            at = above + view.height + 92 + 21 * place
            _text(page, _MARGIN, at, line, _SMALL, LIGHT["soft"], width - 2 * _MARGIN)
    return figure


def _head(heatmap: Heatmap, layer: Layer) -> list[str]:
    """The slide; what made the map; and, where patches have no places, that."""
    about = heatmap.about
    n = len(heatmap.grids[layer.scale])
    parts = [about.get("model"), layer.name, f"{layer.scale}x", f"{n:,} patch{'es' * (n != 1)}"]
    parts += [f"{word} {about[word]}" for word in ("cohort", "encoder") if about.get(word)]
    lines = [heatmap.slide_id, "  ·  ".join(str(part) for part in parts if part)]
    if heatmap.grids[layer.scale].unit == FILE_ORDER:
        lines.append("no coordinates: patches in file order; this is not the shape of the tissue")
    return lines


def _write_head(page: Axes, lines: Sequence[str], width: int, *, synthetic: bool) -> None:
    room = width - 2 * _MARGIN
    _text(page, _MARGIN, _MARGIN + 12, lines[0], _TITLE, LIGHT["ink"], room - 210 * synthetic, weight="bold")
    for place, line in enumerate(lines[1:]):
        colour = LIGHT["high"] if place else LIGHT["soft"]
        _text(page, _MARGIN, _MARGIN + 44 + 24 * place, line, _BODY, colour, room)
    if synthetic:
        box = {"boxstyle": "round,pad=0.45", "facecolor": LIGHT["high"], "edgecolor": "none"}
        words, right = "SYNTHETIC DATA", width - _MARGIN - 8
        _text(page, right, _MARGIN + 12, words, _BODY, "white", ha="right", weight="bold", bbox=box)


def _colour_bar(page: Axes, layer: Layer, top: int) -> None:
    """The scale of the colours, its ticks and what it measures."""
    long, thick, left, middle = 420, 18, _MARGIN, top + 9
    if layer.signed:
        left += 120
        _text(page, _MARGIN, middle, "lowers risk", _BODY, LIGHT["low"], weight="bold")
        _text(page, left + long + 12, middle, "raises risk", _BODY, LIGHT["high"], weight="bold")
    else:
        _text(page, left + long + 14, middle, "percentile of the score", _BODY, LIGHT["ink"])
    shades = colour_map(layer.kind)(np.linspace(0, 1, 256))[None, :, :3]
    view = page.axis()
    page.imshow(shades, extent=(left, left + long, top + thick, top), interpolation="bilinear", aspect="auto")
    page.axis(view)
    for share, label in _ticks(layer):
        at = left + share * long
        page.plot([at, at], [top + thick, top + thick + 5], color=LIGHT["soft"], linewidth=1)
        _text(page, at, top + thick + 16, label, _SMALL, LIGHT["ink"], ha="center")


def _ticks(layer: Layer) -> list[tuple[float, str]]:
    """Places on the colour bar, from 0 to 1, and what is written there."""
    if not layer.signed:
        return [(share, f"{100 * share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    end = f"{limit(layer):.2g}"
    return [(0.0, f"\N{MINUS SIGN}{end}"), (0.5, "0"), (1.0, end)]


def _scale_bar(page: Axes, heatmap: Heatmap, layer: Layer, view: _View, right: int, top: int) -> None:
    """A round length on the slide, about a sixth of the map; nothing where the resolution is not known."""
    if heatmap.mpp is None or heatmap.grids[layer.scale].unit == FILE_ORDER:
        return
    microns_per_pixel = heatmap.mpp / view.zoom
    length = _round_length(view.width * microns_per_pixel / 5)
    long = length / microns_per_pixel
    page.plot([right - long, right], [top + 6, top + 6], color=LIGHT["ink"], linewidth=5, solid_capstyle="butt")
    label = f"{length / 1000:g} mm" if length >= 100 else f"{length:g} µm"
    _text(page, right - long / 2, top + 27, label, _BODY, LIGHT["ink"], ha="center")


def _round_length(most: float) -> float:
    """The longest of 1, 2, 5 times a power of ten that is no longer."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(factor * power for factor in _NICE if factor * power <= most * (1 + 1e-9))


def _notes(heatmap: Heatmap, layer: Layer, width: int) -> list[str]:
    """What the score is, what the colours are, and what else the reader must know, as lines that fit."""
    told = [f"{layer.name}: {layer.meaning}", normalisation(layer), *map(str, heatmap.about.get("notes", ()))]
    letters = int(width / (_SMALL * _LETTER))
    return [line for sentence in told for line in textwrap.wrap(_sentence(sentence), letters)]


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _text(
    page: Axes, x: float, y: float, words: str, height: float, colour: str, room: float = math.inf, **how: Any
) -> None:
    """Words at a point, their height in pixels, smaller where they need more width than there is room.

    They are never read as mathematics, whatever a slide is called.
    """
    made = page.text(x, y, words, fontsize=height * 0.72, color=colour, va="center", parse_math=False, **how)
    if math.isfinite(room):
        needed = made.get_window_extent().width
        made.set_fontsize(height * 0.72 * min(1.0, room / max(needed, 1.0)))
