"""Tasks in processes of their own: results as they finish, progress, and no orphans.

Processes are spawned, not forked: HDF5, DuckDB and torch all have threads or locks that do not
survive a fork.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from cfstore.errors import StoreError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tell = Callable[[], None]
_POLL_SECONDS = 0.1

# Of a worker process: where it tells its progress, and whether it should stop.
_told: Any = None
_stop: Any = None


class StoppedError(Exception):
    """The process that gave out the work wants no more of it."""


def _begin(told: Any, stop: Any) -> None:
    global _told, _stop
    _told, _stop = told, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells us
    end_with_parent()


def end_with_parent() -> None:
    """End with the process that started this one: nobody waits for the results of an orphan, who may be in the way.

    To be called once in a process that multiprocessing spawned; elsewhere it does nothing. The watching thread ends
    before the interpreter does: one that still waits then keeps what its frames see alive, DuckDB's connection among
    it, of which DuckDB complains on stderr, a screen long.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ended, ending = Pipe(duplex=False)
    watcher = threading.Thread(target=_watch, args=(parent, ended), daemon=True)
    watcher.start()

    def end_watching() -> None:
        ending.close()
        watcher.join()

    atexit.register(end_watching)


def _watch(parent: BaseProcess, ended: Connection) -> None:
    if parent.sentinel in wait_for_any([parent.sentinel, ended]):
        os._exit(1)


def _step() -> None:
    if _stop.is_set():
        raise StoppedError
    _told.put(1)


def _run(function: Callable[[Task, Tell], Result], task: Task) -> Result:
    return function(task, _step)


def side_by_side(
    function: Callable[[Task, Tell], Result], tasks: Sequence[Task], jobs: int, on_step: Tell
) -> Iterator[Result]:
    """Results of `function(task, tell)` in the order in which they finish, `jobs` at a time.

    `tell()` is called by the function after each step; it is passed on to `on_step`, and ends
    the task with StoppedError when the caller has stopped listening. With one job everything
    runs in this process.

    Raises
    ------
    StoreError
        A process died; and whatever `function` raises.
    """
    if jobs <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield function(task, on_step)
        return
    context = multiprocessing.get_context("spawn")
    told, stop = context.SimpleQueue(), context.Event()  # a step is in its pipe before the result that follows it
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, _begin, (told, stop)) as pool:
        with _without_main():
            pending = {pool.submit(_run, function, task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                _pass_on(told, on_step)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            message = "a worker process died (killed, or out of memory); run this again, with fewer --jobs"
            raise StoreError(message) from error
        finally:
            stop.set()
            for future in pending:
                future.cancel()


def _pass_on(told: Any, on_step: Tell) -> None:
    while not told.empty():
        told.get()
        on_step()


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes started meanwhile do not run the user's script again: it need not be written for that."""
    main = sys.modules["__main__"]
    held: dict[str, Any] = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
    try:
        main.__dict__.update(dict.fromkeys(held))
        yield
    finally:
        main.__dict__.update(held)
