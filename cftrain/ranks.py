"""The processes that train one model together: one alone, or those that torchrun started.

Gradients are summed once per step, by `sum_`: the step is defined over all processes, so a process without a
slide in it adds zeros, and nobody waits for a dummy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_PATIENCE: Final = timedelta(hours=12)
"""With the first process, which derives what is missing of a cohort; one that dies is torchrun's to notice."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in any process."""
        if self.world == 1:
            return flags
        told = torch.tensor([float(flag) for flag in flags], device=_device())
        dist.all_reduce(told)
        return tuple(bool(each) for each in told.cpu() > 0)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self.world == 1:
            return [value]
        found: list[T] = [value] * self.world
        dist.all_gather_object(found, value)
        return found

    def agree(self, value: object) -> bool:
        """Whether all processes have the same value."""
        return all(each == value for each in self.gather(value))

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun, or what acts like it, started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes_here() -> int:
    """How many of them run on this machine and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Which of all processes this is."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which process of this machine this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, by NCCL on GPUs and gloo on CPUs; alone where it started none."""
    if not launched():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    """Where small tensors must be for the group's backend."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
