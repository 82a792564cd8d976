"""Tasks on the machines of a Ray cluster: one Ray task each, retried where a worker or its machine dies.

A task is given out again only after its process is gone, or is given up for dead; so what it runs has to know its own
earlier work (`shard_job`, `derive_job`), and nothing is written twice. What a task raises itself is raised here, as it
is. Results are records of what was published, never arrays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import uuid4

from cfstore.errors import EngineError, StoreError
from cfstore.locks import PROBE_PREFIX, disk_errors, hold
from cfstore.processes import StoppedError, Tell
from cfstore.ray_connection import RoomWatch, check_code, code_version, node_name, ray_cluster
from cfstore.remote.bucket import Bucket
from cfstore.schema import STORE_FILE, parse_header, read_header

Task = TypeVar("Task")
Result = TypeVar("Result")

RETRIES: Final = 3
"""How often a task is given out again after its worker died."""
_PATIENCE_SECONDS: Final = 1800.0  # hundreds of tasks may finish at once, and a machine that died lets go late
_POLL_SECONDS: Final = 0.2
_STOP_SECONDS: Final = 60.0
_BEGIN_SECONDS: Final = 5.0  # for tasks that are being given out at this moment to be heard of
_ANSWER_SECONDS: Final = 10.0
_ASK_SECONDS: Final = 0.002
_GIB: Final = 1 << 30


@dataclass(frozen=True)
class View:
    """What every node has to see just as this machine does: the store, and (path, size, mtime_ns) of some files.

    `store` is its folder, or the address of its bucket. `probe` tells it from a copy: in a folder the name of a file
    that was made a moment ago; in a bucket, when store.json was put there.
    """

    store: Path | str
    uuid: str
    probe: str
    files: tuple[tuple[str, int, int], ...]


def _stat(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a path of another machine, as it was written there
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@contextmanager
def _shown(store: Path | str, files: Sequence[Path]) -> Iterator[View]:
    """A file in a folder that nobody can have seen before: a copy of the store will not do."""
    seen = tuple((str(path), *stat) for path in files if (stat := _stat(str(path))))
    if isinstance(store, str):
        yield View(store, *_header_in(store), seen)
        return
    probe = store / f"{PROBE_PREFIX}{uuid4().hex}"
    with disk_errors(store):
        try:
            probe.touch()
            with hold(probe):
                yield View(store, read_header(store).uuid, probe.name, seen)
        finally:
            probe.unlink(missing_ok=True)


def _header_in(url: str) -> tuple[str, str]:
    """The uuid of the store in a bucket, and when its header was put; raises StoreError."""
    bucket = Bucket(url)
    uuid, head = parse_header(bucket.get(STORE_FILE), url).uuid, bucket.head(STORE_FILE)
    return uuid, str(head and head.modified)


@cache
def check_view(view: View) -> None:
    """Called by every worker before its first task.

    Raises
    ------
    EngineError
        This node has another store at that place or none, or other files; the message names the node and the place.
    """
    node, store = node_name(), view.store
    remedy = _REACHED if isinstance(store, str) else f"it {_SHARED}"
    try:
        uuid, is_itself = _found(view)
    except StoreError as error:
        raise EngineError(f"node {node} does not see the store {store} ({error}); {remedy}") from error
    if uuid != view.uuid:
        raise EngineError(f"node {node} has another store at {store} ({uuid}, not {view.uuid}); {remedy}")
    if not is_itself:
        raise EngineError(f"node {node} has a copy of the store at {store}, not the store itself; {remedy}")
    for path, *expected in view.files:
        stat = _stat(path)
        if stat is None or [*stat] != expected:
            what = "other than here: another size or time" if stat else "nothing"
            raise EngineError(f"node {node} sees {what} at {path}; the folder {_SHARED}")


_SHARED: Final = "must be on storage that all nodes share, under the same path on each"
_REACHED: Final = (
    "it needs the same endpoint, and credentials: AWS_* in the environment in which its `ray start` ran, or its role"
)


def _found(view: View) -> tuple[str, bool]:
    """The uuid of what is in the store's place here, and whether it is no copy."""
    if isinstance(view.store, str):
        uuid, put = _header_in(view.store)
        return uuid, put == view.probe
    return read_header(view.store).uuid, (view.store / view.probe).exists()


def _attempt(code: str, view: View, packed: bytes, number: int, mailbox: Any) -> tuple[int, int, Any]:
    """Runs on a node: how often the task was given out before, its steps, and its result.

    `packed` is unpacked only when the code that it names is known to be the same.
    """
    from ray import cloudpickle
    from ray._private.worker import global_worker

    worker: Any = global_worker  # no public name tells which attempt this is

    check_code(code)
    check_view(view)
    function, task = cloudpickle.loads(packed)
    told = _Told(number, mailbox)
    result = function(task, told.step)
    return worker.core_worker.get_current_task_attempt_number(), told.steps, result


class _Told:
    """Tells the mailbox of a task's steps, and hears from it when to stop.

    Not from `ray.cancel`: where that meets a task that has just ended, Ray 2.60 ends the process that called it
    ("Tried to complete task that was not pending").

    Raises
    ------
    StoppedError
        By this and by `step`, never in the middle of one, as it publishes shards: nobody wants the result.
    """

    def __init__(self, number: int, mailbox: Any) -> None:
        import ray

        self.steps = 0
        self._ray, self._number, self._mailbox = ray, number, mailbox
        self._asked = self._tell()
        until = time.monotonic() + _ANSWER_SECONDS
        while not self._answered() and time.monotonic() < until:
            time.sleep(_ASK_SECONDS)  # `ray.get` would give this task's CPU to another meanwhile

    def step(self) -> None:
        self._answered()
        self.steps += 1
        sent = self._tell()
        self._asked = self._asked or sent

    def _tell(self) -> Any:
        return self._mailbox.put.remote(self._number, self.steps)

    def _answered(self) -> bool:
        if self._asked is None or not self._ray.wait([self._asked], timeout=0)[0]:
            return False
        asked, self._asked = self._asked, None
        with suppress(self._ray.exceptions.RayError):  # the mailbox begins anew, or is gone with who wanted the result
            if self._ray.get(asked):
                raise StoppedError
        return True


class _Mailbox:
    """Runs beside the process that gave out the work: how far the tasks are, and whether they shall stop."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._begun: set[int] = set()
        self._stopped = False

    def put(self, number: int, steps: int) -> bool:
        """What the task is told in return: to stop."""
        self._begun.add(number)
        self._steps[number] = steps
        return self._stopped

    def take(self) -> dict[int, int]:
        """Steps of tasks that told any since the last time."""
        taken, self._steps = self._steps, {}
        return taken

    def begun(self) -> set[int]:
        """The tasks that were heard of."""
        return self._begun

    def stop(self) -> None:
        self._stopped = True


@dataclass
class _Progress:
    """Steps by task. A task that is given out again begins anew: its steps count once it is further than before."""

    on_step: Tell
    most: dict[int, int] = field(default_factory=dict)

    def reached(self, steps: Mapping[int, int]) -> None:
        for number, count in steps.items():
            for _ in range(self.most.get(number, 0), count):
                self.on_step()
            self.most[number] = max(count, self.most.get(number, 0))


@dataclass
class RayEngine:
    """Runs tasks of a store on Ray; `n_slots` at once fill the cluster. Use `ray_engine`.

    `memory` are bytes that a task reserves: Ray puts no more tasks on a node than its memory has room for.
    `n_restarted` counts how often a task was given out again because its worker died.
    """

    ray: Any
    view: View
    memory: int
    n_slots: int
    room: RoomWatch
    n_restarted: int = 0
    patience: float = _PATIENCE_SECONDS

    def __call__(
        self, function: Callable[[Task, Tell], Result], tasks: Sequence[Task], jobs: int, on_step: Tell
    ) -> Iterator[Result]:
        """As `processes.side_by_side`, on the nodes of the cluster.

        Raises
        ------
        EngineError
            A node is not fit for the work, workers died too often, or no node is left; and whatever `function` raises.
        """
        ray, code = self.ray, code_version()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        mailbox = ray.remote(_Mailbox).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        remote = ray.remote(_attempt).options(
            num_cpus=1, memory=self.memory, max_retries=RETRIES, scheduling_strategy="SPREAD", name=function.__name__
        )
        progress, todo, pending = _Progress(on_step), iter(enumerate(tasks)), {}  # type: _Progress, Any, dict[Any, int]

        def give_out() -> None:
            for number, task in todo:
                packed = ray.cloudpickle.dumps((function, task))
                pending[remote.remote(code, self.view, packed, number, mailbox)] = number
                if len(pending) >= max(1, jobs):
                    return

        try:
            give_out()
            while pending:
                done, _ = ray.wait(list(pending), timeout=_POLL_SECONDS)
                self.room.look()
                with suppress(ray.exceptions.RayError):  # a step more or less: it is told again with the result
                    progress.reached(ray.get(mailbox.take.remote(), timeout=_STOP_SECONDS))
                for ref in done:
                    n_before, steps, result = self._result(ref)
                    self.n_restarted += n_before
                    progress.reached({pending.pop(ref): steps})
                    give_out()
                    yield result
        finally:
            self._stop(mailbox, pending)
            ray.kill(mailbox)

    def _result(self, ref: Any) -> tuple[int, int, Any]:
        errors = self.ray.exceptions
        try:
            answer: tuple[int, int, Any] = self.ray.get(ref)
        except errors.RayTaskError as error:
            if "failed to import on the worker" in str(error.cause):
                last = str(error.cause).strip().splitlines()[-1]
                message = (
                    f"a node has no crossfusion-store, or another version ({last}); install {code_version()} on it"
                )
                raise EngineError(message) from error
            raise error.cause from error
        except errors.RayError as error:
            first = str(error).strip().splitlines()[0][:300]
            message = (
                f"a task was given up after its worker died {RETRIES + 1} times ({type(error).__name__}: {first}); "
                "what was finished stays: run this again, with fewer --jobs or on nodes with more memory"
            )
            raise EngineError(message) from error
        return answer

    def _stop(self, mailbox: Any, pending: Mapping[Any, int]) -> None:
        """End what runs, so that it cleans up after itself; it is killed where it does not."""
        if not pending:
            return
        ray, left = self.ray, list(pending)
        with suppress(ray.exceptions.RayError):
            ray.get(mailbox.stop.remote(), timeout=_STOP_SECONDS)
            _, left = ray.wait(left, num_returns=len(left), timeout=_BEGIN_SECONDS)
            begun = ray.get(mailbox.begun.remote(), timeout=_STOP_SECONDS)
            for ref in left:
                if pending[ref] not in begun:  # it waits for a node, perhaps for ever
                    ray.cancel(ref)
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=_STOP_SECONDS)
        for ref in left:
            ray.cancel(ref, force=True)


def _n_slots(ray: Any, memory: int, need: str) -> int:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = sum(int(min(node.get("CPU", 0), node.get("memory", 0) // memory)) for node in nodes)
    if not slots:
        has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('memory', 0) / _GIB:.1f} GiB" for node in nodes)
        message = (
            f"{need}: no node of the Ray cluster has a CPU and {memory / _GIB:.1f} GiB for a task (it has: {has}); "
            "start a larger one, or Ray with --memory and --num-cpus"
        )
        raise EngineError(message)
    return slots


@contextmanager
def ray_engine(
    store: Path | str, address: str | None, *, files: Sequence[Path], memory: int, need: str
) -> Iterator[RayEngine]:
    """An engine on the Ray cluster at `address`, or on this machine alone.

    Parameters
    ----------
    store
        The store, as an absolute path: every node has to see it there. Or the address of its bucket, which every node
        has to reach.
    files
        A few files that tasks read, which every node has to see as well.
    memory
        Bytes that a task reserves.
    need
        As for `ray_cluster`.

    Raises
    ------
    EngineError
        No Ray, no cluster, or none of its nodes has room for a task.
    """
    with ray_cluster(address, need=need) as ray, _shown(store, files) as view:
        room = RoomWatch(lambda: _n_slots(ray, memory, need))
        yield RayEngine(ray, view, memory, _n_slots(ray, memory, need), room)
