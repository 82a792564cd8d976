"""Passes over the cohort: each feeds every learner of a group, step by step, with checkpoints on the way."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cftrain.errors import StoppedError
from cftrain.feed import Feed, Window, Work, step_visits
from cftrain.learner import Learner
from cftrain.loop import Task
from cftrain.order import Step, cohort_places
from cftrain.ranks import Ranks
from cftrain.results import Epoch
from cftrain.stopping import StopRequest

BEAT_SECONDS = 0.5


@dataclass(frozen=True)
class Beat:
    """Where a group stands, told about twice a second: its learners, the pass and how far it is, and what that took."""

    learners: tuple[str, ...]
    number: int
    share: float
    work: Work


@dataclass
class Clock:
    """Seconds that a run has lasted, those before it was stopped included.

    It goes on in other processes that it is sent to: the monotonic clock is the machine's.
    """

    before: float = 0.0
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started


@dataclass(frozen=True)
class Group:
    """Learners that share their readings, and what they share; one learner where `data.order` is independent.

    Parameters
    ----------
    on_epoch, on_beat
        Told of measured epochs, and of progress.
    """

    learners: Sequence[Learner]
    feed: Feed
    ranks: Ranks
    stop: StopRequest
    clock: Clock
    on_epoch: Callable[[Learner, Epoch], None]
    on_beat: Callable[[Beat], None]


@dataclass(frozen=True)
class _Turn:
    """One step of one learner."""

    learner: Learner
    step: Step
    task: Task


def train(group: Group) -> Iterator[Learner]:
    """Train the learners of a group to their end; yields each when it is finished, those restored as finished first.

    Raises
    ------
    StoppedError
        A signal asked for it; the checkpoints are written.
    NonFiniteError
        See `Learner.do`.
    """
    saved = time.monotonic()
    for learner in group.learners:
        if learner.finished:
            yield learner
    while left := [learner for learner in group.learners if not learner.finished]:
        number = min(learner.number for learner in left)
        together = [learner for learner in left if learner.number == number]
        saved = _one_pass(group, together, saved)
        for learner in together:
            epoch = learner.end(group.ranks)
            if epoch is not None:
                group.on_epoch(learner, epoch)
            if learner.finished:
                _save(group, [learner])
                yield learner


def places_of(learner: Learner, feed: Feed) -> Mapping[str, int] | None:
    """The places of all examples in the learner's pass; None where its draws have an order of their own."""
    data = feed.data
    if learner.config.data.order == "independent":
        return None
    return cohort_places(data.examples, learner.config.order_seed, learner.number, data.order)


def _one_pass(group: Group, learners: Sequence[Learner], saved: float) -> float:
    """Bring all examples by once; returns when the last checkpoint was written."""
    for learner in learners:
        learner.begin()
    places = places_of(learners[0], group.feed)
    turns = [
        _Turn(learner, step, learner.task(step, group.ranks)) for learner in learners for step in learner.steps(places)
    ]
    turns.sort(key=lambda turn: turn.step.ready)
    beaten, counts = 0.0, Work()
    with group.feed.window([step_visits(turn.step, turn.task.own) for turn in turns]) as window:
        for done, turn in enumerate(turns, start=1):
            counts = counts.plus(_take(group, turn, window))
            now = time.monotonic()
            if now - beaten >= BEAT_SECONDS or done == len(turns):
                names = tuple(str(learner.out) for learner in learners)
                group.on_beat(Beat(names, learners[0].number, done / len(turns), counts))
                beaten = now
            due = now - saved >= 60 * turn.learner.config.train.checkpoint_minutes
            stop, save = group.ranks.any(bool(group.stop), due)
            if stop or save:
                _save(group, learners)
                saved = time.monotonic()
            if stop:
                raise stopped(group.stop)
    return saved


def _take(group: Group, turn: _Turn, window: Window) -> Work:
    """Do one step; returns what it cost."""
    feed, learner = group.feed, turn.learner
    started, waited, read = time.perf_counter(), feed.wait_seconds, feed.bytes_read
    model = learner.model
    bags = partial(window.batch, scales=model.scales, extras=model.options.extras())
    learner.do(turn.step, turn.task, bags, group.ranks)
    window.done(step_visits(turn.step, turn.task.own))
    waited = feed.wait_seconds - waited
    visits = turn.step.visits
    work = Work(
        n_slides=sum(len(visit.example.slide_ids) for visit in visits),
        n_patches=sum(visit.example.total_patches for visit in visits),
        bytes_read=feed.bytes_read - read,
        wait_seconds=waited,
        compute_seconds=time.perf_counter() - started - waited,
    )
    learner.spent(work)
    return work


def _save(group: Group, learners: Sequence[Learner]) -> None:
    if group.ranks.first:
        for learner in learners:
            learner.save(group.clock.elapsed)


def stopped(request: StopRequest) -> StoppedError:
    """What ends a run that wrote its checkpoints because it was asked to."""
    name = request.by.name if request.by else "a signal to another process"
    message = f"stopped by {name}; the checkpoints are written, go on with `cftrain run --resume`"
    return StoppedError(message, int(request.by or signal.SIGTERM))
