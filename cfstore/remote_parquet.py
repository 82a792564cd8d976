"""A Parquet file on object storage, opened as if it were here: its footer once, then one request per row group."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

Fetch = Callable[[int, int], memoryview]
_TAIL: Final = 64 << 10  # most footers, with what files say about themselves


class RangeFile(io.RawIOBase):
    """A read-only file of `size` bytes, of which `fetch(start, stop)` gives any range; the last ones are kept.

    Parameters
    ----------
    size
        Bytes in all.
    fetch
        Called for what is not in the range that was fetched last.
    """

    def __init__(self, size: int, fetch: Fetch) -> None:
        self._size, self._fetch = size, fetch
        self._at, self._start, self._held = 0, 0, memoryview(b"")

    def prefetch(self, start: int, stop: int) -> None:
        """Fetch a range now; reads inside it ask nobody."""
        self._start, self._held = start, self._fetch(start, stop)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from where the file stands; fewer bytes at its end."""
        memory = memoryview(buffer).cast("B")
        stop = min(self._at + len(memory), self._size)
        wanted = max(0, stop - self._at)
        if wanted:
            if not self._start <= self._at <= stop <= self._start + len(self._held):
                self.prefetch(self._at, stop)
            memory[:wanted] = self._held[self._at - self._start : stop - self._start]
            self._at += wanted
        return wanted


def read_footer(size: int, fetch: Fetch) -> pq.FileMetaData:
    """The metadata of a file; raises what pyarrow does where it is none."""
    file = RangeFile(size, fetch)
    if size:
        file.prefetch(max(0, size - _TAIL), size)
    return pq.ParquetFile(pa.PythonFile(file, mode="r")).metadata


def open_row_group(size: int, fetch: Fetch, metadata: pq.FileMetaData, row_group: int) -> pq.ParquetFile:
    """The file, all columns of one row group fetched by one request; pages are compared with their checksums."""
    file = RangeFile(size, fetch)
    group = metadata.row_group(row_group)
    spans = [_span(group.column(number)) for number in range(group.num_columns)]
    file.prefetch(min(start for start, _ in spans), max(stop for _, stop in spans))
    return pq.ParquetFile(pa.PythonFile(file, mode="r"), metadata=metadata, page_checksum_verification=True)


def _span(column: Any) -> tuple[int, int]:
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size
