"""Stored parts become bytes of a buffer: compared with their digests, decoded into their places."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import xxhash

from cfstore.codecs import ChunkError, get_codec
from cfstore.errors import DamagedShardError
from cfstore.files import OpenFiles
from cfstore.places import Layout, Part
from cfstore.ring import Buffer, page_aligned

_scratch = threading.local()


def _scratch_bytes(nbytes: int) -> memoryview:
    """Memory of this thread for stored chunks, kept from one to the next."""
    held: Buffer | None = getattr(_scratch, "held", None)
    if held is None or len(held) < nbytes:
        held = _scratch.held = page_aligned(nbytes * 5 // 4)
    return held.data[:nbytes]


def check(part: Part, stored: memoryview, where: str) -> None:
    """Compare stored bytes with the digest of a part, if it has one; `where` names its file.

    Raises
    ------
    DamagedShardError
        They are not what was written.
    """
    if part.digest is not None and xxhash.xxh3_64_intdigest(stored) != part.digest:
        message = f"{where}: bytes from {part.start:,} changed after they were written; restore the shard"
        raise DamagedShardError(message)


def decode(part: Part, stored: memoryview, buffer: Buffer, where: str) -> None:
    """Decode the bytes of a part, which were compared with its digest, into its place.

    Raises
    ------
    DamagedShardError
        They are no chunk of its codec.
    """
    try:
        codec = get_codec(part.codec, "uint8")
        codec.decode_into(stored, buffer[part.to : part.to + part.decoded], trusted=part.digest is not None)
    except ChunkError as error:
        message = f"{where}: the chunk at byte {part.start:,} is damaged ({error}); restore the shard"
        raise DamagedShardError(message) from error


class LocalParts:
    """Parts in files of a store on disk. Plain runs are read straight into the buffer, in one call each."""

    least_threads, least_ahead = 1, 0

    def __init__(self, root: Path) -> None:
        self._root, self._files = root, OpenFiles(root)

    def fill(self, layout: Layout, buffer: Buffer, *, verify: bool, slide: tuple[str, str] | None = None) -> None:
        """Fill `buffer` as `layout` says; `verify`: also compare plain parts with their digests.

        Raises
        ------
        DamagedShardError
            A file is missing, cut short, or its bytes are not what was written.
        """
        memory = buffer.data
        for run in layout.runs:
            first, last = run[0], run[-1]
            where = str(self._root / first.file)
            if first.codec == "none":
                self._files.read_into(first.file, first.start, memory[first.to : last.to + last.decoded])
                for part in run if verify else ():
                    check(part, memory[part.to : part.to + part.decoded], where)
            else:
                stored = _scratch_bytes(first.stored)
                self._files.read_into(first.file, first.start, stored)
                check(first, stored, where)
                decode(first, stored, buffer, where)


def copy(part: Part, stored: memoryview, buffer: Buffer) -> None:
    """Copy the bytes of a plain part to their place, the interpreter's lock free meanwhile."""
    np.copyto(buffer[part.to : part.to + part.decoded], np.frombuffer(stored, np.uint8))
