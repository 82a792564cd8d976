"""Heatmaps to write down and look at, made without any model."""

from __future__ import annotations

import h5py
import numpy as np

from cftrain.heatmap.layers import FILE_ORDER, LEVEL0, Grid, Heatmap, Layer

MEANING = {
    "coarse-cross": "share of the attention of all 10x patches that a 5x patch receives",
    "fine-cross": "share of the attention of all 10x patches that a 20x patch receives",
    "source": "share of the attention of all 10x patches that a 10x patch receives",
    "fused": "share of the class token's attention that a 10x patch receives",
    "gradient": "gradient of the risk times the patch's distance from the slide's mean patch",
}
SCALE = {"coarse-cross": 5, "source": 10, "fused": 10, "fine-cross": 20}


def layers(n_patches, seed=0):
    """The maps of CrossFusion and a gradient map of each scale, with random scores."""
    rng = np.random.default_rng(seed)
    made = []
    for name, scale in SCALE.items():
        if scale in n_patches:
            scores = rng.exponential(size=n_patches[scale])
            made.append(Layer(name, scale, scores / scores.sum(), "attention", MEANING[name]))
    for scale, n in n_patches.items():
        made.append(Layer(f"gradient-{scale}x", scale, rng.normal(size=n), "attribution", MEANING["gradient"]))
    return tuple(made)


def nested_grids(width=6, height=4, edge=1024, holes=True):
    """TRIDENT's grids: every 5x patch holds 2 x 2 of 10x, and those 2 x 2 of 20x; with holes where no tissue is."""
    corners = {5: np.array([(x, y) for y in range(height) for x in range(width) if not holes or (x + y) % 5])}
    for scale in (10, 20):
        steps = [(dx, dy) for dy in (0, 1) for dx in (0, 1)]
        corners[scale] = np.array([(2 * x + dx, 2 * y + dy) for x, y in corners[scale // 2] for dx, dy in steps])
    made = {}
    for scale, cells in corners.items():
        own = edge * 5 // scale
        parents = None if scale == 5 else np.repeat(np.arange(len(cells) // 4), 4)
        note = "" if parents is None else "the grids nest: each patch lies in one patch of the coarser scale"
        made[scale] = Grid(scale, cells.astype(np.int64) * own, own, LEVEL0, "from the source files", parents, note)
    return made


def nested(slide_id="SLIDE-1", seed=0, **shape):
    """A heatmap on nested grids."""
    grids = nested_grids(**shape)
    width = max(int(grid.corners[:, 0].max() + grid.edge) for grid in grids.values())
    height = max(int(grid.corners[:, 1].max() + grid.edge) for grid in grids.values())
    made = layers({scale: len(grid) for scale, grid in grids.items()}, seed)
    return Heatmap(slide_id, grids, made, (width, height), 0.25, about())


def without_coordinates(n=30, slide_id="SLIDE-2"):
    """A heatmap of a bag that has no coordinates: a square in file order."""
    side = int(np.ceil(np.sqrt(n)))
    corners = np.array([(row % side, row // side) for row in range(n)], dtype=np.int64)
    grid = Grid(20, corners, 1, FILE_ORDER, "no coordinates: patches in the order of the file, on a square")
    return Heatmap(slide_id, {20: grid}, layers({20: n}), (side, side), None, about())


def real(shared, layout="trident", slide_id="CMU-1-Small-Region"):
    """The real slide's patches, with random scores; parents only where the grids nest."""
    folder = {"trident": "{}x_256px_0px_overlap/features_toy64", "clam": "x{}/h5_files"}[layout]
    grids = {}
    for scale in (5, 10, 20):
        with h5py.File(shared / "h5" / layout / folder.format(scale) / f"{slide_id}.h5") as file:
            corners = file["coords"][:].astype(np.int64)
        edge = 256 * 20 // scale
        parents = None
        if scale > 5 and layout == "trident":
            above = {tuple(corner): row for row, corner in enumerate(grids[scale // 2].corners.tolist())}
            parents = np.array([above.get(tuple(corner // (2 * edge) * (2 * edge)), -1) for corner in corners])
        grids[scale] = Grid(scale, corners, edge, LEVEL0, "from the source files", parents)
    return Heatmap(
        slide_id, grids, layers({scale: len(grid) for scale, grid in grids.items()}), (2220, 2967), 0.499, about()
    )


def about():
    """What a heatmap says besides its maps."""
    return {
        "run": "runs/DEMO-crossfusion",
        "model": "crossfusion",
        "cohort": "DEMO",
        "encoder": "synthetic",
        "folds": [0],
        "risk": -1.25,
        "notes": ["fold 0 was not trained on this slide"],
        "synthetic": True,
    }
