"""One WebDataset tar per shard: a sample per slide, `.npy` members and a `.json`.

A slide's members are `<key>.x20.npy`, `<key>.coords_x20.npy`, ... and, last, `<key>.json` with
its record and labels. The key is the slide id with dots escaped, because WebDataset cuts names
at the first dot. Rows are not compressed and start at multiples of 4 KiB (the npy header is as
long as that needs), so that they are read at random as fast as from an array.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import quote, unquote

import numpy as np
import xxhash
from numpy.typing import NDArray

from cfstore.convert import ARRAY_DTYPE, Affine
from cfstore.errors import DamagedShardError, StoreFormatError
from cfstore.shards.files import BLANK_DIGEST, Check, is_signed, sign, sync
from cfstore.shards.members import BLOCK, Member, read_array_head, read_bytes, walk
from cfstore.shards.records import BagRecord, Extent, ShardRecord, SlideRecord, slide_from_json

SUFFIX: Final = ".tar"
_ALIGN: Final = 4096
_MAX_JSON: Final = 16 << 20
_MAX_FIELDS: Final = 64
_REMEDY: Final = "make shards with `cfstore export`"


def sample_key(slide_id: str) -> str:
    """The slide's name in tars: '%' and '.' escaped."""
    return quote(slide_id, safe=" ()+,;=@").replace(".", "%2E")


def _npy_header(shape: tuple[int, ...], dtype: str, at: int) -> bytes:
    """A version 1.0 header that ends at a multiple of 4 KiB when it starts at `at`."""
    text = repr({"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape})
    used = 10 + len(text) + 1
    padding = -(at + used) % _ALIGN
    body = text.encode() + b" " * padding + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


class TarShardWriter:
    """Writes one shard into the file `temporary`; see `ShardWriter` in the package."""

    def __init__(self, temporary: Path, head: ShardRecord, slide_rows: Sequence[int]) -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._head = temporary, replace(head, codec="none")
        self._dtype = ARRAY_DTYPE[head.dtype]
        self._file = temporary.open("wb", buffering=0)
        self._at = self._start = 0
        self._position = -1
        self._key = self._member = ""
        self._hash = xxhash.xxh3_64()
        self._digests: dict[str, tuple[str, ...]] = {}
        self._scale = 0

    def begin_slide(self, slide_id: str, affine: Affine | None) -> None:
        """The next bags are this slide's; `affine` where the shard is int8."""
        self._start, self._position, self._key, self._digests = self._at, self._position + 1, sample_key(slide_id), {}
        if affine is not None:
            self._array("scale", affine.scale)
            self._array("zero", affine.zero)

    def begin_bag(self, scale: int, n_patches: int) -> int | None:
        """The next rows are this bag's."""
        self._scale = scale
        self._begin(f"x{scale}", (n_patches, self._head.dim), self._dtype)
        return None

    def append(self, rows: NDArray[Any]) -> None:
        """Add feature rows of the bag, already of the stored dtype."""
        self._put(np.ascontiguousarray(rows).data.cast("B"))

    def end_bag(self, coords: NDArray[np.int32] | None, n_patches: int) -> None:
        """The bag is complete; its coords [n_patches, 2], or None."""
        self._end()
        if coords is not None:
            self._array(f"coords_x{self._scale}", coords)

    def end_slide(
        self,
        slide_id: str,
        cohort: str | None,
        folder: str,
        bags: Sequence[BagRecord],
        labels: Mapping[str, Any] | None = None,
    ) -> SlideRecord:
        """The slide is complete; returns its record. `labels` go into the sample's JSON."""
        slide = SlideRecord(slide_id, cohort, folder, self._position, tuple(bags), dict(self._digests))
        shard = self._head.to_attributes()
        del shard["slides"]
        content = {
            "cfstore": {"digest": BLANK_DIGEST, "shard": shard, "slide": asdict(slide)},
            **(labels or {}),
            "slide_id": slide_id,
            "encoder": self._head.encoder,
            "dtype": self._head.dtype,
            "n_patches": {f"{bag.scale}x": bag.n_patches for bag in bags},
        }
        data = sign(json.dumps(content, allow_nan=False)).encode()
        self._header("json", len(data))
        self._put(data)
        self._pad()
        return slide

    def abandon_slide(self) -> None:
        """Forget the slide that was begun."""
        self._file.truncate(self._start)
        self._file.seek(self._start)
        self._at, self._position = self._start, self._position - 1

    def finish(self, slides: Sequence[SlideRecord]) -> ShardRecord:
        """Write the end of the archive and flush to disk."""
        self._put(b"\0" * (2 * BLOCK))
        self.close()
        sync(self._path)
        return replace(self._head, slides=tuple(slides))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _array(self, field: str, values: NDArray[Any]) -> None:
        self._begin(field, values.shape, values.dtype.str)
        self._put(np.ascontiguousarray(values).data.cast("B"))
        self._end()

    def _begin(self, field: str, shape: tuple[int, ...], dtype: str) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        name = f"{self._key}.{field}.npy"
        at = self._at + len(_tar_header(name, 0))
        header = _npy_header(shape, dtype, at)
        self._header(f"{field}.npy", len(header) + size)
        self._member, self._hash = f"{field}.npy", xxhash.xxh3_64()
        self._put(header)

    def _end(self) -> None:
        self._digests[self._member] = (self._hash.hexdigest(),)
        self._pad()

    def _header(self, field: str, size: int) -> None:
        self._put(_tar_header(f"{self._key}.{field}", size))

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        left = memoryview(data)
        self._at += len(left)
        while left:  # a raw write may take less than it is given, and says ENOSPC only at the next one
            left = left[self._file.write(left) :]

    def _pad(self) -> None:
        self._put(b"\0" * (-self._at % BLOCK))


def _tar_header(name: str, size: int) -> bytes:
    """The header block of one regular file; several blocks (GNU) where the name is long."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def samples(path: Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a tar as WebDataset groups them: neighbouring members of one key, by field."""
    key, sample = "", {}  # type: str, dict[str, Member]
    for member in walk(path, file):
        name, _, field = member.name.partition(".")
        if name != key and sample:
            yield key, sample
            sample = {}
        if field in sample or len(sample) == _MAX_FIELDS:
            what = "twice in one sample" if field in sample else f"the {_MAX_FIELDS + 1}th member of one sample"
            message = f"{path}: {member.name!r} is {what}; it is not read: {_REMEDY}"
            raise StoreFormatError(message)
        key, sample[field] = name, member
    if sample:
        yield key, sample


def _read_json(path: Path, file: BinaryIO, key: str, sample: Mapping[str, Member]) -> dict[str, Any]:
    member = sample.get("json")
    if member is None or member.size > _MAX_JSON:
        what = f"a .json of {member.size:,} bytes" if member else "no .json"
        message = f"{path}: sample {key!r} has {what}, not one of cfstore; {_REMEDY}"
        raise StoreFormatError(message)
    try:
        text = read_bytes(path, file, member.start, member.size).decode()
        content: dict[str, Any] = json.loads(text)
        if not isinstance(content["cfstore"], dict):
            raise TypeError("cfstore")
        if not is_signed(text, content["cfstore"].get("digest")):
            raise ValueError("changed after it was written")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{path}: {member.name} is no record of cfstore ({repr(error)[:200]}); restore it, or {_REMEDY}"
        raise DamagedShardError(message) from error
    return content


def _slide(path: Path, key: str, content: Mapping[str, Any]) -> SlideRecord:
    try:
        slide = slide_from_json(content["cfstore"]["slide"])
        if sample_key(slide.slide_id) != key:
            raise ValueError(f"slide_id {slide.slide_id!r}")
        return slide
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = (
            f"{path}: the record of sample {key!r} is not one ({repr(error)[:200]}); the shard is damaged: restore it"
        )
        raise DamagedShardError(message) from error


def read_shard(root: Path, shard: str) -> tuple[ShardRecord, list[Extent], dict[str, dict[str, Any]]]:
    """Record, places of all rows, and the JSON of every slide, of the tar `root / shard`.

    Reads headers and JSON, never rows. Names of members are compared, never used as paths.

    Raises
    ------
    StoreFormatError
        Not a shard of cfstore, or of a newer format; names the file.
    DamagedShardError
        Cut short, or members are not what the records say.
    """
    path = root / shard
    head: ShardRecord | None = None
    slides: list[SlideRecord] = []
    extents: list[Extent] = []
    jsons: dict[str, dict[str, Any]] = {}
    with _open(path) as file:
        for key, sample in samples(path, file):
            content = _read_json(path, file, key, sample)
            slide, own = _slide(path, key, content), _head(shard, content)
            if slide.slide_id in jsons or own != (head or own):
                what = "is in it twice" if slide.slide_id in jsons else "is of another encoder, dim or dtype"
                message = f"{path}: slide {slide.slide_id} {what}; it is not read: {_REMEDY}"
                raise StoreFormatError(message)
            head = own
            slides.append(slide)
            jsons[slide.slide_id] = content
            extents += _extents(path, file, slide, sample, head)
    if head is None:
        message = f"{path}: holds no sample; {_REMEDY}"
        raise StoreFormatError(message)
    return replace(head, slides=tuple(slides)), extents, jsons


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); restore the shard"
        raise DamagedShardError(message) from error


def _head(shard: str, content: Mapping[str, Any]) -> ShardRecord:
    described = content["cfstore"].get("shard")
    own = described if isinstance(described, dict) else {}
    if (own.get("format"), own.get("codec")) != ("webdataset", "none"):
        message = f"{shard}: records of format {own.get('format')!r} and codec {own.get('codec')!r} in a tar; {_REMEDY}"
        raise StoreFormatError(message)
    return ShardRecord.from_attributes({**own, "slides": []}, shard)


def _extents(
    path: Path, file: BinaryIO, slide: SlideRecord, sample: Mapping[str, Member], head: ShardRecord
) -> Iterator[Extent]:
    def place(field: str, array: str, scale: int | None, shape: tuple[int, ...], dtype: str) -> Extent:
        member = sample.get(field)
        found = read_array_head(path, file, member) if member else None
        if found is None or (found.shape, found.dtype) != (shape, np.dtype(dtype).newbyteorder("<")):
            what = f"{found.shape} of {found.dtype}" if found else "nothing"
            message = (
                f"{path}: slide {slide.slide_id}: {field} should hold {shape} of {dtype}, holds {what}; restore it"
            )
            raise DamagedShardError(message)
        return Extent(slide.slide_id, scale, array, found.start, (found.nbytes,))

    for bag in slide.bags:
        shape = (bag.n_patches, head.dim)
        yield place(f"x{bag.scale}.npy", "features", bag.scale, shape, ARRAY_DTYPE[head.dtype])
        if bag.has_coords:
            yield place(f"coords_x{bag.scale}.npy", "coords", bag.scale, (bag.n_patches, 2), "int32")
    if head.dtype == "int8":
        for array in ("scale", "zero"):
            yield place(f"{array}.npy", array, None, (head.dim,), "float32")


def stored_checks(root: Path, shard: str) -> Iterator[Check]:
    """A check of every slide's members, and one of the end of the archive.

    Raises
    ------
    StoreFormatError
        Headers do not lead from one member to the next.
    """
    path, end = root / shard, 0
    with _open(path) as file:
        for key, sample in samples(path, file):
            yield Check(unquote(key), partial(_damaged_members, path, key, sample))
            end = max(member.stop + -member.stop % BLOCK for member in sample.values())
    rest = path.stat().st_size - end
    wrong = [] if rest == 2 * BLOCK else [f"{path}: {rest:,} bytes at its end, {2 * BLOCK:,} were written"]
    yield Check(None, lambda: wrong)


def _damaged_members(path: Path, key: str, sample: Mapping[str, Member]) -> list[str]:
    found = []
    with _open(path) as file:
        try:
            content = _read_json(path, file, key, sample)
            digests = _slide(path, key, content).digests
        except StoreFormatError as error:
            return [str(error)]
        for field in sorted({*digests, *sample} - {"json"}):
            if field not in sample:
                found.append(f"{path}: {field} is missing")
            elif digests.get(field) != (_file_digest(path, file, sample[field]),):
                found.append(f"{path}: {sample[field].name} changed after it was written")
        for member in sample.values():
            if any(read_bytes(path, file, member.stop, -member.stop % BLOCK)):
                found.append(f"{path}: bytes after {member.name} changed after it was written")
    return found


def _file_digest(path: Path, file: BinaryIO, member: Member) -> str:
    digest = xxhash.xxh3_64()
    for at in range(member.start, member.stop, 1 << 20):
        digest.update(read_bytes(path, file, at, min(1 << 20, member.stop - at)))
    return digest.hexdigest()
