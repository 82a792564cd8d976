"""What a person sees while runs go on, on stderr: a live block on a terminal, else plain lines."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

_MOST_LINES = 12
_BAR = 24
_SILENCE_SECONDS = 60


class Progress:
    """Told by the trainer, tells the person.

    Parameters
    ----------
    labels
        One per run, e.g. "seed 8"; empty where there is one run.
    epochs
        How many each run trains for.
    live
        Whether stderr is a terminal.
    n_inner
        How many of the runs have an inner learner beside every fold.
    """

    def __init__(
        self, labels: Sequence[str], epochs: Sequence[int], *, live: bool | None = None, n_inner: int = 0
    ) -> None:
        self._labels, self._epochs, self._n_inner = labels, epochs, n_inner
        self._live = sys.stderr.isatty() if live is None else live
        self._drawn = 0
        self._lines: dict[tuple[int, int], str] = {}
        self._inner_lines: dict[tuple[int, int], str] = {}
        self._beats: dict[tuple[str, ...], Any] = {}
        self._places: dict[str, float] = {}  # passes behind each learner: those of a group part and meet again
        self._n_learners = 0
        self._started = self._said = time.monotonic()
        self._first_share = math.nan

    # -- what the trainer tells --------------------------------------------------------------------

    def data(self, data: Any, n_parameters: Sequence[int]) -> None:
        """The cohort is known."""
        cohort = data.cohort
        scales = ", ".join(f"{scale}x" for scale in cohort.scales)
        events = sum({slide.patient_id: slide.event for slide in cohort.slides}.values())
        parameters = " / ".join(f"{number:,}" for number in dict.fromkeys(n_parameters))
        self._n_learners = (len(n_parameters) + self._n_inner) * len(data.folds)
        self._say(
            f"cohort {cohort.name}, encoder {cohort.encoder} (D={cohort.dim}), {scales}: "
            f"{len(cohort.slides)} slides of {cohort.n_patients} patients, {events} events; "
            f"splits {data.splits.name}, {len(data.folds)} folds; {parameters} parameters"
        )
        for line in excluded_lines(data.excluded):
            self._say(line)

    def cache(self, plan: Any) -> None:
        """Where bags are kept is known."""
        self._say(plan.why)

    def derive(self, done: int, total: int) -> None:
        """Graphs and parents are derived, once and for all."""
        text = f"deriving graphs, parents or means that the store lacks: {done} of {total} slides"
        if self._live and done < total:
            self._clear()
            click.echo(text, err=True)
            self._drawn = 1
        elif done in (0, total) or time.monotonic() - self._said > _SILENCE_SECONDS:
            self._say(text)

    def epoch(self, run: int, fold: int, epoch: Any) -> None:
        """An epoch of a fold was measured."""
        text = self._lines[run, fold] = self._measured(self._name(run, fold), run, epoch)
        if self._live:
            self._draw()
        elif epoch.epoch in (1, self._epochs[run]) or epoch.epoch % 5 == 0:
            self._say(text)

    def inner_epoch(self, run: int, fold: int, epoch: Any) -> None:
        """An epoch of a fold's inner learner was measured; a pipe hears of its end alone."""
        self._inner_lines[run, fold] = self._measured(f"{self._name(run, fold)} inner", run, epoch)
        if self._live:
            self._draw()

    def _measured(self, name: str, run: int, epoch: Any) -> str:
        """An epoch as a line; steps that were left out of it are said at once."""
        for why in epoch.skipped:
            self._say(f"{name}  epoch {epoch.epoch}: step left out: {why}")
        return (
            f"{name}  epoch {epoch.epoch}/{self._epochs[run]}  loss {number(epoch.train_loss)}  "
            f"val loss {number(epoch.val_loss)}  val C-index {number(epoch.c_index_patient)} per patient"
        )

    def beat(self, beat: Any) -> None:
        """A group of folds has come further."""
        self._beats[beat.learners] = beat
        self._places.update(dict.fromkeys(beat.learners, beat.number + beat.share))
        if self._live:
            self._draw()
        elif time.monotonic() - self._said > _SILENCE_SECONDS:
            self._say(self._total())

    def fold(self, run: int, result: Any) -> None:
        """A fold, or its inner learner, is finished."""
        inner, place = result.examples.inner, result.examples.number
        (self._inner_lines if inner else self._lines).pop((run, place), None)
        work = result.work
        seconds = work.wait_seconds + work.compute_seconds
        share = 100 * work.wait_seconds / max(seconds, 1e-9)
        self._say(
            f"{self._name(run, place)}{' inner' * inner}  done in {seconds:.0f} s ({share:.0f} % waiting for data): "
            f"C-index {number(result.last_epoch.c_index_patient)} per patient{', held out of training' * inner}"
        )

    def end(self) -> None:
        """Nothing more comes."""
        self._clear()

    # -- what the person sees --------------------------------------------------------------------

    def _name(self, run: int, fold: int) -> str:
        return f"{self._labels[run]}  fold {fold}" if self._labels else f"fold {fold}"

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._clear()
        click.echo(text, err=True)

    def _clear(self) -> None:
        if self._drawn:
            click.echo(f"\033[{self._drawn}A\033[J", err=True, nl=False)
            self._drawn = 0

    def _draw(self) -> None:
        learners = [*self._lines.values(), *self._inner_lines.values()]
        lines = [*learners[:_MOST_LINES], self._total()]
        if len(learners) > _MOST_LINES:
            lines.insert(-1, f"... and {len(learners) - _MOST_LINES} more folds")
        width = terminal_size().columns - 1
        self._clear()
        click.echo("\n".join(line[:width] for line in lines), err=True)
        self._drawn = len(lines)

    def _total(self) -> str:
        """How far all learners are, how fast, and how long it will take."""
        passes = max(self._epochs) + 1
        share = min(1.0, sum(self._places.values()) / passes / max(self._n_learners, 1))
        if math.isnan(self._first_share):
            self._first_share = share
        elapsed, gone = time.monotonic() - self._started, share - self._first_share
        left = f"about {duration(elapsed * (1 - share) / gone)} left" if gone > 0.002 else "..."
        slides = sum(beat.work.n_slides for beat in self._beats.values())
        waited = sum(beat.work.wait_seconds for beat in self._beats.values())
        busy = waited + sum(beat.work.compute_seconds for beat in self._beats.values())
        rate = f"{slides / busy * len(self._beats):,.0f} slides/s, " if busy else ""
        waiting = f"{100 * waited / busy:.0f} % waiting for data, " if busy else ""
        return f"{bar(share)}  {rate}{waiting}{left}"


def excluded_lines(excluded: Any) -> list[str]:
    """Slides left out of a run, by reason, a few of them named."""
    return [
        f"{len(ids)} slides left out: {reason} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
        for reason, ids in excluded.items()
    ]


def number(value: float | None) -> str:
    """Three decimals, or n/a."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.3f}"


def bar(share: float) -> str:
    """A share as a bar and in per cent."""
    filled = round(_BAR * share)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {100 * share:3.0f} %"


def terminal_size() -> os.terminal_size:
    """Of the terminal on stderr, which is drawn on: stdout may go into a file."""
    with suppress(OSError, ValueError):  # a stderr that is no file
        found = os.get_terminal_size(sys.stderr.fileno())
        if all(found):
            return found
    return shutil.get_terminal_size()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
