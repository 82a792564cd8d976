"""A sweep from its plan to its table: what is missing is done, the rest is left as it is."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import cfstore
from cfstore import StoreError
from cftrain import run_directory
from cftrain.apart import close, fold_numbers
from cftrain.compare import Comparison, compare, to_html, to_markdown
from cftrain.errors import StoppedError, TrainError
from cftrain.report import write_report
from cftrain.stopping import StopRequest, listening
from cftrain.sweep.engines import Engine, Listener
from cftrain.sweep.jobs import Job, State, error_of, finished, state
from cftrain.sweep.plan import Plan, Run, check_held
from cftrain.sweep.work import note_error

MARKDOWN: Final = "compare.md"
PAGE: Final = "compare.html"


@dataclass(frozen=True)
class Finished:
    """What became of a sweep.

    Parameters
    ----------
    failed
        Jobs that failed, each with its error in one line.
    comparison
        Of the runs that have results; None where there is none.
    """

    jobs: tuple[Job, ...]
    failed: tuple[tuple[Job, str], ...]
    comparison: Comparison | None


def check_plan(plan: Plan) -> None:
    """Compare a plan with the store, and with the directories of runs that were begun; reads no features.

    Raises
    ------
    ConfigError
        The store has no such cohort or encoder.
    RunError
        A run was begun with other settings; names the directory and the settings.
    StoreError
        The store cannot be opened.
    """
    store = cfstore.open(plan.store)
    rows = store.sql("SELECT DISTINCT cohort, encoder FROM bags JOIN slides USING (slide_id) ORDER BY ALL").to_pylist()
    check_held(plan, {key: [row["encoder"] for row in own] for key, own in groupby(rows, lambda row: row["cohort"])})
    for run in plan.runs:
        run_directory.settled(run.out, run.config)


def jobs_of(plan: Plan) -> tuple[Job, ...]:
    """The jobs of a plan in the order in which they are done.

    A run whose folds cannot be told stays one job: doing it says why.
    """
    if not plan.apart:
        return tuple(Job(run, plan.store) for run in plan.runs)
    return tuple(Job(run, plan.store, fold) for run in plan.runs for fold in _folds(run, plan.store))


def _folds(run: Run, store: Path | str) -> Sequence[int | None]:
    try:
        return fold_numbers(run.config, store)
    except (TrainError, StoreError):
        return [None]


def run_sweep(
    plan: Plan,
    engine: Engine,
    listener: Listener,
    *,
    on_jobs: Callable[[Sequence[Job]], None] = lambda jobs: None,
    command: Sequence[str] = (),
) -> Finished:
    """Do what is missing of a sweep and compare its runs; where a job fails the others go on.

    Parameters
    ----------
    engine
        What does the jobs.
    listener
        Hears of the jobs that are done now.
    on_jobs
        Told of all jobs before the first is begun.
    command
        Kept in provenance.json.

    Raises
    ------
    StoppedError
        A signal asked for it; the checkpoints are written.
    RunBusyError
        Another process is at this sweep.
    ConfigError, RunError, StoreError
        See `check_plan`.
    """
    check_plan(plan)
    with run_directory.held(plan.out):
        jobs = jobs_of(plan)
        on_jobs(jobs)
        with listening() as stop:
            engine([job for job in jobs if state(job) is not State.DONE], command, listener, stop)
            if stop:
                raise _stopped(stop)
            for run in plan.runs:
                _close(plan, run)
        failed = tuple((job, error_of(job)) for job in jobs if state(job) is State.FAILED)
        return Finished(jobs, failed, _compared(plan))


def _stopped(request: StopRequest) -> StoppedError:
    name = request.by.name if request.by else "a signal to a job"
    message = f"stopped by {name}; what was begun has its checkpoints, run the same sweep again to go on"
    return StoppedError(message, int(request.by or signal.SIGTERM))


def _close(plan: Plan, run: Run) -> None:
    """Write what the last job of a run's folds could not, if they are all there."""
    if not plan.apart or finished(run):
        return
    try:
        close(run.config, plan.store, run.out)
        if (run.out / "summary.json").exists():
            write_report(run.out)
    except (TrainError, StoreError) as error:
        note_error(Job(run, plan.store), str(error))


def _compared(plan: Plan) -> Comparison | None:
    """The table of all runs that have results, written beside them."""
    there = [run.out for run in plan.runs if (run.out / "summary.json").exists()]
    if not there:
        return None
    found = compare(there)
    run_directory.write_text(plan.out / MARKDOWN, to_markdown(found))
    links = {run.out: f"{run.name}/report.html" for run in plan.runs}
    run_directory.write_text(plan.out / PAGE, to_html(found, links))
    return found
