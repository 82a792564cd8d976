"""A sweep from its plan to its table: what is missing is done, the rest is left as it is."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Final

import cfstore
from cfstore import StoreError
from cftrain import run_directory
from cftrain.apart import close, fold_numbers
from cftrain.compare import Comparison, compare, to_html, to_markdown
from cftrain.errors import OtherSettingsError, RunBusyError, RunError, StoppedError, TrainError
from cftrain.report import write_report
from cftrain.stopping import StopRequest, listening
from cftrain.sweep.engines import Engine, Listener
from cftrain.sweep.jobs import Job, Outcome, State, error_of, finished, runs_of, state
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
        Jobs that are not done, each with its error in one line.
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
        try:
            run_directory.settled(run.out, run.config)
        except OtherSettingsError as error:
            raise RunError(_edited(plan, run, error.keys)) from error


def _edited(plan: Plan, run: Run, keys: Sequence[str]) -> str:
    """What to do about a run that was begun by another plan, or by this one before it was edited."""
    order = "data.order_seed"
    why = f" ({order} is the first of `seeds` where [set] does not name it)" if order in keys else ""
    return (
        f"{run.out}: was begun with another {', '.join(keys)} than {plan.path} has now{why}; "
        "set it back, name another `out`, or remove that directory to begin the run anew"
    )


@contextmanager
def _held(plan: Plan) -> Iterator[None]:
    """Keep other sweeps from the same directory."""
    with ExitStack() as stack:
        try:
            stack.enter_context(run_directory.held(plan.out))
        except RunBusyError as error:
            message = f"{plan.out}: another sweep is at it; wait until it ends, or name another `out` in {plan.path}"
            raise RunBusyError(message) from error
        yield


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
    with _held(plan):
        jobs = jobs_of(plan)
        on_jobs(jobs)
        errors = _Errors(listener)
        with listening() as stop:
            engine([job for job in jobs if state(job) is not State.DONE], command, errors, stop)
            if stop:
                raise _stopped(stop)
            undone = [job for run in runs_of(jobs) for job in _undone(plan, run, jobs, errors)]
        failed = tuple((job, errors.of(job)) for job in undone)
        return Finished(jobs, failed, _compared(plan))


@dataclass
class _Errors:
    """A listener that keeps what jobs said went wrong, for where that cannot be written: a disk that is full."""

    listener: Listener
    said: dict[str, str] = field(default_factory=dict)

    def began(self, job: Job) -> None:
        self.listener.began(job)

    def note(self, text: str) -> None:
        self.listener.note(text)

    def tick(self) -> None:
        self.listener.tick()

    def ended(self, job: Job, outcome: Outcome) -> None:
        self.said[job.name] = outcome.error
        self.listener.ended(job, outcome)

    def of(self, job: Job) -> str:
        found = error_of(job) or self.said.get(job.name)
        return found or f"ended, but its results are not in {job.run.out}; run the sweep again"


def _stopped(request: StopRequest) -> StoppedError:
    name = request.by.name if request.by else "a signal to a job"
    message = f"stopped by {name}; what was begun has its checkpoints, run the same sweep again to go on"
    return StoppedError(message, int(request.by or signal.SIGTERM))


def _undone(plan: Plan, run: Run, jobs: Sequence[Job], errors: _Errors) -> list[Job]:
    """The jobs of a run that are not done, whatever they said: what they left behind is what counts."""
    own = [job for job in jobs if job.run.name == run.name]
    undone = [job for job in own if state(job) is not State.DONE]
    if plan.apart and not finished(run):
        try:
            _close(plan, run)
        except (TrainError, StoreError, OSError) as error:
            if not undone:
                note_error(own[-1], str(error))
                errors.said[own[-1].name] = str(error)
    if finished(run):
        for job in own:
            job.error_file.unlink(missing_ok=True)
        return []
    return undone or own[-1:]


def _close(plan: Plan, run: Run) -> None:
    """Write what the last job of a run's folds could not, if they are all there."""
    close(run.config, plan.store, run.out)
    if (run.out / "summary.json").exists():
        write_report(run.out)


def _compared(plan: Plan) -> Comparison | None:
    """The table of all runs that have results, written beside them.

    Raises
    ------
    RunError
        Results cannot be read, or the table cannot be written.
    """
    there = [run.out for run in plan.runs if (run.out / "summary.json").exists()]
    if not there:
        return None
    found = compare(there)
    links = {run.out: f"{run.name}/report.html" for run in plan.runs}
    try:
        run_directory.write_text(plan.out / MARKDOWN, to_markdown(found))
        run_directory.write_text(plan.out / PAGE, to_html(found, links))
    except OSError as error:
        message = f"{plan.out}: the comparison cannot be written ({error.strerror}); run the sweep again"
        raise RunError(message) from error
    return found
