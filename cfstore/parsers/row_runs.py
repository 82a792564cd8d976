"""Rows that lie uncompressed in a file, read from where they lie.

HDF5 looks every chunk up, holds a global lock meanwhile, and needs 20 us per chunk of one row;
`preadv` needs an address, and lets other threads run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cfstore.errors import UnreadableFileError


@dataclass(frozen=True, eq=False)
class RowRuns:
    """Where a table's rows lie: runs of rows that follow each other in the file.

    `first_row` [R] ascends from 0; run i holds the rows up to the next run's first at `address[i]`.
    """

    first_row: NDArray[np.int64]
    address: NDArray[np.int64]
    n_rows: int
    row_bytes: int

    @classmethod
    def of_chunks(cls, address: NDArray[np.int64], chunk_rows: int, n_rows: int, row_bytes: int) -> RowRuns:
        """Join neighbours among chunks of `chunk_rows` whole rows; `address` [n_chunks] is in the order of rows."""
        starts_run = np.diff(address, prepend=-1) != chunk_rows * row_bytes
        starts_run[0] = True
        first_row = np.flatnonzero(starts_run) * chunk_rows
        return cls(first_row.astype(np.int64), address[starts_run], n_rows, row_bytes)

    def read(self, path: Path, file: BinaryIO, start: int, out: NDArray[Any]) -> None:
        """Rows start, start + 1, ... into `out` [n, columns], contiguous; UnreadableFileError where the file ends."""
        target = out.reshape(-1).view(np.uint8).data
        stop = start + len(out)
        run = int(np.searchsorted(self.first_row, start, side="right")) - 1
        row = start
        while row < stop:
            first = int(self.first_row[run])
            end = int(self.first_row[run + 1]) if run + 1 < len(self.first_row) else self.n_rows
            end = min(end, stop)
            place = target[(row - start) * self.row_bytes : (end - start) * self.row_bytes]
            _read_exactly(path, file, int(self.address[run]) + (row - first) * self.row_bytes, place)
            row, run = end, run + 1


def _read_exactly(path: Path, file: BinaryIO, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):  # one call may read less than asked: at most 2 GiB, or up to a signal
        try:
            n_read = os.preadv(file.fileno(), [target[done:]], offset + done)
        except OSError as error:
            message = f"{path}: cannot be read at byte {offset + done:,} ({error.strerror}); copy or extract it again"
            raise UnreadableFileError(message) from error
        if n_read == 0:
            message = (
                f"{path}: ends before byte {offset + len(target):,}; it was cut while it was read: extract it again"
            )
            raise UnreadableFileError(message)
        done += n_read
