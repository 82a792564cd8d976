"""Make the pictures of the README from a model that has learnt a synthetic cohort.

    python benchmarks/planted.py --seed 1 --jobs 4 --epochs 16 --models crossfusion --keep kept
    python tools/make_pictures.py kept          # writes docs/pictures/; needs chromium

planted_maps.png: what `cfstore synth` marked on a slide, beside what the maps show of it. viewer.png: the viewer.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.stats import rankdata

import cfstore
from cfstore.synth import SHIFT, planted_directions
from cftrain.heatmap import HeatmapOptions, explain_slides

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
PANELS = (
    (5, "planted", "marked by `synth` at 5x"),
    (5, "integrated_5x", "integrated gradients, 5x"),
    (20, "planted", "marked by `synth` at 20x"),
    (20, "integrated_20x", "integrated gradients, 20x"),
    (20, "fine_cross", "cross-attention, 20x"),
)
LEAST_PATCHES = 400
VIEW = "#layer=integrated-20x"


def choose(store: cfstore.Store) -> str:
    """A slide with enough patches to see something, about half of them marked at either scale."""
    query = (
        "SELECT slide_id FROM bags JOIN slides USING (slide_id) JOIN patients USING (cohort, patient_id) "
        f"WHERE scale = 20 AND n_patches >= {LEAST_PATCHES} "
        "ORDER BY abs(oracle_5x - 0.5) + abs(oracle_20x - 0.5), slide_id LIMIT 1"
    )
    return str(store.sql(query)["slide_id"][0].as_py())


def draw(axes: Axes, corners: NDArray[np.int64], edge: float, values: NDArray[np.float64], title: str) -> None:
    """One map: planted marks in black, attribution diverging around 0, attention by percentile."""
    squares = PatchCollection([Rectangle((x, y), edge, edge) for x, y in corners.tolist()], linewidth=0)
    squares.set_array(values)
    if title.startswith("marked"):
        squares.set(cmap="Greys", clim=(-0.25, 1))
    elif values.min() < 0:
        limit = np.percentile(np.abs(values), 99)
        squares.set(cmap="RdBu_r", clim=(-limit, limit))
    else:
        squares.set(cmap="viridis", array=rankdata(values), clim=(1, len(values)))
    axes.add_collection(squares)
    axes.set(
        xlim=(corners[:, 0].min(), corners[:, 0].max() + edge), ylim=(corners[:, 1].max() + edge, corners[:, 1].min())
    )
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)


def planted_maps(folder: Path, store: cfstore.Store, slide_id: str, seed: int, out: Path) -> None:
    """What was planted on the slide, beside its maps."""
    table = pq.read_table(folder / "patches.parquet").to_pandas()
    bags = store.slide(slide_id).bags
    figure = Figure(figsize=(12, 2.9), dpi=140, layout="constrained")
    for axes, (scale, column, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        own = table[table["scale"] == scale]
        directions = planted_directions(bags[scale].dim, seed)
        marks = (bags[scale].features @ directions[scale] > SHIFT / 2).astype(float)
        values = marks if column == "planted" else own[column].to_numpy()
        draw(axes, own[["x", "y"]].to_numpy(), float(own["patch_size_level0"].iloc[0]), values, title)
    figure.savefig(out, metadata={"Software": None})


def screenshot(page: str, out: Path, width: int = 1300, height: int = 1130) -> None:
    """A page as a headless Chromium shows it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium on PATH; install one to make viewer.png")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000",
            f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={out}", page,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    """Explain one slide, and draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path, help="what benchmarks/planted.py --keep left")
    parser.add_argument("--seed", type=int, default=1, help="of the cohort")
    parser.add_argument("--slide", help="[default: a large one, half of it marked]")
    parser.add_argument("--out", type=Path, default=PICTURES)
    told = parser.parse_args()
    run, store = told.kept / "crossfusion", cfstore.open(told.kept / "store")
    slide_id = told.slide or choose(store)
    options = HeatmapOptions(maps=("all", "integrated"), check=True)
    (done,) = explain_slides(run, [slide_id], options=options).heatmaps
    told.out.mkdir(parents=True, exist_ok=True)
    planted_maps(done.path, store, slide_id, told.seed, told.out / "planted_maps.png")
    screenshot(f"{(done.path / 'index.html').resolve().as_uri()}{VIEW}", told.out / "viewer.png")
    print(f"{slide_id}: {told.out / 'planted_maps.png'}, {told.out / 'viewer.png'}")


if __name__ == "__main__":
    main()
