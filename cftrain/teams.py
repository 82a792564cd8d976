"""Groups of learners, one after the other in this process, or side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cfstore import end_with_parent
from cftrain.cache import CachePlan
from cftrain.config import RunConfig
from cftrain.data import RunData
from cftrain.device import make_deterministic
from cftrain.errors import RunError, StoppedError
from cftrain.feed import Feed
from cftrain.folds import inner_fold
from cftrain.learner import Learner, seconds_before
from cftrain.passes import Beat, Clock, Group, stopped, train
from cftrain.ranks import ALONE, Ranks
from cftrain.results import Epoch, FoldResult
from cftrain.run_directory import fold_directory
from cftrain.stopping import StopRequest, listening


@dataclass(frozen=True)
class Spec:
    """A learner before it exists: which run, by its place in the list, and which fold; `inner`: that fold's inner."""

    run: int
    fold: int
    inner: bool = False


@dataclass(frozen=True)
class Team:
    """What all learners of all runs are made from."""

    configs: tuple[RunConfig, ...]
    data: RunData
    outs: tuple[Path, ...]
    device: torch.device
    cache: CachePlan


@dataclass(frozen=True)
class Told:
    """Whom to tell what, while learners train: (run, fold, epoch), the same of inner learners, and progress."""

    on_epoch: Callable[[int, int, Epoch], None]
    on_inner_epoch: Callable[[int, int, Epoch], None]
    on_beat: Callable[[Beat], None]

    def epoch(self, spec: Spec, epoch: Epoch) -> None:
        """An epoch of this learner was measured."""
        (self.on_inner_epoch if spec.inner else self.on_epoch)(spec.run, spec.fold, epoch)


@dataclass(frozen=True)
class Done:
    """A finished learner.

    Parameters
    ----------
    elapsed
        Seconds that the run had lasted when it was finished.
    peak_bytes
        The most memory that its process has used so far.
    """

    run: int
    result: FoldResult
    elapsed: float
    peak_bytes: int


def train_teams(
    team: Team,
    groups: Sequence[Sequence[Spec]],
    jobs: int,
    ranks: Ranks,
    stop: StopRequest,
    told: Told,
) -> Generator[Done, None, None]:
    """Train all groups; yields learners as they finish. Closed early, it asks other processes to stop, and waits.

    Raises
    ------
    StoppedError, NonFiniteError
        See `passes.train`; other processes write their checkpoints before it is raised.
    RunError
        A checkpoint cannot be read.
    """
    begun = (seconds_before(_directory(team, spec)) for specs in groups for spec in specs)
    clock = Clock(max(begun, default=0.0))
    if jobs == 1 or len(groups) < 2:
        feed = _feed(team)
        for specs in groups:
            yield from _train_group(team, specs, feed, ranks, stop, clock, told)
    else:
        yield from _side_by_side(team, groups, jobs, stop, clock, told)


def _feed(team: Team) -> Feed:
    data = team.data
    make_deterministic(team.device)
    extras = sorted({extra for config in team.configs for extra in config.extras()})
    return Feed(data, data.cohort.scales, team.configs[0].data, team.device, team.cache, tuple(extras))


def _train_group(
    team: Team, specs: Sequence[Spec], feed: Feed, ranks: Ranks, stop: StopRequest, clock: Clock, told: Told
) -> Iterator[Done]:
    learners = {_learner(team, spec): spec for spec in specs}
    for learner in learners:
        if not learner.restore():
            learner.fit()
        if ranks.first:
            learner.rewrite_log()
    places = [(learner.number, learner.steps_done, learner.finished) for learner in learners]
    if not ranks.agree(places):
        where = team.outs[specs[0].run]
        message = f"{where}: not all processes see the same checkpoints; it must be on storage that all nodes share"
        raise RunError(message)
    group = Group(
        learners=list(learners),
        feed=feed,
        ranks=ranks,
        stop=stop,
        clock=clock,
        on_epoch=lambda learner, epoch: told.epoch(learners[learner], epoch),
        on_beat=told.on_beat,
    )
    for learner in train(group):
        yield Done(learners[learner].run, learner.result(), learner.elapsed, peak_bytes(team.device))


def _learner(team: Team, spec: Spec) -> Learner:
    fold, config = next(fold for fold in team.data.folds if fold.number == spec.fold), team.configs[spec.run]
    if spec.inner:
        fold = inner_fold(fold, config.train.nested, config.train.seed)
    return Learner(config, team.data, fold, _directory(team, spec), team.device)


def _directory(team: Team, spec: Spec) -> Path:
    return fold_directory(team.outs[spec.run], spec.fold, inner=spec.inner)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use at once: the GPU's where there is one, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# Of a worker process: where it tells its progress, and whether it should stop.
_told: Any = None
_asked: Any = None


def _begin(told: Any, asked: Any, threads: int) -> None:
    global _told, _asked
    _told, _asked = told, asked
    torch.set_num_threads(threads)
    end_with_parent()  # somebody may have resumed the run of an orphan


def _side_by_side(
    team: Team, groups: Sequence[Sequence[Spec]], jobs: int, stop: StopRequest, clock: Clock, told: Told
) -> Iterator[Done]:
    """Groups in processes; what they tell comes through a queue."""
    context = multiprocessing.get_context("spawn")
    queue, asked = context.SimpleQueue(), context.Event()
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, _begin, (queue, asked, threads)) as pool:
        pending = {pool.submit(_in_process, team, specs, clock) for specs in groups}
        failed: BaseException | None = None
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    _tell(told, *queue.get())
                if stop:
                    asked.set()
                for future in done:
                    error = future.exception()
                    if error is None:
                        yield from future.result()
                    else:
                        failed = failed or error
                        asked.set()
        finally:
            asked.set()
            _let_end(pending, queue)
    if isinstance(failed, BrokenProcessPool):
        message = "a worker process died (killed, or out of memory); go on with --resume, and fewer --jobs"
        raise RunError(message) from failed
    if isinstance(failed, StoppedError) and stop:
        raise stopped(stop) from failed
    if failed is not None:
        raise failed


def _let_end(pending: Collection[Future[list[Done]]], queue: Any) -> None:
    """Wait for workers that were asked to stop; what they tell is taken unheard, for a full queue would hold them."""
    for future in pending:
        future.cancel()
    while not all(future.done() for future in pending):
        wait(pending, timeout=0.2)
        while not queue.empty():
            queue.get()


def _tell(told: Told, what: str, *words: Any) -> None:
    listeners: dict[str, Callable[..., None]] = {
        "epoch": told.on_epoch,
        "inner": told.on_inner_epoch,
        "beat": told.on_beat,
    }
    listeners[what](*words)


def _put(what: str, *words: Any) -> None:
    _told.put((what, *words))


def _in_process(team: Team, specs: Sequence[Spec], clock: Clock) -> list[Done]:
    told = Told(*(partial(_put, what) for what in ("epoch", "inner", "beat")))
    with listening(lambda: signal.SIGTERM if _asked.is_set() else None) as stop:
        return list(_train_group(team, specs, _feed(team), ALONE, stop, clock, told))
