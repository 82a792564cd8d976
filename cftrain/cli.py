"""The `cftrain` command: arguments in, one library call, text out. The only module here that prints."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from cfstore import StoreError
from cftrain.errors import TrainError


class _Group(click.Group):
    """Turns what the libraries raise on purpose into one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TrainError, StoreError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="crossfusion-store")
def main() -> None:
    """Train and compare survival models on the slides of a store.

    \b
    Example:
        cftrain run --cohort GBMLGG
        cftrain models
    """


@main.command()
@click.option("--cohort", metavar="NAME", help="Cohort in the store (or data.cohort in --config).")
@click.option("--where", metavar="SQL", help="Only slides that meet a condition on patients and slides.")
@click.option("--model", metavar="NAME", help="One of `cftrain models` [default: crossfusion].")
@click.option("--encoder", metavar="NAME", help="Encoder of the features [default: the cohort's only one].")
@click.option("--splits", metavar="NAME", help="Split set [default: the cohort's only one, or made by patient].")
@click.option("--preset", metavar="NAME", help="default, paper or demo: a named set of settings.")
@click.option("--config", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings, TOML.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. train.epochs=50.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [default: runs/COHORT-MODEL-...].")
@click.option("--cache", metavar="KIND[:SIZE]", help="Keep bags between epochs: auto, off, ram[:8GB] or gpu[:20GB].")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Folds trained side by side.")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="CFSTORE",
    default=Path("cfstore-data"),
    show_default=True,
    help="The store's directory; also $CFSTORE.",
)
@click.option("--shards", metavar="TARS", help="Tars in place of a store, read in sequence: 'path/{000..031}.tar'.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json instead of the table.")
def run(
    cohort: str | None,
    where: str | None,
    model: str | None,
    encoder: str | None,
    splits: str | None,
    preset: str | None,
    file: Path | None,
    settings: tuple[str, ...],
    out: Path | None,
    cache: str | None,
    device: str,
    jobs: int,
    store: Path,
    shards: str | None,
    as_json: bool,
) -> None:
    """Cross-validate a model on a cohort and write a run directory.

    Two C-indices are reported, each with its rule: the last epoch of a schedule fixed
    beforehand (honest), and the best epoch on the reported fold (the paper's; optimistic).

    \b
    Example:
        cftrain run --cohort GBMLGG
        cftrain run --cohort GBMLGG --model abmil --encoder vit4k --set train.epochs=30
        cftrain run --cohort BLCA --preset paper
        cftrain run --where "cohort = 'GBMLGG' AND age > 40"
        cftrain run --shards 'exported/{000..031}.tar'
    """
    from cftrain.config import load_config

    flags = {
        "data.cohort": cohort,
        "data.where": where,
        "data.encoder": encoder,
        "data.splits": splits,
        "data.shards": shards,
        "data.cache": cache,
        "model.name": model,
    }
    config = load_config(preset=preset, file=file, flags=flags, settings=settings)
    if not (config.data.cohort or config.data.where or config.data.shards):
        message = "name the cohort with --cohort (`cfstore info` lists them), or slides with --where"
        raise click.UsageError(message)
    from cftrain.experiment import Watcher, cross_validate
    from cftrain.report import write_report

    named = config.data.cohort or ("where" if config.data.where else "shards")
    folder = out or Path("runs") / f"{named}-{config.model.name}-{datetime.now():%Y%m%d-%H%M%S}"
    told = _Progress(config.train.epochs)
    watch = Watcher(on_data=told.data, on_cache=told.cache, on_epoch=told.epoch, on_fold=told.fold)
    done = cross_validate(config, store, folder, device=device, jobs=jobs, command=sys.argv, watch=watch)
    report = write_report(folder)
    if as_json:
        click.echo(json.dumps(done.summary, indent=2))
        return
    for line in _result_lines(done.summary):
        click.echo(line)
    click.echo(f"\nrun        {folder}")
    click.echo(f"report     {report}")


class _Progress:
    """What a person sees while a run goes on, on stderr: one live line on a terminal, else plain lines."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._live = sys.stderr.isatty()

    def data(self, data: Any, n_parameters: int) -> None:
        from cftrain.results import excluded_lines

        cohort = data.cohort
        scales = ", ".join(f"{scale}x" for scale in cohort.scales)
        events = sum({slide.patient_id: slide.event for slide in cohort.slides}.values())
        click.echo(
            f"cohort {cohort.name}, encoder {cohort.encoder} (D={cohort.dim}), {scales}: "
            f"{len(cohort.slides)} slides of {cohort.n_patients} patients, {events} events; "
            f"splits {data.splits.name}, {len(data.folds)} folds; {n_parameters:,} parameters",
            err=True,
        )
        for line in excluded_lines(data.excluded):
            click.echo(line, err=True)

    def cache(self, plan: Any) -> None:
        click.echo(plan.why, err=True)

    def epoch(self, fold: Any, epoch: Any) -> None:
        left = (self._epochs - epoch.epoch) * epoch.seconds
        text = (
            f"fold {fold.number}  epoch {epoch.epoch}/{self._epochs}  loss {epoch.train_loss:.3f}  "
            f"val C-index {_number(epoch.c_index)}  {epoch.seconds:.1f} s/epoch, {left:.0f} s left in fold"
        )
        if self._live:
            click.echo(f"\r\033[K{text}", err=True, nl=False)
        elif epoch.epoch in (1, self._epochs) or epoch.epoch % 5 == 0:
            click.echo(text, err=True)

    def fold(self, result: Any) -> None:
        share = 100 * result.work.wait_seconds / max(result.seconds, 1e-9)
        text = (
            f"fold {result.slides.number}  done in {result.seconds:.0f} s ({share:.0f} % waiting for data): "
            f"C-index {_number(result.last_epoch.c_index)}"
        )
        click.echo(("\r\033[K" if self._live else "") + text, err=True)


def _number(value: float | None) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.3f}"


def _spread(metric: dict[str, Any]) -> str:
    return f"{_number(metric['mean'])} +- {_number(metric['std'])}"


def _result_lines(summary: Mapping[str, Any]) -> list[str]:
    if summary["synthetic"]:
        lines = ["", "SYNTHETIC DATA: invented by `cfstore synth`, about no real patient", ""]
    else:
        lines = [""]
    head = ("fold", "epochs", "C-index", "per patient", "best epoch", "C-index there", "per patient")
    rows = [
        (
            str(fold["fold"]),
            str(fold["epochs"]),
            _number(fold["c_index"]),
            _number(fold["c_index_patient"]),
            str(fold["best_epoch"]),
            _number(fold["c_index_best_epoch"]),
            _number(fold["c_index_patient_best_epoch"]),
        )
        for fold in summary["folds"]
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines += [
        "",
        f"C-index             {_spread(summary['c_index'])} per slide, "
        f"{_spread(summary['c_index_patient'])} per patient",
        f"                    {summary['c_index']['rule']}",
        f"C-index, best epoch {_spread(summary['c_index_best_epoch'])} per slide, "
        f"{_spread(summary['c_index_patient_best_epoch'])} per patient",
        f"                    {summary['c_index_best_epoch']['rule']}",
    ]
    if summary["reference"]:
        oracle, single = summary["reference"]["oracle"], summary["reference"]["best_single_scale"]
        lines.append(
            f"planted risk        {_spread(oracle)} per patient; "
            f"best predictor from {single['scale']}x alone {_spread(single)}"
        )
    p = summary["log_rank_p"]
    lines.append(
        f"log-rank p          {'n/a' if p is None else f'{p:.2g}'}, patients split at the median risk of their fold"
    )
    return lines


@main.command()
@click.argument("run_directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(run_directory: Path) -> None:
    """Write report.html of a finished run again.

    \b
    Example:
        cftrain report runs/GBMLGG-abmil-20261121-120000
    """
    from cftrain.report import write_report

    click.echo(write_report(run_directory))


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def models(name: str | None, as_json: bool) -> None:
    """List the models, or one model's options and defaults.

    \b
    Example:
        cftrain models
        cftrain models crossfusion
    """
    from cftrain.zoo import MODELS, model_info

    chosen = [model_info(name)] if name else list(MODELS.values())
    rows: list[dict[str, Any]] = [
        {
            "name": info.name,
            "scales": list(info.scales),
            "summary": info.summary,
            "reference": info.reference,
            "options": {item.name: item.default for item in dataclasses.fields(info.options) if item.name != "n_bins"},
        }
        for info in chosen
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        scales = ", ".join(f"{scale}x" for scale in row["scales"])
        click.echo(f"{row['name']:<20} {scales:<12} {row['summary']}")
        if name:
            click.echo(f"{'':<20} {row['reference']}")
            for option, default in row["options"].items():
                click.echo(f"{'':<20} --set model.{option}={json.dumps(default)}")


@main.command("import-weights")
@click.argument("official", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to write [default: OFFICIAL.safetensors].")
@click.option("--heads", type=click.IntRange(min=1), default=4, show_default=True, help="The tensors do not tell.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def import_weights(official: Path, out: Path | None, heads: int, force: bool, as_json: bool) -> None:
    """Turn weights of the authors' code (RustinS/CrossFusion) into a model of this package.

    OFFICIAL is a state dict of CrossFusion, CrossFusionConcat, CrossFusionSingle or AMIL; which, and
    its sizes, is read from the tensors. Nothing but tensors is loaded from it.

    \b
    Example:
        cftrain import-weights best_model.pt
        python -c "from cftrain.checkpoints import load_model; print(load_model('best_model.safetensors'))"
    """
    out = out or official.with_suffix(".safetensors")
    if out.resolve() == official.resolve():
        raise click.UsageError(f"{out} would be written over itself; name another with --out")
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists; name another with --out, or replace it with --force")
    from cftrain.checkpoints import load_released, save_weights

    model = load_released(official, n_heads=heads)
    save_weights(model, out, source=official.name)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    options = dataclasses.asdict(model.options)
    if as_json:
        about = {"model": model.name, "feature_dim": model.feature_dim, "parameters": n_parameters}
        click.echo(json.dumps({**about, "options": options, "weights": str(out)}, indent=2))
        return
    told = ", ".join(f"{key}={value}" for key, value in options.items())
    click.echo(f"{model.name}, D={model.feature_dim}, {n_parameters:,} parameters ({told})")
    click.echo(out)
