"""Bags on the device that computes: copied there as stored, made numbers there, and kept there or in RAM.

int8 bags stay int8 with their scale and zero; they become float32 each time a model asks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfstore import Bag, SlideBags
from cftrain.errors import ConfigError
from cftrain.ranks import launched, local_rank
from cftrain.zoo import Extra

_MOST_COPIES: Final = 4


@dataclass(frozen=True, eq=False)
class DeviceBag:
    """The patches of one slide at one scale: rows [N, D] as stored, and int8's scale and zero, float32 [D]."""

    rows: Tensor
    affine: tuple[Tensor, Tensor] | None = None

    def features(self) -> Tensor:
        """[N, D] in the stored float dtype; int8 as float32, equal to `Bag.dequantised`."""
        if self.affine is None:
            return self.rows
        scale, zero = self.affine
        return self.rows.to(torch.float32).mul_(scale).add_(zero)

    def to(self, device: torch.device) -> DeviceBag:
        """The bag on another device; itself where it is there already."""
        if self.rows.device == device:
            return self
        rows, affine = self.rows.to(device), self.affine
        return DeviceBag(rows, (affine[0].to(device), affine[1].to(device)) if affine else None)


@dataclass(frozen=True, eq=False)
class DeviceSlide:
    """The bags of one slide by scale, and what else models read of it, rows counted within the slide."""

    bags: Mapping[int, DeviceBag]
    extras: Mapping[Extra, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> DeviceSlide:
        """The slide on another device."""
        bags = {scale: bag.to(device) for scale, bag in self.bags.items()}
        return DeviceSlide(bags, {extra: rows.to(device) for extra, rows in self.extras.items()})


def on_device(
    slide: SlideBags,
    device: torch.device,
    extras: Mapping[Extra, NDArray[Any]] = MappingProxyType({}),
    *,
    keep: bool = False,
) -> DeviceSlide:
    """The slide's bags, and its extras, on `device`; the copy may still go on (see `HostMemory`).

    Parameters
    ----------
    keep
        Give memory of its own also where `device` is the CPU; otherwise the CPU's are views of the slide's.
    """

    def moved(rows: NDArray[Any]) -> Tensor:
        return torch.from_numpy(rows).to(device, non_blocking=True, copy=keep)

    def bag_of(bag: Bag) -> DeviceBag:
        affine = (moved(bag.affine.scale), moved(bag.affine.zero)) if bag.affine else None
        return DeviceBag(moved(bag.features), affine)

    bags = {scale: bag_of(bag) for scale, bag in slide.bags.items()}
    return DeviceSlide(bags, {extra: moved(rows) for extra, rows in extras.items()})


class SlideCache:
    """Slides kept on one device, up to a number of bytes; what came first stays.

    Every epoch visits its slides in a new order, so throwing out the oldest would make room for
    nothing that is needed sooner. Room is reserved before a slide is read, so that it is known
    beforehand which slides an epoch needs from the store, also where one comes twice.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device = device
        self._left = limit
        self._slides: dict[str, DeviceSlide] = {}
        self._reserved: dict[str, int] = {}

    def __contains__(self, slide_id: str) -> bool:
        return slide_id in self._slides

    def __getitem__(self, slide_id: str) -> DeviceSlide:
        return self._slides[slide_id]

    def reserve(self, slide_id: str, nbytes: int) -> bool:
        """Whether there was room for a slide of `nbytes`; it is taken then, until `put` or `release`."""
        if nbytes > self._left or slide_id in self._reserved:
            return False
        self._left -= nbytes
        self._reserved[slide_id] = nbytes
        return True

    def reserved(self, slide_id: str) -> bool:
        """Whether room waits for the slide."""
        return slide_id in self._reserved

    def put(self, slide_id: str, slide: DeviceSlide) -> None:
        """Keep a slide for which room was reserved; any other is let go."""
        if self._reserved.pop(slide_id, None) is not None:
            self._slides[slide_id] = slide

    def release(self, slide_ids: Iterable[str]) -> None:
        """Give back the room of those slides that did not come after all."""
        for slide_id in slide_ids:
            self._left += self._reserved.pop(slide_id, 0)


class _Event(Protocol):
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class HostMemory:
    """Holds slides in host memory until the device has copied them: the reader would use their memory again.

    Parameters
    ----------
    record
        Makes an event that is done when all copies queued so far are; None where copies are done at once.
    """

    def __init__(self, record: Callable[[], _Event] | None) -> None:
        self._record = record
        self._held: deque[tuple[_Event, list[SlideBags]]] = deque()

    def hold(self, slides: list[SlideBags]) -> None:
        """Hold `slides`, whose copies were queued just now."""
        if self._record is not None and slides:
            self._held.append((self._record(), slides))

    def release(self) -> None:
        """Let go of what is copied; waits for the oldest where too many copies are queued."""
        while self._held and (self._held[0][0].query() or len(self._held) > _MOST_COPIES):
            self._held[0][0].synchronize()
            self._held.popleft()


def host_memory(device: torch.device) -> HostMemory:
    """`HostMemory` for copies to `device` on its current stream."""
    if device.type != "cuda":
        return HostMemory(None)

    def record() -> _Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    return HostMemory(record)


def pinned(nbytes: int) -> NDArray[np.uint8]:
    """Page-locked memory, from which a GPU copies while the CPU goes on."""
    memory: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def make_deterministic(device: torch.device) -> None:
    """Let the same run give the same bits on the same GPU; an op that cannot says so. A CPU does anyway."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)


def free_gpu(device: torch.device, share: float = 1.0) -> int | None:
    """Bytes free on the device, at most this share of all its memory; None if it is the CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return min(int(free), int(share * total))


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one. Under torchrun, this process's own GPU.

    Raises
    ------
    ConfigError
        No such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"--device {name}: not available here ({str(error).splitlines()[0]}); use cpu, cuda or auto"
        raise ConfigError(message) from error
    return device
