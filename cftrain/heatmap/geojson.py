"""Patches as QuPath tiles that carry their scores, in a file that QuPath takes by drag and drop."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cftrain.errors import ConfigError
from cftrain.heatmap.colours import codes, normalisation, palette, shares
from cftrain.heatmap.layers import FILE_ORDER, NAMESPACE, Grid, Heatmap, Layer

_AT_ONCE = 4096
_LEVEL = 5  # of gzip: one more takes half as long again and saves 2 %
_GREY = (215, 219, 224)


def write_geojson(heatmap: Heatmap, scale: int, path: Path) -> None:
    """Write the patches of one scale as a gzipped GeoJSON FeatureCollection.

    Each is a Feature as QuPath's QuPathTypeAdapters read it: a Polygon in level-0 pixels, objectType "tile", a colour
    (that of the scale's first map) and, as measurements, the raw score and percentile of each map; scores that are no
    numbers are left out. Equal heatmaps give equal bytes, ids included.

    Parameters
    ----------
    path
        Should end in .geojson.gz, which tells QuPath what it is.

    Raises
    ------
    ConfigError
        The patches have no coordinates.
    """
    grid = heatmap.grids[scale]
    if grid.unit == FILE_ORDER:
        message = (
            f"{heatmap.slide_id}: its {scale}x patches have no coordinates, so there is nothing to place on a slide; "
        )
        raise ConfigError(message + "use the table or the picture, or ingest features that have coordinates")
    with path.open("wb") as raw, gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0) as out:
        out.write(_head(heatmap, scale).encode())
        for place, features in enumerate(_features(heatmap, grid)):
            out.write(((",\n" if place else "\n") + features).encode())
        out.write(b"\n]}\n")


def _head(heatmap: Heatmap, scale: int) -> str:
    """The collection up to its features; readers of GeoJSON pass over members that they do not know (RFC 7946, 6.1)."""
    told = {
        "slide_id": heatmap.slide_id,
        "scale": scale,
        "unit": heatmap.grids[scale].unit,
        "maps": {layer.name: layer.meaning for layer in heatmap.layers_of(scale)},
        "colour": {layer.name: normalisation(layer) for layer in heatmap.layers_of(scale)[:1]},
    }
    return '{"type":"FeatureCollection","heatmap":' + json.dumps(told) + ',"features":['


def _features(heatmap: Heatmap, grid: Grid) -> Iterator[str]:
    """Features, a few thousand at a time."""
    layers = heatmap.layers_of(grid.scale)
    colours = [f"[{r},{g},{b}]" for r, g, b in palette(layers[0].kind if layers else "attention", _GREY).tolist()]
    shades = codes(shares(layers[0])) if layers else np.zeros(len(grid), np.uint8)
    for start in range(0, len(grid), _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, len(grid)))
        chosen = slice(rows.start, rows.stop)
        tiles = zip(
            rows,
            _rings(grid, chosen),
            _measurements(layers, chosen),
            (colours[code] for code in shades[chosen].tolist()),
            strict=True,
        )
        yield ",\n".join(
            f'{{"type":"Feature","id":"{_uuid5(f"{heatmap.slide_id}/{grid.scale}/{row}")}",'
            f'"geometry":{{"type":"Polygon","coordinates":[{ring}]}},'
            f'"properties":{{"objectType":"tile","name":"{grid.scale}x patch {row}","color":{colour},'
            f'"measurements":{{{scores}}}}}}}'
            for row, ring, scores, colour in tiles
        )


def _rings(grid: Grid, chosen: slice) -> Iterator[str]:
    """Each patch's border as a closed ring, in GeoJSON's direction (with y down, it looks clockwise)."""
    edge = int(grid.edge) if float(grid.edge).is_integer() else float(grid.edge)
    for left, top in grid.corners[chosen].tolist():
        right, bottom = left + edge, top + edge
        yield f"[[{left},{top}],[{right},{top}],[{right},{bottom}],[{left},{bottom}],[{left},{top}]]"


def _measurements(layers: tuple[Layer, ...], chosen: slice) -> Iterator[str]:
    """The members of every patch's measurements: scores to the last digit, percentiles to four decimals."""
    members = [[""] * len(range(chosen.start, chosen.stop))]
    for layer in layers:
        name, of_percentile = json.dumps(layer.name), json.dumps(f"{layer.name} percentile")
        scores, percentiles = layer.scores[chosen].tolist(), layer.percentile[chosen].round(4).tolist()
        members.append(
            [
                f"{name}:{score!r},{of_percentile}:{percentile!r}" if math.isfinite(score) else ""
                for score, percentile in zip(scores, percentiles, strict=True)
            ]
        )
    for of_patch in zip(*members, strict=True):
        yield ",".join(filter(None, of_patch))


def _uuid5(name: str) -> str:
    """`uuid.uuid5` of a name in the namespace of heatmaps (RFC 9562, 5.5), at a third of its time."""
    found = hashlib.sha1(NAMESPACE.bytes + name.encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(found[16], 16) % 4]
    return f"{found[:8]}-{found[8:12]}-5{found[13:16]}-{variant}{found[17:20]}-{found[20:32]}"
