"""The heatmaps of a run on one page: the slides of highest and lowest risk, and whatever else was explained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from cftrain.errors import RunError
from cftrain.heatmap.folder import ABOUT
from cftrain.prediction.trained import TrainedRun
from cftrain.report.svg import DARK, LIGHT, palette_css
from cftrain.report.wording import count, months, percent

FOLDER: Final = "heatmaps"
_HALF: Final = 50.0  # percentile of the risk between "higher" and "lower"


def extremes(trained: TrainedRun, n: int) -> tuple[list[str], list[str]]:
    """The n slides of highest risk, highest first, and the n of lowest, lowest first; no slide is in both.

    By the risk of the fold that was not trained on the slide, in standard deviations of that fold's risks; the mean
    where several folds validated it. Half of the slides each where a run has fewer than 2 n.
    """
    risk = {slide: sum(own.values()) / len(own) for slide, own in trained.slides.items()}
    ordered = sorted(risk, key=lambda slide: (-risk[slide], slide))
    n_lowest = min(n, len(ordered) // 2)
    n_highest = min(n, len(ordered) - n_lowest)
    return ordered[:n_highest], ordered[::-1][:n_lowest]


def write_overview(run: Path) -> Path | None:
    """Write RUN/heatmaps/index.html, which links to every heatmap in there; None where there is none.

    Raises
    ------
    RunError
        A heatmap.json cannot be read, or the page cannot be written.
    """
    folder = run / FOLDER
    found = [_card(path) for path in sorted(folder.glob(f"*/{ABOUT}"))]
    if not found:
        return None
    found.sort(key=lambda card: (-card["about"]["risk"], card["about"]["slide_id"]))
    environment = Environment(
        loader=PackageLoader("cftrain"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"count": count, "months": months, "percent": percent})
    page = environment.get_template("heatmaps.html").render(
        higher=[card for card in found if card["about"]["risk_percentile"] >= _HALF],
        lower=[card for card in reversed(found) if card["about"]["risk_percentile"] < _HALF],
        about=found[0]["about"],
        run_report=(run / "report.html").exists(),
        light=palette_css(LIGHT),
        dark=palette_css(DARK),
    )
    try:
        aside = folder / ".index.html.partial"
        aside.write_text(page, encoding="utf-8", newline="\n")
        aside.replace(folder / "index.html")
    except OSError as error:
        message = f"{folder / 'index.html'}: cannot be written ({error.strerror})"
        raise RunError(message) from error
    return folder / "index.html"


def _card(path: Path) -> dict[str, Any]:
    """What the page shows of one heatmap: its values, its folder, and a picture of each kind of map."""
    try:
        about: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pictures = [_finest(about["maps"], kind) for kind in ("attention", "attribution")]
        missing = {"slide_id", "risk", "risk_percentile", "event", "honesty"} - about.keys()
        if missing:
            message = f"it lacks {', '.join(sorted(missing))}"
            raise ValueError(message)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: no heatmap that can be read ({error}); make it again with `cftrain heatmap`, or remove it"
        raise RunError(message) from error
    return {"about": about, "link": quote(path.parent.name), "pictures": [name for name in pictures if name]}


def _finest(maps: Mapping[str, Mapping[str, Any]], kind: str) -> str | None:
    """The map of this kind that has the most detail: the first of the finest scale."""
    return max(
        (name for name in maps if maps[name]["kind"] == kind), key=lambda name: maps[name]["scale"], default=None
    )
