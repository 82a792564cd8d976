"""One job of a sweep, done in this process: the same whether it runs here, in a process beside others or on a node."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypedDict

import torch

from cfstore import StoreError
from cftrain import run_directory
from cftrain.apart import train_fold
from cftrain.config import RunConfig
from cftrain.data import load_data
from cftrain.errors import RunBusyError, StoppedError, TrainError
from cftrain.experiment import Watcher, train_runs
from cftrain.extras import derivation_of, derive_missing
from cftrain.memory import EVERYTHING, Allowance
from cftrain.report import write_report
from cftrain.stopping import asked
from cftrain.sweep.jobs import Job, Outcome, c_index

_POLL_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Place:
    """Where a job runs.

    Parameters
    ----------
    device
        As `train_runs` takes it.
    threads
        Of the CPU; None: as many as the process has.
    allowance
        What it may take of the machine's memory.
    patience
        Seconds to wait for another process to leave its run directory: on a cluster a job may be begun again a little
        before the node it ran on is gone.
    """

    device: str = "auto"
    threads: int | None = None
    allowance: Allowance = EVERYTHING
    patience: float = 0.0


class _How(TypedDict):
    """What `train_runs` and `train_fold` take alike."""

    device: str
    command: Sequence[str]
    watch: Watcher
    allowance: Allowance


def do(job: Job, place: Place, command: Sequence[str] = (), tick: Callable[[], None] = lambda: None) -> Outcome:
    """Do a job, or what is left of it. Whatever it fails of is written to its error file and told, not raised.

    Parameters
    ----------
    command
        Kept in provenance.json.
    tick
        Called now and then, at least about twice a second while a model trains.
    """
    started = time.monotonic()
    job.error_file.unlink(missing_ok=True)
    try:
        with _threads(place.threads):
            _patiently(job, place, command, _telling(tick))
    except StoppedError as error:
        seconds = time.monotonic() - started
        return Outcome(job.name, "stopped", seconds=seconds, signal_number=error.signal_number)
    except Exception as error:  # of whatever kind: the other jobs go on
        text = _one_line(error)
        known = isinstance(error, (TrainError, StoreError))
        note_error(job, text, "" if known else traceback.format_exc())
        return Outcome(job.name, "failed", text, time.monotonic() - started)
    return Outcome(job.name, "done", "", time.monotonic() - started, c_index(job.run))


def note_error(job: Job, text: str, details: str = "") -> None:
    """Write why a job failed to where its state is read; a disk that is full takes no word, the outcome says it too."""
    with contextlib.suppress(OSError):
        job.error_file.parent.mkdir(parents=True, exist_ok=True)
        run_directory.write_text(job.error_file, f"{text}\n{details}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (TrainError, StoreError)) and text else f"{type(error).__name__}: {text}"


def _patiently(job: Job, place: Place, command: Sequence[str], watch: Watcher) -> None:
    deadline = time.monotonic() + place.patience
    while True:
        try:
            _train(job, place, command, watch)
        except RunBusyError:
            if time.monotonic() > deadline:
                raise
            if number := asked():
                raise StoppedError(f"stopped by {number.name}", int(number)) from None
            time.sleep(_POLL_SECONDS)
        else:
            return


def _train(job: Job, place: Place, command: Sequence[str], watch: Watcher) -> None:
    run = job.run
    if not (run.out / "summary.json").exists():
        config = run_directory.settled(run.out, run.config)
        _derive(job, config, watch)
        how = _How(device=place.device, command=command, watch=watch, allowance=place.allowance)
        if job.fold is None:
            train_runs([config], job.store, [run.out], resume=True, **how)
        else:
            train_fold(config, job.store, run.out, job.fold, **how)
    if (run.out / "summary.json").exists() and not (run.out / "report.html").exists():
        write_report(run.out)


def _derive(job: Job, config: RunConfig, watch: Watcher) -> None:
    """Let one job of a cohort's features derive what is missing while the others wait, not each for itself."""
    extras = config.extras() + config.fit_extras()
    if config.data.shards or not any(derivation_of(extra) for extra in extras):
        return
    name = config.model.name
    with run_directory.waiting(job.run.out.parent, f"derive-{job.run.cohort}-{job.run.encoder}".replace("/", "_")):
        data = load_data(job.store, config.data, {name: config.scales()}, config.order_seed, {name: extras})
        slide_ids = [slide.slide_id for slide in data.cohort.slides]

        def told(done: int, total: int) -> None:
            watch.on_derive(done, total)
            if number := asked():  # it may take hours, and keeps what it has
                raise StoppedError(f"stopped by {number.name}", int(number))

        derive_missing(data.store, data.cohort.encoder, extras, slide_ids, told)


def _telling(tick: Callable[[], None]) -> Watcher:
    """Whatever is told while runs go on, as one thing."""

    def told(*given: object) -> None:
        tick()

    return Watcher(told, told, told, told, told, told, told)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads; and no GPU memory is kept after it."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.cuda.empty_cache()  # the next job, here or in another process, counts what is free
