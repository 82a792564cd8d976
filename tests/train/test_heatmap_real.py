"""A real slide, from its feature files to its heatmap, in TRIDENT's layout and in CLAM's."""

from __future__ import annotations

import gzip
import json

import h5py
import numpy as np
import openslide
import pytest
from PIL import Image
from test_report_browser import chromium, needs_chromium

import cfstore
from cfstore.synth import synthesize
from cftrain.config import load_config
from cftrain.errors import ConfigError
from cftrain.experiment import cross_validate
from cftrain.heatmap import HeatmapOptions, Source, heatmap_run

SLIDE = "CMU-1-Small-Region"
FOLDER = {"trident": "{}x_256px_0px_overlap/features_toy64", "clam": "x{}/h5_files"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """CrossFusion on 64 numbers a patch, hardly trained."""
    base = tmp_path_factory.mktemp("real")
    synthesize(base / "h5", slides=12, patches=32, dim=64, seed=3)
    store = cfstore.open(base / "store", create=True)
    store.ingest(base / "h5", cfstore.IngestOptions(encoder="toy64"))
    store.make_splits(2, "DEMO", name="two")
    settings = ["train.epochs=1", "train.select_from=1", "model.embed_dim=8", "model.n_heads=2"]
    config = load_config(flags={"data.cohort": "DEMO", "data.splits": "two"}, settings=settings)
    return cross_validate(config, store.path, base / "run", device="cpu").path


@pytest.fixture(params=FOLDER)
def layout(request):
    return request.param


@pytest.fixture
def heatmap(run, shared, layout, tmp_path):
    """The real slide over its own image."""
    store = cfstore.open(tmp_path / "store", create=True)
    store.ingest(shared / "h5" / layout, cfstore.IngestOptions(encoder="toy64", cohort="REAL"))
    return heatmap_run(
        run, SLIDE, tmp_path / "out", source=Source(store.path), options=HeatmapOptions(wsi=shared / "wsi")
    )


def corners_of(shared, layout, scale):
    with h5py.File(shared / "h5" / layout / FOLDER[layout].format(scale) / f"{SLIDE}.h5") as file:
        return file["coords"][:]


def test_tiles_for_qupath_lie_where_the_feature_files_say(heatmap, shared, layout):
    for scale in (5, 10, 20):
        features = json.loads(gzip.decompress((heatmap.path / f"{scale}x.geojson.gz").read_bytes()))["features"]
        rings = np.array([feature["geometry"]["coordinates"][0] for feature in features])
        np.testing.assert_array_equal(rings.min(axis=1), corners_of(shared, layout, scale))
        assert (np.ptp(rings, axis=1) == 256 * 20 / scale).all()  # the slide's level 0 is 20x


def test_the_image_gives_size_and_microns(heatmap, shared):
    with openslide.OpenSlide(shared / "wsi" / f"{SLIDE}.svs") as slide:
        assert tuple(heatmap.about["size"]) == slide.dimensions
        assert heatmap.about["mpp"] == pytest.approx(float(slide.properties["openslide.mpp-x"]))


def test_pictures_are_drawn_over_the_tissue(heatmap):
    for name in heatmap.about["maps"]:
        with Image.open(heatmap.path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 5_000, (
                name
            )  # tissue has many more colours than a map


def test_the_patch_size_that_clam_does_not_write_is_noted(heatmap, layout):
    assert any("spacing" in note for note in heatmap.about["notes"]) == (layout == "clam")


@pytest.mark.browser
@needs_chromium
def test_a_browser_shows_the_slide_with_the_map_on_it(heatmap, tmp_path):
    page = (heatmap.path / "index.html").resolve().as_uri()
    shots = {}
    for opacity in (0, 1):
        shots[opacity] = tmp_path / f"{opacity}.png"
        printed = chromium(
            "--window-size=1200,900", "--virtual-time-budget=8000", f"--screenshot={shots[opacity]}",
            f"{page}#layer=fine-cross&opacity={opacity}", profile=tmp_path / f"profile{opacity}",
        )  # fmt: skip
        assert "CONSOLE" not in printed.stderr
    tissue, covered = (np.asarray(Image.open(shots[opacity]).convert("RGB"), dtype=int) for opacity in (0, 1))
    changed = np.abs(tissue - covered).sum(axis=2) > 60
    assert 0.02 < changed.mean() < 0.6  # the patches, and nothing but the patches and the slider
    assert len(np.unique(tissue[changed], axis=0)) > 10 * len(np.unique(covered[changed], axis=0))


def test_an_image_of_another_slide_is_refused(run, shared, tmp_path):
    store = cfstore.open(tmp_path / "store", create=True)
    store.ingest(shared / "h5" / "trident", cfstore.IngestOptions(encoder="toy64", cohort="REAL"))
    with pytest.raises(ConfigError, match="not the slide"):
        heatmap_run(
            run, "TCGA-CR-7395-01A-01-TS1", tmp_path / "out", source=Source(store.path),
            options=HeatmapOptions(wsi=shared / "wsi" / f"{SLIDE}.svs"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
