"""What shards say of themselves, as rows of the catalog; and which of their slides were removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cfstore.catalog.connection import first_line
from cfstore.catalog.internal import OF_SHARDS, insert
from cfstore.convert import ARRAY_DTYPE
from cfstore.errors import StoreFormatError
from cfstore.schema import BAGS, REMOVED_FILE, TABLES_DIR
from cfstore.shards import Extent, ShardRecord, commit, read_record, read_shard

_REMOVED: Final = pa.schema([("shard", pa.string()), ("slide_id", pa.string())])


def _bag_rows(record: ShardRecord, places: dict[tuple[str, int | None, str], Extent]) -> pa.Table:
    size = np.dtype(ARRAY_DTYPE[record.dtype]).itemsize
    rows = [
        {
            "slide_id": slide.slide_id,
            "encoder": record.encoder,
            "dim": record.dim,
            "dtype": record.dtype,
            "codec": record.codec,
            "bytes": bag.n_patches * record.dim * size,
            "shard": record.shard,
            **_bytes_of(places[slide.slide_id, bag.scale, "features"], record, bag.n_patches),
            **{name: getattr(bag, name) for name, _, _ in BAGS if hasattr(bag, name)},
        }
        for slide in record.slides
        for bag in slide.bags
    ]
    return pa.Table.from_pylist(rows)


def _bytes_of(extent: Extent, record: ShardRecord, n_patches: int) -> dict[str, int]:
    """Where the stored features of a bag begin and how many bytes they are: its rows, or the chunks that hold them."""
    if record.codec == "none":
        length = n_patches * record.dim * np.dtype(ARRAY_DTYPE[record.dtype]).itemsize
        return {"byte_start": extent.byte_start + extent.decoded_start, "byte_length": length}
    return {"byte_start": extent.byte_start, "byte_length": sum(extent.sizes)}


def add_shards(
    connection: duckdb.DuckDBPyConnection,
    root: Path,
    records: Iterable[ShardRecord],
    places: Mapping[str, Sequence[Extent]] = MappingProxyType({}),
) -> set[str]:
    """Enter shards, less what was removed of them, for those that they replace.

    Returns the slides whose bags are not what they were.
    """
    removed, changed = read_removed(root), set()  # type: set[tuple[str, str]], set[str]
    for record in records:
        extents = places[record.shard] if record.shard in places else read_shard(root, record.shard)[1]
        slides = [slide for slide in record.slides if (record.shard, slide.slide_id) not in removed]
        kept = {slide.slide_id for slide in slides}
        changed |= kept.union(*(drop_shard(connection, replaced) for replaced in record.replaces))
        _add_shard(connection, replace(record, slides=tuple(slides)), [e for e in extents if e.slide_id in kept])
    return changed


def _add_shard(connection: duckdb.DuckDBPyConnection, record: ShardRecord, extents: Sequence[Extent]) -> None:
    known = [record.shard, record.chunk_rows, list(record.replaces)]
    connection.execute("INSERT INTO internal.shards VALUES (?, ?, ?)", known)
    if not record.slides:
        return
    insert(connection, "bags", _bag_rows(record, {(e.slide_id, e.scale, e.array): e for e in extents}))
    named = ("slide_id", "cohort", "folder")
    slides = [{"shard": record.shard, **{name: getattr(slide, name) for name in named}} for slide in record.slides]
    strings = pa.schema([(name, pa.string()) for name in ("shard", *named)])
    insert(connection, "internal.shard_slides", pa.Table.from_pylist(slides, schema=strings))
    columns: dict[str, Any] = {
        "shard": [record.shard] * len(extents),
        "slide_id": [e.slide_id for e in extents],
        "scale": pa.array([e.scale for e in extents], pa.int32()),
        "array_name": [e.array for e in extents],
        "byte_start": [e.byte_start for e in extents],
        "sizes": pa.array([e.sizes for e in extents], pa.list_(pa.int64())),
        "decoded_start": [e.decoded_start for e in extents],
        "digests": pa.array([e.digests for e in extents], pa.list_(pa.uint64())),
    }
    insert(connection, "internal.extents", pa.table(columns))


def drop_shard(connection: duckdb.DuckDBPyConnection, shard: str) -> set[str]:
    """Take a shard out; returns its slides."""
    query = "SELECT slide_id FROM internal.shard_slides WHERE shard = ?"
    slides = {slide_id for (slide_id,) in connection.execute(query, [shard]).fetchall()}
    for table in OF_SHARDS:
        connection.execute(f"DELETE FROM {table} WHERE shard = ?", [shard])
    return slides


def read_removed(root: Path) -> set[tuple[str, str]]:
    """Slides that `cfstore rm` took out: (shard, slide_id)."""
    path = root / TABLES_DIR / REMOVED_FILE
    if not path.exists():
        return set()
    try:
        rows = pq.read_table(path, page_checksum_verification=True)
        return set(zip(rows["shard"].to_pylist(), rows["slide_id"].to_pylist(), strict=True))
    except (OSError, KeyError, pa.ArrowException) as error:
        message = (
            f"{path}: cannot be read ({first_line(error)}); restore it, or delete it and run `cfstore reindex`: "
            "removed slides that `cfstore compact` has not dropped yet come back then"
        )
        raise StoreFormatError(message) from error


def write_removed(root: Path, removed: Iterable[tuple[str, str]]) -> None:
    """Replace the list of removed slides. Needs the write lock; the catalog is told by `forget` or `rebuild`."""
    path = root / TABLES_DIR / REMOVED_FILE
    rows = [dict(zip(_REMOVED.names, pair, strict=True)) for pair in sorted(removed)]
    temporary = path.with_name(f".{path.name}")
    pq.write_table(pa.Table.from_pylist(rows, schema=_REMOVED), temporary, write_page_checksum=True)
    commit(temporary, path)


def live_records(root: Path, shards: Iterable[str]) -> list[ShardRecord]:
    """The records of `shards`, without those that another one of them replaces."""
    records = [read_record(root, shard) for shard in shards]
    replaced = {shard for record in records for shard in record.replaces}
    return [record for record in records if record.shard not in replaced]
