"""A slide's maps as a folder that any browser opens: index.html, and viewer/ with scripts, scores and pictures."""

from __future__ import annotations

import base64
import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from cftrain.heatmap.chains import chain
from cftrain.heatmap.colours import palette
from cftrain.heatmap.deepzoom import LONGEST, Pyramid, Regions, write_pyramid
from cftrain.heatmap.layers import FILE_ORDER, Grid, Heatmap, Layer
from cftrain.report.svg import DARK, LIGHT, palette_css

CROP: Final = 224
QUALITY: Final = 85
SCRIPTS: Final = (
    "openseadragon.min.js", "heatmap_scores.js", "heatmap_places.js", "heatmap_slide.js", "heatmap_canvas.js",
    "heatmap_panels.js", "heatmap_viewer.js",
)  # fmt: skip
"""In the order in which the page loads them."""
_COPIED: Final = (*SCRIPTS, "openseadragon.LICENSE.txt")


def write_viewer(heatmap: Heatmap, folder: Path, image: Regions | None, *, top: int = 12) -> Path:
    """Write index.html and viewer/ into a folder: a page that needs no network and no server.

    A `viewer` that is already there is replaced. The same heatmap and image give the same bytes.

    Parameters
    ----------
    folder
        Is created.
    image
        The slide, for the background and for pictures of patches; without one the maps lie on a plain ground.
        Not shown where the patches have no coordinates.
    top
        How many of the highest patches of every map are listed (and as many of the lowest where the sign counts).

    Returns
    -------
    Path
        index.html.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    shown = None if _in_file_order(heatmap) else image
    target = folder / "viewer"
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in _COPIED:
        target.joinpath(name).write_bytes(_static(name))
    style = f"{_palette()}\n{_static('heatmap_viewer.css').decode()}"
    target.joinpath("heatmap_viewer.css").write_text(style, encoding="utf-8", newline="\n")
    pyramid = write_pyramid(shown, target / "tiles") if shown else None
    best = {layer.name: _best(heatmap, layer, top) for layer in heatmap.layers}
    if shown:
        _write_crops(heatmap, shown, target / "patches", best)
    data = json.dumps(_data(heatmap, shown, pyramid, best), allow_nan=False, separators=(",", ":"))
    target.joinpath("data.js").write_text(f"window.HEATMAP = {data};\n", encoding="ascii", newline="\n")
    page = folder / "index.html"
    page.write_text(_page(heatmap, shown, pyramid, top), encoding="utf-8", newline="\n")
    return page


def _best(heatmap: Heatmap, layer: Layer, top: int) -> dict[str, list[list[int]]]:
    """The patches to list of a map, each with those that hold it: rows from the map's scale to the coarsest."""
    highest = layer.top(top)
    lowest = np.argsort(layer.scores, kind="stable")[: top if layer.signed else 0]
    # a patch that lowers the risk does not belong among those that raise it, however few there are
    highest = highest[layer.scores[highest] > (0 if layer.signed else -1)]
    lowest = lowest[layer.scores[lowest] < 0]
    return {
        "high": [chain(heatmap.grids, layer.scale, int(row)) for row in highest],
        "low": [chain(heatmap.grids, layer.scale, int(row)) for row in lowest],
    }


def _write_crops(heatmap: Heatmap, image: Regions, folder: Path, best: dict[str, dict[str, list[list[int]]]]) -> None:
    """A picture of every listed patch and of those that hold it, `{scale}x_{row}.jpg`."""
    folder.mkdir()
    scales = sorted(heatmap.grids, reverse=True)
    wanted = {
        (scale, row)
        for layer in heatmap.layers
        for rows in (*best[layer.name]["high"], *best[layer.name]["low"])
        for scale, row in zip(scales[scales.index(layer.scale) :], rows, strict=True)
        if row >= 0
    }
    for scale, row in sorted(wanted):
        grid = heatmap.grids[scale]
        edge = max(1, round(grid.edge))
        x, y = (int(side) for side in grid.corners[row])
        crop = image.region(x, y, edge, edge, CROP, CROP).convert("RGB")
        crop.save(folder / f"{scale}x_{row}.jpg", quality=QUALITY)


def _data(
    heatmap: Heatmap, image: Regions | None, pyramid: Pyramid | None, best: dict[str, dict[str, list[list[int]]]]
) -> dict[str, Any]:
    """What the page's scripts read."""
    return {
        "size": list(heatmap.size),
        "mpp": _mpp(heatmap, image),
        "ordered": _in_file_order(heatmap),
        "image": None
        if image is None or pyramid is None
        else {"size": list(image.size), "tiles": list(pyramid.size), "levels": pyramid.levels, "tile": pyramid.tile},
        "ramps": {kind: _base64(palette(kind, (0, 0, 0))[1:], "u1") for kind in ("attention", "attribution")},
        "grids": [_grid(heatmap.grids[scale]) for scale in sorted(heatmap.grids)],
        "layers": [
            {
                "name": layer.name, "scale": layer.scale, "kind": layer.kind, "meaning": layer.meaning,
                "scores": _base64(layer.scores, "<f4"), **best[layer.name],
            }
            for layer in heatmap.layers
        ],
    }  # fmt: skip


def _grid(grid: Grid) -> dict[str, Any]:
    return {
        "scale": grid.scale,
        "edge": float(grid.edge),
        "corners": _base64(grid.corners, "<i4"),
        "parents": None if grid.parents is None else _base64(grid.parents, "<i4"),
    }


def _base64(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode("ascii")


def _page(heatmap: Heatmap, image: Regions | None, pyramid: Pyramid | None, top: int) -> str:
    """index.html."""
    scales = sorted(heatmap.grids)
    # how far the background is coarser than level 0, where it is
    reduced = image.size[0] / pyramid.size[0] if image and pyramid and pyramid.size != tuple(image.size) else None
    about = dict(heatmap.about)
    trained_on = set(about.get("folds") or ()) & set(about.get("folds_trained_on_patient") or ())
    environment = Environment(
        loader=PackageLoader("cftrain"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(number=_number, change=_change, count="{:,}".format)
    return environment.get_template("heatmap.html").render(
        heatmap=heatmap,
        about=about,
        notes=[note for note in about.get("notes") or () if not (trained_on and note == about.get("honesty"))],
        trained_on=trained_on,
        groups=[(heatmap.grids[scale], heatmap.layers_of(scale)) for scale in scales],
        parents_notes=_parents_notes([heatmap.grids[scale] for scale in scales]),
        ordered=_in_file_order(heatmap),
        has_image=image is not None,
        mpp=_mpp(heatmap, image),
        reduced=reduced,
        longest=LONGEST,
        scripts=SCRIPTS,
        top=top,
        signed=any(layer.signed for layer in heatmap.layers),
        attention=any(not layer.signed for layer in heatmap.layers),
    )


def _parents_notes(grids: Sequence[Grid]) -> list[tuple[str, str]]:
    """How each scale's patches were found in the next coarser one: ("20x in 10x", sentence)."""
    unknown = "unknown; a place is looked up on each scale by itself"
    return [
        (f"{fine.scale}x in {coarse.scale}x", fine.parents_note if fine.parents is not None else unknown)
        for coarse, fine in itertools.pairwise(grids)
        if fine.unit != FILE_ORDER and (fine.parents is None or fine.parents_note)
    ]


def _number(value: float | None) -> str:
    """A risk with three decimals; "n/a" where it is undefined."""
    return f"{value:.3f}".replace("-", "\u2212") if value is not None and math.isfinite(value) else "n/a"


def _change(row: Mapping[str, Any]) -> str:
    """How far the risk moved without the patches that the map puts first."""
    moved = _number(row["without_top"] - row["risk"])
    return moved if moved.startswith(("\u2212", "n")) else f"+{moved}"


def _in_file_order(heatmap: Heatmap) -> bool:
    return any(grid.unit == FILE_ORDER for grid in heatmap.grids.values())


def _mpp(heatmap: Heatmap, image: Regions | None) -> float | None:
    found = heatmap.mpp if heatmap.mpp is not None or image is None else image.mpp
    return None if found is None else float(found)


def _palette() -> str:
    """The report's colours, as the head of the style sheet."""
    light = f":root {{ color-scheme: light dark; {palette_css(LIGHT)} }}"
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {palette_css(DARK)} }} }}"


def _static(name: str) -> bytes:
    return files("cftrain").joinpath("heatmap", "static", name).read_bytes()
