"""One writer at a time: an advisory lock on the store, held only while it registers.

The lock belongs to the process: the kernel drops it when the process dies, so nothing stale is
left to remove by hand.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from cfstore.errors import StoreBusyError, StoreError
from cfstore.schema import LOCK_FILE

_POLL_SECONDS: Final = 0.05


def try_lock(handle: int) -> bool:
    """Take an exclusive lock on an open file or folder without waiting."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def write_lock(root: Path, timeout: float = 60.0) -> Iterator[None]:
    """Hold the store's write lock.

    Raises
    ------
    StoreBusyError
        Another process held it for `timeout` seconds.
    StoreError
        The store's folder cannot be written to.
    """
    try:
        handle = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        message = f"{root}: cannot write to the store ({error.strerror}); check its permissions or name another --store"
        raise StoreError(message) from error
    try:
        deadline = time.monotonic() + timeout
        while not try_lock(handle):
            if time.monotonic() > deadline:
                message = (
                    f"{root}: another process has been writing for {timeout:.0f} s; wait for it, then run this again"
                )
                raise StoreBusyError(message)
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(handle)


@contextmanager
def _holding(handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(handle)


def hold_folder(folder: Path) -> AbstractContextManager[None]:
    """Lock `folder` now, until the returned context ends: `sweep` leaves it alone meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try_lock(handle)
    return _holding(handle)


def sweep(folder: Path, prefix: str) -> int:
    """Remove what writers that died left behind: folders named `prefix`* that nobody has locked."""
    removed = 0
    for leftover in sorted(folder.glob(f"{prefix}*")):
        try:
            handle = os.open(leftover, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its writer was faster
        try:
            if try_lock(handle):
                shutil.rmtree(leftover)
                removed += 1
        finally:
            os.close(handle)
    return removed
