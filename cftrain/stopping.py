"""Signals by which a run writes a checkpoint and leaves: SIGTERM, SIGUSR1 and SIGUSR2 (SLURM's warnings), Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""SLURM sends a job's warning to all processes of it: to a run also the one that is meant for submitit, SIGUSR2."""


@dataclass
class StopRequest:
    """Whether, and by which signal, this process was asked to stop; `also` asks somebody else (a parent process)."""

    by: signal.Signals | None = None
    also: Callable[[], signal.Signals | None] = field(default=lambda: None)

    def __bool__(self) -> bool:
        self.by = self.by or self.also()
        return self.by is not None


_listener: ContextVar[StopRequest | None] = ContextVar("listener", default=None)


@contextmanager
def listening(also: Callable[[], signal.Signals | None] = lambda: None) -> Iterator[StopRequest]:
    """Note the signals in place of dying of them; a second Ctrl-C kills at once.

    Who begins to listen while somebody does already hears of what that one was asked before.
    """
    before_us = _listener.get()
    request = StopRequest(also=lambda: also() or (before_us.by if before_us else None))
    token = _listener.set(request)

    def note(number: int, frame: FrameType | None) -> None:
        if request.by is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.by = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        _listener.reset(token)
        for number, handler in before.items():
            signal.signal(number, handler)


def asked() -> signal.Signals | None:
    """The signal that asked the innermost listener, or one around it, to stop; None while nobody listens."""
    request = _listener.get()
    return request.by if request else None
