"""The jobs of a sweep on the nodes of a Ray cluster: one task each, begun again where a worker or its node dies.

A task goes on from its own checkpoint, as a run does that was stopped. The lock of a run directory dies with the
process that held it. What comes back is a row per job; results lie on the storage that all nodes share.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cfstore
from cfstore import EngineError, RoomWatch, StoreError, check_code, code_version, is_url, ray_cluster
from cftrain.memory import Allowance
from cftrain.stopping import StopRequest, listening
from cftrain.sweep.engines import Listener, process_died, process_stopped
from cftrain.sweep.jobs import Job, Outcome, State, state
from cftrain.sweep.plan import Resources
from cftrain.sweep.work import Place, do, note_error

NEED: Final = "cftrain sweep --engine ray"
_POLL_SECONDS: Final = 1.0
_PATIENCE: Final = 300.0
"""Seconds for the locks of a process that is given up for dead to go: a file server may keep those of a machine that
lost power for 90."""
_LEAVE_SECONDS: Final = 300.0
"""For jobs that were asked to stop to write their checkpoints."""
_STOP_FILE: Final = ".stop"
"""In the sweep's directory, while its jobs are to stop."""
_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True)
class OnRay:
    """An engine of a sweep (`cftrain.sweep.engines.Engine`).

    Parameters
    ----------
    resources
        What Ray keeps for each job: CPUs (one where none are named), its part of a GPU, memory.
    address
        As `cfstore.ray_cluster` takes it.

    Raises
    ------
    EngineError
        See `cfstore.ray_cluster`; or a node has other code, does not see the sweep's directory or its store, or no
        node is left that a job fits on.
    """

    resources: Resources
    address: str | None = None

    def __call__(self, jobs: Sequence[Job], command: Sequence[str], listener: Listener, stop: StopRequest) -> None:
        """See `Engine`."""
        if not jobs:
            return
        with ray_cluster(self.address, need=NEED) as ray:
            _check_fits(ray, self.resources)
            asked = _asked(self.resources)
            task = ray.remote(**asked, max_retries=self.resources.retries, retry_exceptions=False)(_do)
            code, place = code_version(), _place(self.resources)
            uuid = cfstore.open(jobs[0].store).header.uuid  # one plan, one store
            stopping = jobs[0].run.out.parent / _STOP_FILE
            stopping.unlink(missing_ok=True)

            def begin(job: Job) -> Any:
                return task.remote(code, pickle.dumps((job, place, tuple(command), uuid)))

            with listening(lambda: stop.by if stop else None) as own:  # once more: Ray has put its handlers over ours
                try:
                    self._collect(ray, begin, jobs, listener, own)
                finally:
                    stop.by = own.by
                    stopping.unlink(missing_ok=True)

    def _collect(
        self, ray: Any, begin: Callable[[Job], Any], jobs: Sequence[Job], listener: Listener, stop: StopRequest
    ) -> None:
        room = RoomWatch(lambda: _check_fits(ray, self.resources))
        leaving, times = 0.0, dict.fromkeys((job.name for job in jobs), 0)
        pending: dict[Any, Job] = {}
        try:
            pending |= {begin(job): job for job in jobs}
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
                for each in ready:
                    job = pending.pop(each)
                    outcome = self._outcome(ray, each, job, stopping=bool(stop))
                    if outcome.state == "stopped" and not stop:  # somebody else sent a signal, as `ray stop` does
                        times[job.name] += 1
                        if times[job.name] <= self.resources.retries:
                            listener.note(f"{job.name}: it was asked to stop; it is begun again from its checkpoint")
                            pending[begin(job)] = job
                            continue
                        outcome = _failed(job, process_stopped(outcome.signal_number, times[job.name]))
                    listener.ended(job, outcome)
                listener.tick()
                room.look()
                if stop and not leaving:
                    leaving = time.monotonic() + _LEAVE_SECONDS
                    _stop(ray, pending, jobs[0].run.out.parent / _STOP_FILE)
                if leaving and time.monotonic() > leaving:
                    return
        finally:
            for each in pending:
                ray.cancel(each, force=True)

    def _outcome(self, ray: Any, reference: Any, job: Job, *, stopping: bool) -> Outcome:
        """What a task came to.

        Raises
        ------
        EngineError
            Its node is not fit for the work; no other job would fare better there.
        """
        try:
            found: Outcome = ray.get(reference)
        except ray.exceptions.TaskCancelledError:
            return Outcome(job.name, "stopped")
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineError):
                raise error.cause from error
            return Outcome(job.name, "stopped") if stopping else _failed(job, _first_line(error.cause or error))
        except ray.exceptions.RayError as error:
            if stopping:
                return Outcome(job.name, "stopped")
            return _failed(job, process_died(type(error).__name__, self.resources.retries + 1))
        return found


def _do(code: str, packed: bytes) -> Outcome:
    """Runs on a node. What is packed is unpacked only when the code that it names is known to be the same.

    Raises
    ------
    EngineError
        It has other code, or does not see the sweep's directory or its store.
    """
    check_code(code)
    job, place, command, uuid = pickle.loads(packed)  # noqa: S301 - of the process that gave out the jobs, by Ray
    _check_sees(job.run.out.parent)
    stopping = job.run.out.parent / _STOP_FILE
    if stopping.exists():
        return Outcome(job.name, "stopped")
    _check_store(job.store, uuid)
    with listening(_Told(stopping)):
        return do(job, place, command)


class _Told:
    """SIGTERM while a file is there; it is looked for once a second."""

    def __init__(self, file: Path) -> None:
        self._file, self._next, self._there = file, 0.0, False

    def __call__(self) -> signal.Signals | None:
        """What `listening` asks."""
        if time.monotonic() >= self._next:
            self._next, self._there = time.monotonic() + _LOOK_SECONDS, self._file.exists()
        return signal.SIGTERM if self._there else None


def _check_sees(out: Path) -> None:
    """The process that gave out the jobs holds a lock in the sweep's directory, so it is there."""
    if not (out / ".lock").exists():
        message = (
            f"node {os.uname().nodename} does not see the sweep's directory {out}; "
            "it must be on storage that all nodes share, under the same path on each"
        )
        raise EngineError(message)


def _check_store(store: Path | str, uuid: str) -> None:
    """A node without it would fail every job that it is given, faster than others do theirs, and so be given them all;
    one that has another in its place would train on that.
    """
    node = os.uname().nodename
    shared = "it must be on storage that all nodes share, under the same path on each"
    remedy = "see its AWS_* variables and network, where `ray start` ran" if is_url(store) else shared
    try:
        found = cfstore.open(store).header.uuid
    except StoreError as error:
        raise EngineError(f"node {node} does not see the store {store} ({error}); {remedy}") from error
    if found != uuid:
        raise EngineError(f"node {node} has another store at {store} ({found}, not {uuid}); {remedy}")


def _asked(resources: Resources) -> dict[str, float]:
    """What Ray keeps for a job."""
    memory = {} if resources.memory is None else {"memory": resources.memory}
    return {"num_cpus": resources.cpus or 1, "num_gpus": resources.gpus or 0, **memory}


def _place(resources: Resources) -> Place:
    """A job has the GPU that Ray gave it, or none."""
    device = "cuda" if resources.gpus else "cpu"
    return Place(device, resources.cpus or 1, Allowance(resources.memory, resources.gpus or 1.0), _PATIENCE)


def _check_fits(ray: Any, resources: Resources) -> None:
    """Ray would wait for a node that fits, for ever and in silence.

    Raises
    ------
    EngineError
        There is none.
    """
    needed = {"CPU": resources.cpus or 1, "GPU": resources.gpus or 0, "memory": resources.memory or 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in nodes):
        asked = ", ".join(f"{name} {amount:g}" for name, amount in needed.items() if amount)
        has = "; ".join(", ".join(f"{name} {node.get(name, 0):g}" for name in needed) for node in nodes)
        message = (
            f"{NEED}: no node of the Ray cluster has what a job takes ({asked}; the nodes have: {has}); "
            "ask for less in [resources] of the plan, or start a larger node"
        )
        raise EngineError(message)


def _stop(ray: Any, pending: dict[Any, Job], file: Path) -> None:
    """Stop the jobs that run by a file, and take back those that wait.

    Where `ray.cancel` meets a task that has just ended, Ray 2.60 ends the process that called it ("Tried to complete
    task that was not pending"): so it is only for jobs that have begun nothing, where the file could be written.
    """
    try:
        file.touch()
    except OSError:  # a disk that is full
        waiting = list(pending)
    else:
        waiting = [each for each, job in pending.items() if state(job) is State.MISSING]
    for each in reversed(waiting):  # the one that is next last: it may be begun at any moment
        ray.cancel(each)


def _failed(job: Job, text: str) -> Outcome:
    note_error(job, text)
    return Outcome(job.name, "failed", text)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
