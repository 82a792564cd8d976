"""The report page: words and numbers around the figures, and the files it is written to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from cftrain.errors import RunError
from cftrain.report.figures import (
    FoldScores,
    Line,
    Marks,
    epochs_figure,
    kaplan_meier_figure,
    overview_figure,
    risk_figure,
)
from cftrain.report.groups import curves_csv, median_follow_up, median_time, patients_by_fold, split_by_risk
from cftrain.report.reading import Results, Row, read_results
from cftrain.report.svg import DARK, FIGURE_CSS, LIGHT, padded, palette_css, standalone
from cftrain.survival.metrics import patient_level

NOT_SHOWN = {"host", "hostname", "node"}
LONGEST_TABLE = 30


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
        html, survival, curves = _render(results)
    except (KeyError, TypeError, UndefinedError) as error:
        msg = f"{run}: summary.json or metrics.jsonl lacks what a report needs ({error}); run `cftrain run` again"
        raise RunError(msg) from error
    (run / "figures").mkdir(exist_ok=True)
    _write(run / "figures" / "kaplan_meier.svg", standalone(survival))
    _write(run / "figures" / "kaplan_meier.csv", curves)
    _write(run / "report.html", html)
    return run / "report.html"


def _render(results: Results) -> tuple[str, str, str]:
    """The page, its Kaplan-Meier figure and the numbers behind that figure."""
    summary, predictions = results.summary, results.predictions
    folds = patients_by_fold(predictions)
    groups = split_by_risk(folds)
    log_rank = summary["log_rank"] or {}
    survival = kaplan_meier_figure(
        groups, f"log-rank {p_value(summary['log_rank_p'])}", "Synthetic data" if summary["synthetic"] else ""
    )
    patients = patient_level(predictions.patient_id, predictions.time_months, predictions.event, predictions.risk)
    counted = {group.name: group.time_months.size for group in groups}
    tested = {name: log_rank.get(f"n_{name}", counted.get(name)) for name in counted}
    page = _environment().get_template("report.html")
    html = page.render(
        summary=summary,
        style=Markup(FIGURE_CSS),  # noqa: S704 (a constant)
        light=palette_css(LIGHT),
        dark=palette_css(DARK),
        overview=Markup(overview_figure(_scores(summary))),  # noqa: S704 (figures escape their text)
        survival=Markup(survival),  # noqa: S704
        loss_figures=[Markup(each) for each in _loss_figures(results)],  # noqa: S704
        score_figures=[Markup(each) for each in _score_figures(results)],  # noqa: S704
        risks=Markup(  # noqa: S704
            risk_figure(predictions.slide_id, predictions.fold, predictions.event, predictions.risk)
        ),
        medians={group.name: median_time(group.curve) for group in groups},
        log_rank=log_rank,
        tested_elsewhere=tested != counted,
        n_repeated=sum(fold.patient_id.size for fold in folds) - patients.patient_id.size,
        follow_up=median_follow_up(patients),
        config=results.config,
        provenance=list(_rows(results.provenance)),
        settings=_settings(summary),
    )
    return html, survival, curves_csv(groups)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cftrain"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        score=score, spread=spread, months=months, count=count, duration=duration, p_value=p_value, share=share
    )
    return environment


def score(value: float | None) -> str:
    """A C-index with three decimals; "n/a" where it is undefined."""
    return f"{value:.3f}" if _defined(value) else "n/a"


def spread(metric: Mapping[str, Any]) -> str:
    """Mean ± standard deviation over folds."""
    return f"{score(metric['mean'])} ± {score(metric['std'])}" if _defined(metric["mean"]) else "n/a"


def months(value: float | None) -> str:
    """A number of months with one decimal; infinities and undefined ones in words."""
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value:.1f}" if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def count(value: float | None) -> str:
    """A whole number with separators."""
    return "n/a" if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def p_value(value: float | None) -> str:
    """A p-value as journals print it."""
    if value is None or not math.isfinite(value):
        return "p n/a"
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def share(part: float | None, whole: float | None) -> str:
    """A part as whole percent."""
    return f"{part / whole:.0%}".replace("%", " %") if part is not None and whole else "n/a"


def _defined(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _scores(summary: Mapping[str, Any]) -> list[FoldScores]:
    """The rows of the overview: the honest rule, the paper's, and what the planted risk reaches."""
    named = [
        ("Last epoch, patient", "low", summary["c_index_patient"]),
        ("Last epoch, slide", "low", summary["c_index"]),
        ("Best epoch, patient", "plain", summary["c_index_patient_best_epoch"]),
        ("Best epoch, slide", "plain", summary["c_index_best_epoch"]),
    ]
    reference = summary["reference"]
    if reference:
        one = reference["best_single_scale"]
        named += [
            ("Planted risk", "second", reference["oracle"]),
            (f"Planted risk, {one['scale']}x only", "second", one),
        ]
    return [
        FoldScores(label, kind, _number(metric["mean"]), _number(metric["std"]), [*map(_number, metric["folds"])])
        for label, kind, metric in named
    ]


def _loss_figures(results: Results) -> list[str]:
    lines = {
        fold: [
            Line("validation", "high", _column(rows, "val_loss")),
            Line("training", "plain", _column(rows, "train_loss")),
        ]
        for fold, rows in results.epochs.items()
    }
    marks = {fold["fold"]: Marks(fold["epochs"]) for fold in results.summary["folds"]}
    return _panels("loss", lines, marks)


def _score_figures(results: Results) -> list[str]:
    lines = {
        fold: [
            Line("per slide", "low", _column(rows, "c_index")),
            Line("per patient", "second", _column(rows, "c_index_patient")),
        ]
        for fold, rows in results.epochs.items()
    }
    marks = {
        fold["fold"]: Marks(fold["epochs"], best=fold["best_epoch"], chance=0.5) for fold in results.summary["folds"]
    }
    return _panels("c-index", lines, marks)


def _panels(name: str, lines: Mapping[int, Sequence[Line]], marks: Mapping[int, Marks]) -> list[str]:
    """One panel per fold, all on the same vertical scale, chance within it."""
    values = [value for each in lines.values() for line in each for value in line.values if math.isfinite(value)]
    values += [each.chance for each in marks.values() if each.chance is not None]
    y_range = padded(min(values, default=0.0), max(values, default=1.0))
    return [epochs_figure(f"{name}-{fold}", f"Fold {fold}", lines[fold], y_range, marks[fold]) for fold in lines]


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [_number(row[name]) for row in rows]


def _settings(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Preset", summary["preset"]),
        *([("Only where", summary["where"])] if summary.get("where") else []),
        ("Scales", ", ".join(f"{scale}x" for scale in summary["scales"])),
        ("Splits", f"{summary['splits']}, {len(summary['folds'])} folds"),
        ("Seed", str(summary["seed"])),
        ("Time bins from", summary["bins_from"]),
        ("One training example", summary["unit"]),
        ("Feature width", count(summary["feature_dim"])),
        ("Parameters", count(summary["n_parameters"])),
        ("Device", summary["device"]),
        ("Time taken", duration(summary["seconds"])),
        (
            "Slides per second",
            "n/a" if summary["slides_per_second"] is None else f"{summary['slides_per_second']:,.1f}",
        ),
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
