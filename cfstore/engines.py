"""Who does the work: processes on this machine, or a Ray cluster. The work itself is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar, get_args

from cfstore.errors import EngineError
from cfstore.locks import LOCK_SECONDS
from cfstore.processes import Tell, side_by_side
from cfstore.ray_engine import ray_engine

Task = TypeVar("Task")
Result = TypeVar("Result")

EngineName = Literal["local", "ray"]
ENGINES: Final = get_args(EngineName)


class Engine(Protocol):
    """Runs tasks side by side, `jobs` at a time; calls `on_step` after each step; results as they come."""

    @property
    def n_slots(self) -> int | None:
        """How many tasks fill it; None: as many as this machine has cores."""

    @property
    def patience(self) -> float:
        """For how many seconds a task waits while others register what they wrote."""

    @property
    def n_restarted(self) -> int:
        """How often a task was given out again because its worker died."""

    def __call__(
        self, function: Callable[[Task, Tell], Result], tasks: Sequence[Task], jobs: int, on_step: Tell
    ) -> Iterator[Result]: ...


class LocalEngine:
    """Processes on this machine; with one job, this very process."""

    n_slots: int | None = None
    patience = LOCK_SECONDS
    n_restarted = 0

    def __call__(
        self, function: Callable[[Task, Tell], Result], tasks: Sequence[Task], jobs: int, on_step: Tell
    ) -> Iterator[Result]:
        return side_by_side(function, tasks, jobs, on_step)


@contextmanager
def open_engine(
    name: str, address: str | None, *, store: Path | str, files: Sequence[Path] = (), memory: int, need: str
) -> Iterator[Engine]:
    """The engine of that name; see `ray_engine` for what the arguments mean to Ray.

    Raises
    ------
    EngineError
        No such engine, an address for one that has none, or the engine cannot be had.
    """
    if name not in ENGINES:
        raise EngineError(f"{need}: there is no engine {name!r}; name one of {', '.join(ENGINES)}")
    if name == "local":
        if address is not None:
            raise EngineError(f"{need}: --address is of --engine ray; name that too")
        yield LocalEngine()
        return
    with ray_engine(store, address, files=files, memory=memory, need=need) as engine:
        yield engine
