"""What a person sees while a sweep goes on, on stderr: a table that is drawn anew, or in a pipe a line per job."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import click

from cftrain.cli.columns import padded
from cftrain.cli.progress import bar, duration, number, terminal_size
from cftrain.sweep.jobs import Job, Outcome, State, c_index, finished, runs_of, share_done, state
from cftrain.sweep.plan import Run

_DRAWN_EVERY: Final = 1.0
_SILENCE_SECONDS: Final = 60.0
_WAITING: Final = "."


class SweepProgress:
    """Hears of a sweep's jobs (`cftrain.sweep.engines.Listener`), and shows where its runs are.

    The share of a run that is done is read from its directory: whoever trains it, on this machine or another, writes
    there. A cell is the C-index per patient of a finished run, how far another is, or what became of it.

    Parameters
    ----------
    live
        Whether stderr is a terminal.
    """

    def __init__(self, *, live: bool | None = None) -> None:
        self._live = sys.stderr.isatty() if live is None else live
        self._jobs: Sequence[Job] = ()
        self._n_folds: Counter[str] = Counter()
        self._open: dict[str, Job] = {}
        self._cells: dict[str, str] = {}
        self._drawn = 0
        self._n_failed = 0
        self._started = self._said = time.monotonic()
        self._last_draw = 0.0
        self._first_share = 0.0

    # -- what the sweep tells ----------------------------------------------------------------------

    def jobs(self, jobs: Sequence[Job]) -> None:
        """All jobs of the sweep, before the first is begun."""
        self._jobs = jobs
        self._n_folds = Counter(job.run.name for job in jobs if job.fold is not None)
        self._open = {job.name: job for job in jobs if state(job) is not State.DONE}
        self._first_share = self._share()
        runs = runs_of(jobs)
        what = f"{len(jobs)} folds of " if any(job.fold is not None for job in jobs) else ""
        self._say(f"{what}{len(runs)} runs; {len(jobs) - len(self._open)} done before, {len(self._open)} to do")
        self._draw()

    def began(self, job: Job) -> None:
        """A job was begun."""
        self._draw()

    def note(self, text: str) -> None:
        """Something that a person should know."""
        self._say(text)
        self._draw()

    def tick(self) -> None:
        """Time has passed."""
        now = time.monotonic()
        if self._live and now - self._last_draw > _DRAWN_EVERY:
            self._draw()
        elif not self._live and now - self._said > _SILENCE_SECONDS:
            self._say(self._total())

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job came to its end."""
        if outcome.state != "stopped":
            self._open.pop(job.name, None)
        self._n_failed += outcome.state == "failed"
        text = f"{outcome.state:<7} {job.name}"
        if outcome.state == "done":
            text += f"  {duration(outcome.seconds)}"
            text += "" if outcome.c_index is None else f", C-index {number(outcome.c_index)} per patient"
        if outcome.error:
            text += f": {outcome.error}"
        n_done = len(self._jobs) - len(self._open) - self._n_failed
        if not self._live:
            self._say(f"{text}  ({n_done} of {len(self._jobs)})")
        elif outcome.state == "failed":
            self._say(text)
        self._draw()

    def end(self) -> None:
        """Nothing more comes: the table stays as it is now."""
        if self._live and self._jobs:
            self._draw()
        self._drawn = 0

    # -- what the person sees ----------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._clear()
        click.echo(text, err=True)

    def _clear(self) -> None:
        if self._drawn:
            click.echo(f"\033[{self._drawn}A\033[J", err=True, nl=False)
            self._drawn = 0

    def _draw(self) -> None:
        if not self._live:
            return
        self._last_draw = time.monotonic()
        width, height = terminal_size()
        lines = [line[: width - 1] for line in [*self.table(height - 4), self._total()]]
        self._clear()
        click.echo("\n".join(lines), err=True)
        self._drawn = len(lines)

    def table(self, most: int = 1 << 30) -> list[str]:
        """Models of cohorts down, seeds across; at most `most` lines, those that are not finished first."""
        rows: dict[tuple[str, ...], dict[int, Run]] = {}
        for run in runs_of(self._jobs):
            rows.setdefault((run.cohort, run.encoder, run.model), {})[run.seed] = run
        seeds = list(dict.fromkeys(job.run.seed for job in self._jobs))
        shown = list(rows)
        if len(rows) + 1 > most:
            unfinished = [key for key in rows if not all(finished(run) for run in rows[key].values())]
            shown = [*unfinished, *(key for key in rows if key not in unfinished)][: max(most - 2, 1)]
        cells = [["  ".join(filter(None, key)), *(self._cell(rows[key].get(seed)) for seed in seeds)] for key in shown]
        lines = padded([["", *(f"seed {seed}" for seed in seeds)], *cells])
        return [*lines, f"... and {len(rows) - len(shown)} more rows"] if len(shown) < len(rows) else lines

    def _cell(self, run: Run | None) -> str:
        if run is None:
            return ""
        if run.name in self._cells:
            return self._cells[run.name]
        if finished(run):
            return self._cells.setdefault(run.name, number(c_index(run)))
        own = [job for job in self._jobs if job.run.name == run.name]
        if any(state(job) is State.FAILED for job in own):
            return "failed"
        return (
            f"{100 * share_done(run, self._n_folds[run.name]):.0f} %"
            if any(state(job) is not State.MISSING for job in own)
            else _WAITING
        )

    def _share(self) -> float:
        """The part of all epochs that were measured."""
        runs = runs_of(self._jobs)
        left = {job.run.name for job in self._open.values()}
        shares = (share_done(run, self._n_folds[run.name]) if run.name in left else 1.0 for run in runs)
        return sum(shares) / max(len(runs), 1)

    def _total(self) -> str:
        share, elapsed = self._share(), time.monotonic() - self._started
        gone = share - self._first_share
        left = f"about {duration(elapsed * (1 - share) / gone)} left" if gone > 0.002 and share < 1 else ""
        n_done = len(self._jobs) - len(self._open) - self._n_failed
        what = "folds" if any(job.fold is not None for job in self._jobs) else "runs"
        failed = f"{self._n_failed} failed" if self._n_failed else ""
        parts = [f"{n_done} of {len(self._jobs)} {what}", failed, duration(elapsed), left]
        return f"{bar(share)}  {', '.join(part for part in parts if part)}"


def plan_rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The jobs for machines: what each is, and how far."""
    return [
        {
            "name": job.name,
            "cohort": job.run.cohort,
            "encoder": job.run.encoder or None,
            "model": job.run.model,
            "seed": job.run.seed,
            "fold": job.fold,
            "directory": str(job.run.out),
            "state": str(state(job)),
            "c_index_patient": c_index(job.run),
        }
        for job in jobs
    ]
