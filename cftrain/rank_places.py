"""What each process of a placement group gets: its share of a node, and the environment that torchrun would give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cfstore import EngineError

LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or what a test says is one: all of its CPUs and GPUs, in use or not."""

    node_id: str
    name: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Share:
    """What one process gets, exclusively: whole CPUs, and one GPU or none."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.cpus} CPU{'s' * (self.cpus != 1)}" + " and a GPU" * self.gpus


@dataclass(frozen=True)
class Place:
    """Where a process is: its node, and the GPU that it was given, as CUDA_VISIBLE_DEVICES names it ("" for none)."""

    node: Node
    gpu: str = ""


def share_of(nodes: Sequence[Node], workers: int, *, gpu: bool, cpus: int | None = None) -> Share:
    """The most CPUs that each of `workers` processes can have, all having as many; with `gpu`, a GPU each.

    Processes with a GPU get no more CPUs than leave some for every GPU of a node.

    Parameters
    ----------
    cpus
        As many, in place of the most.

    Raises
    ------
    EngineError
        The nodes have not enough, were they idle; says what was asked for and what each node has.
    """
    fair = [max(1, node.cpus // node.gpus) for node in nodes if node.gpus] if gpu else []
    most = min([max((node.cpus for node in nodes), default=0), *fair])
    for each in (cpus,) if cpus else range(most, 0, -1):
        if sum(min(node.cpus // each, node.gpus if gpu else workers) for node in nodes) >= workers:
            return Share(each, int(gpu))
    asked = Share(cpus or 1, int(gpu))
    has = "; ".join(f"{node.name}: {node.cpus} CPUs, {node.gpus} GPUs" for node in nodes) or "no node is alive"
    other = ", --device cpu" if gpu else ""
    message = (
        f"{workers} workers of {asked} each do not fit the Ray cluster ({has}); "
        f"ask for fewer --workers{' or --worker-cpus' if cpus else ''}{other}, or start a larger cluster"
    )
    raise EngineError(message)


def ranks_of(places: Sequence[Place]) -> list[int]:
    """Which place each rank gets: ranks of one machine follow each other, as under torchrun."""
    machines = list(dict.fromkeys(place.node.address for place in places))
    return sorted(range(len(places)), key=lambda index: machines.index(places[index].node.address))


def own_address(places: Sequence[Place], rank: int) -> str:
    """Where the others reach a rank: by loopback where all are on one machine."""
    together = len({place.node.address for place in places}) == 1
    return LOOPBACK if together else places[rank].node.address


def environment(places: Sequence[Place], rank: int, port: int, threads: int) -> Mapping[str, str]:
    """The variables by which `cftrain.ranks` and torch know a process, as torchrun sets them.

    Parameters
    ----------
    places
        Of all ranks, in their order.
    port
        Free on the node of rank 0.
    threads
        Of each process's computations: the number changes the rounding of sums.
    """
    here = [index for index, place in enumerate(places) if place.node.address == places[rank].node.address]
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(places)),
        "LOCAL_RANK": str(here.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(here)),
        "MASTER_ADDR": own_address(places, 0),
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
    }
    if places[rank].gpu:
        # all GPUs of its machine's ranks: LOCAL_RANK is then the number of its own, and NCCL finds the others
        found["CUDA_VISIBLE_DEVICES"] = ",".join(places[index].gpu for index in here)
    return found
