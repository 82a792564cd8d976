"""`cftrain sweep`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cftrain.cli.progress import duration

if TYPE_CHECKING:
    from cftrain.sweep.engines import Engine
    from cftrain.sweep.jobs import Job
    from cftrain.sweep.plan import Plan
    from cftrain.sweep.running import Finished

_LOCAL: Final = "local"
_RAY: Final = "ray"


@click.command()
@click.argument("plan", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes on this machine.")
@click.option(
    "--engine",
    type=click.Choice([_LOCAL, _RAY]),
    default=_LOCAL,
    show_default=True,
    help="This machine, or the nodes of a Ray cluster.",
)
@click.option("--address", metavar="HOST:PORT", help="Of the Ray cluster [default: Ray started on this machine].")
@click.option("--dry-run", is_flag=True, help="List the jobs and how far each is, and what is left would take.")
@click.option("--json", "as_json", is_flag=True, help="Print jobs and comparison as JSON instead of text.")
def sweep(plan: Path, jobs: int, engine: str, address: str | None, dry_run: bool, as_json: bool) -> None:
    """Train cohorts x models x encoders x seeds as PLAN, a TOML file, says, and compare them.

    Each run has a directory of its own, which says how far it is: run the same sweep again, and it does only what
    is missing. Jobs that fail are named at the end, with exit code 1; the others go on. A job whose process is killed
    is begun again from its checkpoint. With `folds = "apart"` each fold is a job.

    \b
    Example:
        cftrain sweep plan.toml --dry-run
        cftrain sweep plan.toml
        cftrain sweep plan.toml --jobs 4
        cftrain sweep plan.toml --engine ray --address 10.0.0.1:6379
    """
    if engine == _RAY and jobs > 1:
        raise click.UsageError("--jobs is of --engine local; on Ray the cluster and [resources] say how many run")
    if engine == _LOCAL and address:
        raise click.UsageError("--address is of --engine ray; add it, or leave --address out")
    from cftrain.sweep.plan import read_plan

    read = read_plan(plan)
    if dry_run:
        _say_plan(read, as_json)
        return
    _sweep(read, _engine(read, engine, jobs, address), as_json)


def _engine(plan: Plan, engine: str, jobs: int, address: str | None) -> Engine:
    if engine == _RAY:
        from cftrain.ray_jobs import OnRay

        return OnRay(plan.resources, address)
    from cftrain.sweep.engines import InTurn, SideBySide, check_jobs

    check_jobs(plan.resources, jobs)
    return InTurn(plan.resources) if jobs == 1 else SideBySide(plan.resources, jobs)


def _sweep(plan: Plan, engine: Engine, as_json: bool) -> None:
    from cftrain.cli.sweep_progress import SweepProgress
    from cftrain.sweep.running import run_sweep

    told = SweepProgress()
    try:
        done = run_sweep(plan, engine, told, on_jobs=told.jobs, command=sys.argv)
    finally:
        told.end()
    _say_end(plan, done, as_json)
    if done.failed:
        click.get_current_context().exit(1)


def _say_end(plan: Plan, done: Finished, as_json: bool) -> None:
    from cftrain.cli.sweep_progress import plan_rows
    from cftrain.compare import to_dict, to_text
    from cftrain.sweep.running import MARKDOWN, PAGE

    if as_json:
        errors = {job.name: error for job, error in done.failed}
        rows = [row | {"error": errors.get(row["name"])} for row in plan_rows(done.jobs)]
        compared = to_dict(done.comparison) if done.comparison else None
        click.echo(json.dumps({"jobs": rows, "comparison": compared}, indent=2))
    elif done.comparison:
        click.echo(to_text(done.comparison))
        click.echo(f"runs       {plan.out}")
        click.echo(f"table      {plan.out / MARKDOWN}, {plan.out / PAGE}")
    if done.failed:
        click.echo(f"{len(done.failed)} of {len(done.jobs)} jobs failed; the same command does them again:", err=True)
        for job, error in done.failed:
            click.echo(f"  {job.name}: {error}", err=True)


def _say_plan(plan: Plan, as_json: bool) -> None:
    from cftrain.cli.sweep_progress import plan_rows
    from cftrain.sweep.running import check_plan, jobs_of

    check_plan(plan)
    jobs = jobs_of(plan)
    rows = plan_rows(jobs)
    forecasts = _forecasts(plan, jobs)
    if as_json:
        click.echo(json.dumps({"jobs": rows, "forecasts": list(forecasts)}, indent=2))
        return
    for row in rows:
        value = row["c_index_patient"]
        click.echo(f"{row['state']:<8} {row['name']}" + ("" if value is None else f"  C-index {value:.3f} per patient"))
    n_done = sum(row["state"] == "done" for row in rows)
    click.echo(f"\n{len(rows)} jobs, {n_done} done; each takes {_resources(plan)}")
    for each in forecasts:
        click.echo(_forecast_line(each))
    click.echo("nothing was trained or written; times are of this machine as it is now")


def _resources(plan: Plan) -> str:
    from cftrain.cache import size_text

    own = plan.resources
    return ", ".join(
        [
            "its share of the cores" if own.cpus is None else f"{own.cpus} core{'s' * (own.cpus > 1)}",
            "a GPU where there is one" if own.gpus is None else f"{own.gpus:g} of a GPU" if own.gpus else "no GPU",
            "what memory is free" if own.memory is None else f"at most {size_text(own.memory)} of RAM",
        ]
    )


def _forecasts(plan: Plan, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """What the missing runs of each model on each cohort would take, from one of them; or why they cannot be made."""
    from cfstore import StoreError
    from cftrain.errors import TrainError
    from cftrain.experiment import prepare
    from cftrain.forecast import forecast
    from cftrain.memory import Allowance
    from cftrain.sweep.jobs import finished, runs_of

    missing: dict[tuple[str, str, str], list[Any]] = {}
    for run in runs_of(job for job in jobs if not finished(job.run)):
        missing.setdefault((run.cohort, run.encoder, run.model), []).append(run)
    own = plan.resources
    for (cohort, encoder, model), runs in missing.items():
        about = {"cohort": cohort, "encoder": encoder or None, "model": model, "n_runs": len(runs)}
        try:
            allowance = Allowance(own.memory, own.gpus or 1.0)
            found = forecast(prepare([runs[0].config], plan.store, device=own.device, allowance=allowance))
        except (TrainError, StoreError) as error:
            yield about | {"error": str(error)}
        else:
            (one,) = found.runs
            seconds = {"compute_seconds": one.compute_seconds * len(runs)}
            read = {"bytes_per_pass": found.bytes_per_pass, "passes": found.passes * len(runs)}
            yield about | seconds | read | {"step_bytes": one.step_bytes, "n_slides": found.n_slides}


def _forecast_line(found: dict[str, Any]) -> str:
    from cftrain.cache import size_text

    name = "-".join(part for part in (found["cohort"], found["encoder"], found["model"]) if part)
    what = f"{name}: {found['n_runs']} run{'s' * (found['n_runs'] > 1)} to do"
    if "error" in found:
        return f"{what}, and they cannot be made: {found['error']}"
    return (
        f"{what} on {found['n_slides']:,} slides, about {duration(found['compute_seconds'])} of computing; "
        f"{found['passes']} passes of {size_text(found['bytes_per_pass'])}; "
        f"the largest step needs {size_text(found['step_bytes'])}"
    )
