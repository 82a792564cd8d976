"""Files of derived arrays: Parquet, immutable, several slides in one, each a row group.

The columns are plain, for other tools; what the file is about (which derivation, of which bags) is JSON with a
digest of its own in the metadata. A file is written under a temporary name and appears by one rename.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from cfstore.derivation import Derivation
from cfstore.errors import DerivationError, StoreFormatError
from cfstore.schema import DERIVED_DIR
from cfstore.shards.files import BLANK_DIGEST, is_signed, sign

SUFFIX: Final = ".parquet"
_ABOUT: Final = "cfstore.derived"
_FORMAT: Final = 1
CHANGED: Final = "its bags changed meanwhile; run this again"
"""In files, in place of the source of a slide whose bags became others while they were read; never change it."""


@dataclass(frozen=True)
class DerivedEntry:
    """One slide of a file. `source` says which bags; `edges` are the patch edges used (parents only)."""

    slide_id: str
    n_rows: int
    nbytes: int
    digest: str
    source: str
    edges: tuple[float, float] | None = None


@dataclass(frozen=True)
class DerivedFile:
    """What a file holds; entry i is row group i."""

    file: str
    encoder: str
    derivation: Derivation
    version: int
    created: str
    entries: tuple[DerivedEntry, ...]


@dataclass(frozen=True)
class PrototypesFile:
    """What a file of centroids holds; `slides` gives the digest of each training slide's bag."""

    file: str
    encoder: str
    scale: int
    n: int
    seed: int
    version: int
    key: str
    slides: Mapping[str, str]
    slides_digest: str
    n_sampled: int
    inertia: float
    digest: str
    created: str


def folder_of(root: Path, encoder: str, name: str) -> Path:
    """Where files of a derivation (or of prototypes) of an encoder are."""
    return root / DERIVED_DIR / encoder / name


def published_files(root: Path) -> list[str]:
    """Files of derived arrays and of prototypes, relative to the store."""
    found = (root / DERIVED_DIR).glob(f"*/*/*{SUFFIX}")
    return sorted(path.relative_to(root).as_posix() for path in found if not path.name.startswith("."))


def now() -> str:
    """The time, for `created`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def digest_of(values: NDArray[Any]) -> str:
    """xxh3-128 of an array's bytes in C order."""
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).data)}"


# -- arrays --------------------------------------------------------------------------------------


class DerivedWriter:
    """Writes one file of `derivation`, slide after slide; `finish`, or `close` without it."""

    def __init__(self, path: Path, encoder: str, derivation: Derivation) -> None:
        self.path, self.derivation, self.encoder = path, derivation, encoder
        self._created = now()
        self._entries: list[DerivedEntry] = []
        self._file = pq.ParquetWriter(
            path,
            _schema(derivation),
            use_dictionary=["slide_id"],
            compression="zstd",
            write_page_checksum=True,
            write_statistics=["slide_id"],
        )

    def add(self, slide_id: str, values: NDArray[Any], source: str, edges: tuple[float, float] | None = None) -> None:
        """Write what was derived of one slide."""
        table = _as_table(self.derivation, slide_id, values)
        self._file.write_table(table, row_group_size=max(1, len(table)))
        self._entries.append(DerivedEntry(slide_id, len(table), values.nbytes, digest_of(values), source, edges))

    @property
    def n_entries(self) -> int:
        return len(self._entries)

    def finish(self, sources: Mapping[str, str | None]) -> list[str]:
        """Complete the file; a slide whose source is not that of `sources` any more counts for nothing: gives those."""
        entries = [
            entry if sources.get(entry.slide_id) == entry.source else replace(entry, source=CHANGED)
            for entry in self._entries
        ]
        head = DerivedFile("", self.encoder, self.derivation, self.derivation.version, self._created, tuple(entries))
        self._file.add_key_value_metadata(_about("derived", asdict(head) | {"derivation": self.derivation.name}))
        self.close()
        return [entry.slide_id for entry in entries if entry.source == CHANGED]

    def close(self) -> None:
        self._file.close()


def _columns(derivation: Derivation) -> list[str]:
    if derivation.k:
        return [f"{derivation.kind}_{number}" for number in range(1, derivation.k + 1)]
    return ["parent" if derivation.kind == "parents" else "mean"]


def _schema(derivation: Derivation) -> pa.Schema:
    kind = pa.list_(pa.float32()) if derivation.kind == "mean" else pa.int32()
    return pa.schema([("slide_id", pa.string()), *((name, kind) for name in _columns(derivation))])


def _as_table(derivation: Derivation, slide_id: str, values: NDArray[Any]) -> pa.Table:
    if derivation.kind == "mean":
        columns = [pa.array([values], pa.list_(pa.float32()))]
    elif derivation.kind == "parents":
        columns = [pa.array(values)]
    else:
        columns = [pa.array(column) for column in np.ascontiguousarray(values.T)]
    slide_ids = pa.array([slide_id] * len(columns[0]), pa.string())
    return pa.Table.from_arrays([slide_ids, *columns], schema=_schema(derivation))


def open_file(path: Path, metadata: Any = None) -> pq.ParquetFile:
    """A file opened for reading, page by page against checksums; `metadata` as read before.

    Raises
    ------
    FileNotFoundError
        It is gone.
    StoreFormatError
        It cannot be read.
    """
    try:
        return pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error


def read_values(path: Path, opened: pq.ParquetFile, derivation: Derivation, row_group: int) -> NDArray[Any]:
    """The array of one slide: int32 [N, k], int32 [N] or float32 [D].

    Raises
    ------
    StoreFormatError
        It is not what was written.
    """
    names = _columns(derivation)
    try:
        table = opened.read_row_group(row_group, columns=names, use_threads=False)
        if derivation.kind == "mean":
            return np.array(table["mean"].combine_chunks().flatten().to_numpy(zero_copy_only=False), np.float32)
        if derivation.kind == "parents":
            return np.array(table["parent"].to_numpy(), np.int32)
        values = np.empty((len(table), len(names)), np.int32)
        for number, name in enumerate(names):
            values[:, number] = table[name].to_numpy()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    return values


def read_file(root: Path, file: str) -> DerivedFile | PrototypesFile:
    """What a file says about itself.

    Raises
    ------
    StoreFormatError
        It cannot be read, or is not ours.
    """
    path = root / file
    opened = open_file(path)
    raw = (opened.metadata.metadata or {}).get(_ABOUT.encode())
    try:
        text = (raw or b"").decode()
        content = json.loads(text)
        if not is_signed(text, content.pop("signature")):
            raise ValueError("its metadata changed after it was written")
        if content.pop("format") != _FORMAT:
            raise StoreFormatError(f"{path}: written by a newer version of cfstore; use that one, or delete the file")
        kind = content.pop("what")
        content["file"] = file
        if kind == "prototypes":
            return PrototypesFile(**content)
        entries = tuple(
            DerivedEntry(**{**entry, "edges": tuple(entry["edges"]) if entry["edges"] else None})
            for entry in content.pop("entries")
        )
        return DerivedFile(derivation=Derivation.parse(content.pop("derivation")), entries=entries, **content)
    except (ValueError, KeyError, TypeError, AttributeError, DerivationError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: object) -> StoreFormatError:
    """Says that a file cannot be used, and that it can be made again."""
    words = str(error).strip().splitlines() or [repr(error)]
    return StoreFormatError(f"{path}: damaged ({words[0][:200]}); delete it: `cfstore derive` computes it again")


def _about(what: str, content: Mapping[str, Any]) -> dict[str, str]:
    about = {"format": _FORMAT, "what": what, **content, "signature": BLANK_DIGEST}
    return {_ABOUT: sign(json.dumps(about))}


# -- prototypes ----------------------------------------------------------------------------------


def write_prototypes(path: Path, about: PrototypesFile, centroids: NDArray[np.float32], sizes: Sequence[int]) -> None:
    """Write centroids [n, D] and how many sampled patches each has."""
    table = pa.table(
        {
            "prototype": pa.array(range(len(centroids)), pa.int32()),
            "n_sampled": pa.array(sizes, pa.int64()),
            "centroid": pa.array(list(centroids), pa.list_(pa.float32())),
        }
    )
    table = table.replace_schema_metadata(_about("prototypes", asdict(about)))
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False)


def read_centroids(path: Path, digest: str) -> NDArray[np.float32]:
    """The centroids [n, D] of a file; StoreFormatError where they are not what was written."""
    opened = open_file(path)
    try:
        table = opened.read(columns=["centroid"], use_threads=False)
        centroids = np.array(table["centroid"].to_pylist(), np.float32)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    if digest_of(centroids) != digest:
        raise damaged(path, "its centroids are not what was written")
    return centroids
