"""What a heatmap's files hold, as their readers see it: pyarrow, pandas, tifffile, openslide, PIL, QuPath's rules."""

from __future__ import annotations

import dataclasses
import gzip
import json
import time
import tracemalloc
import uuid
from xml.etree import ElementTree as ET

import heatmap_samples
import numpy as np
import openslide
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import percentileofscore

from cftrain.errors import ConfigError
from cftrain.heatmap import colours, picture, raster
from cftrain.heatmap.geojson import write_geojson
from cftrain.heatmap.layers import LEVEL0, Grid, Heatmap, Layer
from cftrain.heatmap.picture import write_picture
from cftrain.heatmap.slide_image import open_slide
from cftrain.heatmap.tables import patch_table, write_tables
from cftrain.heatmap.tiff import write_colour_tiff, write_score_tiff

VIRIDIS_TOP = (253, 231, 37)  # the last colour of viridis, as published


def percentiles(scores):
    return np.array([percentileofscore(scores, score, kind="mean") for score in scores])


def one_grid(corners, scores, edge=256, size=None, mpp=0.25, kind="attention", slide_id="S"):
    """A heatmap of one scale with one map."""
    corners = np.asarray(corners, np.int64)
    layer = Layer("source", 10, np.asarray(scores, float), kind, "a meaning")
    reach = tuple(int(side + edge) for side in corners.max(axis=0))
    grids = {10: Grid(10, corners, edge, LEVEL0, "a note")}
    return Heatmap(slide_id, grids, (layer,), size or reach, mpp, heatmap_samples.about())


def big(n=138_000):
    """As many patches as the largest slides have."""
    side = int(np.ceil(np.sqrt(n)))
    corners = np.stack([np.arange(n) % side, np.arange(n) // side], axis=1).astype(np.int64) * 256
    grids = {20: Grid(20, corners, 256, LEVEL0, "a note")}
    return Heatmap("BIG", grids, heatmap_samples.layers({20: n}), (side * 256, side * 256), 0.25, {})


# tables


def test_the_table_has_one_row_per_patch_with_its_place_and_scores():
    heatmap = heatmap_samples.nested()
    found = patch_table(heatmap).to_pandas()
    assert len(found) == sum(len(grid) for grid in heatmap.grids.values())
    for scale, grid in heatmap.grids.items():
        rows = found[found["scale"] == scale]
        assert (rows["slide_id"] == "SLIDE-1").all()
        assert rows["patch"].tolist() == list(range(len(grid)))
        assert rows[["x", "y"]].to_numpy().tolist() == grid.corners.tolist()
        assert (rows["patch_size_level0"] == 1024 * 5 // scale).all()
        for layer in heatmap.layers:
            name = layer.name.replace("-", "_")
            if layer.scale == scale:
                assert rows[name].tolist() == layer.scores.tolist()
                np.testing.assert_allclose(rows[f"{name}_percentile"], percentiles(layer.scores))
            else:
                assert rows[[name, f"{name}_percentile"]].isna().all(axis=None)


def test_parents_are_rows_of_the_coarser_scale_and_null_where_there_is_none():
    heatmap = heatmap_samples.nested()
    heatmap.grids[20].parents[3] = -1
    found = patch_table(heatmap)
    by_place = {(row["scale"], row["patch"]): row for row in found.to_pylist()}
    for row in by_place.values():
        if row["scale"] == 5 or (row["scale"], row["patch"]) == (20, 3):
            assert row["parent"] is None
        else:
            parent = by_place[row["scale"] // 2, row["parent"]]
            edge = parent["patch_size_level0"]
            assert (parent["x"], parent["y"]) == (row["x"] // edge * edge, row["y"] // edge * edge)


def test_patches_without_coordinates_have_no_x_and_y():
    found = patch_table(heatmap_samples.without_coordinates())
    for name in ("x", "y", "patch_size_level0", "parent"):
        assert found[name].null_count == found.num_rows == 30
    assert found["fine_cross"].null_count == 0
    assert b"null" in found.schema.metadata[b"no_coordinates"]
    assert json.loads(found.schema.metadata[b"unit"]) == {"20x": "file order"}


def test_parquet_and_csv_say_the_same_and_parquet_says_what_it_means(tmp_path):
    heatmap = heatmap_samples.nested()
    write_tables(heatmap, tmp_path)
    table = pq.read_table(tmp_path / "patches.parquet")
    text = pd.read_csv(tmp_path / "patches.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(table.to_pandas(), text, check_dtype=False, check_exact=True)
    told = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert told["slide_id"] == "SLIDE-1"
    assert told["mpp"] == "0.25"
    assert json.loads(told["unit"]) == {"5x": "level-0 pixels", "10x": "level-0 pixels", "20x": "level-0 pixels"}
    assert "percentile" in told["normalisation"]
    assert told["meaning of fine_cross"] == heatmap_samples.MEANING["fine-cross"]
    assert json.loads(told["about"])["model"] == "crossfusion"


# GeoJSON


def read_as_qupath(path):
    """Tiles of a file by the rules of QuPath 0.4 to 0.7: PathIO, QuPathTypeAdapters, ROITypeAdapters.

    Written from what they accept: the type by objectType, else a tile becomes an annotation; measurements as an object
    of numbers (Map<String, Double>); a colour of exactly three numbers; an id that is a UUID; JTS closes no rings.
    """
    assert path.name.endswith(".geojson.gz")
    collection = json.loads(gzip.decompress(path.read_bytes()), parse_constant=lambda word: pytest.fail(word))
    assert collection["type"] == "FeatureCollection"
    tiles = []
    for feature in collection["features"]:
        assert feature["type"] == "Feature"
        geometry, properties = feature["geometry"], feature["properties"]
        assert geometry["type"] == "Polygon"
        (ring,) = geometry["coordinates"]
        assert len(ring) == 5
        assert ring[0] == ring[-1], "a LinearRing must be closed"
        assert all(len(point) == 2 for point in ring)
        xs, ys = zip(*ring, strict=True)
        assert len({tuple(point) for point in ring}) == 4
        area = sum(xs[i] * ys[i + 1] - xs[i + 1] * ys[i] for i in range(4)) / 2
        assert properties["objectType"] == "tile"
        assert "type" not in properties
        colour = properties["color"]
        assert len(colour) == 3
        assert all(isinstance(part, int) and 0 <= part <= 255 for part in colour)
        assert isinstance(properties["name"], str)
        assert all(isinstance(value, float | int) for value in properties["measurements"].values())
        box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
        assert area == box[2] * box[3], "a square, and in GeoJSON's direction"
        tiles.append((uuid.UUID(feature["id"]), box, colour, properties["measurements"], properties["name"]))
    return tiles


@pytest.mark.parametrize("layout", ["trident", "clam"])
def test_qupath_reads_every_patch_with_its_place_and_scores(shared, tmp_path, layout):
    heatmap = heatmap_samples.real(shared, layout)
    for scale, n in ((5, 4), (10, 15), (20, 52)):
        path = tmp_path / f"{scale}x.geojson.gz"
        write_geojson(heatmap, scale, path)
        tiles = read_as_qupath(path)
        assert len(tiles) == n
        edge = 256 * 20 // scale
        corners = heatmap.grids[scale].corners.tolist()
        assert [box for _, box, *_ in tiles] == [(x, y, edge, edge) for x, y in corners]
        for layer in heatmap.layers_of(scale):
            assert [scores[layer.name] for *_, scores, _ in tiles] == layer.scores.tolist()
            shown = [scores[f"{layer.name} percentile"] for *_, scores, _ in tiles]
            np.testing.assert_allclose(shown, percentiles(layer.scores), atol=6e-5)
        assert {len(scores) for *_, scores, _ in tiles} == {2 * len(heatmap.layers_of(scale))}
        assert tiles[3][-1] == f"{scale}x patch 3"


def test_tiles_have_the_colour_of_the_scales_first_map(tmp_path):
    heatmap = heatmap_samples.nested()
    write_geojson(heatmap, 10, tmp_path / "a.geojson.gz")
    tiles = read_as_qupath(tmp_path / "a.geojson.gz")
    scores = heatmap.layers_of(10)[0].scores
    assert np.abs(np.subtract(tiles[int(scores.argmax())][2], VIRIDIS_TOP)).max() < 12
    luminance = [np.dot([0.299, 0.587, 0.114], tile[2]) for tile in tiles]
    assert (np.diff(np.array(luminance)[scores.argsort()]) > -1).all()


def test_geojson_of_equal_heatmaps_is_equal_byte_by_byte_and_ids_are_uuid5(tmp_path):
    for name in ("a", "b"):
        write_geojson(heatmap_samples.nested(), 20, tmp_path / f"{name}.geojson.gz")
        time.sleep(0.01)
    written = (tmp_path / "a.geojson.gz").read_bytes()
    assert written == (tmp_path / "b.geojson.gz").read_bytes()
    assert written[4:8] == bytes(4), "no time of writing (RFC 1952)"
    ids = [tile[0] for tile in read_as_qupath(tmp_path / "a.geojson.gz")]
    names = uuid.uuid5(uuid.NAMESPACE_URL, "https://pypi.org/project/crossfusion-store/heatmap")
    assert ids == [uuid.uuid5(names, f"SLIDE-1/20/{row}") for row in range(len(ids))]
    write_geojson(heatmap_samples.nested(), 10, tmp_path / "10x.geojson.gz")
    others = [tile[0] for tile in read_as_qupath(tmp_path / "10x.geojson.gz")]
    assert len({*ids, *others}) == len(ids) + len(others)


def test_scores_that_are_no_numbers_are_left_out_of_geojson(tmp_path):
    heatmap = one_grid([(0, 0), (256, 0), (512, 0)], [0.25, np.nan, np.inf])
    write_geojson(heatmap, 10, tmp_path / "a.geojson.gz")
    scores = [tile[3] for tile in read_as_qupath(tmp_path / "a.geojson.gz")]
    assert [sorted(each) for each in scores] == [["source", "source percentile"], [], []]


def test_edges_that_are_no_whole_pixels_keep_their_fraction(tmp_path):
    write_geojson(one_grid([(100, 40), (548, 40)], [1, 2], edge=448.5), 10, tmp_path / "a.geojson.gz")
    assert [tile[1] for tile in read_as_qupath(tmp_path / "a.geojson.gz")] == [
        (100, 40, 448.5, 448.5), (548, 40, 448.5, 448.5),
    ]  # fmt: skip


def test_patches_without_coordinates_are_refused_by_geojson(tmp_path):
    with pytest.raises(ConfigError, match=r"SLIDE-2: its 20x patches have no coordinates.*use the table"):
        write_geojson(heatmap_samples.without_coordinates(), 20, tmp_path / "a.geojson.gz")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_138_000_tiles_are_a_small_file_written_in_little_memory(tmp_path):
    heatmap = big()
    tracemalloc.start()
    write_geojson(heatmap, 20, tmp_path / "a.geojson.gz")
    assert tracemalloc.get_traced_memory()[1] < 16e6, "the text alone has 57 MB"
    tracemalloc.stop()
    assert (tmp_path / "a.geojson.gz").stat().st_size < 13e6
    assert gzip.decompress((tmp_path / "a.geojson.gz").read_bytes()).count(b'"objectType":"tile"') == 138_000


# TIFF of scores


def read_ome(path):
    """Channel names, pixels, attributes of Pixels, the first plane's, and the annotation, from the file's own XML."""
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        assert all(page.is_tiled and page.compression.name == "ADOBE_DEFLATE" for page in file.pages)
        values, text = file.asarray(), file.ome_metadata
    space = {"o": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}
    root = ET.fromstring(text.split("?>")[1])  # noqa: S314
    pixels = root.find(".//o:Pixels", space)
    told = {entry.attrib["K"]: entry.text for entry in root.iterfind(".//o:MapAnnotation//o:M", space)}
    names = [channel.attrib["Name"] for channel in pixels.iterfind("o:Channel", space)]
    plane = pixels.find("o:Plane", space).attrib
    return names, values.reshape(len(names), *values.shape[-2:]), pixels.attrib, plane, told


def test_score_tiff_has_a_channel_per_map_and_a_pixel_per_patch(tmp_path):
    heatmap = heatmap_samples.nested()
    for scale in (5, 10, 20):
        write_score_tiff(heatmap, scale, tmp_path / "a.ome.tif")
        names, values, pixels, plane, told = read_ome(tmp_path / "a.ome.tif")
        assert names == [layer.name for layer in heatmap.layers_of(scale)]
        edge = 1024 * 5 // scale
        assert values.dtype == np.float32
        assert values.shape[1:] == (4 * 1024 // edge, 6 * 1024 // edge)
        for layer, found in zip(heatmap.layers_of(scale), values, strict=True):
            expected = np.full(found.shape, np.nan, np.float32)
            for (x, y), score in zip(heatmap.grids[scale].corners, layer.scores, strict=True):
                expected[y // edge, x // edge] = score
            np.testing.assert_array_equal(found, expected)
            assert np.isnan(found).any()
            assert told[f"meaning of {layer.name}"] == layer.meaning
        assert float(pixels["PhysicalSizeX"]) == float(pixels["PhysicalSizeY"]) == 0.25 * edge
        assert pixels["PhysicalSizeXUnit"] == "µm"
        assert (plane["PositionX"], plane["PositionXUnit"]) == ("0.0", "µm")
        assert told["patches that share a pixel"] == told["furthest that a patch was moved to its pixel"] == "0"


def test_openslide_opens_the_score_tiff_with_its_size_and_resolution(tmp_path):
    write_score_tiff(heatmap_samples.nested(), 20, tmp_path / "a.ome.tif")
    with openslide.OpenSlide(tmp_path / "a.ome.tif") as slide:
        assert slide.dimensions == (24, 16)
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(64)


def test_a_grid_that_begins_elsewhere_says_where_its_first_pixel_lies(tmp_path):
    heatmap = one_grid([(612, 40), (868, 40), (100, 808)], [1, 2, 3])
    write_score_tiff(heatmap, 10, tmp_path / "a.ome.tif")
    _, values, _, plane, told = read_ome(tmp_path / "a.ome.tif")
    nan = np.nan
    np.testing.assert_array_equal(values[0], [[nan, nan, 1, 2], [nan] * 4, [nan] * 4, [3, nan, nan, nan]])
    assert (float(plane["PositionX"]), float(plane["PositionY"])) == (100 * 0.25, 40 * 0.25)
    assert told["left and upper edge of the first pixel"] == "100, 40"


def test_without_a_resolution_the_first_pixel_is_placed_in_level_0_pixels(tmp_path):
    heatmap = one_grid([(100, 40), (356, 40)], [1, 2], mpp=None)
    write_score_tiff(heatmap, 10, tmp_path / "a.ome.tif")
    _, _, pixels, plane, _ = read_ome(tmp_path / "a.ome.tif")
    assert "PhysicalSizeX" not in pixels
    assert (plane["PositionX"], plane["PositionXUnit"]) == ("100.0", "pixel")


def test_patches_of_no_common_grid_go_to_the_nearest_pixel_and_share_it_by_their_mean(tmp_path):
    # two pieces of tissue, as CLAM cuts them: the second begins 100 right and 60 below the first's grid
    heatmap = one_grid([(0, 0), (256, 0), (0, 256), (356, 60), (612, 60)], [1, 2, 3, 6, 8])
    write_score_tiff(heatmap, 10, tmp_path / "a.ome.tif")
    _, values, _, _, told = read_ome(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(values[0][:2, :3], [[1, 4, 8], [3, np.nan, np.nan]])
    assert told["patches that share a pixel"] == "2"
    assert told["furthest that a patch was moved to its pixel"] == "100"
    assert "mean" in told["pixel value"]


def test_overlapping_patches_on_a_grid_have_a_pixel_each():
    corners = [(x, y) for y in range(0, 640, 128) for x in range(0, 1280, 128)]
    heatmap = one_grid(corners, np.arange(50))
    placed = raster.cells(heatmap.grids[10], heatmap.size)
    assert placed.pitch == 128
    np.testing.assert_array_equal(placed.mean(np.arange(50.0))[:5, :10], np.arange(50).reshape(5, 10))
    assert (placed.shared, placed.moved) == (0, 0)


def test_corners_rounded_to_whole_pixels_keep_their_grid():
    corners = [(round(37.7 + 447.6 * i), round(12.2 + 447.6 * j)) for j in range(30) for i in range(40)]
    heatmap = one_grid(corners, np.arange(1200), edge=447.6)
    placed = raster.cells(heatmap.grids[10], heatmap.size)
    assert placed.shape == (30, 40)
    assert placed.shared == 0
    assert placed.moved <= 1


def test_patches_that_stick_out_before_the_slide_have_their_pixels():
    placed = raster.cells(one_grid([(-256, 0), (0, 0), (256, -512)], [1, 2, 3]).grids[10], (512, 256))
    np.testing.assert_array_equal(
        placed.mean(np.array([1.0, 2, 3])), [[np.nan, np.nan, 3], [np.nan] * 3, [1, 2, np.nan]]
    )
    assert placed.origin == (-256, -512)


def test_score_tiff_without_coordinates_is_the_square_in_file_order(tmp_path):
    heatmap = heatmap_samples.without_coordinates(30)
    write_score_tiff(heatmap, 20, tmp_path / "a.ome.tif")
    _, values, pixels, _, told = read_ome(tmp_path / "a.ome.tif")
    expected = np.full(36, np.nan, np.float32)
    expected[:30] = heatmap.layers[0].scores
    np.testing.assert_array_equal(values[0], expected.reshape(6, 6))
    assert told["unit"] == "file order"
    assert "PhysicalSizeX" not in pixels


@pytest.mark.parametrize(
    "write", [lambda h, p: write_score_tiff(h, 20, p), lambda h, p: write_colour_tiff(h, h.layers[3], p)]
)
def test_tiffs_of_equal_heatmaps_are_equal_byte_by_byte(tmp_path, write):
    for name in ("a.tif", "b.tif"):
        write(heatmap_samples.nested(), tmp_path / name)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


# coloured TIFF


def test_openslide_reads_the_coloured_pyramid(tmp_path):
    heatmap = heatmap_samples.nested(width=17, height=11)  # odd numbers at the coarse levels
    layer = heatmap.layers[3]
    write_colour_tiff(heatmap, layer, tmp_path / "a.tif")
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        about = json.loads(slide.properties["tiff.ImageDescription"])
        down = about["downsample"]
        assert slide.dimensions == (17 * 1024 / down, 11 * 1024 / down) == (1088, 704)
        assert slide.level_count == 3
        assert slide.level_downsamples == pytest.approx([1, 2, 4], rel=0.01)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25 * down)
        whole = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        for level in (1, 2):
            found = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"), float)
            expected = Image.fromarray(whole).resize(slide.level_dimensions[level], Image.Resampling.BOX)
            assert np.abs(found - np.asarray(expected, float)).max() <= 2
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert [page.subfiletype for page in file.pages] == [0, 1, 1]
        per_cm = [page.tags["XResolution"].value for page in file.pages]
        assert [1e4 * below / above for above, below in per_cm] == pytest.approx([0.25 * down * 2**n for n in range(3)])
        assert all(page.tile == (256, 256) for page in file.pages)
        np.testing.assert_array_equal(file.pages[0].asarray(), whole)
    white = np.ones(whole.shape[:2], bool)
    for x, y in heatmap.grids[20].corners:
        square = whole[int(y // down) : int((y + 256) // down), int(x // down) : int((x + 256) // down)]
        assert (square == square[0, 0]).all()
        white[int(y // down) : int((y + 256) // down), int(x // down) : int((x + 256) // down)] = False
    assert white.any()
    assert (whole[white] == 255).all()
    at = (heatmap.grids[20].corners // down).astype(int)
    shown = whole[at[:, 1] + 4, at[:, 0] + 4]
    luminance = shown @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance[layer.scores.argsort()]) > -1).all(), "brighter is more"
    assert np.abs(shown[layer.scores.argmax()] - np.array(VIRIDIS_TOP, int)).max() < 3


def test_a_large_map_keeps_its_longer_side_at_most_4096_pixels_and_at_least_one_per_patch(tmp_path):
    for across, pixels in ((100, 16), (400, 8), (1500, 2), (5000, 1)):
        heatmap = one_grid([(0, 0), ((across - 1) * 256, 0)], [1, 2])
        write_colour_tiff(heatmap, heatmap.layers[0], tmp_path / "a.tif")
        with openslide.OpenSlide(tmp_path / "a.tif") as slide:
            assert slide.dimensions == (across * pixels, pixels)


def test_attribution_is_blue_where_it_lowers_and_orange_where_it_raises_the_risk(tmp_path):
    heatmap = one_grid([(256 * i, 0) for i in range(5)], [-2.0, -0.5, 0.0, 0.5, 2.0], kind="attribution")
    write_colour_tiff(heatmap, heatmap.layers[0], tmp_path / "a.tif")
    row = tifffile.imread(tmp_path / "a.tif")[8, 8::16].astype(int)
    assert (row[:2, 2] > row[:2, 0] + 20).all()
    assert (row[3:, 0] > row[3:, 2] + 20).all()
    assert (row[2] > 235).all()
    assert (np.diff(row[:3].sum(axis=1)) > 0).all()
    assert (np.diff(row[2:].sum(axis=1)) < 0).all()


# colours and squares


def test_attribution_limits_are_the_99th_percentile_of_the_size():
    scores = np.concatenate([np.linspace(-1, 1, 1001), [50]])
    layer = Layer("a", 10, scores, "attribution", "")
    assert colours.limit(layer) == np.percentile(np.abs(scores), 99) < 1
    shares = colours.shares(layer)
    assert (shares[-1], shares[500]) == (1, 0.5)
    assert colours.limit(Layer("a", 10, np.zeros(3), "attribution", "")) == 1
    assert colours.limit(Layer("a", 10, np.array([0.0] * 500 + [3]), "attribution", "")) == 3


@pytest.mark.parametrize("kind", ["attention", "attribution"])
def test_colours_are_ordered_by_lightness_so_they_are_read_without_colour_vision(kind):
    shades = colours.palette(kind, (9, 9, 9))
    assert shades[colours.NONE].tolist() == [9, 9, 9]
    luminance = shades[1:] @ [0.299, 0.587, 0.114]
    if kind == "attention":
        assert (np.diff(luminance) > -0.5).all()
    else:
        assert (np.diff(luminance[:128]) > -0.5).all()
        assert (np.diff(luminance[127:]) < 0.5).all()
    assert np.ptp(luminance) > 100


def test_overlapping_squares_show_their_mean_as_a_loop_over_patches_does(rng, monkeypatch):
    corners = rng.integers(-150, 900, (60, 2))
    shares = rng.random(60)
    shares[5] = np.nan
    grid = Grid(10, corners, 111.3, LEVEL0, "")
    for at_once in (1 << 22, 300):
        monkeypatch.setattr(raster, "_AT_ONCE", at_once)
        found = raster.paint(grid, shares, (-20.0, 13.0), 0.31, (280, 300))
        sums, counts = np.zeros((280, 300)), np.zeros((280, 300))
        for (x, y), share in zip(corners, shares, strict=True):
            if np.isnan(share):
                continue
            ends = [round((at - start) * 0.31) for at, start in ((x, -20), (y, 13), (x + 111.3, -20), (y + 111.3, 13))]
            left, top, right, bottom = (max(end, 0) for end in ends)
            sums[top:bottom, left:right] += share
            counts[top:bottom, left:right] += 1
        assert ((found == colours.NONE) == (counts == 0)).all()
        assert counts.max() > 2
        mean = sums[counts > 0] / counts[counts > 0]
        assert np.abs((found[counts > 0] - 0.5) / 255 - mean).max() < 0.5 / 255 + 2e-5


def test_patches_smaller_than_a_pixel_are_still_seen():
    grid = Grid(10, np.array([[0, 0], [1000, 1000]]), 10, LEVEL0, "")
    found = raster.paint(grid, np.array([0.1, 0.9]), (0.0, 0.0), 0.01, (11, 11))
    assert np.argwhere(found).tolist() == [[0, 0], [10, 10]]


# pictures


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (kept.append(self), save(self, *args, **how))[1])
    return kept


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_over_the_slide_the_map_is_half_transparent_and_the_rest_is_the_slide(shared, tmp_path, drawn):
    heatmap = heatmap_samples.real(shared)
    layer = heatmap.layers[3]
    with open_slide(shared / "wsi" / "CMU-1-Small-Region.svs") as slide:
        write_picture(heatmap, layer, tmp_path / "a.png", slide)
        high, wide = drawn[0].axes[0].images[0].get_array().shape[:2]
        expected = np.asarray(slide.region(0, 0, 2220, 2967, wide, high), float)
    zoom = high / 2967
    covered = np.zeros((high, wide), bool)
    for (x, y), share in zip(heatmap.grids[20].corners, percentiles(layer.scores) / 100, strict=True):
        box = np.s_[round(y * zoom) : round((y + 256) * zoom), round(x * zoom) : round((x + 256) * zoom)]
        covered[box] = True
        colour = 255 * np.array(colours.colour_map("attention")(share)[:3])
        expected[box] = (expected[box] + colour) / 2
    with Image.open(tmp_path / "a.png") as saved:
        pixels = np.asarray(saved.convert("RGB"), float)
    left = picture._MARGIN
    tops = [top for top in range(300) if np.abs(pixels[top, left : left + wide] - expected[0]).max() < 4]
    found = pixels[tops[0] : tops[0] + high, left : left + wide]
    np.testing.assert_array_equal(found[~covered], expected[~covered])
    assert np.abs(found - expected).max() < 4
    assert 1400 < max(pixels.shape) < 1650


def test_a_picture_says_what_it_shows(shared, tmp_path, drawn):
    heatmap = heatmap_samples.real(shared)
    for layer in heatmap.layers:
        write_picture(heatmap, layer, tmp_path / "a.png", None)
        said = words(drawn[-1])
        text = " ".join(said)
        assert said[0] == "CMU-1-Small-Region"
        assert f"crossfusion  ·  {layer.name}  ·  {layer.scale}x" in text
        assert layer.meaning in text
        assert "fold 0 was not trained on this slide." in said
        assert "SYNTHETIC DATA" in said
        assert "no coordinates" not in text
        assert any(word.endswith("mm") for word in said)
        if layer.kind == "attention":
            assert "percentile of the score" in said
            assert {"0", "25", "50", "75", "100"} <= set(said)
        else:
            assert {"lowers risk", "raises risk", "0"} <= set(said)
            assert "99th percentile" in text
            ends = f"{np.percentile(np.abs(layer.scores), 99):.2g}"
            assert {ends, f"\N{MINUS SIGN}{ends}"} <= set(said)


def test_the_scale_bar_is_as_long_as_it_says(tmp_path, drawn):
    heatmap = one_grid([(0, 0), (256 * 99, 256 * 59)], [1, 2], mpp=0.5)
    write_picture(heatmap, heatmap.layers[0], tmp_path / "a.png", None)
    (label,) = (word for word in words(drawn[0]) if word.endswith(" mm"))
    view = drawn[0].axes[0].images[0].get_array().shape
    microns_per_pixel = 256 * 100 * 0.5 * (1 + 2 * 0.02) / view[1]  # the map and its margins
    bars = [line.get_xdata() for line in drawn[0].axes[0].lines if line.get_linewidth() > 3]
    length = (bars[0][1] - bars[0][0]) * microns_per_pixel
    assert length == pytest.approx(1000 * float(label.removesuffix(" mm")), rel=0.002)


def test_without_a_resolution_or_a_mark_nothing_is_said_of_them(tmp_path, drawn):
    heatmap = dataclasses.replace(one_grid([(0, 0), (256, 0)], [1, 2], mpp=None), about={})
    write_picture(heatmap, heatmap.layers[0], tmp_path / "a.png", None)
    assert not [word for word in words(drawn[0]) if word.endswith((" mm", " µm")) or "SYNTHETIC" in word]


def test_without_coordinates_the_picture_says_that_it_is_no_tissue(shared, tmp_path, drawn):
    heatmap = heatmap_samples.without_coordinates()
    with open_slide(shared / "wsi" / "CMU-1-Small-Region.svs") as slide:
        for layer in heatmap.layers:
            write_picture(heatmap, layer, tmp_path / "a.png", slide)
            said = words(drawn[-1])
            assert "no coordinates: patches in file order; this is not the shape of the tissue" in said
            assert not [word for word in said if word.endswith((" mm", " µm"))]


def test_the_image_of_another_slide_is_refused(shared, tmp_path):
    heatmap = heatmap_samples.nested()
    with (
        open_slide(shared / "wsi" / "CMU-1-Small-Region.svs") as slide,
        pytest.raises(ConfigError, match="not the slide"),
    ):
        write_picture(heatmap, heatmap.layers[0], tmp_path / "a.png", slide)
    assert not (tmp_path / "a.png").exists()


LONG_ID = "TCGA-CS-4941-01Z-00-DX1.56ac541d-9b1a-477b-af9c-0cc2cf7ff8d2"


@pytest.mark.parametrize("slide_id", [LONG_ID, "WIDE $letters_MMMM-WWWW-MMMM-WWWW-MMMM-WWWW$", "S"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 60), (60, 2), (30, 20)])
@pytest.mark.parametrize("kind", ["attention", "attribution"])
def test_words_stay_inside_the_picture_and_off_each_other(tmp_path, drawn, slide_id, width, height, kind):
    corners = [(256 * x, 256 * y) for x in range(width) for y in range(height)]
    scores = np.linspace(-0.0123, 0.0456, len(corners)) if kind == "attribution" else np.ones(len(corners))
    heatmap = one_grid(corners, scores, kind=kind, slide_id=slide_id)
    notes = ["a note that is much longer than what fits in one line of the picture " * 4, "another one"]
    about = heatmap.about | {"notes": notes, "cohort": "GBMLGG", "encoder": "vit4k_xs_dino_hipt"}
    heatmap = dataclasses.replace(heatmap, about=about)
    write_picture(heatmap, heatmap.layers[0], tmp_path / "a.png", None)
    (figure,) = drawn
    renderer = figure.canvas.get_renderer()
    wide, high = figure.canvas.get_width_height()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts]
    assert not any(text.get_parse_math() for text in figure.axes[0].texts), "ids may have dollar signs"
    for word, box in boxes:
        assert box.x0 >= 0, word
        assert box.x1 <= wide, word
        assert box.y0 >= 0, word
        assert box.y1 <= high, word
    for at, (word, box) in enumerate(boxes):
        for other_word, other in boxes[:at]:
            apart = box.x1 <= other.x0 or other.x1 <= box.x0 or box.y1 <= other.y0 or other.y1 <= box.y0
            assert apart, f"{word!r} lies on {other_word!r}"
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.size == (wide, high)
        assert max(saved.size) < 1700


@pytest.mark.slow
def test_138_000_patches_are_written_in_seconds(tmp_path):
    heatmap = big()
    start = time.perf_counter()
    write_tables(heatmap, tmp_path)
    write_geojson(heatmap, 20, tmp_path / "a.geojson.gz")
    write_score_tiff(heatmap, 20, tmp_path / "a.ome.tif")
    write_colour_tiff(heatmap, heatmap.layers[0], tmp_path / "a.tif")
    write_picture(heatmap, heatmap.layers[0], tmp_path / "a.png", None)
    assert time.perf_counter() - start < 30  # a loop over artists or pixels takes minutes; else 4 s on one core
