"""A discrete-event model of workers that take tasks off a list, share resources and wait for locks.

A task is a row of steps, each of some work on one resource. A `Shared` resource serves all who use it at once: each
gets the same part of its capacity, at most `each` (bandwidth of the storage; cores; a GPU). A `Lock` serves one at a
time, in the order of arrival (the commit). Between two events all rates stand still, so the model is exact.

Every user of a shared resource is served at the same rate, so its clock is the work that each has got so far: a
user who comes with work w leaves when the clock has gone on by w. Time is O(events x log workers).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, Protocol


class Step(NamedTuple):
    """`work` (bytes, core-seconds, seconds) on a resource."""

    resource: str
    work: float


Task = tuple[Step, ...]


class Resource(Protocol):
    """What serves workers; times are of the schedule, in seconds."""

    def take(self, now: float, worker: int, work: float) -> None:
        """A worker begins."""

    def next(self) -> float:
        """When the next worker is done; infinite where there is none."""

    def give(self, now: float) -> int:
        """That worker, who leaves."""


@dataclass
class Shared:
    """Serves all at once: each at the rate min(each, capacity / users)."""

    capacity: float = math.inf
    each: float = math.inf
    served: float = 0.0
    """Work done, of all users."""
    _clock: float = 0.0
    _now: float = 0.0
    _users: list[tuple[float, int, int]] = field(default_factory=list)
    _order: Iterable[int] = field(default_factory=count)

    def _rate(self) -> float:
        return min(self.each, self.capacity / len(self._users))

    def _go_on(self, now: float) -> None:
        if self._users and now > self._now:
            self._clock += self._rate() * (now - self._now)
        self._now = now

    def take(self, now: float, worker: int, work: float) -> None:
        self._go_on(now)
        self.served += work
        heapq.heappush(self._users, (self._clock + work, next(iter(self._order)), worker))

    def next(self) -> float:
        if not self._users:
            return math.inf
        left, rate = max(0.0, self._users[0][0] - self._clock), self._rate()
        return self._now if math.isinf(rate) else self._now + left / rate

    def give(self, now: float) -> int:
        end, _, worker = self._users[0]
        self._go_on(now)
        self._clock = end  # where rounding left it a little short of it
        heapq.heappop(self._users)
        return worker


@dataclass
class Lock:
    """Serves one at a time, first come, first served. `slower(n)`: seconds that a service takes more after n others."""

    slower: Callable[[int], float] = lambda _: 0.0
    served: float = 0.0
    """Seconds that it was held."""
    waited: float = 0.0
    """Seconds that workers waited for it, and the longest of them."""
    longest: float = 0.0
    _services: int = 0
    _end: float = math.inf
    _holder: int = -1
    _queue: deque[tuple[float, int, float]] = field(default_factory=deque)

    def take(self, now: float, worker: int, work: float) -> None:
        self._queue.append((now, worker, work))
        if self._holder < 0:
            self._begin(now)

    def _begin(self, now: float) -> None:
        came, self._holder, work = self._queue.popleft()
        seconds = work + self.slower(self._services)
        self.waited, self.longest = self.waited + now - came, max(self.longest, now - came)
        self.served, self._services, self._end = self.served + seconds, self._services + 1, now + seconds

    def next(self) -> float:
        return self._end

    def give(self, now: float) -> int:
        worker, self._holder, self._end = self._holder, -1, math.inf
        if self._queue:
            self._begin(now)
        return worker


def makespan(tasks: Iterable[Task], workers: int, resources: Mapping[str, Shared | Lock], start: float = 0.0) -> float:
    """Seconds until the last task is done.

    Parameters
    ----------
    tasks
        In the order in which they are given out: to whoever is free first.
    workers
        Tasks at once.
    resources
        By the names that steps use; they say afterwards how much they served.
    start
        When the workers are ready.
    """
    todo, steps, now = iter(tasks), {}, start  # type: Iterator[Task], dict[int, Iterator[Step]], float

    def advance(worker: int) -> None:
        while True:
            step = next(steps[worker], None)
            if step is not None:
                resources[step.resource].take(now, worker, step.work)
                return
            task = next(todo, None)
            if task is None:
                return
            steps[worker] = iter(task)

    for worker in range(workers):
        steps[worker] = iter(())
        advance(worker)
    while True:
        resource = min(resources.values(), key=lambda each: each.next())
        if math.isinf(resource.next()):
            return now
        now = max(now, resource.next())
        advance(resource.give(now))


def ingest_tasks(shards: Iterable[tuple[float, float, float]], commit: float) -> list[Task]:
    """Shards of (bytes to read, core-seconds, bytes to write), each registered under the lock for `commit` seconds."""
    return [
        (Step("read", read), Step("cores", work), Step("write", write), Step("commit", commit))
        for read, work, write in shards
    ]


def sweep_makespan(seconds: Iterable[float], gpus: int, part: float, gain: float = 1.0, start: float = 0.0) -> float:
    """Seconds that jobs take which each use a `part` of a GPU, given out in turn.

    Parameters
    ----------
    seconds
        Of each job, alone on a GPU.
    gain
        How much more a full GPU does than one with one job: 1 where one job fills it, 1 / part where sharing is free.
    start
        Seconds that each job needs before it computes, whoever else does.
    """
    slots = round(1 / part)
    machines: dict[str, Shared | Lock] = {"begin": Shared(each=1.0)}
    machines |= {"gpus": Shared(gpus * min(gain, slots), 1.0)}
    tasks = [(Step("begin", start), Step("gpus", each)) for each in seconds]
    return makespan(tasks, gpus * slots, machines)
