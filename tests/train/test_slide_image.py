"""The slide's picture: against openslide, tifffile and numpy on the same file."""

from __future__ import annotations

import ast
import dataclasses
import sys
from pathlib import Path

import heatmap_samples
import numpy as np
import openslide
import pytest
import tifffile

from cftrain.errors import ConfigError
from cftrain.heatmap import slide_image
from cftrain.heatmap.slide_image import check_fits, find_slide, open_slide

SLIDE = "CMU-1-Small-Region"


@pytest.fixture
def svs(shared):
    return shared / "wsi" / f"{SLIDE}.svs"


@pytest.fixture
def levels_tiff(tmp_path):
    """1024 x 512 pixels in three levels of one colour each, so that a level is known by its colour."""
    path = tmp_path / "LEVELS.tif"
    with tifffile.TiffWriter(path) as out:
        for level, colour in enumerate(((200, 0, 0), (0, 200, 0), (0, 0, 200))):
            pixels = np.full((512 >> level, 1024 >> level, 3), colour, np.uint8)
            out.write(pixels, photometric="rgb", tile=(128, 128), subfiletype=int(level > 0), metadata=None)
    return path


def test_size_and_resolution_are_those_of_the_file(svs):
    with open_slide(svs) as slide:
        assert slide.path == svs
        with tifffile.TiffFile(svs) as raw:
            assert slide.size == raw.pages[0].shape[1::-1]
            assert "MPP = 0.4990" in raw.pages[0].description
        assert slide.mpp == 0.499


def test_a_region_at_full_size_is_what_openslide_reads(svs):
    with open_slide(svs) as slide, openslide.OpenSlide(svs) as raw:
        expected = np.asarray(raw.read_region((900, 700), 0, (300, 200)).convert("RGB"))
        found = slide.region(900, 700, 300, 200, 300, 200)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(found, expected)


def test_a_smaller_region_is_the_mean_of_its_pixels(svs):
    with open_slide(svs) as slide, openslide.OpenSlide(svs) as raw:
        pixels = np.asarray(raw.read_region((512, 512), 0, (800, 400)).convert("RGB"), float)
        expected = pixels.reshape(100, 4, 200, 4, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(slide.region(512, 512, 800, 400, 200, 100), float) - expected).max() <= 1


def test_beyond_the_border_everything_is_white(svs):
    with open_slide(svs) as slide:
        width, height = slide.size
        found = np.asarray(slide.region(width - 50, height - 50, 100, 100, 100, 100))
        np.testing.assert_array_equal(found[:50, :50], slide.region(width - 50, height - 50, 50, 50, 50, 50))
        assert (found[50:] == 255).all()
        assert (found[:, 50:] == 255).all()
        before = np.asarray(slide.region(-60, -40, 100, 100, 50, 50))
        assert (before[:20] == 255).all()
        assert (before[:, :30] == 255).all()
        assert (before[21:, 31:] < 255).any()


def test_a_thumbnail_has_the_slides_shape(svs):
    with open_slide(svs) as slide:
        assert slide.thumbnail(600).size == (round(600 * 2220 / 2967), 600)
        assert slide.thumbnail(600).mode == "RGB"


@pytest.mark.parametrize(("out", "level"), [(1024, 0), (600, 0), (512, 1), (300, 1), (256, 2), (60, 2), (2048, 0)])
def test_a_region_comes_from_the_smallest_level_that_is_fine_enough(levels_tiff, out, level):
    with open_slide(levels_tiff) as slide:
        assert slide.size == (1024, 512)
        found = np.asarray(slide.region(0, 0, 1024, 512, out, out // 2))
        assert (found == np.eye(3, dtype=np.uint8)[level] * 200).all()
        part = np.asarray(slide.region(333, 77, 512, 256, out // 2, out // 4))
        assert (part == np.eye(3, dtype=np.uint8)[level] * 200).all()


def test_a_slide_too_large_to_read_at_once_is_read_in_strips(svs, monkeypatch):
    with open_slide(svs) as slide:
        whole = np.asarray(slide.thumbnail(701), float)
        sizes = []
        read = slide._read
        monkeypatch.setattr(slide, "_read", lambda corner, level, size: sizes.append(size) or read(corner, level, size))
        monkeypatch.setattr(slide_image, "_AT_ONCE", 300_000)
        strips = np.asarray(slide.thumbnail(701), float)
        assert len(sizes) > 10
        assert max(width * height for width, height in sizes) < 320_000
        assert np.abs(whole - strips).max() <= 1


def test_strips_are_as_high_as_the_level_allows(levels_tiff, monkeypatch):
    with open_slide(levels_tiff) as slide:
        sizes = []
        read = slide._read
        monkeypatch.setattr(slide, "_read", lambda corner, level, size: sizes.append(size) or read(corner, level, size))
        monkeypatch.setattr(slide_image, "_AT_ONCE", 10_000)
        slide.thumbnail(256)  # the smallest level, 256 x 128
        assert 8_000 < max(width * height for width, height in sizes) <= 10_000


@pytest.mark.parametrize(
    ("resolution", "mpp"),
    [(None, None), ((72, 72, "INCH"), None), ((40_000, 40_000, "CENTIMETER"), 0.25), ((40_000, 20_000, 3), 0.375)],
)
def test_a_resolution_is_known_only_where_the_file_gives_one_of_a_scanner(tmp_path, resolution, mpp):
    path = tmp_path / "S.tif"
    how = {} if resolution is None else {"resolution": resolution[:2], "resolutionunit": resolution[2]}
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", tile=(64, 64), metadata=None, **how)
    with open_slide(path) as slide:
        assert slide.mpp == mpp


def test_what_is_no_slide_is_refused(tmp_path):
    words = tmp_path / "S.svs"
    words.write_text("no slide")
    with pytest.raises(ConfigError, match=r"S\.svs: no slide that OpenSlide reads; convert it"):
        open_slide(words)
    with pytest.raises(ConfigError, match=r"GONE\.svs: no such slide"):
        open_slide(tmp_path / "GONE.svs")


def test_a_slide_that_ends_early_is_refused_by_name(svs, tmp_path):
    cut = tmp_path / "CUT.svs"
    cut.write_bytes(svs.read_bytes()[:-100_000])
    with pytest.raises(ConfigError, match=r"CUT\.svs"), open_slide(cut) as slide:
        slide.thumbnail(500)


def test_damaged_pixels_are_refused_by_name_and_place(svs, tmp_path):
    hurt = tmp_path / "HURT.svs"
    content = bytearray(svs.read_bytes())
    with tifffile.TiffFile(svs) as raw:
        page = raw.pages[0]
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            content[offset : offset + count] = bytes(count)
    hurt.write_bytes(content)
    with open_slide(hurt) as slide, pytest.raises(ConfigError, match=r"HURT\.svs: cannot be read at 10, 20 \("):
        slide.region(10, 20, 100, 100, 100, 100)


def test_without_openslide_the_message_says_what_to_install(svs, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ConfigError, match=r"pip install 'crossfusion-store\[slides\]'"):
        open_slide(svs)


def test_no_module_needs_openslide_to_be_imported():
    for path in Path(slide_image.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("openslide")], path


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_slide_is_found_by_its_own_path_whatever_its_name(tmp_path):
    touch(tmp_path / "other name.xyz")
    assert find_slide(tmp_path / "other name.xyz", "S1") == tmp_path / "other name.xyz"


@pytest.mark.parametrize("name", ["S1.svs", "S1.SVS", "S1.tiff", "S1.ndpi", "S1.mrxs", "uuid/S1.svs", "uuid/S1.bif"])
def test_a_slide_is_found_in_a_folder_or_one_below(tmp_path, name):
    touch(tmp_path / name, tmp_path / "S10.svs", tmp_path / "S1.2.svs", tmp_path / "uuid2" / "XS1.svs")
    touch(tmp_path / "S1.png", tmp_path / "S1.svs.partial", tmp_path / "uuid" / "S1.json", tmp_path / "a/b/S1.svs")
    assert find_slide(tmp_path, "S1") == tmp_path / name


def test_ids_with_dots_and_brackets_are_found(tmp_path):
    for slide_id in ("TCGA-CS-4941-01Z-00-DX1.56ac541d-9b1a-477b-af9c-0cc2cf7ff8d2", "S[1]", "S*"):
        touch(tmp_path / f"{slide_id}.svs", tmp_path / "SX.svs", tmp_path / "S1.svs")
        assert find_slide(tmp_path, slide_id) == tmp_path / f"{slide_id}.svs"


def test_no_file_or_several_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file or folder; name the slide's file"):
        find_slide(tmp_path / "gone", "S1")
    with pytest.raises(ConfigError, match=r"no file of slide S1 there or one folder down \(.*\.svs, .*name the file"):
        find_slide(tmp_path, "S1")
    touch(tmp_path / "S1.svs", tmp_path / "uuid" / "S1.tif")
    with pytest.raises(ConfigError, match=r"2 files of slide S1 \(\S*S1\.svs, \S*uuid/S1\.tif\); name one of them"):
        find_slide(tmp_path, "S1")


@pytest.mark.parametrize("layout", ["trident", "clam"])
def test_the_real_slide_fits_its_own_patches(shared, svs, layout):
    heatmap = heatmap_samples.real(shared, layout)
    with open_slide(svs) as slide:
        check_fits(slide.size, heatmap)


def test_patches_wholly_beyond_the_image_are_refused():
    heatmap = heatmap_samples.nested()  # 6 x 4 patches of 1,024 pixels
    check_fits((6144, 4096), heatmap)
    check_fits((5900, 3900), heatmap)  # patches stick out over the border
    for size in ((5000, 4096), (6144, 2000), (2220, 2967)):
        with pytest.raises(ConfigError, match=r"SLIDE-1: the \d+x patches .*not the slide that the patches were cut"):
            check_fits(size, heatmap)


def test_patches_before_the_slides_corner_are_refused():
    heatmap = heatmap_samples.nested()
    moved = {s: dataclasses.replace(grid, corners=grid.corners - 2 * 1024) for s, grid in heatmap.grids.items()}
    with pytest.raises(ConfigError, match="or other coordinates"):
        check_fits((6144, 4096), dataclasses.replace(heatmap, grids=moved))


def test_patches_without_coordinates_fit_any_image():
    check_fits((1, 1), heatmap_samples.without_coordinates())
