"""One writer at a time: an advisory lock on the store, held only while it registers.

The lock belongs to the process: the kernel drops it when the process dies, so nothing stale is
left to remove by hand. Only files that are opened for writing are locked, never folders: that is
what NFS keeps between machines.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final

from cfstore.errors import StoreBusyError, StoreError, StoreWriteError
from cfstore.schema import LOCK_FILE

PROBE_PREFIX: Final = ".probe-"
"""Of files that show other machines that they see this very store; locked while somebody may ask."""
LOCK_SECONDS: Final = 3600.0
"""The usual patience: a living process holds the lock, and others may wait before us, each with a commit to make."""
_GUARD: Final = ".guard"
_POLL_SECONDS: Final = 0.05
_SAY_AFTER: Final = 60.0
_log: Final = logging.getLogger("cfstore")


def try_lock(handle: int) -> bool:
    """Take an exclusive lock on an open file or folder without waiting."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def write_lock(root: Path, timeout: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the store's write lock. That it waits is logged, once, after a minute.

    Raises
    ------
    StoreBusyError
        Another process held it for `timeout` seconds.
    StoreWriteError
        The store's folder cannot be written to, or the disk fails while the lock is held.
    """
    try:
        handle = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        message = f"{root}: cannot write to the store ({error.strerror}); check its permissions or name another --store"
        raise StoreWriteError(message) from error
    try:
        began, said = time.monotonic(), False
        while not try_lock(handle):
            waited = time.monotonic() - began
            if waited > _SAY_AFTER and not said:
                said = True
                _log.warning("%s: other processes have been writing for %.0f s; waiting for them", root, waited)
            if waited > timeout:
                message = (
                    f"{root}: another process has been writing for {timeout:.0f} s; wait for it, then run this again"
                )
                raise StoreBusyError(message)
            time.sleep(_POLL_SECONDS)
        with disk_errors(root):
            yield
    finally:
        os.close(handle)


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Raise what the disk says while the store is written as StoreWriteError, with what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        message = (
            f"{root}: cannot be written ({error.strerror or error}); what was committed is whole: "
            "free space or mend permissions, then run this again, it goes on where it stopped"
        )
        raise StoreWriteError(message) from error


@contextmanager
def _holding(handle: int, guard: Path | None) -> Iterator[None]:
    try:
        yield
    finally:
        if guard:
            guard.unlink(missing_ok=True)
        os.close(handle)


def _guard_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _GUARD)


def hold(path: Path) -> AbstractContextManager[None]:
    """Lock a file, or a folder by a file beside it, now and until the context ends: `sweep` leaves it alone so long."""
    guard = _guard_of(path) if path.is_dir() else None
    handle = os.open(guard or path, os.O_RDWR | (os.O_CREAT if guard else 0), 0o666)
    try_lock(handle)
    return _holding(handle, guard)


def sweep(folder: Path, prefix: str) -> int:
    """Remove what writers that died left behind: files and folders named `prefix`* that nobody has locked."""
    removed = 0
    for leftover in sorted(folder.glob(f"{prefix}*")):
        try:
            handle = _open_lock(leftover)
        except FileNotFoundError:
            continue  # its writer was faster
        try:
            if try_lock(handle):
                discard(leftover)
                removed += 1
        finally:
            os.close(handle)
    return removed


def _open_lock(leftover: Path) -> int:
    if not leftover.is_dir():
        return os.open(leftover, os.O_RDWR)
    with suppress(FileNotFoundError):
        return os.open(_guard_of(leftover), os.O_RDWR)
    return os.open(leftover, os.O_RDONLY)  # nobody's; or of a version that locked folders


def discard(path: Path) -> None:
    """Remove a file or folder, whichever it is."""
    if path.is_dir() and not path.is_symlink():
        while path.exists():
            with suppress(FileNotFoundError):  # somebody else removes it too
                shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
