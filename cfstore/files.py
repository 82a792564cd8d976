"""Open files of a store, shared by threads: opened once, read at any place by `preadv`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cfstore.errors import DamagedShardError
from cfstore.shards import check_inside

_MAX_OPEN: Final = 256
_ONE_READ: Final = 1 << 30  # Linux transfers at most 2 GiB at once


class OpenFiles:
    """Handles of a store's files. Beyond 256 of them, files are opened for one read and closed again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def _handle(self, file: str) -> Iterator[int]:
        handle = self._handles.get(file)
        if handle is not None:
            yield handle
            return
        path = self._root / file
        opened = self._open(path)
        with self._lock:
            keep = file not in self._handles and len(self._handles) < _MAX_OPEN
            if keep:
                self._handles[file] = opened
        try:
            yield opened
        finally:
            if not keep:
                os.close(opened)

    @staticmethod
    def _open(path: Path) -> int:
        shard = next(parent for parent in (path, *path.parents) if parent.suffix in (".zarr", ".tar"))
        try:
            return os.open(check_inside(path, shard), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            message = f"{path}: cannot be opened ({error.strerror}); restore the shard"
            raise DamagedShardError(message) from error

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of `file` (relative to the store).

        Raises
        ------
        DamagedShardError
            The file is missing, or shorter than that.
        """
        with self._handle(file) as handle:
            done = 0
            while done < len(buffer):
                try:
                    count = os.preadv(handle, [buffer[done : done + _ONE_READ]], start + done)
                except OSError as error:
                    message = f"{self._root / file}: cannot be read ({error.strerror}); restore the shard"
                    raise DamagedShardError(message) from error
                if not count:
                    message = f"{self._root / file}: ends before byte {start + len(buffer):,}; restore the shard"
                    raise DamagedShardError(message)
                done += count

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
