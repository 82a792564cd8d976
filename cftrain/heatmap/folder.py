"""The folder of a heatmap: all of its files, complete or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

from cftrain.errors import RunError
from cftrain.heatmap.geojson import write_geojson
from cftrain.heatmap.layers import LEVEL0, Heatmap
from cftrain.heatmap.picture import write_picture
from cftrain.heatmap.slide_image import SlideImage
from cftrain.heatmap.tables import write_tables
from cftrain.heatmap.tiff import write_colour_tiff, write_score_tiff
from cftrain.heatmap.viewer import write_viewer

ABOUT: Final = "heatmap.json"
_LONGEST: Final = 150


def folder_name(slide_id: str) -> str:
    """A name for the slide's folder: its id, made safe where it has characters that a folder cannot have."""
    safe = re.sub(r"[^\w.()+=@ -]", "_", slide_id).strip(". ")[:_LONGEST]
    if safe == slide_id:
        return safe
    return f"{safe}-{hashlib.sha256(slide_id.encode()).hexdigest()[:8]}"


def check_replaceable(out: Path) -> None:
    """Refuse a folder that holds something else than a heatmap: RunError."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ABOUT).is_file())):
        message = f"{out}: holds something else than a heatmap; name another folder with -o"
        raise RunError(message)


def write_folder(heatmap: Heatmap, out: Path, image: SlideImage | None) -> Heatmap:
    """Write all files of a heatmap aside and rename their folder; a heatmap that was there is replaced.

    Returns
    -------
    Heatmap
        With the list of files in `about`.

    Raises
    ------
    RunError
        The folder cannot be written.
    """
    aside, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    try:
        aside.mkdir(parents=True)
        listed = dataclasses.replace(heatmap, about={**heatmap.about, "files": _write_files(heatmap, aside, image)})
        write_viewer(listed, aside, image)
        (aside / ABOUT).write_text(_json(listed.about), encoding="utf-8")
        check_replaceable(out)
        _replace(aside, out, old)
    except OSError as error:
        message = f"{out}: the heatmap cannot be written ({error}); name another folder with -o"
        raise RunError(message) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return listed


def _replace(new: Path, out: Path, old: Path) -> None:
    """Put `new` in the place of `out`, which is put back where that fails."""
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _write_files(heatmap: Heatmap, folder: Path, image: SlideImage | None) -> list[str]:
    """All but the viewer and heatmap.json; their names."""
    write_tables(heatmap, folder)
    names = ["patches.parquet", "patches.csv"]
    for scale, grid in heatmap.grids.items():
        if not heatmap.layers_of(scale):
            continue
        write_score_tiff(heatmap, scale, folder / f"{scale}x.ome.tif")
        names.append(f"{scale}x.ome.tif")
        if grid.unit == LEVEL0:
            write_geojson(heatmap, scale, folder / f"{scale}x.geojson.gz")
            names.append(f"{scale}x.geojson.gz")
    for layer in heatmap.layers:
        write_picture(heatmap, layer, folder / f"{layer.name}.png", image)
        write_colour_tiff(heatmap, layer, folder / f"{layer.name}.tif")
        names += [f"{layer.name}.png", f"{layer.name}.tif"]
    return [*names, ABOUT]


def _json(about: Any) -> str:
    return json.dumps(about, indent=2, allow_nan=False) + "\n"
