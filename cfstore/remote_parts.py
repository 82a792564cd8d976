"""Parts of a store on object storage: by few large requests side by side, kept on a local disk where that is wanted.

Latency is hidden by having many requests under way, not by making each faster: a slide is cut into pieces of about
8 MiB of whole chunks, small ranges that lie close together are one piece, and the pieces of several slides are
fetched, compared, and decoded by one pool of threads, each as soon as it is there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cfstore.errors import DamagedShardError, RemoteObjectChangedError, RemoteObjectMissingError
from cfstore.mirrors import Remote
from cfstore.parts import check, copy, decode
from cfstore.places import Layout, Part
from cfstore.remote.disk_cache import DiskCache, cache_at, range_name, slide_name
from cfstore.ring import Buffer

PIECE_BYTES: Final = 8 << 20
GAP_BYTES: Final = 256 << 10
"""Ranges closer than that are one request: as many bytes take less time than another request."""
WORKERS: Final = 32

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    """The threads of this process that fetch; a process forked from it gets its own."""
    with _lock:
        pool = _pools.get(os.getpid())
        if pool is None:
            pool = _pools[os.getpid()] = ThreadPoolExecutor(WORKERS, thread_name_prefix="cfstore-fetch")
        return pool


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of a file, fetched by one request, and the parts among them."""

    file: str
    start: int
    stop: int
    parts: tuple[Part, ...]


def pieces(layout: Layout) -> list[Piece]:
    """The requests that fetch what a layout needs, in the order of files and places."""
    found: list[list[Part]] = []
    for part in _split(sorted((part for run in layout.runs for part in run), key=lambda part: (part.file, part.start))):
        if found and _joins(found[-1], part):
            found[-1].append(part)
        else:
            found.append([part])
    return [
        Piece(parts[0].file, parts[0].start, max(part.start + part.stored for part in parts), tuple(parts))
        for parts in found
    ]


def _joins(parts: list[Part], part: Part) -> bool:
    stop = max(each.start + each.stored for each in parts[-2:])
    near = parts[0].file == part.file and part.start - stop <= GAP_BYTES
    return near and part.start + part.stored - parts[0].start <= PIECE_BYTES


def _split(parts: Iterable[Part]) -> Iterator[Part]:
    """Plain parts without a digest (rows of tars, some rows of a bag) may be cut anywhere."""
    for part in parts:
        if part.codec != "none" or part.digest is not None or part.stored <= PIECE_BYTES:
            yield part
            continue
        for at in range(0, part.stored, PIECE_BYTES):
            size = min(PIECE_BYTES, part.stored - at)
            yield replace(part, start=part.start + at, stored=size, to=part.to + at, decoded=size)


class RemoteParts:
    """Parts in objects of a store. An object must stay the one that it was at the first request."""

    least_threads, least_ahead = 16, 32

    def __init__(self, remote: Remote) -> None:
        self._bucket, self._uuid = remote.bucket, remote.uuid
        self._cache: DiskCache | None = cache_at(Path(remote.cache)) if remote.cache else None
        self._etags: dict[str, str | None] = {}

    def fill(self, layout: Layout, buffer: Buffer, *, verify: bool, slide: tuple[str, str] | None = None) -> None:
        """Fill `buffer` as `layout` says; what came from the server is always compared with its digests.

        Parameters
        ----------
        slide
            Encoder and id of a slide that is read whole: its pieces are kept on the local disk.

        Raises
        ------
        DamagedShardError
            An object is missing, cut short, another one than before, or its bytes are not what was written.
        RemoteError
            The server or the way to it fails, finally.
        """
        kept = slide_name(self._uuid, *slide) if slide and self._cache else None
        wanted = pieces(layout)
        futures = [_pool().submit(self._piece, piece, buffer, kept, verify) for piece in wanted[1:]]
        try:
            for piece in wanted[:1]:  # while the others are on their way
                self._piece(piece, buffer, kept, verify)
            for future in futures:
                future.result()
        finally:
            _end(futures)  # nobody writes into a buffer that its owner has back
        if kept and self._cache:
            self._cache.touch(kept)

    def fetch(self, file: str, start: int, stop: int, slide: tuple[str, str], *, afresh: bool = False) -> memoryview:
        """Some bytes of a file, kept as bytes of that slide; `afresh`: not what was kept. Raises as `fill`.

        They are kept unseen: who finds that they are not what was written asks for them afresh.
        """
        name, key = range_name(file, start, stop), slide_name(self._uuid, *slide)
        if self._cache and not afresh and (found := self._cache.read(key, name, stop - start)) is not None:
            self._cache.touch(key)
            return found.data
        data = self._request(file, start, stop)
        if self._cache:
            self._cache.keep(key, name, data)
        return data

    def size(self, file: str) -> int:
        """Bytes of a file; FileNotFoundError where there is none."""
        head = self._bucket.head(file)
        if head is None:
            raise FileNotFoundError(self._bucket.shown(file))
        return head.size

    # -- one piece -------------------------------------------------------------------------------

    def _piece(self, piece: Piece, buffer: Buffer, kept: str | None, verify: bool) -> None:
        name = range_name(piece.file, piece.start, piece.stop)
        if kept and self._cache:
            found = self._cache.read(kept, name, piece.stop - piece.start)
            if found is not None and self._taken_over(piece, found, buffer, verify):
                return
            if found is not None:
                self._cache.drop(kept, name)
        data = self._request(piece.file, piece.start, piece.stop)
        try:
            self._take_over(piece, data, buffer, verify=True)
        except DamagedShardError:  # on its way here, perhaps
            data = self._request(piece.file, piece.start, piece.stop)
            self._take_over(piece, data, buffer, verify=True)
        if kept and self._cache:
            self._cache.keep(kept, name, data)

    def _taken_over(self, piece: Piece, found: Buffer, buffer: Buffer, verify: bool) -> bool:
        try:
            self._take_over(piece, found.data, buffer, verify=verify)
        except DamagedShardError:
            return False
        return True

    def _take_over(self, piece: Piece, data: memoryview, buffer: Buffer, *, verify: bool) -> None:
        where = self._bucket.shown(piece.file)
        for part in piece.parts:
            stored = data[part.start - piece.start : part.start - piece.start + part.stored]
            if part.codec != "none":
                check(part, stored, where)
                decode(part, stored, buffer, where)
                continue
            if verify:
                check(part, stored, where)
            copy(part, stored, buffer)

    def _request(self, file: str, start: int, stop: int) -> memoryview:
        try:
            found = self._bucket.read_range(file, start, stop)
        except RemoteObjectMissingError as error:
            raise DamagedShardError(f"{error}; the store changed, open it again, or restore the shard") from error
        except RemoteObjectChangedError as error:
            raise DamagedShardError(f"{error}; the store changed, open it again, or restore the shard") from error
        if self._etags.setdefault(file, found.etag) != found.etag:
            where = self._bucket.shown(file)
            raise DamagedShardError(f"{where}: became another object; the store changed, open it again")
        return found.data


def _end(futures: list[Future[None]]) -> None:
    running = [future for future in futures if not future.cancel()]
    wait(running)
