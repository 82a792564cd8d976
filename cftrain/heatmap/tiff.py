"""Maps as TIFF: the scores themselves, a pixel for each patch, and a coloured pyramid that slide viewers open."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cftrain.heatmap.colours import Codes, Rgb, normalisation, palette, shares
from cftrain.heatmap.layers import FILE_ORDER, NAMESPACE, Grid, Heatmap, Layer
from cftrain.heatmap.raster import Cells, cells, paint

_TILE = 256
_LONGEST = 4096
_MOST_PIXELS = 16  # for a patch's side
_SMALLEST = 512  # a pyramid ends at the first level whose longer side is no longer
_WHITE = (255, 255, 255)
_ZLIB: dict[str, Any] = {"tile": (_TILE, _TILE), "compression": "zlib", "software": "crossfusion-store"}


def write_score_tiff(heatmap: Heatmap, scale: int, path: Path) -> None:
    """Write the raw scores of one scale as an OME-TIFF of float32 with one pixel per patch.

    Channels are the scale's maps, by name; NaN is where no patch lies. PhysicalSize is a cell's side in µm where the
    resolution is known. Plane PositionX and PositionY are the left and upper edge of the first pixel from the slide's
    corner, in µm, or in level-0 pixels where the resolution is not known. A MapAnnotation says all of it, and how far
    patches were moved and how many share a pixel, where the grid has no room for all (`raster.cells`).

    Parameters
    ----------
    path
        Should end in .ome.tif.
    """
    grid, layers = heatmap.grids[scale], heatmap.layers_of(scale)
    placed = cells(grid, heatmap.size)
    scores = np.stack([placed.mean(layer.scores) for layer in layers]).astype(np.float32)
    step = None if heatmap.mpp is None or grid.unit == FILE_ORDER else placed.pitch * heatmap.mpp
    metadata: dict[str, Any] = {
        "axes": "CYX",
        "Name": f"{heatmap.slide_id} {scale}x",
        "UUID": str(uuid.uuid5(NAMESPACE, f"{heatmap.slide_id}/{scale}")),  # the default changes with every writing
        "Creator": "crossfusion-store",
        "Channel": {"Name": [layer.name for layer in layers]},
        "Plane": _positions(heatmap, placed, step, len(layers)),
        "MapAnnotation": _annotation(heatmap, grid, placed),
    }
    if step is not None:
        metadata |= {f"PhysicalSize{axis}": step for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    with tifffile.TiffWriter(path, ome=True) as out:
        out.write(scores, photometric="minisblack", metadata=metadata, **_ZLIB, **_resolution(step))


def write_colour_tiff(heatmap: Heatmap, layer: Layer, path: Path) -> None:
    """Write a coloured map as a tiled RGB pyramid over all of the slide, white where no patch lies.

    OpenSlide and what builds on it open it beside the slide or over it: it has 2, 4, 8 or 16 pixels for a patch's side
    (or one, where more would make it longer than 4,096 pixels) and the resolution in its tags; its description is
    JSON that says how many level-0 pixels a pixel is (`downsample`) and what the colours mean. Levels follow each
    other as reduced pages, because OpenSlide does not read them as SubIFDs.
    """
    grid = heatmap.grids[layer.scale]
    zoom = pixels_per_patch(grid, heatmap.size) / grid.edge
    width, height = (math.ceil(side * zoom) for side in heatmap.size)
    known = heatmap.mpp is not None and grid.unit != FILE_ORDER
    mpp = heatmap.mpp / zoom if heatmap.mpp is not None and known else None
    shades = paint(grid, shares(layer), (0.0, 0.0), zoom, (height, width))
    colours = palette(layer.kind, _WHITE)
    with tifffile.TiffWriter(path, bigtiff=False) as out:
        about = json.dumps(_about(heatmap, layer, 1 / zoom))
        level: Rgb | None = None
        for reduced in range(_levels(height, width)):
            tiles, shape = (_tiles(shades, colours), shades.shape)
            if reduced:
                level = _halved(shades, colours) if level is None else _halved(level, None)
                tiles, shape = _tiles(level, None), level.shape[:2]
            out.write(
                tiles,
                shape=(*shape, 3),
                dtype=np.uint8,
                photometric="rgb",
                subfiletype=int(reduced > 0),
                description=None if reduced else about,
                metadata=None,
                **_ZLIB,
                **_resolution(None if mpp is None else mpp * 2**reduced),
            )


def pixels_per_patch(grid: Grid, size: tuple[int, int]) -> int:
    """Pixels for a patch's side in the coloured map: a power of two, so that zoom levels are those of slides."""
    most = min(_LONGEST * grid.edge / max(size), _MOST_PIXELS)
    return 1 << max(math.floor(math.log2(most)), 0)


def _annotation(heatmap: Heatmap, grid: Grid, placed: Cells) -> dict[str, str]:
    told = {
        "slide_id": heatmap.slide_id,
        "unit": grid.unit,
        "coordinates": grid.note,
        "left and upper edge of the first pixel": f"{placed.origin[0]:g}, {placed.origin[1]:g}",
        "pixel size in that unit": f"{placed.pitch:g}",
        "pixel value": "raw score of the patch; NaN where there is none; the mean where patches share a pixel",
        "patches that share a pixel": str(placed.shared),
        "furthest that a patch was moved to its pixel": f"{placed.moved:g}",
    }
    return told | {f"meaning of {layer.name}": layer.meaning for layer in heatmap.layers_of(grid.scale)}


def _positions(heatmap: Heatmap, placed: Cells, step: float | None, n_planes: int) -> dict[str, list[float | str]]:
    """Where the first pixel begins, for every plane."""
    factor, unit = (1.0, "pixel") if step is None or heatmap.mpp is None else (heatmap.mpp, "µm")
    found: dict[str, list[float | str]] = {}
    for axis, start in zip("XY", placed.origin, strict=True):
        found[f"Position{axis}"] = [start * factor] * n_planes
        found[f"Position{axis}Unit"] = [unit] * n_planes
    return found


def _about(heatmap: Heatmap, layer: Layer, downsample: float) -> dict[str, str | float]:
    return {
        "slide_id": heatmap.slide_id,
        "map": layer.name,
        "scale": layer.scale,
        "meaning": layer.meaning,
        "colour": normalisation(layer),
        "unit": heatmap.grids[layer.scale].unit,
        "downsample": downsample,
        "white": "no patch",
    }


def _resolution(mpp: float | None) -> dict[str, Any]:
    """TIFF's resolution tags."""
    return {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def _levels(height: int, width: int) -> int:
    """How many levels a pyramid has."""
    return 1 + max(math.ceil(math.log2(max(height, width) / _SMALLEST)), 0)


def _tiles(pixels: Codes | Rgb, colours: Rgb | None) -> Iterator[Rgb]:
    """A level's tiles, row by row, whole ones: what lies beyond the border is white."""
    for top in range(0, pixels.shape[0], _TILE):
        for left in range(0, pixels.shape[1], _TILE):
            part = pixels[top : top + _TILE, left : left + _TILE]
            tile = np.full((_TILE, _TILE, 3), 255, np.uint8)
            tile[: part.shape[0], : part.shape[1]] = part if colours is None else colours[part]
            yield tile


def _halved(pixels: Codes | Rgb, colours: Rgb | None) -> Rgb:
    """Means of 2 x 2 pixels; an odd last row or column is repeated."""
    height, width = (pixels.shape[0] + 1) // 2, (pixels.shape[1] + 1) // 2
    made = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _TILE):
        band = pixels[2 * top : 2 * (top + _TILE)]
        band = band if colours is None else colours[band]
        band = np.pad(band, ((0, band.shape[0] % 2), (0, band.shape[1] % 2), (0, 0)), mode="edge")
        sums = np.full((band.shape[0] // 2, width, 3), 2, np.uint16)  # 2: rounded, not cut off
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            sums += band[row::2, column::2]
        made[top : top + _TILE] = sums >> 2
    return made
