"""What does the jobs of a sweep on one machine: this process, one job after the other, or processes side by side.

On a cluster `cftrain.ray_jobs` does them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Final, Protocol

import torch

from cfstore import end_with_parent
from cftrain.errors import ConfigError
from cftrain.memory import Allowance, free_ram
from cftrain.stopping import StopRequest
from cftrain.sweep.jobs import Job, Outcome
from cftrain.sweep.plan import Resources
from cftrain.sweep.work import Place, do, note_error

_POLL_SECONDS: Final = 0.5


class Listener(Protocol):
    """Whoever wants to hear what becomes of jobs."""

    def began(self, job: Job) -> None:
        """A job was begun, as far as the engine knows."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def tick(self) -> None:
        """Time has passed, half a second or so."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job came to its end."""


class Engine(Protocol):
    """Does jobs until there are none, or `stop` says so; stopped jobs have written their checkpoints."""

    def __call__(self, jobs: Sequence[Job], command: Sequence[str], listener: Listener, stop: StopRequest) -> None: ...


def process_died(exit_code: str, times: int) -> str:
    """The error of a job whose process never came to an end of its own."""
    return f"its process died {times} time(s), last with {exit_code} (killed, or out of memory); run the sweep again"


def process_stopped(number: int, times: int) -> str:
    """The error of a job that was asked to stop, and not by the sweep."""
    what = signal.Signals(number).name if number else "a signal"
    return f"was stopped by {what} {times} time(s), which the sweep had not sent; run the sweep again"


@dataclass(frozen=True)
class InTurn:
    """One job after the other, in this process."""

    resources: Resources

    def __call__(self, jobs: Sequence[Job], command: Sequence[str], listener: Listener, stop: StopRequest) -> None:
        """See `Engine`."""
        own = self.resources
        place = Place(own.device, own.cpus, Allowance(own.memory, own.gpus or 1.0))
        for job in jobs:
            if stop:
                return
            listener.began(job)
            outcome = do(job, place, command, listener.tick)
            listener.ended(job, outcome)
            if outcome.state == "stopped":
                stop.by = stop.by or signal.Signals(outcome.signal_number)
                return


@dataclass
class _Worker:
    """A process, and the job that it is at, if any."""

    process: Any
    line: Connection
    job: Job | None = None
    attempt: int = 1

    def take(self, job: Job, attempt: int) -> None:
        """Begin a job; where the process is gone already, `answer` says so."""
        self.job, self.attempt = job, attempt
        with suppress(OSError):
            self.line.send(job)

    def answer(self) -> Outcome | None:
        """What became of its job; None if the process died of it."""
        try:
            found: Outcome = self.line.recv()
        except (EOFError, OSError):
            return None
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send it, if somebody is there."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def end(self) -> None:
        """Let it leave, or make it, if it has a job still."""
        self.line.close()
        if self.job is not None:
            self.signal(signal.SIGKILL)
        self.process.join()


@dataclass(frozen=True)
class SideBySide:
    """So many jobs at once, in processes that each do one after the other; one that dies takes no other with it."""

    resources: Resources
    n_processes: int

    def __call__(self, jobs: Sequence[Job], command: Sequence[str], listener: Listener, stop: StopRequest) -> None:
        """See `Engine`."""
        todo = [(job, 1) for job in jobs]
        memory = self.resources.memory or free_ram() // self.n_processes
        slots: list[_Worker | None] = [None] * min(self.n_processes, len(jobs))
        asked = False
        try:
            while True:
                for slot, worker in enumerate(slots):
                    if todo and not stop and (worker is None or worker.job is None):
                        slots[slot] = worker = worker or self._start(slot, memory, command)
                        listener.began(todo[0][0])
                        worker.take(*todo.pop(0))
                busy = {slot: worker for slot, worker in enumerate(slots) if worker is not None and worker.job}
                if not busy:
                    return
                ready = wait([worker.line for worker in busy.values()], _POLL_SECONDS)
                listener.tick()
                for slot, worker in busy.items():
                    if worker.line in ready:
                        again = self._ended(worker, listener, stop)
                        slots[slot] = None if worker.job else worker
                        todo = again + todo
                if stop and not asked:
                    asked = True
                    for worker in busy.values():
                        worker.signal(signal.SIGTERM)
        finally:
            for each in slots:
                if each is not None:
                    each.end()

    def _ended(self, worker: _Worker, listener: Listener, stop: StopRequest) -> list[tuple[Job, int]]:
        """Tell what became of a job; returns it with its next attempt where its process died, or was asked to stop by
        somebody else, and it may try again.
        """
        job, outcome = worker.job, worker.answer()
        assert job is not None  # noqa: S101 - it is busy
        if outcome is None:
            worker.process.join()
            worker.line.close()
            what = "its process died"
            text = process_died(f"exit code {worker.process.exitcode}", worker.attempt)
        else:
            worker.job = None
            what, text = "it was asked to stop", process_stopped(outcome.signal_number, worker.attempt)
        if stop or (outcome and outcome.state != "stopped"):
            listener.ended(job, outcome or Outcome(job.name, "stopped"))
            return []
        if worker.attempt <= self.resources.retries:
            listener.note(f"{job.name}: {what}; it is begun again from its checkpoint")
            return [(job, worker.attempt + 1)]
        note_error(job, text)
        listener.ended(job, Outcome(job.name, "failed", text))
        return []

    def _start(self, slot: int, memory: int, command: Sequence[str]) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        given = (theirs, self._place(slot, memory), tuple(command))
        process = context.Process(target=_work, args=given, name=f"sweep-{slot}")
        # Ctrl-C reaches us, who send SIGTERM. It stays blocked in all threads of the process: a second would kill it
        resource_tracker.ensure_running()  # which unblocks it, once
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _for_children("OMP_NUM_THREADS", str(self._threads)):
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the line ends with the process
        return _Worker(process, ours)

    @property
    def _threads(self) -> int:
        return self.resources.cpus or max(1, torch.get_num_threads() // self.n_processes)

    def _place(self, slot: int, memory: int) -> Place:
        own = self.resources
        gpus = own.gpus if own.gpus is not None else 1 / self.n_processes
        return Place(_device(own, slot), self._threads, Allowance(memory, gpus or 1.0))


@contextmanager
def _for_children(name: str, value: str) -> Iterator[None]:
    """A variable of the environment that processes started meanwhile see: OpenMP reads it when it is loaded."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _per_gpu(resources: Resources) -> int:
    """Jobs that share a GPU."""
    return max(1, int(1 / resources.gpus)) if resources.gpus else 1


def _device(resources: Resources, slot: int) -> str:
    """The GPU of a slot, where there are several."""
    n_gpus = torch.cuda.device_count() if resources.device != "cpu" else 0
    return resources.device if n_gpus < 2 else f"cuda:{slot // _per_gpu(resources) % n_gpus}"


def check_jobs(resources: Resources, n_processes: int) -> None:
    """Refuse more processes than the machine's GPUs have parts for.

    Raises
    ------
    ConfigError
        Names both numbers.
    """
    n_gpus = torch.cuda.device_count()
    room = n_gpus * _per_gpu(resources)
    if resources.gpus and n_gpus and n_processes > room:
        message = (
            f"--jobs {n_processes}: {n_gpus} GPU(s) have room for {room} jobs of {resources.gpus:g}; "
            "ask for fewer, or make [resources] gpus smaller"
        )
        raise ConfigError(message)


def _work(line: Connection, place: Place, command: Sequence[str]) -> None:
    """The life of a process of `SideBySide`."""
    end_with_parent()  # somebody may have begun the sweep of an orphan again
    with suppress(EOFError):
        while True:
            line.send(do(line.recv(), place, command))
