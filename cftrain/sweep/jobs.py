"""The jobs of a sweep and how far each is, as its files tell. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cftrain.run_directory import begun, fold_directory, fold_finished
from cftrain.sweep.plan import Run

FAILED: Final = "failed"
"""Folder of a sweep: a file per job that failed, its first line the error."""


class State(StrEnum):
    """How far a job is."""

    MISSING = "missing"
    BEGUN = "begun"
    FAILED = "failed"
    DONE = "done"


@dataclass(frozen=True)
class Job:
    """What one process does at a time: a run, or one fold of it where folds are trained apart."""

    run: Run
    store: Path | str
    fold: int | None = None

    @property
    def name(self) -> str:
        """E.g. BLCA-uni-abmil-s7, or with its fold BLCA-uni-abmil-s7-fold_2."""
        return self.run.name if self.fold is None else f"{self.run.name}-fold_{self.fold}"

    @property
    def error_file(self) -> Path:
        """Where its error is written, if it fails."""
        return self.run.out.parent / FAILED / f"{self.name}.txt"


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a row that travels between machines.

    Parameters
    ----------
    state
        "done", "failed" or "stopped" (it wrote its checkpoints because it was asked to leave).
    error
        Of a job that failed, in one line.
    seconds
        That it took this time.
    c_index
        Per patient, mean over folds, once its run has results.
    signal_number
        Of the signal that stopped it.
    """

    name: str
    state: str
    error: str = ""
    seconds: float = 0.0
    c_index: float | None = None
    signal_number: int = 0


def runs_of(jobs: Iterable[Job]) -> list[Run]:
    """The runs of jobs, each once."""
    return list({job.run.name: job.run for job in jobs}.values())


def finished(run: Run) -> bool:
    """Whether a run has its results and its page."""
    return (run.out / "summary.json").exists() and (run.out / "report.html").exists()


def state(job: Job) -> State:
    """How far a job is."""
    if finished(job.run):
        return State.DONE
    if job.error_file.exists():  # of a fold that is finished: the run could not be put together
        return State.FAILED
    nested = job.run.config.has_inner
    if job.fold is not None and fold_finished(job.run.out, job.fold, nested=nested):
        return State.DONE
    own = begun(job.run.out) if job.fold is None else fold_directory(job.run.out, job.fold).exists()
    return State.BEGUN if own else State.MISSING


def error_of(job: Job) -> str:
    """The first line of the file that a failed job left; empty where there is none."""
    try:
        return job.error_file.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return ""


def c_index(run: Run) -> float | None:
    """The C-index per patient after the last epoch, mean over folds; None while there is none."""
    summary: Any = None
    try:
        summary = json.loads((run.out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = summary.get("c_index_patient", {}).get("mean") if isinstance(summary, dict) else None
    return None if value is None else float(value)


def share_done(run: Run, n_folds: int = 0) -> float:
    """The part of a run's epochs that were measured, of all its folds; 0 before the first.

    Parameters
    ----------
    n_folds
        0: as many as have begun, where all begin at once, and else as many as the settings say; splits of the store may
        have others.
    """
    if (run.out / "summary.json").exists():
        return 1.0
    logs = list(run.out.glob("fold_*/metrics.jsonl"))
    data = run.config.data
    at_once = logs and data.order != "independent"
    n_folds = n_folds or (len(logs) if at_once else max(len(logs), data.folds))
    return min(1.0, sum(map(_lines, logs)) / (run.config.train.epochs * n_folds))


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
