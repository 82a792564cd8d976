"""The report page: words and numbers around the figures, and the files it is written to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from cftrain.errors import RunError
from cftrain.report.calibrated import calibration_sentences, curve_points
from cftrain.report.concordance import brier_sentence, fewest, fold_intervals, fold_scores, month_scores, notes_of
from cftrain.report.cost import cost_rows, limit_sentence, n_skipped, skipped_steps
from cftrain.report.figures import (
    calibration_figure,
    deciles_figure,
    forest_figure,
    kaplan_meier_figure,
    over_time_figure,
    overview_figure,
    risk_figure,
)
from cftrain.report.groups import curves_csv, median_follow_up, median_time, patients_by_fold, split_by_risk
from cftrain.report.hazards import covariate_rows, cox_sentence, hazard_rows, missing_values
from cftrain.report.panels import loss_figures, score_figures
from cftrain.report.reading import Results, read_results
from cftrain.report.svg import DARK, FIGURE_CSS, LIGHT, palette_css, standalone
from cftrain.report.wording import (
    bare_p,
    count,
    counted,
    duration,
    limits,
    months,
    p_value,
    percent,
    score,
    share,
    spread,
    whole_months,
)
from cftrain.survival.metrics import patient_level
from cftrain.survival.regression import RISK

NOT_SHOWN = {"host", "hostname", "node"}
HEATMAPS = "heatmaps"
LONGEST_TABLE = 30
LONGEST_FOREST = 40
MOST_SKIPPED = 20
UNITS: Final = {"slide": "a slide", "patient": "a patient, all their slides in one bag"}
LOSSES: Final = {
    "nll": "negative log-likelihood of time bins",
    "ce": "cross-entropy of time bins",
    "cox": "Cox partial likelihood",
}


def write_report(run: Path) -> Path:
    """Write report.html, figures/kaplan_meier.svg and figures/kaplan_meier.csv into a finished run directory.

    The page is one file that needs no network and no script; the same run gives the same bytes.

    Parameters
    ----------
    run
        A directory that `cftrain run` finished.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    RunError
        A file of the run is missing, unreadable, or lacks what a finished run has.
    """
    results = read_results(run)
    try:
        html, survival, curves = _render(results, _heatmaps(run))
    except (KeyError, TypeError, UndefinedError) as error:
        msg = f"{run}: summary.json or metrics.jsonl lacks what a report needs ({error}); run `cftrain run` again"
        raise RunError(msg) from error
    (run / "figures").mkdir(exist_ok=True)
    _write(run / "figures" / "kaplan_meier.svg", standalone(survival))
    _write(run / "figures" / "kaplan_meier.csv", curves)
    _write(run / "report.html", html)
    return run / "report.html"


def _heatmaps(run: Path) -> dict[str, str]:
    """Slides of the run with a heatmap, and the folder of each; nothing where there is no page of them."""
    if not (run / HEATMAPS / "index.html").is_file():
        return {}
    found = {}
    for path in sorted((run / HEATMAPS).glob("*/heatmap.json")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            found[str(about["slide_id"])] = f"{HEATMAPS}/{quote(path.parent.name)}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = f"{path}: no heatmap that can be read ({error}); make it again with `cftrain heatmap`, or remove it"
            raise RunError(msg) from error
    return found


def _render(results: Results, heatmaps: Mapping[str, str]) -> tuple[str, str, str]:
    """The page, its Kaplan-Meier figure and the numbers behind that figure."""
    summary, predictions = results.summary, results.predictions
    folds = patients_by_fold(predictions)
    groups = split_by_risk(folds)
    log_rank = summary["log_rank"] or {}
    survival = kaplan_meier_figure(
        groups, f"log-rank {p_value(summary['log_rank_p'])}", "Synthetic data" if summary["synthetic"] else ""
    )
    patients = patient_level(predictions.patient_id, predictions.time_months, predictions.event, predictions.risk)
    sizes = {group.name: group.time_months.size for group in groups}
    tested = {name: log_rank.get(f"n_{name}", sizes.get(name)) for name in sizes}
    html = (
        _environment()
        .get_template("report.html")
        .render(
            summary=summary,
            style=Markup(FIGURE_CSS),  # noqa: S704 (a constant)
            light=palette_css(LIGHT),
            dark=palette_css(DARK),
            survival=Markup(survival),  # noqa: S704 (figures escape their text)
            loss_figures=[Markup(each) for each in loss_figures(results)],  # noqa: S704
            score_figures=[Markup(each) for each in score_figures(results)],  # noqa: S704
            risks=Markup(  # noqa: S704
                risk_figure(predictions.slide_id, predictions.fold, predictions.event, predictions.risk)
            ),
            heatmaps=heatmaps,
            medians={group.name: median_time(group.curve) for group in groups},
            log_rank=log_rank,
            tested_elsewhere=tested != sizes,
            n_repeated=sum(fold.patient_id.size for fold in folds) - patients.patient_id.size,
            follow_up=median_follow_up(patients),
            config=results.config,
            provenance=list(_rows(results.provenance)),
            settings=_settings(summary),
            **_assessed(summary),
            **_regressed(summary.get("cox")),
            **_spent(results),
        )
    )
    return html, survival, curves_csv(groups)


def _assessed(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the sections on concordance and calibration show; an older run has no assessment."""
    assessment = summary.get("assessment")
    calibration = assessment["calibration"] if assessment else None
    points, by_month = curve_points(calibration), month_scores(assessment)
    counts = calibration["d_calibration"]["counts"] if calibration else []
    heading = "Each fold, per patient after the last epoch, with 95 % intervals"
    return {
        "assessment": assessment,
        "overview": Markup(  # noqa: S704
            overview_figure(fold_scores(summary), fold_intervals(assessment), heading)
        ),
        "brier": brier_sentence(assessment) if assessment else "",
        "notes": notes_of(assessment) if assessment else [],
        "by_month": Markup(over_time_figure(by_month)) if by_month else "",  # noqa: S704
        "fewest": fewest(assessment) if assessment else {},
        "calibration": calibration,
        "calibration_means": calibration_sentences(calibration) if calibration else [],
        "curve": Markup(  # noqa: S704
            calibration_figure(points, calibration["horizon_months"]) if calibration and points else ""
        ),
        "deciles": Markup(deciles_figure(counts)) if counts else "",  # noqa: S704
    }


def _regressed(cox: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the section on hazard ratios shows; an older run has no regression."""
    bars = hazard_rows(cox)
    return {
        "cox": cox,
        "hazards": covariate_rows(cox) if cox else [],
        "hazards_mean": cox_sentence(cox, RISK) if cox else "",
        "forest": Markup(forest_figure(bars[:LONGEST_FOREST])) if bars else "",  # noqa: S704
        "n_beyond_forest": max(len(bars) - LONGEST_FOREST, 0),
        "missing": missing_values(cox) if cox else [],
    }


def _spent(results: Results) -> dict[str, Any]:
    """What the section on time and memory shows, and the steps that were left out."""
    skipped = skipped_steps(results.epochs)
    return {
        "cost": cost_rows(results.summary, results.config),
        "limit": limit_sentence(results.summary),
        "skipped": skipped[:MOST_SKIPPED],
        "n_skipped": n_skipped(results.summary, skipped),
    }


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cftrain"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (score, spread, limits, months, whole_months, count, duration, p_value, bare_p, share, percent, counted)
    environment.filters.update({each.__name__: each for each in filters})
    return environment


def _settings(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    loss = summary.get("loss")
    return [
        ("Preset", summary["preset"]),
        *([("Only where", summary["where"])] if summary.get("where") else []),
        ("Scales", ", ".join(f"{scale}x" for scale in summary["scales"])),
        ("Splits", f"{summary['splits']}, {len(summary['folds'])} folds"),
        ("Seed", str(summary["seed"])),
        ("Time bins from", summary["bins_from"]),
        ("One training example", UNITS.get(summary["unit"], summary["unit"])),
        *([("Loss", f"{loss}: {LOSSES[loss]}" if loss in LOSSES else loss)] if loss else []),
        ("Feature width", count(summary["feature_dim"])),
        ("Parameters", count(summary["n_parameters"])),
        ("Device", summary["device"]),
    ]


def _rows(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as rows with dotted names; the machine's name stays private, very long tables stay in the file."""
    for name, value in values.items():
        label = f"{above}{name}"
        if name in NOT_SHOWN:
            continue
        if isinstance(value, dict) and len(value) <= LONGEST_TABLE:
            yield from _rows(value, f"{label}.")
        elif isinstance(value, dict):
            yield label, f"{len(value):,} entries, listed in provenance.json"
        elif isinstance(value, list):
            yield label, " ".join(map(str, value))
        else:
            yield label, "n/a" if value is None else str(value)


def _write(path: Path, text: str) -> None:
    """Write beside the file, then rename: nobody sees half a page."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)
