"""One Zarr v3 group per shard: `features` [rows, D] and `coords` [rows, 2], slide-major.

A slide's rows lie back to back, coarse to fine, and start on a chunk boundary, so one slide is
one contiguous range of chunks. Codecs are those that every Zarr v3 reader knows: little-endian
bytes, Blosc (zstd 1, byte shuffle) and crc32c, inside sharding. Blosc's block size is set to
1 MiB: with its default of a few KiB the same codec is larger and 2-3 times slower to decode.

A shard is written under a temporary name and appears by one rename.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from cfstore.errors import StoreFormatError
from cfstore.shards.records import ShardRecord

_CHUNK_BYTES: Final = 2 << 20
_FILE_BYTES: Final = 64 << 20
_BLOCK_BYTES: Final = 1 << 20
_MIN_CHUNK_ROWS: Final = 32
_MIN_CHUNKS_PER_FILE: Final = 32
_MAX_CHUNKS_PER_FILE: Final = 1024
_COORD_CHUNK_ROWS: Final = 16_384
TEMPORARY_PREFIX: Final = ".writing-"


def chunk_rows(row_bytes: int, slide_rows: Sequence[int]) -> int:
    """Rows per chunk: about 2 MiB, a power of two, but no more than an eighth of the median slide.

    Small bags (region-level encoders give 20 to 250 rows) would otherwise decode megabytes of
    padding for kilobytes of data.
    """
    by_bytes = max(1, _CHUNK_BYTES // row_bytes)
    by_slide = max(_MIN_CHUNK_ROWS, int(np.median(slide_rows)) // 8)
    return 1 << (min(by_bytes, by_slide).bit_length() - 1)


def digest_rows(features: NDArray[np.generic], coords: NDArray[np.int32] | None) -> str:
    """sha256 over the stored rows in C order, features then coords."""
    digest = hashlib.sha256(np.ascontiguousarray(features).data)
    if coords is not None:
        digest.update(np.ascontiguousarray(coords).data)
    return f"sha256:{digest.hexdigest()}"


class ShardWriter:
    """Writes one shard; `with ShardWriter(...) as shard:` leaves nothing behind unless published.

    Parameters
    ----------
    path
        Final directory, `<store>/features/<encoder>/<id>.zarr`; must not exist.
    dim, dtype
        Feature dimension and stored precision.
    slide_rows
        Rows of each slide to come (an upper bound on them): decides the chunk size.
    """

    def __init__(self, path: Path, *, dim: int, dtype: str, slide_rows: Sequence[int]) -> None:
        self.path = path
        self.temporary = path.with_name(TEMPORARY_PREFIX + path.name)
        self._chunk = chunk_rows(dim * np.dtype(dtype).itemsize, slide_rows)
        chunk_bytes = self._chunk * dim * np.dtype(dtype).itemsize
        per_file = min(max(_FILE_BYTES // chunk_bytes, _MIN_CHUNKS_PER_FILE), _MAX_CHUNKS_PER_FILE)
        per_file = 1 << (per_file.bit_length() - 1)
        self._file_rows = self._chunk * per_file
        capacity = sum(self._aligned(rows) for rows in slide_rows)
        self.temporary.parent.mkdir(parents=True, exist_ok=True)
        self._group = zarr.create_group(self.temporary)
        self._features = self._create("features", (capacity, dim), self._chunk, dtype)
        self._coords = self._create("coords", (capacity, 2), min(self._file_rows, _COORD_CHUNK_ROWS), "int32")
        self._feature_rows = np.zeros((self._file_rows, dim), dtype=dtype)
        self._coord_rows = np.full((self._file_rows, 2), -1, dtype=np.int32)
        self._next = 0  # next free row
        self._written = 0  # rows already handed to zarr

    def _aligned(self, rows: int) -> int:
        return -(-rows // self._chunk) * self._chunk

    def _create(self, name: str, shape: tuple[int, int], chunk: int, dtype: str) -> zarr.Array[Any]:
        typesize = np.dtype(dtype).itemsize
        blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=typesize, blocksize=_BLOCK_BYTES)
        return self._group.create_array(
            name,
            shape=shape,
            chunks=(chunk, shape[1]),
            shards=(self._file_rows, shape[1]),
            dtype=dtype,
            compressors=[blosc, Crc32cCodec()],
            fill_value=0 if name == "features" else -1,
        )

    def begin_slide(self) -> None:
        """The next rows start a slide: move to a chunk boundary."""
        self._skip(self._aligned(self._next) - self._next)

    def append(self, features: NDArray[np.generic], coords: NDArray[np.int32] | None) -> int:
        """Add one bag's rows (already of the shard's dtype); returns its first row."""
        start = self._next
        done = 0
        while done < len(features):
            at = self._next - self._written
            take = min(self._file_rows - at, len(features) - done)
            self._feature_rows[at : at + take] = features[done : done + take]
            if coords is not None:
                self._coord_rows[at : at + take] = coords[done : done + take]
            done += take
            self._advance(take)
        return start

    def _skip(self, rows: int) -> None:
        while rows:
            take = min(self._file_rows - (self._next - self._written), rows)
            rows -= take
            self._advance(take)

    def _advance(self, rows: int) -> None:
        self._next += rows
        if self._next - self._written == self._file_rows:
            self._flush(self._file_rows)

    def _flush(self, rows: int) -> None:
        """Write whole files only: a partial write would make zarr read, merge and rewrite one."""
        stop = self._written + rows
        self._features[self._written : stop] = self._feature_rows[:rows]
        self._coords[self._written : stop] = self._coord_rows[:rows]
        self._written = stop
        self._feature_rows[:] = 0
        self._coord_rows[:] = -1

    def publish(self, record: ShardRecord) -> None:
        """Write the rest and the record, flush to disk, and rename into place."""
        total = self._aligned(self._next)
        for array in (self._features, self._coords):
            array.resize((total, array.shape[1]))
        if total > self._written:
            self._flush(total - self._written)
        self._group.update_attributes(record.to_attributes())
        _sync_tree(self.temporary)
        self.temporary.rename(self.path)
        _sync(self.path.parent)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.temporary.exists():
            shutil.rmtree(self.temporary)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def read_record(root: Path, shard: str) -> ShardRecord:
    """The record of the shard at `root / shard`; raises StoreFormatError naming it."""
    try:
        group = zarr.open_group(root / shard, mode="r")
    except (OSError, ValueError, KeyError) as error:
        message = f"{root / shard}: not a readable Zarr group ({error})"
        raise StoreFormatError(message) from error
    return ShardRecord.from_attributes(group.attrs.asdict(), shard)


class ShardReader:
    """Rows of one published shard. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        try:
            self._features = zarr.open_array(path / "features", mode="r")
            self._coords = zarr.open_array(path / "coords", mode="r")
        except (OSError, ValueError, KeyError) as error:
            message = (
                f"{path}: shard is missing or damaged ({error}); restore it, or ingest its slides into a new store"
            )
            raise StoreFormatError(message) from error
        self._path = path

    def read(
        self, start: int, stop: int, *, coords: bool = True
    ) -> tuple[NDArray[np.generic], NDArray[np.int32] | None]:
        """Rows [start, stop): features [N, D], and coords [N, 2] where asked for."""
        try:
            features = np.asarray(self._features[start:stop])
            places = np.asarray(self._coords[start:stop], dtype=np.int32) if coords else None
        except (OSError, ValueError, RuntimeError) as error:
            message = f"{self._path}: rows {start} to {stop} cannot be decoded ({error}); the shard is damaged"
            raise StoreFormatError(message) from error
        return features, places
