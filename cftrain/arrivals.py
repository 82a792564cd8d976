"""What arrives on the device that computes, in order and a little ahead of the computation."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from cftrain.device import DeviceBag

_COPIED_AHEAD: Final = 4

T = TypeVar("T")


class Arrivals(Iterator[T]):
    """What is copied to the device, in order, by a thread of its own where the device is a GPU.

    The thread queues copies on a stream of its own, a few examples ahead of the computation; whoever takes one
    makes the stream that computes wait for its copies, not the CPU. On a CPU nothing is copied, and nothing runs
    beside.
    """

    def __init__(self, source: Generator[T, None, None], device: torch.device, *, threaded: bool | None = None) -> None:
        self._source, self._device = source, device
        self._threaded = device.type == "cuda" if threaded is None else threaded
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._queue: queue.Queue[tuple[T | BaseException | None, Any]] = queue.Queue(_COPIED_AHEAD)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if self._threaded:
            self._thread = threading.Thread(target=self._run, name="cftrain-copies", daemon=True)
            self._thread.start()

    def __next__(self) -> T:
        if self._thread is None:
            return next(self._source)
        item, copied = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            raise StopIteration
        if copied is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(copied)
            for tensor in _tensors(item):
                tensor.record_stream(computing)
        return item

    def close(self) -> None:
        """Stop copying; what was not taken is dropped."""
        self._closed.set()
        if self._thread is not None:
            while self._thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    self._queue.get(timeout=0.05)
            self._thread.join()
        self._source.close()

    def _run(self) -> None:
        try:
            with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
                for item in self._source:
                    copied = self._stream.record_event() if self._stream else None
                    self._queue.put((item, copied))
                    if self._closed.is_set():
                        return
            self._queue.put((None, None))
        except BaseException as error:  # told to whoever takes the next one
            self._queue.put((error, None))


def _tensors(item: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and bags."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, DeviceBag):
        yield item.rows
        yield from item.affine or ()
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from _tensors(value)
