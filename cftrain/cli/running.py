"""`cftrain run`."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from cftrain.cli.outcome import result_lines
from cftrain.cli.places import StorePlace, kept_between_epochs
from cftrain.cli.progress import Progress
from cftrain.cli.running_on_ray import asked_of_ray, train_on_ray

RUNS = Path("runs")
_NESTED = "train.nested=0.2"


@click.command()
@click.option("--cohort", metavar="NAME", help="Cohort in the store (or data.cohort in --config).")
@click.option("--where", metavar="SQL", help="Only slides that meet a condition on patients and slides.")
@click.option(
    "--model",
    "models",
    metavar="NAME",
    multiple=True,
    help="One of `cftrain models`; several train together; all: those that the features allow.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Train seeds train.seed, +1, ..."
)
@click.option("--encoder", metavar="NAME", help="Encoder of the features [default: the cohort's only one].")
@click.option(
    "--splits",
    metavar="NAME",
    help="Split set [default: the cohort's only one; made by patient where there is none, and with --where].",
)
@click.option(
    "--unit", type=click.Choice(["slide", "patient"]), help="One bag per slide, or one of all a patient's slides."
)
@click.option("--preset", metavar="NAME", help="recommended (the default), paper or demo.")
@click.option("--config", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings, TOML.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. train.epochs=50.")
@click.option(
    "--nested",
    is_flag=True,
    help="Also choose each fold's epoch on 20 % of its training patients, by an inner model (train.nested).",
)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [default: runs/COHORT-MODEL-...].")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, or with the latest unfinished one in runs/.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, read and needed, and do nothing.")
@click.option(
    "--cache",
    "caches",
    metavar="KIND[:SIZE]",
    multiple=True,
    help="Keep bags between epochs: auto, off, ram[:8GB] or gpu[:20GB]. Besides, disk:DIR:200GB keeps on a local disk "
    "what is read of a store on object storage; also $CFSTORE_CACHE.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Groups of folds side by side.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="This process, or --workers processes on a Ray cluster that train together: docs/cluster.md.",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help='Of the Ray cluster; "auto": the one that runs here [default: Ray on this machine alone].',
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes on Ray; on GPUs each has one.")
@click.option(
    "--worker-cpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPUs of each of the --workers [default: as many as all can have].",
)
@click.option("--fuse/--no-fuse", default=True, show_default=True, help="Let folds share one reading of the cohort.")
@click.option(
    "--store",
    type=StorePlace(),
    envvar="CFSTORE",
    default=Path("cfstore-data"),
    show_default=True,
    help="The store's directory or address (s3://bucket/folder, gs://, az://, https://); also $CFSTORE.",
)
@click.option("--shards", metavar="TARS", help="Tars in place of a store, read in sequence: 'path/{000..031}.tar'.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events; needs the package tensorboard.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json (or the plan) instead of text.")
@click.pass_context
def run(
    ctx: click.Context,
    cohort: str | None,
    where: str | None,
    models: tuple[str, ...],
    seeds: int,
    encoder: str | None,
    splits: str | None,
    unit: str | None,
    preset: str | None,
    file: Path | None,
    settings: tuple[str, ...],
    nested: bool,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    caches: tuple[str, ...],
    device: str,
    jobs: int,
    engine: str,
    address: str | None,
    workers: int | None,
    worker_cpus: int | None,
    fuse: bool,
    store: Path | str,
    shards: str | None,
    tensorboard: bool,
    as_json: bool,
) -> None:
    """Cross-validate a model on a cohort and write a run directory.

    C-indices are reported with their rule: the last epoch of a schedule fixed
    beforehand (honest), and the best epoch on the reported fold (the paper's; optimistic). --nested
    adds a third: the epoch that an inner model chose on held-out training patients (honest).

    Killed at any moment, `--resume` goes on and ends with the same numbers, bit for bit on the same machine.
    On SIGTERM, SIGUSR1 or SIGUSR2 a run writes its checkpoints and exits with 75. Several processes under torchrun
    train each step together; so do --workers on a Ray cluster, which goes on by itself where one is killed.

    \b
    Example:
        cftrain run --cohort GBMLGG
        cftrain run --cohort GBMLGG --dry-run
        cftrain run --cohort GBMLGG --model abmil --encoder vit4k --set train.epochs=30
        cftrain run --cohort GBMLGG --model abmil --model crossfusion --seeds 3
        cftrain run --cohort GBMLGG --model all
        cftrain run --cohort BLCA --preset paper
        cftrain run --cohort BLCA --preset paper --nested
        cftrain run --where "cohort = 'GBMLGG' AND age > 40"
        cftrain run --shards 'exported/{000..031}.tar'
        cftrain run --resume
        torchrun --nproc-per-node 2 -m cftrain run --cohort GBMLGG
        cftrain run --cohort GBMLGG --engine ray --workers 4 --address 10.0.0.5:6379
    """
    on_ray = asked_of_ray(engine, address, workers, worker_cpus, device, jobs)
    flags = {
        "data.cohort": cohort,
        "data.where": where,
        "data.encoder": encoder,
        "data.splits": splits,
        "data.unit": unit,
        "data.shards": shards,
        "data.cache": kept_between_epochs(ctx, caches),
    }
    settings = (_NESTED, *settings) if nested else settings  # a share of the user's own comes later and wins
    if resume:
        from cftrain.planned import resumed

        if preset or file or models or seeds > 1:
            raise click.UsageError(
                "--resume takes its settings from the run; leave out --preset, --config, --model, --seeds"
            )
        given = ctx.get_parameter_source("store") is not click.core.ParameterSource.DEFAULT
        planned = resumed(out, RUNS, store if given else None, flags, settings)
    else:
        from cftrain.planned import new_runs

        if "all" in models:
            models = _all_models(store, preset, file, flags, settings)
        planned = new_runs(
            out,
            RUNS,
            models,
            seeds,
            store,
            preset=preset,
            file=file,
            flags=flags,
            settings=settings,
            stamp=f"{datetime.now():%Y%m%d-%H%M%S}",
        )
    first = planned.configs[0]
    if not (first.data.cohort or first.data.where or first.data.shards):
        message = "name the cohort with --cohort (`cfstore info` lists them), or slides with --where"
        raise click.UsageError(message)
    if dry_run:
        _say_plan(planned, device, jobs, fuse, as_json)
        return
    if on_ray:
        train_on_ray(ctx, on_ray, planned, models)
        return
    _train(planned, device, jobs, fuse, resume, tensorboard, as_json)


def _all_models(
    store: Path | str, preset: str | None, file: Path | None, flags: dict[str, str | None], settings: tuple[str, ...]
) -> tuple[str, ...]:
    from cftrain.fitting_models import fitting_models

    fitting = fitting_models(store, preset=preset, file=file, flags=flags, settings=settings)
    for name, reason in fitting.left_out.items():
        click.echo(f"model {name} left out: {reason}", err=True)
    return fitting.models


def _say_plan(planned: Any, device: str, jobs: int, fuse: bool, as_json: bool) -> None:
    from cftrain.experiment import prepare
    from cftrain.forecast import forecast

    plan = forecast(prepare(planned.configs, planned.store, device=device, jobs=jobs, fuse=fuse))
    click.echo(json.dumps(plan.to_dict(), indent=2) if as_json else "\n".join(plan.lines()))


def _train(planned: Any, device: str, jobs: int, fuse: bool, resume: bool, tensorboard: bool, as_json: bool) -> None:
    from cftrain.experiment import Watcher, train_runs
    from cftrain.ranks import rank
    from cftrain.report import write_report

    n_inner = sum(config.has_inner for config in planned.configs)
    told = Progress(planned.labels, [config.train.epochs for config in planned.configs], n_inner=n_inner)
    on_epoch: Any = told.epoch
    if tensorboard:
        from cftrain.tensorboard import events

        on_epoch = events(planned.outs, told.epoch)
    watch = Watcher(told.data, told.cache, told.derive, on_epoch, told.beat, told.fold, told.inner_epoch)
    try:
        finished = train_runs(
            planned.configs,
            planned.store,
            planned.outs,
            device=device,
            jobs=jobs,
            fuse=fuse,
            resume=resume,
            command=sys.argv,
            watch=watch,
        )
    finally:
        told.end()
    if rank() > 0:
        return
    reports = [write_report(done.path) for done in finished]
    summaries = [done.summary for done in finished]
    if as_json:
        click.echo(json.dumps(summaries[0] if len(summaries) == 1 else summaries, indent=2))
        return
    for done, page in zip(finished, reports, strict=True):
        for line in result_lines(done.summary):
            click.echo(line)
        click.echo(f"\nrun        {done.path}")
        click.echo(f"report     {page}")
