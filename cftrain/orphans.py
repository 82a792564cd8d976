"""Worker processes end with the process that started them: nobody waits for the results of an orphan."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import threading
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """Watch the parent process from now on, in a process that multiprocessing spawned; elsewhere do nothing.

    The watching thread ends before the interpreter does. One that still waits then keeps what its frames see
    alive, DuckDB's connection among it, of which DuckDB complains on stderr, a screen long.
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
    if parent.sentinel in wait([parent.sentinel, ended]):
        os._exit(1)
