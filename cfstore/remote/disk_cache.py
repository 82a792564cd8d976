"""Bytes of remote stores kept on a local disk: up to a limit, those of the least recently used slide go first.

<folder>/
  limit              bytes that may be kept, as whoever opened the folder last said
  used               bytes that are kept, about; counted anew whenever something has to go
  lock               held while something goes
  kept/ab/<slide>/   one folder per slide; in it one file per byte range, named by what it holds
  making/            files that are being written; their writers have them locked

A file is its bytes and a trailer with their number and digest: it appears by one rename, and what a crash left of
it is seen and thrown away. A slide goes whole, by one rename of its folder; who has a file of it open reads on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from cfstore.errors import CacheError
from cfstore.locks import discard, sweep, try_lock

CACHE_VARIABLE: Final = "CFSTORE_CACHE"
"""In the environment: the cache of stores that are opened without naming one."""
_TRAILER: Final = struct.Struct("<8sQ16s")
_MAGIC: Final = b"cfrange1"
_KEPT_OF_LIMIT: Final = 0.9  # that stays when something goes, so that it need not go at every slide
_SIZE: Final = re.compile(r"^(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?$", re.IGNORECASE)
_SMALLEST: Final = 1 << 20
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class CacheWarning(UserWarning):
    """Nothing more is kept on the local disk; reading goes on without."""


@dataclass(frozen=True)
class CacheSetting:
    """Where, and how many bytes at most."""

    folder: Path
    limit: int


def parse_cache(text: str) -> CacheSetting:
    """`disk:/path:200GB` as a setting; kB, MB, GB and TB are powers of 1000, KiB to TiB of 1024.

    Raises
    ------
    CacheError
        It is not written so, or the size is below 1 MiB.
    """
    kind, _, rest = text.partition(":")
    folder, _, size = rest.rpartition(":")
    if kind != "disk" or not folder:
        raise CacheError(f"cache {text!r}: write disk:FOLDER:SIZE, as in disk:/scratch/cfstore:200GB")
    found = _SIZE.match(size.strip())
    if not found:
        raise CacheError(f"cache {text!r}: {size!r} is no size; write it as 200GB, 1.5TB or 512MiB")
    base = 1024 if found[3] else 1000
    limit = int(float(found[1]) * base ** " kmgt".index(found[2].lower() or " "))
    if limit < _SMALLEST:
        raise CacheError(f"cache {text!r}: {size} keeps no slide; give 1 MiB or more")
    return CacheSetting(Path(folder).expanduser().absolute(), limit)


def slide_name(*parts: str) -> str:
    """The name of a slide's folder: a digest of what tells it from all others."""
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def range_name(file: str, start: int, stop: int) -> str:
    """The name of a file that holds bytes [start, stop) of `file`."""
    return xxhash.xxh3_128_hexdigest(f"{file}\0{start}\0{stop}".encode())


class DiskCache:
    """A folder of byte ranges. Safe under many threads and processes; never a reason for a read to fail.

    Parameters
    ----------
    folder
        Made where there is none.
    limit
        Bytes at most, of all processes together; None: as was said last.

    Raises
    ------
    CacheError
        The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self._kept, self._making = folder / "kept", folder / "making"
        self._lock = threading.Lock()
        self._off = False
        try:
            for each in (self._kept, self._making):
                each.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
            if limit is not None:
                self._write(folder / "limit", str(limit).encode())
            self.limit = self._said_last()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CacheError(f"{folder}: cannot be a cache ({reason}); name another folder or mend this one") from error
        sweep(self._making, "")

    # -- reading and keeping ---------------------------------------------------------------------

    def read(self, slide: str, name: str, nbytes: int) -> NDArray[np.uint8] | None:
        """The bytes of a range if they are kept, whole and as they were; else None.

        What is not as it was is removed.
        """
        path = self._folder_of(slide) / name
        try:
            with path.open("rb", buffering=0) as file:
                found = np.empty(nbytes + _TRAILER.size, np.uint8)
                whole = os.fstat(file.fileno()).st_size == len(found) and _fill(file.fileno(), found.data)
        except OSError:
            return None
        data = found[:nbytes]
        if whole and found[nbytes:].tobytes() == _trailer(data.data):
            return data
        self.drop(slide, name)
        return None

    def drop(self, slide: str, name: str) -> None:
        """Remove a range that is not what it should be."""
        with suppress(OSError):
            (self._folder_of(slide) / name).unlink()

    def touch(self, slide: str) -> None:
        """Note that a slide is used now."""
        with suppress(OSError):
            os.utime(self._folder_of(slide))

    def keep(self, slide: str, name: str, data: memoryview) -> None:
        """Keep the bytes of a range; other slides may go for it. Warns and stops keeping where the disk is full."""
        nbytes = len(data) + _TRAILER.size
        if self._off:
            return
        try:
            with suppress(ValueError):
                self.limit = self._said_last()  # by another process meanwhile
            if nbytes > self.limit:
                return
            self._put(slide, name, data)
            if self._count(nbytes) > self.limit:
                self._make_room()
        except OSError as error:
            self._turn_off(error)

    def _put(self, slide: str, name: str, data: memoryview) -> None:
        temporary = self._making / uuid.uuid4().hex
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if not try_lock(handle):
                return  # taken for a leftover, at this very moment
            _write_all(handle, data)
            _write_all(handle, memoryview(_trailer(data)))
            folder = self._folder_of(slide)
            for _ in range(3):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    temporary.rename(folder / name)
                except FileNotFoundError:  # the slide was just thrown out
                    continue
                return
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)

    def _turn_off(self, error: OSError) -> None:
        with self._lock:
            told, self._off = self._off, True
        if not told:
            what = "the disk is full" if error.errno in _FULL else f"it cannot be written to ({error.strerror})"
            message = f"cache {self.folder}: {what}; nothing more is kept there, reading goes on without"
            warnings.warn(message, CacheWarning, stacklevel=3)

    # -- making room -----------------------------------------------------------------------------

    def used(self) -> int:
        """Bytes kept, counted."""
        return sum(nbytes for _, nbytes, _ in self._slides())

    def _said_last(self) -> int:
        """The limit, of whoever named one last."""
        return int((self.folder / "limit").read_text())

    def _count(self, more: int) -> int:
        """Add to the number of bytes kept, of all processes."""
        with self._held("used") as handle:
            count = _counted(handle, self.limit + 1) + more  # none, or cut short: counted anew
            _write_count(handle, count)
            return count

    def _make_room(self) -> None:
        """Throw out the least recently used slides; one process at a time, the others need not wait.

        What they kept meanwhile, and left to this one, goes in the next turn.
        """
        while self._count(0) > self.limit:
            if not self._throw_out():
                return

    def _throw_out(self) -> bool:
        """False where another process is about it."""
        with (self.folder / "lock").open("rb") as lock:
            if not try_lock(lock.fileno()):
                return False
            sweep(self._making, "")
            before = self._count(0)
            slides = sorted(self._slides())
            used = sum(nbytes for _, nbytes, _ in slides)
            for _, nbytes, folder in slides:
                if used <= self.limit * _KEPT_OF_LIMIT:
                    break
                gone = self._making / uuid.uuid4().hex
                with suppress(FileNotFoundError):
                    folder.rename(gone)
                    discard(gone)
                    used -= nbytes
            with self._held("used") as handle:  # what came meanwhile may be counted twice, never not at all
                _write_count(handle, used + max(0, _counted(handle, before) - before))
            return True

    def _slides(self) -> Iterator[tuple[float, int, Path]]:
        """When last used, bytes, and folder of every slide."""
        for bucket in _entries(self._kept):
            for slide in _entries(Path(bucket)):
                with suppress(FileNotFoundError):
                    nbytes = sum(file.stat().st_size for file in os.scandir(slide))
                    yield slide.stat().st_mtime, nbytes, Path(slide)

    # -- files -----------------------------------------------------------------------------------

    def _folder_of(self, slide: str) -> Path:
        return self._kept / slide[:2] / slide

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        temporary.write_bytes(content)
        temporary.replace(path)

    @contextmanager
    def _held(self, name: str) -> Iterator[int]:
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return []


def _counted(handle: int, otherwise: int) -> int:
    """The number that is written, if it is one."""
    written = os.pread(handle, 32, 0)
    return int(written) if written.isdigit() else otherwise


def _write_count(handle: int, count: int) -> None:
    """In the place of the one before, so that there is one at any moment."""
    os.pwrite(handle, f"{count:020}".encode(), 0)
    os.ftruncate(handle, 20)


def _trailer(data: memoryview) -> bytes:
    return _TRAILER.pack(_MAGIC, len(data), xxhash.xxh3_128_digest(data))


def _fill(handle: int, memory: memoryview) -> bool:
    done = 0
    while done < len(memory):
        count = os.preadv(handle, [memory[done:]], done)
        if not count:
            return False
        done += count
    return True


def _write_all(handle: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(handle, data[done:])


# -- one cache per folder and process ----------------------------------------------------------------

_opened: dict[Path, DiskCache] = {}
_opening = threading.Lock()


def cache_at(folder: Path, limit: int | None = None) -> DiskCache:
    """The cache in a folder: one per process, so that a full disk is said once."""
    with _opening:
        held = _opened.get(folder)
        if held is None or limit not in (None, held.limit):
            held = _opened[folder] = DiskCache(folder, limit)
        return held
