"""The viewer's folder: what the page says, and the files it reads."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from heatmap_samples import layers, nested, nested_grids, real, without_coordinates
from PIL import Image

import cftrain
from cftrain.heatmap.chains import chain
from cftrain.heatmap.deepzoom import Pyramid, write_pyramid
from cftrain.heatmap.layers import LEVEL0, Grid, Layer
from cftrain.heatmap.viewer import write_viewer

STATIC = Path(cftrain.__file__).parent / "heatmap" / "static"
NASTY = '</script><script>alert("x")</script>&amp;<b>\u2028'


class Picture:
    """A slide in memory: a gradient, so that every place has a colour of its own."""

    def __init__(self, width, height, mpp=0.5):
        self.size, self.mpp = (width, height), mpp
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 90)], axis=-1)
        self.whole = Image.fromarray(pixels.astype(np.uint8))

    def region(self, x, y, width, height, out_w, out_h):
        return self.whole.crop((x, y, x + width, y + height)).resize((out_w, out_h), Image.Resampling.BOX)


class Page(HTMLParser):
    """The tags, attributes and words of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def texts(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    def every(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def data_of(folder):
    text = (folder / "viewer" / "data.js").read_text(encoding="ascii")
    return json.loads(text.removeprefix("window.HEATMAP = ").removesuffix(";\n"))


def decoded(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def said(heatmap, **about):
    return dataclasses.replace(heatmap, about={**heatmap.about, **about})


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_data_are_the_scores_corners_and_parents_bit_for_bit(tmp_path):
    heatmap = nested()
    write_viewer(heatmap, tmp_path, None)
    data = data_of(tmp_path)
    assert [grid["scale"] for grid in data["grids"]] == [5, 10, 20]
    for grid, written in zip(heatmap.grids.values(), data["grids"], strict=True):
        np.testing.assert_array_equal(decoded(written["corners"], "<i4").reshape(-1, 2), grid.corners)
        assert written["edge"] == grid.edge
        if grid.parents is None:
            assert written["parents"] is None
        else:
            np.testing.assert_array_equal(decoded(written["parents"], "<i4"), grid.parents)
    for layer, written in zip(heatmap.layers, data["layers"], strict=True):
        assert (written["name"], written["scale"], written["kind"]) == (layer.name, layer.scale, layer.kind)
        np.testing.assert_array_equal(decoded(written["scores"], "<f4"), layer.scores.astype(np.float32))


def test_138000_patches_with_all_maps_stay_below_ten_megabytes(tmp_path):
    heatmap = nested(width=110, height=98)
    assert len(heatmap.grids[20]) > 137_000
    write_viewer(heatmap, tmp_path, None)
    assert sum(map(len, files_of(tmp_path).values())) < 10e6


def test_nothing_from_the_data_becomes_markup(tmp_path):
    grids = nested_grids()
    scores = np.arange(len(grids[20]), dtype=float)
    layer = Layer(NASTY, 20, scores, "attention", f"meaning {NASTY}")
    heatmap = dataclasses.replace(nested(slide_id=NASTY), layers=(layer,))
    heatmap = said(heatmap, model=NASTY, run=NASTY, notes=[NASTY], files=[NASTY], encoder=NASTY)
    page = Page(write_viewer(heatmap, tmp_path, None))
    assert [each.get("src") for each in page.every("script")][:2] == ["viewer/data.js", "viewer/openseadragon.min.js"]
    assert all(each.get("src", "").startswith("viewer/") for each in page.every("script"))
    assert not page.every("b")
    assert NASTY.replace("\u2028", " ") in page.texts()
    assert NASTY in [each.get("value") for each in page.every("input")]
    assert data_of(tmp_path)["layers"][0]["name"] == NASTY


def test_the_page_asks_for_files_of_its_folder_only(tmp_path):
    heatmap = said(nested(), files=["fine-cross.geojson.gz", "a b&c?.png"])
    page = Page(write_viewer(heatmap, tmp_path, None))
    links = [each[name] for _, each in page.tags for name in ("src", "href") if name in each]
    assert links
    assert not [link for link in links if re.match(r"[a-z]+:|//", link)]
    assert "./a%20b%26c%3F.png" in links
    inside = [link for link in links if link.startswith("viewer/")]
    assert all((tmp_path / link).is_file() for link in inside)


def test_the_policy_allows_no_inline_script_and_only_the_style_that_openseadragon_adds(tmp_path):
    page = Page(write_viewer(nested(), tmp_path, None))
    policy = next(each["content"] for each in page.every("meta") if each.get("http-equiv"))
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    assert "connect-src" not in parts
    assert "unsafe" not in policy
    added = re.search(r"@media \(hover: none\)[^\"]*", (STATIC / "openseadragon.min.js").read_text())[0]
    digest = base64.b64encode(hashlib.sha256(added.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in parts["style-src"]
    assert not [each for _, each in page.tags if "style" in each or any(name.startswith("on") for name in each)]


def test_openseadragon_comes_as_released_with_its_licence(tmp_path):
    write_viewer(nested(), tmp_path, None)
    library = (tmp_path / "viewer" / "openseadragon.min.js").read_bytes()
    # sha256 of build/openseadragon/openseadragon.min.js in openseadragon-6.1.1.tgz from the npm registry
    assert hashlib.sha256(library).hexdigest() == "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad"
    licence = (tmp_path / "viewer" / "openseadragon.LICENSE.txt").read_text()
    assert "Redistributions in binary form must reproduce" in licence
    assert "OpenSeadragon contributors" in licence


def test_the_same_heatmap_gives_the_same_bytes_and_nothing_stays_of_an_older_one(tmp_path, shared):
    heatmap, image = real(shared), Picture(1110, 1480)
    write_viewer(heatmap, tmp_path / "a", image)
    write_viewer(heatmap, tmp_path / "b", Picture(1600, 1100), top=20)
    write_viewer(heatmap, tmp_path / "b", image)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_top_patches_are_the_highest_and_for_attribution_also_the_lowest(tmp_path):
    scores = np.array([0.3, -2.0, 5.0, 0.0, 5.0, -0.1])
    corners = np.stack([np.arange(6), np.zeros(6)], axis=1).astype(np.int64)
    made = tuple(
        Layer(kind, 20, values, kind, "a score")
        for kind, values in (("attention", np.abs(scores)), ("attribution", scores))
    )
    grids = {20: Grid(20, corners * 256, 256, LEVEL0, "made")}
    heatmap = dataclasses.replace(nested(), grids=grids, layers=made)
    write_viewer(heatmap, tmp_path, None, top=4)
    attention, attribution = data_of(tmp_path)["layers"]
    assert attention["high"] == [[2], [4], [1], [0]]
    assert attention["low"] == []
    assert attribution["high"] == [[2], [4], [0]]  # none that lowers the risk
    assert attribution["low"] == [[1], [5]]


def test_a_chain_follows_the_parents_that_are_known():
    grids = nested_grids()
    corner = grids[20].corners[37]
    _, above, top = chain(grids, 20, 37)
    np.testing.assert_array_equal(grids[10].corners[above], corner // 512 * 512)
    np.testing.assert_array_equal(grids[5].corners[top], corner // 1024 * 1024)


def test_a_chain_without_known_parents_goes_by_the_middle_of_the_patch():
    coarse = np.array([[0, 0], [300, 0], [600, 600]])
    fine = np.array([[200, 10], [400, 400], [700, 700]])  # the first one's middle, (264, 74), lies in coarse patch 0
    grids = {10: Grid(10, coarse, 298, LEVEL0, ""), 20: Grid(20, fine, 128, LEVEL0, "")}
    assert [chain(grids, 20, row) for row in range(3)] == [[0, 0], [1, -1], [2, 2]]


def test_a_parent_that_is_none_stays_none_and_the_next_scale_goes_by_place():
    grids = nested_grids(holes=False)
    parents = grids[20].parents.copy()
    parents[5] = -1
    grids[20] = dataclasses.replace(grids[20], parents=parents)
    assert chain(grids, 20, 5) == [5, -1, 0]


def test_every_listed_patch_has_its_picture_and_so_have_those_that_hold_it(tmp_path, shared):
    heatmap, image = real(shared), Picture(2220, 2967)
    write_viewer(heatmap, tmp_path, image)
    scales = [20, 10, 5]
    expected = {
        f"{scale}x_{row}.jpg"
        for layer in data_of(tmp_path)["layers"]
        for rows in layer["high"] + layer["low"]
        for scale, row in zip(scales[scales.index(layer["scale"]) :], rows, strict=True)
        if row >= 0
    }
    assert {path.name for path in (tmp_path / "viewer" / "patches").iterdir()} == expected
    row = heatmap.layers_of(20)[0].top(1)[0]
    x, y = heatmap.grids[20].corners[row]
    with Image.open(tmp_path / "viewer" / "patches" / f"20x_{row}.jpg") as crop:
        assert crop.size == (224, 224)
        red, green, _ = np.asarray(crop).reshape(-1, 3).mean(axis=0)
    assert red == pytest.approx(255 * (x + 128) / 2220, abs=2)
    assert green == pytest.approx(255 * (y + 128) / 2967, abs=2)


def test_the_tiles_put_together_are_the_slide_at_every_level(tmp_path):
    image = Picture(1500, 1107)
    pyramid = write_pyramid(image, tmp_path, longest=1200, tile=256)
    assert pyramid == Pyramid((1200, 886), 4, 256)
    assert {path.name for path in (tmp_path / "0").iterdir()} == {"0_0.jpg"}
    for level, (width, height) in enumerate([(150, 111), (300, 222), (600, 443), (1200, 886)]):
        whole = np.zeros((height, width, 3))
        for path in (tmp_path / str(level)).iterdir():
            column, row = map(int, path.stem.split("_"))
            with Image.open(path) as tile:
                part = whole[256 * row : 256 * row + tile.height, 256 * column : 256 * column + tile.width]
                part[:] = np.asarray(tile)
        expected = np.asarray(image.whole.resize((width, height), Image.Resampling.BOX), dtype=float)
        assert np.abs(whole - expected).mean() < 2
        assert np.abs(whole - expected).max() < 30


def test_a_large_slide_is_reduced_and_the_page_says_so(tmp_path):
    assert Pyramid.of((100_000, 60_000)).size == (8192, 4915)
    heatmap = dataclasses.replace(nested(), size=(16_384, 256))
    page = Page(write_viewer(heatmap, tmp_path / "large", Picture(16_384, 256)))
    assert "reduced to 8,192 pixels on its longer side: 1 pixel of it is 2 pixels of level 0" in page.texts()
    assert "reduced to" not in Page(write_viewer(nested(), tmp_path / "small", Picture(600, 400))).texts()


def test_without_coordinates_the_page_says_so_and_shows_no_slide(tmp_path):
    page = Page(write_viewer(without_coordinates(), tmp_path, Picture(600, 400)))
    assert "No coordinates: patches in file order." in page.texts()
    assert "not the shape of the tissue" in page.texts()
    data = data_of(tmp_path)
    assert data["ordered"] is True
    assert data["image"] is None
    assert not (tmp_path / "viewer" / "tiles").exists()


def test_the_header_says_what_was_explained_and_by_what(tmp_path):
    text = Page(write_viewer(said(nested(), folds=[0, 3], honesty="x"), tmp_path, None)).texts()
    for each in ("SLIDE-1", "crossfusion", "DEMO", "Folds0, 3", "\u22121.250", "Synthetic data.", "not trained on"):
        assert each in text
    assert "Trained on this patient." not in text
    assert "Attention is not explanation." in text


def test_an_undefined_risk_is_no_number_and_missing_facts_are_left_out(tmp_path):
    heatmap = dataclasses.replace(nested(), about={"risk": float("nan")})
    text = Page(write_viewer(heatmap, tmp_path, None)).texts()
    assert "Riskn/a" in text
    assert "Cohort" not in text
    assert "Synthetic" not in text


def test_a_model_that_was_trained_on_the_patient_is_pointed_out_first(tmp_path):
    honesty = "fold 0, TRAINED on this slide's patient"
    heatmap = said(nested(), folds=[0], folds_trained_on_patient=[0, 1], honesty=honesty, notes=[honesty, "another"])
    page = Page(write_viewer(heatmap, tmp_path, None))
    assert f"Trained on this patient. {honesty}." in page.texts()
    assert page.texts().count(honesty) == 1
    assert len(page.every("aside")) == 2


def test_the_check_is_a_table_of_risks_with_and_without_the_first_patches(tmp_path):
    row = {"map": "fine-cross", "n_dropped": 5, "n_patches": 100, "risk": 0.5, "without_top": 0.2}
    row |= {"without_random_mean": 0.48, "without_random_sd": None}
    text = Page(write_viewer(said(nested(), check=[row]), tmp_path / "with", None)).texts()
    assert "fine-cross 5 of 100 (5 %) 0.500 0.200 \u22120.300 0.480 ± n/a" in text
    assert "Left out" not in Page(write_viewer(nested(), tmp_path / "without", None)).texts()


def test_how_the_grids_lie_to_each_other_is_said(tmp_path):
    grids = nested_grids()
    grids[20] = dataclasses.replace(grids[20], parents=None, parents_note="")
    heatmap = dataclasses.replace(nested(), grids=grids, layers=layers({20: len(grids[20])}))
    text = Page(write_viewer(heatmap, tmp_path, None)).texts()
    assert "10x in 5x: the grids nest" in text
    assert "20x in 10x: unknown; a place is looked up on each scale by itself" in text
