"""What lies in a tar, said by bounded reads: nothing is unpacked, followed, executed or believed.

Headers of 512 bytes are taken apart by the standard library; the walk from one to the next is
ours, because `tarfile` reads name extensions of any size into memory and stops without a word at
a damaged header.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, Final

import numpy as np

from cfstore.errors import DamagedShardError, StoreFormatError

BLOCK: Final = 512
_MAX_NAME: Final = 64 << 10
_MAX_TAIL: Final = 1 << 20
_MAX_NPY_HEADER: Final = 10_000
_CHECKSUM_END: Final = slice(154, 156)
_NPY_MAGIC: Final = b"\x93NUMPY\x01\x00"
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_KINDS: Final = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_REMEDY: Final = "it is not read: make shards with `cfstore export`"


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file: its content is bytes [start, start + size) of the tar."""

    name: str
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class ArrayHead:
    """The rows of a `.npy` member: their first byte in the tar, shape and dtype."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    nbytes: int


def read_bytes(path: Path, file: BinaryIO, start: int, size: int) -> bytes:
    """Bytes [start, start + size) of `file`, all of them; DamagedShardError where it ends before."""
    try:
        data = os.pread(file.fileno(), size, start)
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); restore the shard"
        raise DamagedShardError(message) from error
    if len(data) != size:
        message = (
            f"{path}: ends at byte {start + len(data):,}, in the middle of something; it was cut short: restore it"
        )
        raise DamagedShardError(message)
    return data


def walk(path: Path, file: BinaryIO) -> Iterator[Member]:
    """Every member of the tar `file` from front to end.

    Raises
    ------
    StoreFormatError
        Compressed, or something else than regular files in one folder.
    DamagedShardError
        Cut short, or a header that is none.
    """
    total = os.fstat(file.fileno()).st_size
    _check_plain(path, file, total)
    at, long_name = 0, None  # type: int, str | None
    while True:
        block = read_bytes(path, file, at, BLOCK)
        if not any(block):
            break
        info = _header(path, block, at)
        start = at + BLOCK
        if not 0 <= info.size <= total - start:
            message = (
                f"{path}: {info.name[:200]!r} declares {info.size:,} bytes, {total - start:,} are left; "
                "the shard was cut short or is none: restore it"
            )
            raise DamagedShardError(message)
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            long_name = _long_name(path, file, info, start) or long_name
        else:
            yield _member(path, info, long_name or info.name, start)
            long_name = None
        at = start + info.size + -info.size % BLOCK
    tail = total - at
    if tail > _MAX_TAIL or any(read_bytes(path, file, at, tail)):
        message = f"{path}: {tail:,} bytes follow the end of the archive, and not zeros; {_REMEDY}"
        raise StoreFormatError(message)


def _check_plain(path: Path, file: BinaryIO, total: int) -> None:
    first = read_bytes(path, file, 0, min(total, BLOCK))
    kind = next((kind for magic, kind in _COMPRESSED.items() if first.startswith(magic)), None)
    if kind:
        message = f"{path}: compressed with {kind}; rows are read in place, so shards are plain tars: unpack it to .tar"
        raise StoreFormatError(message)
    if not total:
        message = f"{path}: an empty file; the shard was cut short: restore it"
        raise DamagedShardError(message)


def _header(path: Path, block: bytes, at: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if block[_CHECKSUM_END] not in (b"\0 ", b" \0"):  # the only bytes that the checksum does not cover
            raise ValueError("its checksum does not end as one")
        return info
    except (tarfile.TarError, ValueError) as error:
        message = f"{path}: no tar header at byte {at:,} ({error}); the shard is damaged, or no tar: restore it"
        raise DamagedShardError(message) from error


def _member(path: Path, info: tarfile.TarInfo, name: str, start: int) -> Member:
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        message = f"{path}: {name[:200]!r} is {_KINDS.get(info.type, 'of an unknown kind')}, no regular file; {_REMEDY}"
        raise StoreFormatError(message)
    if "/" in name or "\0" in name or not name.isprintable():
        message = f"{path}: {name[:200]!r} is no name that cfstore gives: samples lie in no folder; {_REMEDY}"
        raise StoreFormatError(message)
    return Member(name, start, info.size)


def _long_name(path: Path, file: BinaryIO, info: tarfile.TarInfo, start: int) -> str | None:
    """The name that a GNU or PAX extension gives to the member after it, if it gives one."""
    if info.size > _MAX_NAME:
        message = f"{path}: an extended header of {info.size:,} bytes; {_REMEDY}"
        raise StoreFormatError(message)
    content = read_bytes(path, file, start, info.size)
    try:
        if any(read_bytes(path, file, start + info.size, -info.size % BLOCK)):
            raise ValueError("bytes after its end")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name, _, rest = content.partition(b"\0")
            if any(rest):
                raise ValueError("bytes after its end")
            return name.decode()
        fields = _pax_fields(content)
        if "size" in fields or any(field.startswith("GNU.sparse") for field in fields):
            raise ValueError("a size of its own")
        return fields["path"].decode() if "path" in fields else None
    except ValueError as error:
        message = f"{path}: an extended header with {error}; {_REMEDY}"
        raise StoreFormatError(message) from error


def _pax_fields(content: bytes) -> dict[str, bytes]:
    """Records `<length> <field>=<value>\\n`; ValueError where they are none."""
    fields, at = {}, 0
    while at < len(content):
        digits = content[at : at + 8].partition(b" ")[0]
        length = int(digits)
        record = content[at + len(digits) + 1 : at + length]
        field, equals, value = record.partition(b"=")
        if not len(digits) + 1 < length <= len(content) - at or not equals or not value.endswith(b"\n"):
            raise ValueError("no records")
        fields[field.decode()] = value[:-1]
        at += length
    return fields


def read_array_head(path: Path, file: BinaryIO, member: Member) -> ArrayHead:
    """Where the rows of a `.npy` member are, checked against its size. Objects are never unpickled.

    Raises
    ------
    DamagedShardError
        No plain array, or of another size than its header says.
    """
    content = io.BytesIO(read_bytes(path, file, member.start, min(member.size, _MAX_NPY_HEADER)))
    try:
        if content.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
            raise ValueError("no .npy of version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(content, max_header_size=_MAX_NPY_HEADER)
        if fortran or dtype.hasobject or any(n < 0 for n in shape):
            raise ValueError(f"shape {shape} of {dtype}")
        nbytes = dtype.itemsize
        for n in shape:
            nbytes *= int(n)
        if content.tell() + nbytes != member.size:
            raise ValueError(f"shape {shape} of {dtype} in {member.size:,} bytes")
    except (ValueError, TypeError, KeyError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        message = f"{path}: {member.name} is no plain .npy array ({str(error)[:200]}); the shard is damaged: restore it"
        raise DamagedShardError(message) from error
    return ArrayHead(member.start + content.tell(), shape, dtype, nbytes)
