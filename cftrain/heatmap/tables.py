"""The scores as a table, one row per patch, for SQL, pandas, R and TissUUmaps: patches.parquet and patches.csv."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from cftrain.heatmap.colours import PERCENTILE
from cftrain.heatmap.layers import FILE_ORDER, Grid, Heatmap, Layer


def patch_table(heatmap: Heatmap) -> pa.Table:
    """One row per patch of every scale, coarse to fine, in the order of the bags.

    Returns
    -------
    pyarrow.Table
        slide_id; scale; patch, its row in the bag; x, y of its top-left corner and patch_size_level0, its side, in
        level-0 pixels, null without coordinates; parent, the row of the patch of the next coarser scale that holds
        it, null where none is known. Then two columns per map, null at other scales: the raw score (`fine_cross`)
        and its percentile (`fine_cross_percentile`). The schema's metadata says what they are.
    """
    return pa.concat_tables([_scale_table(heatmap, grid) for grid in heatmap.grids.values()]).replace_schema_metadata(
        _metadata(heatmap)
    )


def write_tables(heatmap: Heatmap, folder: Path) -> None:
    """`patch_table` as patches.parquet and patches.csv in a folder that is there; CSV has no place for the metadata."""
    table = patch_table(heatmap)
    pq.write_table(table, folder / "patches.parquet")
    csv.write_csv(table, folder / "patches.csv")


def column(layer: Layer) -> str:
    """The column of a map's raw scores."""
    return layer.name.replace("-", "_")


def _scale_table(heatmap: Heatmap, grid: Grid) -> pa.Table:
    n = len(grid)
    nowhere = np.full(n, grid.unit == FILE_ORDER)
    parents = np.full(n, -1) if grid.parents is None else grid.parents
    columns = {
        "slide_id": pa.array([heatmap.slide_id] * n, pa.string()),
        "scale": pa.array(np.full(n, grid.scale), pa.int32()),
        "patch": pa.array(np.arange(n), pa.int64()),
        "x": pa.array(grid.corners[:, 0], pa.int64(), mask=nowhere),
        "y": pa.array(grid.corners[:, 1], pa.int64(), mask=nowhere),
        "patch_size_level0": pa.array(np.full(n, grid.edge), pa.float64(), mask=nowhere),
        "parent": pa.array(parents, pa.int64(), mask=parents < 0),
    }
    for layer in heatmap.layers:
        here = layer.scale == grid.scale
        for name, values in ((column(layer), layer.scores), (f"{column(layer)}_percentile", layer.percentile)):
            columns[name] = pa.array(values, pa.float64()) if here else pa.nulls(n, pa.float64())
    return pa.table(columns)


def _metadata(heatmap: Heatmap) -> dict[str, str]:
    units = {f"{scale}x": grid.unit for scale, grid in heatmap.grids.items()}
    places = {f"{scale}x": grid.note for scale, grid in heatmap.grids.items()}
    told = {
        "slide_id": heatmap.slide_id,
        "mpp": "unknown" if heatmap.mpp is None else str(float(heatmap.mpp)),
        "unit": json.dumps(units),
        "coordinates": json.dumps(places),
        "normalisation": PERCENTILE,
        "about": json.dumps(dict(heatmap.about)),
    }
    if FILE_ORDER in units.values():
        told["no_coordinates"] = "x and y are null where the unit is file order: the source file says no places"
    return told | {f"meaning of {column(layer)}": layer.meaning for layer in heatmap.layers}
