"""Where the bytes of a slide are, and where they go: from the catalog alone.

A slide is read by runs of parts. A part is a stored chunk that becomes bytes of a buffer. A
compressed chunk is a run of its own; plain ones that follow each other in the file and in the
buffer are one run: one system call reads the slide.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cfstore.catalog import AMONG, connect
from cfstore.convert import ARRAY_DTYPE
from cfstore.errors import SlideNotFoundError
from cfstore.shards import COORDS_CODEC, file_of

COORD_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Array:
    """One array of one bag in its file; fields as in `shards.Extent`."""

    file: str
    byte_start: int
    sizes: tuple[int, ...]
    decoded_start: int
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """What is wanted of an array: its place, decoded bytes, bytes of a whole decoded chunk, codec, bytes of an item."""

    array: Array
    nbytes: int
    chunk_bytes: int
    codec: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class BagPlace:
    """One bag: its shape, codec, and arrays. `chunk_rows` is 0 where the rows are not in chunks (a tar)."""

    shard: str
    dtype: str
    codec: str
    dim: int
    n_patches: int
    chunk_rows: int
    features: Array
    coords: Array | None
    scale: Array | None
    zero: Array | None
    digest: str
    """Of the stored rows, wherever they lie."""

    @property
    def array_dtype(self) -> np.dtype[np.generic]:
        return np.dtype(ARRAY_DTYPE[self.dtype])

    @property
    def row_bytes(self) -> int:
        return self.dim * self.array_dtype.itemsize

    @property
    def feature_rows(self) -> Rows:
        chunk = self.chunk_rows * self.row_bytes
        return Rows(self.features, self.n_patches * self.row_bytes, chunk, self.codec, self.array_dtype.itemsize)

    def coord_rows(self, coords: Array) -> Rows:
        """How `coords`, this bag's, are stored."""
        codec = COORDS_CODEC if self.chunk_rows else "none"
        return Rows(coords, self.n_patches * COORD_BYTES, self.chunk_rows * COORD_BYTES, codec, 4)

    def affine_rows(self, array: Array) -> Rows:
        """How `array`, this bag's scale or zero, is stored."""
        return Rows(array, self.dim * 4, 0, "none", 4)


@dataclass(frozen=True, slots=True)
class Part:
    """Stored bytes [start, start + stored) of a file become bytes [to, to + decoded) of a buffer.

    `digest` is the xxh3-64 of the stored bytes, None where it is not known.
    """

    file: str
    start: int
    stored: int
    to: int
    decoded: int
    codec: str
    digest: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows are read into one buffer: runs of parts, where each wanted array begins, and the buffer's bytes."""

    runs: tuple[tuple[Part, ...], ...]
    starts: tuple[int, ...]
    nbytes: int


def lay_out(wanted: Sequence[Rows]) -> Layout:
    """Place arrays one after another in a buffer.

    A chunk that two neighbours share is decoded once, so they overlap in the buffer as they do
    in the file.
    """
    parts: dict[tuple[str, int, int], Part] = {}
    starts = [0] * len(wanted)
    end = 0
    for index in _in_file_order(wanted):
        rows = wanted[index]
        if not rows.nbytes:
            continue
        array, at = rows.array, rows.array.byte_start
        plain = rows.codec == "none"
        end = -(-end // rows.itemsize) * rows.itemsize
        digests = array.digests or (None,) * len(array.sizes)
        for number, (size, digest) in enumerate(zip(array.sizes, digests, strict=True)):
            key = (array.file, at, size)
            if key not in parts:
                decoded = size if plain else rows.chunk_bytes
                parts[key] = Part(array.file, at, size, end, decoded, rows.codec, digest)
                end += decoded
            if number == 0:
                starts[index] = parts[key].to + array.decoded_start
            at += size
    return Layout(_joined(parts.values()), tuple(starts), end)


def _in_file_order(wanted: Sequence[Rows]) -> list[int]:
    """Positions in `wanted`, file after file. Arrays in chunks go by their place, so that those who share one meet."""
    ranks = {file: rank for rank, file in enumerate(dict.fromkeys(rows.array.file for rows in wanted))}

    def place(index: int) -> tuple[int, int, int]:
        rows = wanted[index]
        rank, array = ranks[rows.array.file], rows.array
        return (rank, array.byte_start, array.decoded_start) if rows.chunk_bytes else (rank, 0, 0)

    return sorted(range(len(wanted)), key=place)


def row_range(rows: Rows, start: int, stop: int, row_bytes: int) -> Rows:
    """Rows [start, stop) of what `rows` describes: only the chunks that hold them."""
    array, nbytes = rows.array, (stop - start) * row_bytes
    first_byte = array.decoded_start + start * row_bytes
    if rows.codec == "none":
        part = Array(array.file, array.byte_start + first_byte, (nbytes,), 0, ())
        return Rows(part, nbytes, rows.chunk_bytes, rows.codec, rows.itemsize)
    first, last = first_byte // rows.chunk_bytes, -(-(first_byte + nbytes) // rows.chunk_bytes)
    at = array.byte_start + sum(array.sizes[:first])
    inside = first_byte - first * rows.chunk_bytes
    part = Array(array.file, at, array.sizes[first:last], inside, array.digests[first:last])
    return Rows(part, nbytes, rows.chunk_bytes, rows.codec, rows.itemsize)


def _joined(parts: Iterable[Part]) -> tuple[tuple[Part, ...], ...]:
    """Parts as runs: plain ones together that follow each other both in the file and in the buffer."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and _follows(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return tuple(tuple(run) for run in runs)


def _follows(last: Part, part: Part) -> bool:
    plain = last.codec == part.codec == "none" and last.file == part.file
    return plain and last.start + last.stored == part.start and last.to + last.decoded == part.to


def find_bags(
    root: Path, encoder: str, scales: Sequence[int], slide_ids: Iterable[str]
) -> dict[str, dict[int, BagPlace]]:
    """Where the asked-for bags of every slide are, by slide and scale (coarse to fine).

    Raises
    ------
    SlideNotFoundError
        A slide lacks one of the scales.
    """
    found: dict[str, dict[int, BagPlace]] = {slide_id: {} for slide_id in slide_ids}
    query = (
        "SELECT bags.slide_id, bags.scale, shard, dtype, bags.codec, dim, n_patches, chunk_rows, digest FROM bags "
        "JOIN internal.shards USING (shard) WHERE encoder = ? AND list_contains(?, scale) "
        f"AND {AMONG} ORDER BY bags.slide_id, scale"
    )
    with connect(root) as connection:
        rows = connection.execute(query, [encoder, list(scales), list(found)]).fetchall()
        arrays = _arrays(connection, encoder, list(found))
    for slide_id, scale, shard, *rest in rows:
        dtype, codec, dim, n_patches, chunk_rows, digest = rest
        own, shared = arrays[shard, slide_id, scale], arrays[shard, slide_id, None]
        found[slide_id][scale] = BagPlace(
            shard, dtype, codec, dim, n_patches, chunk_rows, own["features"], own.get("coords"),
            shared.get("scale"), shared.get("zero"), digest,
        )  # fmt: skip
    for slide_id, bags in found.items():
        lacking = [f"{scale}x" for scale in scales if scale not in bags]
        if lacking:
            message = f"slide {slide_id}: no {', '.join(lacking)} bag from encoder {encoder} in {root}"
            raise SlideNotFoundError(message)
    return found


def _arrays(
    connection: object, encoder: str, slide_ids: list[str]
) -> Mapping[tuple[str, str, int | None], dict[str, Array]]:
    query = (
        "SELECT shard, slide_id, scale, array_name, byte_start, sizes, decoded_start, digests FROM internal.extents "
        f"WHERE shard IN (SELECT shard FROM bags WHERE encoder = ?) AND {AMONG}"
    )
    rows = connection.execute(query, [encoder, slide_ids]).fetchall()  # type: ignore[attr-defined]
    arrays: dict[tuple[str, str, int | None], dict[str, Array]] = defaultdict(dict)
    for shard, slide_id, scale, name, start, sizes, decoded, digests in rows:
        place = Array(file_of(shard, name), start, tuple(sizes), decoded, tuple(digests))
        arrays[shard, slide_id, scale][name] = place
    return arrays
