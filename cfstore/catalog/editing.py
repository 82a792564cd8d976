"""The DuckDB index is written by replacing the whole file, so readers are never locked out.

DuckDB lets no process read a file while another writes to it, and no process write while a
reader has it open. So a writer copies the catalog, changes the copy, and renames it into place
under the store's write lock; whoever has the old one open keeps reading it. Everything in it
can be rebuilt from the shards and `tables/`.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

import duckdb
import pyarrow as pa

from cfstore import derived_tables
from cfstore.catalog.connection import AMONG, asking, connect, first_line
from cfstore.catalog.internal import SNAPSHOT, create_tables, insert, trails
from cfstore.catalog.questions import all_replaced
from cfstore.catalog.shard_rows import add_shards, drop_shard, live_records, read_removed
from cfstore.catalog.table_rows import follow, known_tables, load_tables, name_table_objects, table_digests
from cfstore.derived_files import published_files
from cfstore.errors import DamagedShardError, StoreWriteError
from cfstore.locks import discard
from cfstore.schema import CATALOG_FILE, SNAPSHOT_FILE, STAGED_FILE, TABLES_DIR
from cfstore.shards import Extent, ShardRecord, commit, published_shards, read_record

_DISK_ERRORS: Final = (
    OSError,
    duckdb.IOException,
    duckdb.FatalException,
    duckdb.InternalException,
    duckdb.TransactionException,
)


@contextmanager
def _edit(root: Path, *, afresh: bool = False, with_snapshot: bool = True) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a copy of the catalog (or an empty one), renamed into place on success. Needs the write lock."""
    current, staged = root / CATALOG_FILE, (root / STAGED_FILE).exists()
    sweep_temporary(root)
    copy, snapshot = root / f".{CATALOG_FILE}.{uuid.uuid4().hex}", root / f".{SNAPSHOT_FILE}"
    try:
        if current.exists() and not afresh:
            shutil.copyfile(current, copy)
        with duckdb.connect(copy) as connection:
            create_tables(connection)
            yield connection
            if staged:
                name_table_objects(connection, root)
            if with_snapshot:
                connection.execute("DELETE FROM internal.trailing")
            if with_snapshot and not staged:  # `remote.staging` puts it when the writing ends
                _copy_snapshot(connection, snapshot)
            connection.execute("CHECKPOINT")
        # The snapshot first: cut off between the two, the catalog is behind what is on disk or says that the
        # snapshot is, and `reconcile` does it again. A snapshot that is behind would go unnoticed.
        if with_snapshot and not staged:
            commit(snapshot, root / SNAPSHOT_FILE)
        commit(copy, current)
    except _DISK_ERRORS as error:
        message = (
            f"{root}: the catalog cannot be written ({first_line(error)}); nothing that was committed is lost: "
            "free space or mend permissions, then run this again"
        )
        raise StoreWriteError(message) from error
    finally:
        sweep_temporary(root)


def _copy_snapshot(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    connection.execute(f"COPY ({SNAPSHOT}) TO ? (FORMAT parquet)", [str(path)])


def write_snapshot(root: Path) -> None:
    """Make `catalog.parquet` of the catalog as it is; `_edit` does it except where the folder stands for a bucket."""
    with connect(root) as connection:
        _copy_snapshot(connection, root / SNAPSHOT_FILE)


def sweep_temporary(root: Path) -> None:
    """Remove what a process that died left of catalogs and tables it was writing. Needs the write lock."""
    for pattern in (f".{CATALOG_FILE}.*", f".{SNAPSHOT_FILE}", f"{TABLES_DIR}/.*.parquet"):
        for leftover in root.glob(pattern):
            discard(leftover)


def note_swept(root: Path, names: Iterable[str]) -> None:
    """Write down that these uploads are given up. Needs the write lock."""
    with _edit(root) as connection:
        insert(connection, "internal.swept", pa.table({"name": pa.array(sorted(names), pa.string())}))


def register(
    root: Path, records: Sequence[ShardRecord], places: Mapping[str, Sequence[Extent]] = MappingProxyType({})
) -> None:
    """Make published shards visible; `places` are those of shards that were read already. Needs the write lock.

    It looks at the slides of these shards only. The snapshot, written as a whole, trails until `reload_tables`.
    """
    with _edit(root, with_snapshot=False) as connection:
        follow(connection, root, sorted(add_shards(connection, root, records, places)))
        connection.execute("DELETE FROM internal.trailing")
        connection.execute("INSERT INTO internal.trailing VALUES (?)", [SNAPSHOT_FILE])


def forget(root: Path, removed: Iterable[tuple[str, str]]) -> None:
    """Take removed slides, (shard, slide_id), out of the catalog. Needs the write lock."""
    pairs = list(removed)
    with _edit(root) as connection:
        for pair in pairs:
            for table in ("bags", "internal.shard_slides", "internal.extents"):
                connection.execute(f"DELETE FROM {table} WHERE shard = ? AND slide_id = ?", list(pair))
        follow(connection, root, sorted({slide_id for _, slide_id in pairs}))


def drop_shards(root: Path, shards: Iterable[str]) -> None:
    """Take deleted shards out of the catalog. Needs the write lock."""
    with _edit(root) as connection:
        slides = {slide_id for shard in shards for slide_id in drop_shard(connection, shard)}
        follow(connection, root, sorted(slides))


def reload_tables(root: Path) -> None:
    """Take over changed files of `tables/`, and write the snapshot where it trails. Needs the write lock."""
    with connect(root) as connection:
        unchanged = known_tables(connection) == table_digests(root)
        if unchanged and (root / SNAPSHOT_FILE).exists() and not trails(connection):
            return
    with _edit(root) as connection:
        if not unchanged:
            load_tables(connection, root)


def reload_derived(root: Path, *, everything: bool = False) -> None:
    """Take over changed files of `derived/`; with `everything`, list anew what counts of any. Needs the write lock."""
    with _edit(root, with_snapshot=False) as connection:
        (derived_tables.load if everything else derived_tables.follow)(connection, root)


def rebuild(root: Path) -> None:
    """Make the catalog anew from shards, `tables/` and `derived/` alone. Needs the write lock.

    Raises
    ------
    StoreFormatError
        A shard cannot be read; the catalog stays as it was.
    """
    with _edit(root, afresh=True) as connection:
        try:
            add_shards(connection, root, live_records(root, published_shards(root)))
        except DamagedShardError as error:
            message = (
                f"{error}. The catalog stays as it was. Without a copy to restore: delete the shard, "
                "`cfstore reindex`, and ingest its slides again"
            )
            raise DamagedShardError(message) from error
        load_tables(connection, root)
        derived_tables.load(connection, root)


def reconcile(root: Path) -> int:
    """Bring the catalog up to date with what other processes left, dying; how many shards it lacked.

    Needs the write lock.
    """
    missing = adopt(root)
    with asking(root) as connection:
        behind = derived_tables.is_behind(connection)
        derived = derived_tables.known_files(connection)
    if behind or derived != set(published_files(root)):
        reload_derived(root, everything=behind)
    reload_tables(root)
    return missing


def adopt(root: Path) -> int:
    """Register shards that were published but never registered, and forget slides that were removed but not forgotten.

    What a commit has to know: a process may have died between the two. Needs the write lock.
    """
    if not (root / CATALOG_FILE).exists():
        rebuild(root)
        return len(published_shards(root))
    removed = read_removed(root)
    with asking(root) as connection:
        known = {shard for (shard,) in connection.execute("SELECT shard FROM internal.shards").fetchall()}
        known |= all_replaced(connection)
        query = f"SELECT shard, slide_id FROM internal.shard_slides WHERE {AMONG}"
        listed = (
            set(connection.execute(query, [[slide_id for _, slide_id in removed]]).fetchall()) if removed else set()
        )
    if removed & listed:
        forget(root, removed & listed)
    missing = [shard for shard in published_shards(root) if shard not in known]
    if missing:
        records = [read_record(root, shard) for shard in missing]
        replaced = {shard for shard in missing if any(shard in record.replaces for record in records)}
        register(root, [record for record in records if record.shard not in replaced])
    return len(missing)
