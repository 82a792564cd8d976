"""The viewer in a headless Chromium, from a folder: it draws, it answers, it asks nobody."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from heatmap_samples import nested, nested_grids, real, without_coordinates
from PIL import Image
from test_report_browser import chromium, needs_chromium

from cftrain.heatmap.colours import codes, palette, shares
from cftrain.heatmap.layers import Layer
from cftrain.heatmap.slide_image import open_slide
from cftrain.heatmap.viewer import write_viewer

pytestmark = [pytest.mark.browser, needs_chromium]

HOSTILE = '<img src=x onerror="document.title=1">&amp;</script>'
COLOURS = "heatmap.grids.map(grid => view.pixels([...Array(grid.n).keys()].map(row => middle(grid, row))))"


@pytest.fixture
def slide(shared):
    """The real slide."""
    pytest.importorskip("openslide")
    with open_slide(shared / "wsi" / "CMU-1-Small-Region.svs") as image:
        yield image


def ask(folder, question, where="", width=1200, *arguments):
    """What an expression finds in the page, in a frame of some width (a window itself is at least 500 wide).

    `view` is the page's window.heatmapViewer, `heatmap` its data, `middle(grid, row)` a patch's middle. A complaint of
    the browser fails the test.
    """
    (folder / "viewer" / "question.js").write_text(
        "(async () => { const view = window.heatmapViewer, heatmap = view.data;"
        "const middle = (grid, row) => [grid.x(row) + grid.edge / 2, grid.y(row) + grid.edge / 2];"
        "const wait = ms => new Promise(resolve => setTimeout(resolve, ms));"
        "await view.ready; await wait(300);"
        f"return {question}; }})().then(found => parent.postMessage(JSON.stringify(found), '*'),"
        "error => parent.postMessage(JSON.stringify('failed: ' + error), '*'));",
        encoding="utf-8",
    )
    page = (folder / "index.html").read_text(encoding="utf-8")
    asking = page.replace("</body>", '<script src="viewer/question.js"></script></body>')
    (folder / "asking.html").write_text(asking, encoding="utf-8")
    outer = folder / "outer.html"
    outer.write_text(
        "<!DOCTYPE html><p></p><script>onmessage = event => {"
        "document.querySelector('p').textContent = 'found ' + btoa(unescape(encodeURIComponent(event.data))) }"
        f'</script><iframe style="width:{width}px;height:900px;border:0" src="asking.html{where}"></iframe>',
        encoding="utf-8",
    )
    printed = chromium(
        "--window-size=1400,1000", "--virtual-time-budget=20000", "--dump-dom", *arguments, outer.as_uri(),
        profile=folder / "profile",
    )  # fmt: skip
    assert "CONSOLE" not in printed.stderr
    found = re.search(r"<p>found (.*?)</p>", printed.stdout)
    return json.loads(base64.b64decode(found.group(1)))


def expected(layer, norm="percentile"):
    """The colour of every patch: [N, 3], from the scores."""
    if norm == "linear":
        scores = layer.scores.astype(np.float32).astype(float)
        low, high = np.percentile(scores, [1, 99])
        found = np.clip((scores - low) / (high - low), 0, 1)
    else:
        found = shares(layer)
    return palette(layer.kind, (0, 0, 0))[codes(found)].astype(int)


def assert_drawn(pixels, layer, norm="percentile"):
    """Every patch of the layer has its colour; a shade beside it may come of float32."""
    pixels = np.array(pixels)
    assert (pixels[:, 3] == 255).all()
    assert np.abs(pixels[:, :3] - expected(layer, norm)).max() <= 5
    assert (pixels[:, :3] == expected(layer, norm)).all(axis=1).mean() > 0.9


@pytest.mark.parametrize("name", ["coarse-cross", "source", "fine-cross", "gradient-10x", "gradient-20x"])
def test_every_patch_has_the_colour_of_its_score(tmp_path, name):
    heatmap = nested()
    write_viewer(heatmap, tmp_path, None)
    layer = next(each for each in heatmap.layers if each.name == name)
    found = ask(tmp_path, COLOURS, f"#layer={name}")[[5, 10, 20].index(layer.scale)]
    assert_drawn(found, layer)


def test_patches_far_from_the_corner_of_the_slide_fill_the_view_all_the_same(tmp_path):
    plain = nested()
    moved = {
        scale: dataclasses.replace(grid, corners=grid.corners + np.array([120_000, 90_000]))
        for scale, grid in plain.grids.items()
    }
    size = (plain.size[0] + 120_000, plain.size[1] + 90_000)
    write_viewer(dataclasses.replace(plain, grids=moved, size=size), tmp_path, None)
    layer = next(each for each in plain.layers if each.name == "fine-cross")
    assert_drawn(ask(tmp_path, COLOURS, "#layer=fine-cross")[2], layer)  # a patch out of sight has no pixel
    width = np.ptp(plain.grids[5].corners[:, 0]) + plain.grids[5].edge
    seen = ask(tmp_path, "[view.state().view, view.pixels([[119_000, 90_000]])[0]]", "#layer=fine-cross")
    assert seen[0] is None  # all there is
    across = ask(tmp_path, f"view.pixels([[120_000 - {width} * 3, 90_000]])[0]", "#layer=fine-cross")
    assert across is None  # what is empty is not in sight


def test_colours_by_score_are_even_between_the_1st_and_99th_percentile(tmp_path):
    heatmap = nested()
    write_viewer(heatmap, tmp_path, None)
    found = ask(tmp_path, COLOURS, "#layer=fine-cross&norm=linear")[2]
    assert_drawn(found, heatmap.layers_of(20)[0], "linear")
    assert np.abs(expected(heatmap.layers_of(20)[0], "linear") - expected(heatmap.layers_of(20)[0])).max() > 20


@pytest.mark.parametrize("width", [40_000, 1500], ids=["from far", "from near"])
def test_patches_on_no_lattice_have_their_colours_too(tmp_path, width):
    rng = np.random.default_rng(0)
    grids = nested_grids(width=40, height=30)
    grids[20] = dataclasses.replace(grids[20], corners=grids[20].corners + rng.integers(0, 9, (len(grids[20]), 2)))
    heatmap = dataclasses.replace(nested(width=40, height=30), grids=grids)
    write_viewer(heatmap, tmp_path, None)
    found = ask(tmp_path, f"[heatmap.grids[2].cells, {COLOURS}]", f"#layer=fine-cross&view=20000,15000,{width}")
    assert found[0] is None
    pixels = found[1][2]
    seen = np.array([row for row, pixel in enumerate(pixels) if pixel])
    assert len(seen) > (10_000 if width > 20_000 else 10)
    exact = (np.array([pixels[row][:3] for row in seen]) == expected(heatmap.layers_of(20)[0])[seen]).all(axis=1)
    # from far a patch is three pixels: the one in its middle may be a neighbour's
    assert exact.mean() > (0.85 if width > 20_000 else 0.9)


def test_what_the_address_says_is_shown_and_what_is_shown_is_in_the_address(tmp_path):
    write_viewer(nested(), tmp_path, None)
    read = "{...view.state(), shown: document.querySelector('.overlay-map').style.opacity, at: location.hash}"
    where = "#layer=source&opacity=0.35&norm=linear&show=20&place=700,800"
    found = ask(tmp_path, read, where)
    assert (found["layer"], found["opacity"], found["norm"], found["show"]) == ("source", 0.35, "linear", 20)
    assert found["place"] == [700, 800]
    assert found["shown"] == "0.35"
    change = f"(view.set({{layer: 'gradient-5x', opacity: 0.5, show: 5}}), await wait(400), {read})"
    found = ask(tmp_path, change, where)
    assert found["shown"] == "0.5"
    assert found["at"] == "#layer=gradient-5x&opacity=0.5&norm=linear&show=5&place=700,800"


def test_an_address_that_makes_no_sense_shows_the_usual_things(tmp_path):
    write_viewer(nested(), tmp_path, None)
    found = ask(tmp_path, "view.state()", "#layer=no-such&opacity=much&norm=odd&show=&place=1,x&view=1")
    assert found == ask(tmp_path, "view.state()")
    assert found["layer"] == "fine-cross"


def test_controls_change_the_map(tmp_path):
    heatmap = nested()
    write_viewer(heatmap, tmp_path, None)
    click = "document.querySelector('input[value=gradient-20x]').click()"
    found = ask(tmp_path, f"({click}, [{COLOURS}, document.querySelector('#meaning').textContent])")
    assert_drawn(found[0][2], heatmap.layers_of(20)[1])
    assert found[1] == heatmap.layers_of(20)[1].meaning


def test_only_the_highest_patches_are_shown_on_request(tmp_path, shared, slide):
    heatmap = real(shared)
    write_viewer(heatmap, tmp_path, slide)
    clear = np.array(ask(tmp_path, COLOURS, "#layer=fine-cross&show=20")[2])[:, 3] == 0
    scores = heatmap.layers_of(20)[0].scores
    assert set(np.flatnonzero(~clear)) == set(np.argsort(-scores)[:10])  # 20 % of 52 patches
    clear = np.array(ask(tmp_path, COLOURS, "#layer=gradient-20x&show=20")[2])[:, 3] == 0
    strong = np.abs(heatmap.layers_of(20)[1].scores)
    assert set(np.flatnonzero(~clear)) == set(np.argsort(-strong)[:10])


def test_a_place_is_in_the_patches_that_hold_it(tmp_path):
    heatmap = nested()
    write_viewer(heatmap, tmp_path, None)
    points = np.random.default_rng(1).integers(0, heatmap.size, (60, 2))
    found = ask(tmp_path, f"{points.tolist()}.map(([x, y]) => view.place(x, y))", "#layer=source")
    n_inside = 0
    for point, rows in zip(points, found, strict=True):
        for grid, row in zip(heatmap.grids.values(), rows, strict=True):
            inside = ((grid.corners <= point) & (point < grid.corners + grid.edge)).all(axis=1)
            assert np.flatnonzero(inside).tolist() == ([] if row < 0 else [row])
            n_inside += row >= 0
    assert 60 < n_inside < 180


def test_parents_that_are_known_count_more_than_where_patches_lie(tmp_path):
    grids = nested_grids(holes=False)
    parents = grids[20].parents.copy()
    parents[:4] = [7, 7, -1, 7]  # rows 0 to 3 lie in row 0 of 10x
    grids[20] = dataclasses.replace(grids[20], parents=parents)
    heatmap = dataclasses.replace(nested(holes=False), grids=grids)
    write_viewer(heatmap, tmp_path, None)
    question = "[[10, 10], [10, 266]].map(([x, y]) => view.place(x, y))"
    above = heatmap.grids[10].parents[7]
    assert ask(tmp_path, question, "#layer=fine-cross") == [[above, 7, 0], [0, -1, 2]]
    # from 10x downwards: the child at the point must be the patch's own
    assert ask(tmp_path, question, "#layer=source") == [[0, 0, -1], [0, 0, -1]]


def test_grids_that_do_not_nest_are_looked_up_one_by_one(tmp_path, shared, slide):
    heatmap = real(shared, "clam")
    write_viewer(heatmap, tmp_path, slide)
    points = np.random.default_rng(1).integers(0, heatmap.size, (60, 2))
    found = ask(tmp_path, f"{points.tolist()}.map(([x, y]) => view.place(x, y))")
    for point, rows in zip(points, found, strict=True):
        for grid, row in zip(heatmap.grids.values(), rows, strict=True):
            inside = ((grid.corners <= point) & (point < grid.corners + grid.edge)).all(axis=1)
            assert row in np.flatnonzero(inside) if inside.any() else row == -1


def test_the_panel_shows_scores_and_percentiles_of_the_three_patches(tmp_path):
    heatmap = nested()
    write_viewer(heatmap, tmp_path, None)
    read = (
        "[...document.querySelectorAll('.card')].map(each => [each.dataset.row, each.innerText.split(/\\s*\\n\\s*/)])"
    )
    found = ask(tmp_path, read, "#layer=fine-cross&place=1300,300")
    scores = heatmap.layers_of(20)[1].scores
    row = int(found[2][0])
    np.testing.assert_array_equal(heatmap.grids[20].corners[row], [1280, 256])
    text = " ".join(found[2][1])
    percentile = 100 * ((scores < scores[row]).sum() + 0.5) / len(scores)
    figures = f"{scores[row]:.3g}".replace("-", "\u2212")
    assert re.search(rf"gradient-20x\s+{figures}", text)
    assert f"{percentile:.1f}" in text
    assert "x 1,280, y 256" in text
    assert "side 256 px = 64 µm" in text
    assert "holds 4 of 10x" in " ".join(found[0][1])


def test_a_top_patch_is_gone_to_when_it_is_chosen(tmp_path, shared, slide):
    heatmap = real(shared)
    write_viewer(heatmap, tmp_path, slide)
    chosen = "document.querySelectorAll('.top-patch')[2]"
    question = (
        f"({chosen}.click(), await wait(3000), {{rows: view.state().rows,"
        "x: view.viewer.viewport.getCenter().x * 2220,"
        f"pictures: [...{chosen}.querySelectorAll('img')].map(each => each.getAttribute('src'))}})"
    )
    found = ask(tmp_path, question)
    row = heatmap.layers_of(20)[0].top(3)[2]
    assert found["rows"][2] == row
    assert found["x"] == pytest.approx(heatmap.grids[20].corners[row][0] + 128, abs=30)
    assert found["pictures"][0] == f"viewer/patches/20x_{row}.jpg"
    assert len(found["pictures"]) == sum(each >= 0 for each in found["rows"])
    assert all((tmp_path / picture).is_file() for picture in found["pictures"])


def test_without_coordinates_no_patch_holds_another(tmp_path):
    heatmap = without_coordinates()
    write_viewer(heatmap, tmp_path, None)
    found = ask(tmp_path, f"[{COLOURS}, view.place(2.5, 1.5)]")
    assert_drawn(found[0][0], heatmap.layers[0])
    assert found[1] == [8]  # a square of 6 in rows


def test_names_from_the_data_stay_words(tmp_path):
    scores = np.arange(len(nested_grids()[20]), dtype=float)
    named = (Layer(HOSTILE, 20, scores, "attention", HOSTILE),)
    heatmap = dataclasses.replace(nested(slide_id=HOSTILE), layers=named)
    write_viewer(heatmap, tmp_path, None)
    question = "[document.title, document.querySelectorAll('img[src=x]').length, view.state().layer, location.hash]"
    title, n_images, layer, where = ask(
        tmp_path, f"(view.set({{show: 50}}), await wait(400), {question})", "#place=300,300"
    )
    assert title == f"{HOSTILE} · heatmap (synthetic data)"
    assert n_images == 0
    assert layer == HOSTILE
    assert "<" not in where


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_no_wider_than_its_window(tmp_path, shared, slide, width):
    write_viewer(dataclasses.replace(real(shared), slide_id="S" * 90), tmp_path, slide)
    assert ask(tmp_path, "document.documentElement.scrollWidth", "#place=1100,1400", width) == width


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_the_slide_lies_under_its_map(tmp_path, shared, slide, scheme):
    page, shot = write_viewer(real(shared), tmp_path, slide), tmp_path / "shot.png"
    shots = {}
    for where in ("#layer=off", "#layer=fine-cross&opacity=0.5"):
        printed = chromium(
            f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,1400", f"--screenshot={shot}",
            "--virtual-time-budget=8000", page.as_uri() + where, profile=tmp_path / "profile",
        )  # fmt: skip
        assert "CONSOLE" not in printed.stderr
        with Image.open(shot) as image:
            shots[where] = np.asarray(image.convert("RGB")).astype(int)
    tissue, both = shots.values()
    assert (np.median(tissue) < 60) == (scheme == 0)
    pink = lambda shot: ((shot[..., 0] - shot[..., 1] > 40) & (shot[..., 2] > 90))[200:800, 100:800].mean()  # noqa: E731
    assert pink(tissue) > 0.1
    assert pink(both) < pink(tissue) - 0.02
    assert np.abs(both - tissue)[200:800, 100:800].mean() > 10


def asked_of_others(page, folder):
    """What a page, and nothing else, asks of other machines; Chromium's own questions are Google's."""
    log = folder / "net.json"
    chromium(
        f"--log-net-log={log}", "--virtual-time-budget=8000", "--dump-dom", page.as_uri(), profile=folder / "profile"
    )
    urls = re.findall(r'"url":"((?:https?|wss?):[^"]+)"', log.read_text(encoding="utf-8", errors="replace"))
    return {url for url in urls if not re.match(r"\w+://[\w.-]*(google|googleapis|gvt1)\.com[:/]", url)}


def test_the_page_asks_nobody_else(tmp_path, shared, slide):
    page = write_viewer(real(shared), tmp_path, slide)
    assert asked_of_others(page, tmp_path) == set()
    nosy = page.with_name("nosy.html")
    policy = re.compile("<meta http-equiv[^>]*>")
    image = '<img src="http://127.0.0.1:9/asked.png">'
    nosy.write_text(policy.sub(image, page.read_text(encoding="utf-8")), encoding="utf-8")
    assert asked_of_others(nosy, tmp_path) == {"http://127.0.0.1:9/asked.png"}  # it would have been seen


def test_it_prints_light_with_the_map_and_no_controls(tmp_path, shared, slide):
    page, paper = write_viewer(real(shared), tmp_path, slide), tmp_path / "page.pdf"
    chromium(
        "--blink-settings=preferredColorScheme=0", "--no-pdf-header-footer", "--virtual-time-budget=8000",
        f"--print-to-pdf={paper}", page.as_uri(), profile=tmp_path / "profile",
    )  # fmt: skip
    assert 2 <= len(re.findall(rb"/Type /Page\b", paper.read_bytes())) <= 8
    if shutil.which("pdftoppm") is None:
        return  # the look of the pages needs poppler
    subprocess.run(["pdftoppm", "-r", "40", "-png", "-l", "1", paper, tmp_path / "page"], check=True)
    with Image.open(next(tmp_path.glob("page-*.png"))) as image:
        first = np.asarray(image.convert("RGB")).astype(int)
    assert np.median(first) == 255
    assert ((first.max(axis=-1) - first.min(axis=-1)) > 60).mean() > 0.02  # the map's colours


@pytest.mark.slow
def test_138000_patches_are_drawn_right(tmp_path):
    heatmap = nested(width=110, height=98)
    write_viewer(heatmap, tmp_path, None)
    rows = list(range(0, len(heatmap.grids[20]), 997))
    question = f"view.pixels({rows}.map(row => middle(heatmap.grids[2], row)))"
    found = np.array(ask(tmp_path, question, "#layer=fine-cross"))
    layer = dataclasses.replace(heatmap.layers_of(20)[0])
    exact = (found[:, :3] == expected(layer)[rows]).all(axis=1)
    assert exact.mean() > 0.85  # a patch is two pixels
