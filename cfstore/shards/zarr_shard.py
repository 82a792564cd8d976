"""One Zarr v3 group per shard: `features` [rows, D] and `coords` [rows, 2], slide-major.

A slide's rows lie back to back, coarse to fine, and start on a chunk boundary, so one slide is
one contiguous range of bytes. int8 shards have `scale` and `zero` [slides, D] beside them. The
codecs are those that every Zarr v3 reader knows.

The group's attributes hold the record: row ranges, sources, digests of every chunk, slide and
metadata file, and a digest of the attributes themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray

from cfstore.codecs import get_codec
from cfstore.convert import ARRAY_DTYPE, Affine
from cfstore.errors import DamagedShardError
from cfstore.shards.files import BLANK_DIGEST, Check, check_inside, is_signed, sign, sync_tree
from cfstore.shards.packed import DATA_FILE, Mark, PackedWriter, chunk_digest, read_index
from cfstore.shards.records import BagRecord, Extent, ShardRecord, SlideRecord

SUFFIX: Final = ".zarr"
_COMPRESSED_CHUNK: Final = 1 << 20
_PLAIN_CHUNK: Final = 512 << 10  # nothing is gained by more, and a slide is padded by half of it
_MIN_CHUNK_ROWS: Final = 32
_MIN_PLAIN_CHUNK_ROWS: Final = 4  # small chunks cost nothing where there is nothing to decode
_DIGEST: Final = re.compile("[0-9a-f]{16}")
COORDS_CODEC: Final = "blosc-zstd"
_COORDS_FILL: Final = -1


def chunk_rows(row_bytes: int, slide_rows: Sequence[int], codec: str) -> int:
    """Rows per chunk: about 1 MiB (uncompressed 512 KiB), a power of two, at most an eighth of the median slide.

    Small bags (region-level encoders give 20 to 250 rows) would otherwise decode megabytes of
    padding for kilobytes of data.
    """
    plain = codec == "none"
    by_bytes = max(1, (_PLAIN_CHUNK if plain else _COMPRESSED_CHUNK) // row_bytes)
    by_slide = max(_MIN_PLAIN_CHUNK_ROWS if plain else _MIN_CHUNK_ROWS, int(np.median(slide_rows)) // 8)
    return 1 << (min(by_bytes, by_slide).bit_length() - 1)


class ZarrShardWriter:
    """Writes one shard into the folder `temporary`; see `ShardWriter` in the package."""

    def __init__(self, temporary: Path, head: ShardRecord, slide_rows: Sequence[int]) -> None:
        self._root, self._head = temporary, head
        self._dtype = ARRAY_DTYPE[head.dtype]
        self._codec = get_codec(head.codec, self._dtype)
        self._chunk = chunk_rows(head.dim * np.dtype(self._dtype).itemsize, slide_rows, head.codec)
        temporary.mkdir(parents=True)
        self._features = PackedWriter(temporary / "features", head.dim, self._dtype, 0, self._chunk, self._codec)
        coords = get_codec(COORDS_CODEC, "int32")
        self._coords = PackedWriter(temporary / "coords", 2, "int32", _COORDS_FILL, self._chunk, coords)
        self._affines: list[Affine] = []
        self._position = -1
        self._start: tuple[Mark, Mark] = (self._features.mark(), self._coords.mark())

    def begin_slide(self, slide_id: str, affine: Affine | None) -> None:
        """The next bags are this slide's; `affine` where the shard is int8."""
        self._position += 1
        if affine is not None:
            self._affines.append(affine)
        self._start = (self._features.mark(), self._coords.mark())

    def begin_bag(self, scale: int, n_patches: int) -> int | None:
        """The next rows are this bag's; returns its first row."""
        return self._features.rows

    def append(self, rows: NDArray[Any]) -> None:
        """Add feature rows of the bag, already of the stored dtype."""
        self._features.append(rows)

    def end_bag(self, coords: NDArray[np.int32] | None, n_patches: int) -> None:
        """The bag is complete; its coords [n_patches, 2], or None."""
        missing = np.full((n_patches, 2), _COORDS_FILL, dtype=np.int32)
        self._coords.append(missing if coords is None else coords)

    def end_slide(
        self,
        slide_id: str,
        cohort: str | None,
        folder: str,
        bags: Sequence[BagRecord],
        labels: Mapping[str, Any] | None = None,
    ) -> SlideRecord:
        """The slide is complete; returns its record. Labels are the catalog's, not kept here."""
        features, coords = self._start
        self._features.align()
        self._coords.align()
        digests = {
            "features": self._features.digests_since(features),
            "coords": self._coords.digests_since(coords),
        }
        return SlideRecord(slide_id, cohort, folder, self._position, tuple(bags), digests)

    def abandon_slide(self) -> None:
        """Forget the slide that was begun."""
        features, coords = self._start
        self._features.rollback(features)
        self._coords.rollback(coords)
        del self._affines[self._position :]
        self._position -= 1

    def finish(self, slides: Sequence[SlideRecord]) -> ShardRecord:
        """Write indexes, metadata and record, and flush to disk."""
        rows = self._features.finish()
        self._coords.finish()
        group = zarr.create_group(self._root)
        self._describe(group, "features", (rows, self._head.dim), self._dtype, self._codec.compressors(), 0)
        compressors = get_codec(COORDS_CODEC, "int32").compressors()
        self._describe(group, "coords", (rows, 2), "int32", compressors, _COORDS_FILL)
        for name in ("scale", "zero") if self._affines else ():
            values = np.stack([getattr(affine, name) for affine in self._affines])
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=values.shape,
                dtype="float32",
                compressors=None,
                config={"write_empty_chunks": True},  # zeros, too: features after a ReLU have no other zero
            )
            array[:] = values
        record = replace(self._head, chunk_rows=self._chunk, n_rows=rows, slides=tuple(slides))
        _write_record(self._root, record)
        sync_tree(self._root)
        return record

    def _describe(
        self, group: zarr.Group, name: str, shape: tuple[int, int], dtype: str, compressors: Any, fill: float
    ) -> None:
        chunks = (self._chunk, shape[1])
        group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            shards=shape,
            dtype=dtype,
            compressors=compressors or None,
            fill_value=fill,
        )

    def close(self) -> None:
        """Close files; what is not finished is the caller's to remove."""
        self._features.close()
        self._coords.close()


def _side_files(shard: Path) -> list[str]:
    """Every file but the chunks and the group's metadata, relative to the shard."""
    packed = [f"{name}/{DATA_FILE}" for name in ("features", "coords")]
    found = (str(path.relative_to(shard)) for path in shard.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (*packed, "zarr.json"))


def _write_record(shard: Path, record: ShardRecord) -> None:
    files = {name: xxhash.xxh3_64_hexdigest((shard / name).read_bytes()) for name in _side_files(shard)}
    attributes = {"cfstore": {"digest": BLANK_DIGEST, "files": files, **record.to_attributes()}}
    text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})
    (shard / "zarr.json").write_text(sign(text))


def _read_metadata(root: Path, shard: str) -> tuple[str, dict[str, Any]]:
    path = root / shard / "zarr.json"
    try:
        text = path.read_text()
        return text, dict(json.loads(text)["attributes"]["cfstore"])
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); the shard is damaged: restore it"
        raise DamagedShardError(message) from error
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path}: not the metadata of a shard ({error!r}); the shard is damaged: restore it"
        raise DamagedShardError(message) from error


def read_record(root: Path, shard: str) -> ShardRecord:
    """The record of the shard `root / shard`; raises StoreFormatError naming it, also where it was changed."""
    text, attributes = _read_metadata(root, shard)
    own = ("digest", "files")
    record = ShardRecord.from_attributes({k: v for k, v in attributes.items() if k not in own}, shard)
    if not is_signed(text, attributes.get("digest")):
        message = f"{root / shard / 'zarr.json'}: changed after it was written; restore the shard"
        raise DamagedShardError(message)
    return record


def stored_checks(root: Path, shard: str) -> Iterator[Check]:
    """A check of the files around the chunks, and one of every slide's chunks.

    Raises
    ------
    DamagedShardError
        The record or an index is not what was written: nothing tells then where chunks are.
    """
    record = read_record(root, shard)
    yield Check(None, lambda: list(_damaged_files(root, shard)))
    arrays = {}
    for array in ("features", "coords"):
        path = check_inside(root / shard / array / DATA_FILE, root / shard)
        arrays[array] = path, read_index(path, record.n_rows // record.chunk_rows)
    for slide in record.slides:
        yield Check(slide.slide_id, partial(_damaged_chunks, arrays, record.chunk_rows, slide))


def _damaged_chunks(
    arrays: Mapping[str, tuple[Path, NDArray[np.int64]]], chunk_rows: int, slide: SlideRecord
) -> list[str]:
    first = min(bag.row_start or 0 for bag in slide.bags) // chunk_rows
    found = []
    for array, (path, places) in arrays.items():
        with path.open("rb") as file:
            for number, digest in enumerate(slide.digests[array], first):
                file.seek(places[number, 0])
                if chunk_digest(file.read(places[number, 1])) != digest:
                    found.append(f"{path}: chunk {number} changed after it was written")
    return found


def _damaged_files(root: Path, shard: str) -> Iterator[str]:
    _, attributes = _read_metadata(root, shard)
    files = dict(attributes["files"])
    present = _side_files(root / shard)
    for name in sorted({*files, *present}):
        path = root / shard / name
        if name not in present:
            yield f"{path}: missing"
        elif name not in files:
            yield f"{path}: not written by cfstore"
        elif path.is_symlink():
            yield f"{path}: a link; it was a file when it was written"
        elif xxhash.xxh3_64_hexdigest(path.read_bytes()) != files[name]:
            yield f"{path}: changed after it was written"
    for path in (root / shard).rglob("*"):
        if path.is_symlink() and str(path.relative_to(root / shard)) not in present:
            yield f"{path}: a link; a shard holds none"


def read_extents(root: Path, record: ShardRecord) -> Iterator[Extent]:
    """Where the rows of every bag lie, from the arrays' indexes.

    Raises
    ------
    DamagedShardError
        A file is missing or its index is not what was written.
    """
    shard = root / record.shard
    chunk = record.chunk_rows
    _check_rows(shard, record)
    total = record.n_rows // chunk
    row_bytes = record.dim * np.dtype(ARRAY_DTYPE[record.dtype]).itemsize
    for array, width in (("features", row_bytes), ("coords", 8)):
        places = read_index(shard / array / DATA_FILE, total)
        for slide in record.slides:
            digests = tuple(int(digest, 16) for digest in slide.digests[array])
            begin = _first_chunk(slide, chunk)
            for bag in (bag for bag in slide.bags if array == "features" or bag.has_coords):
                start = bag.row_start or 0
                first, stop = start // chunk, -(-(start + bag.n_patches) // chunk)
                inside = (start - first * chunk) * width
                sizes = tuple(int(size) for size in places[first:stop, 1])
                known = digests[first - begin : stop - begin]
                yield Extent(slide.slide_id, bag.scale, array, int(places[first, 0]), sizes, inside, known)
    if record.dtype == "int8":
        for slide in record.slides:
            for array in ("scale", "zero"):
                size = record.dim * 4
                yield Extent(slide.slide_id, None, array, slide.position * size, (size,))


def _first_chunk(slide: SlideRecord, chunk: int) -> int:
    return min(bag.row_start or 0 for bag in slide.bags) // chunk


def _check_rows(shard: Path, record: ShardRecord) -> None:
    """Raise DamagedShardError unless rows and digests of the record can be those of its arrays."""
    chunk, wrong = record.chunk_rows, None
    if chunk < 1 or record.n_rows < 1 or record.n_rows % chunk:
        wrong = f"{record.n_rows} rows in chunks of {chunk}"
    for slide in record.slides if not wrong else ():
        ends = [-1 if bag.row_start is None else bag.row_start + bag.n_patches for bag in slide.bags]
        if min(bag.row_start or 0 for bag in slide.bags) < 0 or min(ends) < 0 or max(ends) > record.n_rows:
            wrong = f"slide {slide.slide_id}: rows up to {max(ends)} of {record.n_rows}"
            break
        n_chunks = -(-max(ends) // chunk) - _first_chunk(slide, chunk)
        for array in ("features", "coords"):
            digests = slide.digests.get(array, ())
            if len(digests) != n_chunks or not all(_DIGEST.fullmatch(str(digest)) for digest in digests):
                wrong = f"slide {slide.slide_id}: {len(digests)} digests of {n_chunks} chunks of {array}"
        if slide.position < 0:
            wrong = f"slide {slide.slide_id}: position {slide.position}"
    if wrong:
        message = f"{shard}: not the record of a shard ({wrong}); the shard is damaged: restore it"
        raise DamagedShardError(message)


def file_of(shard: str, array: str) -> str:
    """The file that holds an array of a shard, relative to the store."""
    return f"{shard}/{array}/{DATA_FILE}"
