"""The report in a headless Chromium: it draws, it fits, it prints."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from report_runs import assessed, cox, hazard, make_run

from cftrain.report import write_report


def chromium(*arguments, profile):
    """Run a headless Chromium with a profile of its own; what it printed."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={profile}", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on PATH")


WORDS_IN_THE_WAY = """
[...frame.contentDocument.querySelectorAll('svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  const words = [...svg.querySelectorAll('text')].map(each => [each.textContent, each.getBoundingClientRect()]);
  const cut = words.filter(([, one]) => one.left < box.left - 1 || one.right > box.right + 1
    || one.top < box.top - 1 || one.bottom > box.bottom + 1).map(([name]) => 'cut: ' + name);
  const over = words.flatMap(([a, one], place) => words.slice(place + 1).filter(([, two]) =>
    Math.min(one.right, two.right) - Math.max(one.left, two.left) > 1
    && Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top) > 4).map(([b]) => a + ' on ' + b));
  return [...cut, ...over];
})
"""


def new_run(folder):
    """A synthetic run with all that a report can show: many covariates of long names, skipped steps."""
    wide = hazard("paraffin_embedded_diagnosis: oligodendroglioma vs astrocytoma", 2e-3, 1e-5, 0.4, 0.01)
    more = cox() | {"univariable": [*cox()["univariable"], wide]}
    run = make_run(folder, synthetic=True, **assessed() | {"cox": more, "where": "grade IN ('G2', 'G3')"})
    path = run / "fold_1" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["skipped"] = ["the loss is nan; slides P001-DX0, P002-DX1"]
    path.write_text("\n".join(map(json.dumps, rows)))
    return run


def inside(page, width, question, folder):
    """What a script finds in the page, shown in a frame of some width (a window itself is at least 500 wide)."""
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        "<p></p><script>onload = () => { const frame = document.querySelector('iframe'); "
        f"document.querySelector('p').textContent = 'found ' + JSON.stringify({question}) }}</script>",
        encoding="utf-8",
    )
    printed = chromium("--window-size=1400,900", "--dump-dom", outer.as_uri(), profile=folder / "profile")
    return json.loads(html.unescape(re.search(r"<p>found (.*?)</p>", printed.stdout, flags=re.DOTALL).group(1)))


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_browser_draws_the_page_without_complaint(tmp_path, scheme):
    page, shot = write_report(new_run(tmp_path)), tmp_path / "shot.png"
    printed = chromium(
        f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,7000", f"--screenshot={shot}",
        page.as_uri(), profile=tmp_path / "profile",
    )  # fmt: skip
    assert "CONSOLE" not in printed.stderr
    with Image.open(shot) as image:
        grey = np.asarray(image.convert("L"))
    assert grey.shape == (7000, 1200)
    assert (np.median(grey) < 60) == (scheme == 0)
    assert grey.std() > 10
    assert len(np.unique(grey)) > 50


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [360, 800, 1200])
def test_no_page_is_wider_than_its_window(tmp_path, width):
    page = write_report(new_run(tmp_path)).read_text(encoding="utf-8")
    printed = inside(page, width, "frame.contentDocument.documentElement.scrollWidth", tmp_path)
    assert printed == width


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [400, 1000])
def test_words_in_figures_neither_leave_them_nor_lie_on_each_other(tmp_path, width):
    page = write_report(new_run(tmp_path)).read_text(encoding="utf-8")
    assert inside(page, width, WORDS_IN_THE_WAY.strip(), tmp_path) == []


@pytest.mark.browser
@needs_chromium
def test_on_a_desktop_no_table_or_figure_needs_scrolling(tmp_path):
    page = write_report(new_run(tmp_path)).read_text(encoding="utf-8")
    wide = "[...frame.contentDocument.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth)"
    assert inside(page, 1000, f"{wide}.map(one => one.ariaLabel)", tmp_path) == []


@pytest.mark.browser
@needs_chromium
def test_a_page_from_a_dark_screen_is_printed_light_and_whole(tmp_path):
    page, paper = write_report(new_run(tmp_path)), tmp_path / "report.pdf"
    chromium(
        "--blink-settings=preferredColorScheme=0", "--no-pdf-header-footer", f"--print-to-pdf={paper}", page.as_uri(),
        profile=tmp_path / "profile",
    )  # fmt: skip
    assert 5 <= len(re.findall(rb"/Type /Page\b", paper.read_bytes())) <= 20
    if shutil.which("pdftoppm") is None:
        return  # the look of the pages needs poppler
    subprocess.run(["pdftoppm", "-r", "40", "-gray", "-png", paper, tmp_path / "page"], check=True)
    sheets = sorted(tmp_path.glob("page-*.png"))
    for sheet in sheets:
        with Image.open(sheet) as image:
            grey = np.asarray(image)
        edge = np.concatenate([grey[:, :10].ravel(), grey[:, -10:].ravel()])
        assert np.median(grey) == 255
        assert (edge == 255).all()  # nothing runs off the paper
