"""From bytes on disk to named columns of text: zip, byte order mark, comments, delimiter."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from cfstore.clinical.cells import blank_missing
from cfstore.errors import ClinicalError

MAX_BYTES: Final = 1 << 30  # a zip of a few kB can claim any size; no cohort comes near this
_HEAD_BYTES: Final = 4 << 20  # headers of 9,000 genes are some 150 kB
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_UNNAMED: Final = re.compile(r"(Unnamed: \d+(\.\d+)*)?$")
_ZIP_MAGIC: Final = b"PK\x03\x04"
_BOM: Final = b"\xef\xbb\xbf"
UNREADABLE: Final = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)
"""What reading a damaged, encrypted or strangely compressed file can raise."""


@dataclass(frozen=True, slots=True, eq=False)
class RawTable:
    """Columns of text as the file has them, missing markers null; names may repeat."""

    path: Path
    digest: str
    names: tuple[str, ...]
    columns: tuple[pa.Array, ...]
    n_rows: int
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> pa.Array:
        """The first column of that name."""
        return self.columns[self.names.index(name)]

    def take(self, rows: NDArray[np.int64]) -> RawTable:
        """The table of these rows only."""
        columns = tuple(column.take(pa.array(rows)) for column in self.columns)
        return RawTable(self.path, self.digest, self.names, columns, len(rows), self.notes)


@dataclass(frozen=True, slots=True)
class _Header:
    names: list[str]
    delimiter: str
    end: int  # where the first row starts


def read_raw(path: Path) -> RawTable:
    """Every row and named column of the file, as text.

    Raises
    ------
    ClinicalError
        If the file cannot be read, is no text table, or holds no row.
    """
    try:
        _check_size(path, path.stat().st_size)
        data = path.read_bytes()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        text = _unzipped(path, data)
    except UNREADABLE as error:
        message = f"{path.name}: cannot be read ({error})"
        raise ClinicalError(message) from error
    text, notes = _utf8(path, text.removeprefix(_BOM))
    header = _header(path, text)
    return _columns(path, digest, header, text[header.end :], notes)


def read_names(path: Path) -> list[str]:
    """The column names alone, from the first bytes of the file."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_ZIP_MAGIC):
        with zipfile.ZipFile(path) as archive, archive.open(_member(path, archive)) as member:
            head = member.read(_HEAD_BYTES)
    return _header(path, head.removeprefix(_BOM)).names


def _check_size(path: Path, n_bytes: int) -> None:
    if n_bytes > MAX_BYTES:
        message = f"{path.name}: {n_bytes} bytes are more than a clinical table can have ({MAX_BYTES})"
        raise ClinicalError(message)


def _member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    # macOS adds a shadow of every file; the member's own name says nothing (MCAT's has "../" in it)
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        message = f"{path.name}: a zip with {len(members)} files; leave only the clinical table in it"
        raise ClinicalError(message)
    return members[0]


def _unzipped(path: Path, data: bytes) -> bytes:
    if not data.startswith(_ZIP_MAGIC):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = _member(path, archive)
        _check_size(path, member.file_size)
        return archive.read(member)


def _utf8(path: Path, text: bytes) -> tuple[bytes, tuple[str, ...]]:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        # what Excel on Windows saves; its few undefined bytes cannot occur in the fields we read
        return text.decode("cp1252", errors="replace").encode(), (f"{path.name} is not UTF-8: read as Windows-1252",)
    return text, ()


def _header(path: Path, text: bytes) -> _Header:
    if b"\0" in text[:_HEAD_BYTES]:
        message = f"{path.name}: not a text table (binary, or UTF-16: save it as UTF-8)"
        raise ClinicalError(message)
    start = 0
    while True:
        found = _LINE_END.search(text, start)
        line, end = (text[start : found.start()], found.end()) if found else (text[start:], len(text))
        # cBioPortal describes its columns in four lines that start with '#', quoted by some programs
        if end == len(text) or (line.strip() and not line.lstrip(b'"').startswith(b"#")):
            break
        start = end
    words = line.decode("utf-8", errors="replace")
    delimiter = max("\t,;", key=words.count)
    try:
        return _Header(next(csv.reader([words], delimiter=delimiter), []), delimiter, end)
    except csv.Error as error:
        message = f"{path.name}: its first line is no header ({error})"
        raise ClinicalError(message) from error


def _columns(path: Path, digest: str, header: _Header, body: bytes, notes: tuple[str, ...]) -> RawTable:
    if not body.strip():
        message = f"{path.name}: a header ({', '.join(header.names[:10])}) and no row"
        raise ClinicalError(message)
    table = _parsed(path, header, body)
    names = [name.strip() for name in header.names]
    # nameless columns are row numbers that pandas or Excel left behind
    kept = [number for number, name in enumerate(names) if not _UNNAMED.match(name)]
    columns = tuple(blank_missing(table.column(number).combine_chunks()) for number in kept)
    return RawTable(path, digest, tuple(names[number] for number in kept), columns, table.num_rows, notes)


def _parsed(path: Path, header: _Header, body: bytes) -> pa.Table:
    numbers = [str(number) for number in range(len(header.names))]  # the names themselves may repeat
    try:
        return pacsv.read_csv(
            pa.BufferReader(body),
            # one block: a row of 9,000 genes may be longer than the default block
            read_options=pacsv.ReadOptions(column_names=numbers, block_size=len(body) + 1),
            parse_options=pacsv.ParseOptions(delimiter=header.delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(numbers, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        message = f"{path.name}: its rows do not fit its header of {len(numbers)} columns ({str(error)[:200]})"
        raise ClinicalError(message) from error
