"""`cftrain report`, `compare` and `predict`: what finished runs say, side by side, and of other slides."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import click

from cftrain.cli.columns import padded
from cftrain.cli.places import StorePlace
from cftrain.cli.progress import excluded_lines, number

METRICS: Final = tuple(
    f"{metric}{rule}" for rule in ("", "_best_epoch", "_nested") for metric in ("c_index_patient", "c_index")
)
FORMATS: Final = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".html": "html", ".json": "json"}
_SHARE_TOLD: Final = 10  # per cent of the slides between two lines of progress
_FEW_MONTHS: Final = 8


@click.command()
@click.argument("run_directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(run_directory: Path) -> None:
    """Write report.html of a finished run again.

    \b
    Example:
        cftrain report runs/GBMLGG-abmil-20261121-120000
    """
    from cftrain.report import write_report

    click.echo(write_report(run_directory))


@click.command()
@click.argument("runs", type=click.Path(exists=True, file_okay=False, path_type=Path), nargs=-1, required=True)
@click.option(
    "--metric", type=click.Choice(METRICS), default=METRICS[0], show_default=True, help="Which number of every run."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", *FORMATS.values()]),
    help="[default: what the name of -o says (.md, .csv, .tex, .html, .json), else text]",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.option(
    "--replicates", type=click.IntRange(min=1), default=1000, show_default=True, help="Resamples behind a p-value."
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def compare(
    runs: tuple[Path, ...], metric: str, form: str | None, output: Path | None, replicates: int, as_json: bool
) -> None:
    """Put finished runs into one table: models down, cohorts across, mean and deviation over folds.

    RUNS are run directories, or folders that hold some. Several seeds of a model are one row. The best
    model of a cohort is tested against each other one, on the same patients in the same folds.

    \b
    Example:
        cftrain compare runs/
        cftrain compare runs/GBMLGG-abmil-* runs/GBMLGG-crossfusion-*
        cftrain compare runs/ --metric c_index_best_epoch
        cftrain compare runs/ -o table.tex
    """
    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} say different things; give one of them")
    from cftrain import compare as tables

    found = tables.compare(runs, metric=metric, replicates=replicates)
    chosen = "json" if as_json else form or FORMATS.get(output.suffix if output else "", "text")
    if chosen == "json":
        text = json.dumps(tables.to_dict(found), indent=2) + "\n"
    else:
        write = {
            "text": tables.to_text,
            "markdown": tables.to_markdown,
            "csv": tables.to_csv,
            "latex": tables.to_latex,
            "html": tables.to_html,
        }
        text = write[chosen](found)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{output}: cannot be written ({error.strerror})") from error


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--store", type=StorePlace(), help="The store whose slides are predicted.")
@click.option("--shards", metavar="TARS", help="Tars in place of a store: 'path/{000..031}.tar'.")
@click.option("--cohort", metavar="NAME", help="Cohort in the store [default: its only one].")
@click.option("--where", metavar="SQL", help="Only slides that meet a condition on patients and slides.")
@click.option("--encoder", metavar="NAME", help="Encoder of the features [default: the run's, by name].")
@click.option(
    "--weights", type=click.Choice(["last", "best"]), default="last", show_default=True, help="Of which epoch."
)
@click.option("--out", type=click.Path(path_type=Path), help="New directory [default: RUN/predictions/STORE-COHORT].")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--allow-training-patients", is_flag=True, help="Also predict patients that the run was trained on.")
@click.option(
    "--replicates", type=click.IntRange(min=1), default=1000, show_default=True, help="Resamples behind an interval."
)
@click.option("--json", "as_json", is_flag=True, help="Print prediction.json instead of text.")
def predict(
    run: Path,
    store: Path | str | None,
    shards: str | None,
    cohort: str | None,
    where: str | None,
    encoder: str | None,
    weights: Literal["last", "best"],
    out: Path | None,
    device: str,
    allow_training_patients: bool,
    replicates: int,
    as_json: bool,
) -> None:
    """Apply a finished RUN to the slides of another store: external validation, with labels or without.

    The models of all folds predict every slide. Their risks, each on the scale of its own fold, are averaged, and
    so are their probabilities to live longer. Patients that the run was trained on are refused.

    \b
    Example:
        cftrain predict runs/GBMLGG-abmil-20261121-120000 --store hospital-store
        cftrain predict runs/GBMLGG-abmil-20261121-120000 --store hospital-store --where "age > 40"
        cftrain predict runs/GBMLGG-abmil-20261121-120000 --shards 'exported/{000..031}.tar' --out external
    """
    if (store is None) == (shards is None):
        raise click.UsageError("name the slides to predict with --store or with --shards, one of them")
    from cftrain.prediction import PredictionWatcher, predict_run

    done = predict_run(
        run,
        store,
        out,
        cohort=cohort,
        where=where,
        encoder=encoder,
        shards=shards,
        weights=weights,
        device=device,
        allow_training_patients=allow_training_patients,
        replicates=replicates,
        command=sys.argv,
        watch=PredictionWatcher(_say_target, _Slides().tell),
    )
    if as_json:
        click.echo(json.dumps(done.summary, indent=2))
        return
    for line in prediction_lines(done.summary):
        click.echo(line)
    click.echo(f"\npredictions  {done.path / 'predictions.parquet'}")
    click.echo(f"summary      {done.path / 'prediction.json'}")


def _say_target(trained: Any, target: Any) -> None:
    """What is applied to what, on stderr, before it is."""
    cohort, labelled = target.data.cohort, target.labelled_examples
    scales = ", ".join(f"{scale}x" for scale in cohort.scales)
    click.echo(
        f"{trained.config.model.name} of {trained.path}, {len(trained.members)} folds, on cohort {cohort.name} of "
        f"{target.source}: {len(cohort.slides)} slides, encoder {cohort.encoder} (D={cohort.dim}), {scales}; "
        f"{sum(len(each.slide_ids) for each in labelled)} slides have a label",
        err=True,
    )
    if cohort.encoder != trained.encoder:
        click.echo(
            f"the run was trained on encoder {trained.encoder}; {cohort.encoder} is taken for the same", err=True
        )
    for line in excluded_lines(target.data.excluded):
        click.echo(line, err=True)


class _Slides:
    """Plain lines on stderr, one per tenth of the slides."""

    def __init__(self) -> None:
        self._told = 0

    def tell(self, done: int, total: int) -> None:
        """So many slides of so many are predicted."""
        share = 100 * done // total
        if share >= self._told + _SHARE_TOLD or done == total:
            self._told = share
            click.echo(f"{done} of {total} slides", err=True)


def prediction_lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary of a prediction, for a terminal."""
    lines = [""]
    if summary["synthetic"]:
        lines += ["SYNTHETIC DATA: invented by `cfstore synth`, about no real patient", ""]
    lines.append(
        f"predicted   {summary['n_slides']} slides of {summary['n_patients']} patients; "
        f"{summary['weights']} of {len(summary['folds'])} folds"
    )
    if summary["n_slides_of_unknown_patients"]:
        lines.append(
            f"unknown     the patients of {summary['n_slides_of_unknown_patients']} slides: whether the run was "
            "trained on them cannot be told"
        )
    if not summary["encoder_is_the_runs"]:
        lines.append(
            f"encoder     {summary['encoder']}, where the run was trained on {summary['trained_on']['encoder']}"
        )
    if summary["n_training_patients"]:
        lines.append(
            f"NO VALIDATION: the run was trained on {summary['n_training_patients']} of these patients "
            "(--allow-training-patients)"
        )
    months = summary["survival_months"]
    if months:
        shown = ", ".join(f"{month:g}" for month in months[:_FEW_MONTHS]) + (
            ", ..." if len(months) > _FEW_MONTHS else ""
        )
        lines.append(f"survival    at {shown} months")
    if not summary["n_labelled_slides"]:
        return [*lines, "labels      none: nothing to hold the predictions against"]
    return [*lines, *_measured_lines(summary)]


def _measured_lines(summary: Mapping[str, Any]) -> list[str]:
    rows = [(f"fold {fold['fold']}", number(fold["c_index_patient"]), "") for fold in summary["folds"]]
    rows.append(("all folds", *_interval(summary["c_index_patient"])))
    log_rank, brier, calibration = summary["log_rank"], summary["brier"], summary["calibration"]
    p = log_rank["p"]
    lines = [
        f"labels      {summary['n_labelled_slides']} slides of {summary['n_labelled_patients']} patients, "
        f"{summary['n_events']} events",
        "",
        *padded([("", "C-index per patient", "95 % interval"), *rows]),
        "",
        f"C-index per slide   {' '.join(_interval(summary['c_index']))}",
        f"log-rank p          {'n/a' if p is None else f'{p:.2g}'}, patients split at their median risk",
    ]
    if brier:
        lines.append(
            f"Brier score         {number(brier['value'])} integrated; {number(brier['kaplan_meier'])} for these "
            "patients' own Kaplan-Meier curve"
        )
    if calibration:
        d_calibration = calibration["d_calibration"]["p_value"]
        lines.append(
            f"calibration         ICI {number(calibration['ici'])} at {calibration['horizon_months']:g} months; "
            f"D-calibration p {'n/a' if d_calibration is None else f'{d_calibration:.2g}'}"
        )
    return lines


def _interval(found: Mapping[str, Any]) -> tuple[str, str]:
    return number(found["value"]), f"({number(found['lower'])} to {number(found['upper'])})"
