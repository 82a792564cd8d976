"""One Zarr v3 array in one file, `c/0/0`, written chunk by chunk.

The file is a `sharding_indexed` shard as large as the array: stored chunks back to back, then
for each its offset and length (two little-endian uint64) and the crc32c of that index. One file
means that the rows of a slide are one contiguous byte range.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from cfstore.codecs import Codec
from cfstore.errors import DamagedShardError

DATA_FILE: Final = "c/0/0"
_INDEX_DTYPE: Final = np.dtype("<u8")
_CRC_BYTES: Final = 4


class Mark(NamedTuple):
    """A state to return to."""

    rows: int
    n_chunks: int
    end: int


class PackedWriter:
    """Appends rows; every `align` starts a new chunk.

    Parameters
    ----------
    folder
        The array's folder; its metadata is written by whoever knows the final shape.
    columns, dtype, fill
        Shape of a row, array dtype, value of padding rows.
    chunk_rows, codec
        Rows of a chunk and how they are stored.
    """

    def __init__(self, folder: Path, columns: int, dtype: str, fill: float, chunk_rows: int, codec: Codec) -> None:
        path = folder / DATA_FILE
        path.parent.mkdir(parents=True)
        self._file = path.open("wb", buffering=0)
        self._chunk = np.empty((chunk_rows, columns), dtype=dtype)
        self._fill, self._codec = fill, codec
        self._used = 0  # rows in self._chunk
        self._end = 0
        self._index: list[tuple[int, int]] = []
        self._digests: list[str] = []

    @property
    def rows(self) -> int:
        """The next free row."""
        return len(self._index) * len(self._chunk) + self._used

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows [n, columns] of the array's dtype."""
        done = 0
        while done < len(rows):
            if not self._used and len(rows) - done >= len(self._chunk):
                self._store(rows[done : done + len(self._chunk)])  # whole chunks need no copy
                done += len(self._chunk)
                continue
            take = min(len(self._chunk) - self._used, len(rows) - done)
            self._chunk[self._used : self._used + take] = rows[done : done + take]
            self._used += take
            done += take
            if self._used == len(self._chunk):
                self._used = 0
                self._store(self._chunk)

    def align(self) -> None:
        """Fill the chunk up, so that the next row starts a new one."""
        if self._used:
            self._chunk[self._used :] = self._fill
            self._used = 0
            self._store(self._chunk)

    def _store(self, chunk: NDArray[Any]) -> None:
        stored = memoryview(self._codec.encode(np.ascontiguousarray(chunk))).cast("B")
        self._write(stored)
        self._index.append((self._end, len(stored)))
        self._digests.append(chunk_digest(stored))
        self._end += len(stored)

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:  # a raw write may take less than it is given, and says ENOSPC only at the next one
            left = left[self._file.write(left) :]

    def mark(self) -> Mark:
        """The present state; rows must be aligned."""
        return Mark(self.rows, len(self._index), self._end)

    def rollback(self, mark: Mark) -> None:
        """Forget every row since `mark`."""
        del self._index[mark.n_chunks :], self._digests[mark.n_chunks :]
        self._used, self._end = 0, mark.end
        self._file.truncate(mark.end)
        self._file.seek(mark.end)

    def digests_since(self, mark: Mark) -> tuple[str, ...]:
        """Digests of the chunks written since `mark`."""
        return tuple(self._digests[mark.n_chunks :])

    def finish(self) -> int:
        """Write the index and flush to disk; returns the number of rows."""
        self.align()
        index = np.array(self._index, dtype=_INDEX_DTYPE).tobytes()
        self._write(index + google_crc32c.value(index).to_bytes(_CRC_BYTES, "little"))
        os.fsync(self._file.fileno())
        self.close()
        return self.rows

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def chunk_digest(stored: bytes | memoryview) -> str:
    """xxh3-64 of the stored bytes of one chunk, as hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(stored)


def read_index(path: Path, n_chunks: int) -> NDArray[np.int64]:
    """Offset and length of every chunk, [n_chunks, 2], checked against the file.

    Raises
    ------
    DamagedShardError
        The file is missing or cut short, or its index is not what was written.
    """
    length = n_chunks * 2 * _INDEX_DTYPE.itemsize
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - length - _CRC_BYTES))
            found = file.read()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); restore the shard"
        raise DamagedShardError(message) from error
    index, crc = found[:length], found[length:]
    if len(found) != length + _CRC_BYTES or google_crc32c.value(index) != int.from_bytes(crc, "little"):
        message = f"{path}: its index is damaged, or the file was cut short; restore the shard"
        raise DamagedShardError(message)
    places = np.frombuffer(index, dtype=_INDEX_DTYPE).reshape(n_chunks, 2).astype(np.int64)
    ends = np.cumsum(places[:, 1])
    if not np.array_equal(places[1:, 0], ends[:-1]) or places[0, 0] != 0 or ends[-1] != size - len(found):
        message = f"{path}: its index does not match its chunks; restore the shard"
        raise DamagedShardError(message)
    return places
