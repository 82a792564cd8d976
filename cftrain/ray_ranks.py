"""Processes that train together on a Ray cluster: one placement group, in it the command that torchrun would start.

Nothing of the training is here. An actor per rank starts the process, says what it said, and knows how it ended
(`cftrain.rank_agent`). Where one is killed, the others are ended, the group is removed, and a new one goes on from
the checkpoints.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cfstore import EngineError, code_version, ray_cluster
from cftrain.errors import RankError, StoppedError
from cftrain.rank_agent import Ended, News, RankAgent
from cftrain.rank_places import Node, Place, Share, environment, own_address, ranks_of, share_of
from cftrain.stopping import StopRequest, listening

RESTARTS: Final = 3
"""How often a run goes on from its checkpoints after a process or a node died."""
_NEED: Final = "cftrain run --engine ray"
_PLACE_SECONDS: Final = 60.0
_NEWS_SECONDS: Final = 0.5
_LAST_SECONDS: Final = 10.0
"""For the other ranks, after one has failed, to say why or to end."""


@dataclass(frozen=True)
class Asked:
    """What to run, and with how much.

    Parameters
    ----------
    arguments
        Device ("cpu" or "cuda") to the arguments of `cftrain`; asked before every attempt, so that a later one may go
        on where an earlier was ended.
    workers, cpus
        Processes, and CPUs of each; None: as many as all can have.
    gpu
        Whether each needs a GPU; None: if there are any in the cluster.
    """

    arguments: Callable[[str], Sequence[str]]
    workers: int
    cpus: int | None = None
    gpu: bool | None = None
    restarts: int = RESTARTS
    place_seconds: float = _PLACE_SECONDS


@dataclass(frozen=True)
class Heard:
    """Whom to tell what the first rank prints, what a process said that crashed, and that a run begins again."""

    out: Callable[[bytes], None]
    err: Callable[[bytes], None]
    note: Callable[[str], None]


def train_on_ray(asked: Asked, address: str | None, heard: Heard) -> int:
    """Run `cftrain ARGUMENTS` in `workers` processes that train together; returns the exit code of all.

    SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C are passed on: the run writes its checkpoints and ends with 75 or 130.

    Raises
    ------
    EngineError
        No Ray, no cluster, too small or too busy a cluster, or a node without the code or the folder.
    RankError
        A process failed; names its rank, its node and why. Or processes died more often than `restarts`.
    StoppedError
        A signal came while nothing ran.
    """
    with ray_cluster(address, need=_NEED) as ray, listening() as stop:
        nodes = _nodes(ray)
        gpu = any(node.gpus for node in nodes) if asked.gpu is None else asked.gpu
        share = share_of(nodes, asked.workers, gpu=gpu, cpus=asked.cpus)
        restart = 0
        while True:
            arguments = asked.arguments("cuda" if gpu else "cpu")
            with _kept(restart), _placed(ray, share, asked, stop) as agents:
                ends = _Attempt(ray, agents, stop, heard).run(arguments, share.cpus)
            cause = _cause(ends)
            if cause is None or (stop and ends[0].ended.how == "stopped"):
                return max(end.ended.code for end in ends if end.ended.how in ("well", "stopped"))
            if cause.ended.how != "died" or stop or restart == asked.restarts:
                raise _failure(cause, heard)
            restart += 1
            about = f"restart {restart} of {asked.restarts}"
            heard.note(f"{cause.name} {cause.ended.why}; going on from the checkpoints, {about}")


@dataclass(frozen=True)
class _End:
    """How a rank ended, and what it is called."""

    name: str
    ended: Ended


def _cause(ends: Sequence[_End]) -> _End | None:
    """Of the ranks that failed the one because of which the others did; None where none failed.

    Ranks crash where another has gone, and NCCL aborts them: so an error raised on purpose comes before a process that
    was killed, that before any other end, and of these the first.
    """

    def order(end: _End) -> tuple[int, float]:
        killed = end.ended.how == "died" and end.ended.code != -signal.SIGABRT
        return 0 if end.ended.how == "said" else 1 if killed else 2, end.ended.when

    return min((end for end in ends if end.ended.how not in ("well", "stopped")), key=order, default=None)


def _failure(cause: _End, heard: Heard) -> RankError:
    """One line; the traceback of what nobody raised on purpose is told before."""
    if cause.ended.how == "said":
        return RankError(f"{cause.name}: {cause.ended.why}")
    heard.err(cause.ended.trace.encode())
    return RankError(f"{cause.name} {cause.ended.why}; see why, and go on with `cftrain run --resume`")


def _nodes(ray: Any) -> list[Node]:
    return [
        Node(
            node_id=node["NodeID"],
            name=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextmanager
def _kept(restart: int) -> Iterator[None]:
    """Say of an error that it ends no first attempt: the cluster may have no room any more."""
    try:
        yield
    except EngineError as error:
        if not restart:
            raise
        raise EngineError(f"{error}; the checkpoints are kept, go on with `cftrain run --resume`") from error


@contextmanager
def _placed(ray: Any, share: Share, asked: Asked, stop: StopRequest) -> Iterator[list[tuple[Any, Place]]]:
    """Agents in a placement group of their own by rank, and where they are; the group is removed afterwards.

    Raises
    ------
    EngineError, StoppedError
        The cluster has no room for it now.
    """
    bundle = {"CPU": share.cpus, **({"GPU": share.gpus} if share.gpus else {})}
    group = ray.util.placement_group([bundle] * asked.workers, strategy="PACK", name=_NEED)
    agents: list[Any] = []
    try:
        _wait_for(ray, group, share, asked, stop)
        for index in range(asked.workers):
            within = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            )
            agent = ray.remote(RankAgent).options(
                num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0, scheduling_strategy=within
            )
            agents.append(agent.remote())
        code = code_version()
        gpus = [_asked(ray, agent.gpu.remote(code)) for agent in agents]
        nodes = {node.node_id: node for node in _nodes(ray)}
        where = ray.util.placement_group_table(group)["bundles_to_node_id"]
        places = [Place(nodes[where[index]], gpu if share.gpus else "") for index, gpu in enumerate(gpus)]
        yield [(agents[index], places[index]) for index in ranks_of(places)]
    finally:
        for ref in [agent.end.remote() for agent in agents]:
            with suppress(ray.exceptions.RayError):
                ray.get(ref, timeout=_LAST_SECONDS)
        for agent in agents:
            ray.kill(agent)
        ray.util.remove_placement_group(group)


def _wait_for(ray: Any, group: Any, share: Share, asked: Asked, stop: StopRequest) -> None:
    """Until the group is there: others may use the nodes that could hold it, or a lost node may be replaced."""
    ready, until = group.ready(), time.monotonic() + asked.place_seconds
    while not ray.wait([ready], timeout=_NEWS_SECONDS)[0]:
        if stop:
            raise StoppedError(f"stopped by {_name(stop)} before it began", int(stop.by or signal.SIGTERM))
        if time.monotonic() > until:
            free = ray.available_resources()
            message = (
                f"{asked.workers} workers of {share} each found no room on the Ray cluster within "
                f"{asked.place_seconds:g} s: {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free; "
                "wait for what else runs there, or ask for fewer --workers or --worker-cpus"
            )
            raise EngineError(message)


def _asked(ray: Any, ref: Any) -> Any:
    """What an agent answers, before any training.

    Raises
    ------
    EngineError
        Its node is not fit for the work.
    """
    try:
        return ray.get(ref, timeout=_PLACE_SECONDS)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EngineError):
            raise error.cause from error
        last = str(error.cause).strip().splitlines()[-1]
        message = f"a node has no crossfusion-store, or another version ({last}); install {code_version()} on it"
        raise EngineError(message) from error
    except ray.exceptions.RayError as error:
        first = (str(error).strip().splitlines() or [""])[0]
        message = f"a worker did not start ({type(error).__name__}: {first}); see the logs of Ray on its node"
        raise EngineError(message) from error


def _name(stop: StopRequest) -> str:
    return stop.by.name if stop.by else "a signal"


class _Attempt:
    """All ranks once, from their start until each has ended, or one has failed."""

    def __init__(self, ray: Any, agents: Sequence[tuple[Any, Place]], stop: StopRequest, heard: Heard) -> None:
        self._ray, self._stop, self._heard = ray, stop, heard
        self._agents = [agent for agent, _ in agents]
        self._places = [place for _, place in agents]
        self._ends: dict[int, Ended] = {}
        self._passed_on: signal.Signals | None = None

    def run(self, arguments: Sequence[str], threads: int) -> list[_End]:
        """How the ranks ended that have; those that another's failure left hanging are not among them."""
        self._start(arguments, threads)
        pending = {self._ask(rank): rank for rank in range(len(self._agents))}
        until = float("inf")
        while pending and time.monotonic() < until:
            done, _ = self._ray.wait(list(pending), timeout=_NEWS_SECONDS)
            for ref in done:
                rank = pending.pop(ref)
                if not self._hear(rank, self._news(ref)):
                    pending[self._ask(rank)] = rank
            self._pass_on()
            if until == float("inf") and self._others_should_end():
                until = time.monotonic() + _LAST_SECONDS
        return [_End(self._called(rank), end) for rank, end in sorted(self._ends.items())]

    def _others_should_end(self) -> bool:
        """Where one has failed, or the first was stopped, which stops after it has written the checkpoints."""
        stopped = 0 in self._ends and self._ends[0].how == "stopped"
        return stopped or any(end.how not in ("well", "stopped") for end in self._ends.values())

    def _start(self, arguments: Sequence[str], threads: int) -> None:
        folder, port = str(Path.cwd()), _asked(self._ray, self._agents[0].free_port.remote())
        started = [
            agent.start.remote(
                list(arguments),
                folder,
                dict(environment(self._places, rank, port, threads)),
                own_address(self._places, rank),
                speaks=rank == 0,
            )
            for rank, agent in enumerate(self._agents)
        ]
        for ref in started:
            _asked(self._ray, ref)

    def _ask(self, rank: int) -> Any:
        return self._agents[rank].news.remote(_NEWS_SECONDS)

    def _news(self, ref: Any) -> News:
        errors = self._ray.exceptions
        try:
            news: News = self._ray.get(ref)
        except errors.RayError:  # its agent is gone, and the process with it
            return News(ended=Ended("died", -signal.SIGKILL, "died with its Ray worker or node", when=time.time()))
        return news

    def _hear(self, rank: int, news: News) -> bool:
        """Pass on what a rank said; whether it has ended."""
        if news.out:
            self._heard.out(news.out)
        if news.err:
            self._heard.err(news.err)
        if news.ended is not None:
            self._ends[rank] = news.ended
        return news.ended is not None

    def _pass_on(self) -> None:
        """A signal goes to the first rank and stops all; another that had left for that would die of one of its own."""
        if self._stop and self._stop.by is not self._passed_on:
            self._passed_on = self._stop.by
            self._agents[0].signal.remote(int(self._stop.by or signal.SIGTERM))

    def _called(self, rank: int) -> str:
        return f"rank {rank} of {len(self._places)} on node {self._places[rank].node.name}"
