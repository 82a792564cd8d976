"""The DuckDB index: written by replacing the whole file, so readers are never locked out.

DuckDB lets no process read a file while another writes to it, and no process write while a
reader has it open. So a writer copies the catalog, changes the copy, and renames it into place
under the store's write lock; whoever has the old one open keeps reading it. Everything in it
can be rebuilt from the shards and `tables/`.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cfstore import derived_tables
from cfstore.convert import ARRAY_DTYPE
from cfstore.derived_files import published_files
from cfstore.errors import DamagedShardError, StoreFormatError, StoreWriteError
from cfstore.labels import CohortLabels, Resolver, collect, possible_patients
from cfstore.locks import discard
from cfstore.schema import BAGS, CATALOG_FILE, REMOVED_FILE, SNAPSHOT_FILE, STAGED_FILE, TABLES, TABLES_DIR, ddl
from cfstore.shards import Extent, ShardRecord, commit, published_shards, read_record, read_shard

PATIENTS_PREFIX: Final = "patients-"
SLIDE_LABELS_PREFIX: Final = "slides-"
SPLITS_PREFIX: Final = "splits-"
SKIPPED_PREFIX: Final = "skipped-"

# What users' SQL does not see: the registered shards, what they say of a slide before labels are
# looked up, where every array of every bag lies, which files of `tables/` were taken over, and
# which file beside the catalog is behind it: the snapshot, while shards are being registered.
# Of a store in a bucket (see `remote.commits`) also: which objects are the files of `tables/`, and
# which uploads were swept away and must not be named any more.
_INTERNAL: Final = {
    "shards": "shard VARCHAR, chunk_rows INTEGER, replaces VARCHAR[]",
    "shard_slides": "slide_id VARCHAR, cohort VARCHAR, folder VARCHAR, shard VARCHAR",
    "extents": "shard VARCHAR, slide_id VARCHAR, scale INTEGER, array_name VARCHAR, byte_start BIGINT, "
    "sizes BIGINT[], decoded_start BIGINT, digests UBIGINT[]",
    "tables": "file VARCHAR, digest VARCHAR",
    "trailing": "file VARCHAR",
    "table_objects": "file VARCHAR, digest VARCHAR, object VARCHAR",
    "swept": "name VARCHAR",
    **derived_tables.INTERNAL,
}
_OF_SHARDS: Final = ("bags", "internal.shards", "internal.shard_slides", "internal.extents")
AMONG: Final = "slide_id IN (SELECT unnest(?::VARCHAR[]))"
"""A condition: the slide is in a list, however long. Its parameter is the list."""
_REMOVED: Final = pa.schema([("shard", pa.string()), ("slide_id", pa.string())])
_DISK_ERRORS: Final = (
    OSError,
    duckdb.IOException,
    duckdb.FatalException,
    duckdb.InternalException,
    duckdb.TransactionException,
)
_SNAPSHOT: Final = """
    SELECT bags.*, slides.cohort, slides.patient_id, patients.* EXCLUDE (cohort, patient_id)
    FROM bags JOIN slides USING (slide_id)
    LEFT JOIN patients ON patients.cohort = slides.cohort AND patients.patient_id = slides.patient_id
    ORDER BY bags.slide_id, bags.encoder, bags.scale
"""


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
            _create_tables(connection)
            yield connection
            if staged:
                _name_table_objects(connection, root)
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
            f"{root}: the catalog cannot be written ({_first_line(error)}); nothing that was committed is lost: "
            "free space or mend permissions, then run this again"
        )
        raise StoreWriteError(message) from error
    finally:
        sweep_temporary(root)


def _copy_snapshot(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    connection.execute(f"COPY ({_SNAPSHOT}) TO ? (FORMAT parquet)", [str(path)])


def write_snapshot(root: Path) -> None:
    """Make `catalog.parquet` of the catalog as it is; `_edit` does it except where the folder stands for a bucket."""
    with connect(root) as connection:
        _copy_snapshot(connection, root / SNAPSHOT_FILE)


def sweep_temporary(root: Path) -> None:
    """Remove what a process that died left of catalogs and tables it was writing. Needs the write lock."""
    for pattern in (f".{CATALOG_FILE}.*", f".{SNAPSHOT_FILE}", f"{TABLES_DIR}/.*.parquet"):
        for leftover in root.glob(pattern):
            discard(leftover)


def _create_tables(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute("CREATE SCHEMA IF NOT EXISTS internal")
    for table, columns in _INTERNAL.items():
        connection.execute(f"CREATE TABLE IF NOT EXISTS internal.{table} ({columns})")
    for table in TABLES:
        connection.execute(ddl(table).replace("OR REPLACE TABLE", "TABLE IF NOT EXISTS"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:300]


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    connection.register("incoming", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
    connection.unregister("incoming")


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


def _tables(root: Path, prefix: str) -> list[str]:
    return [str(path) for path in sorted((root / TABLES_DIR).glob(f"{prefix}*.parquet"))]


def _load_table(connection: duckdb.DuckDBPyConnection, root: Path, table: str, prefix: str) -> None:
    """Fill one catalog table from its Parquet files; columns beyond the known ones follow them."""
    connection.execute(ddl(table))
    files = _tables(root, prefix)
    if not files:
        return
    relation = connection.read_parquet(files, union_by_name=True)
    known = {name for name, _, _ in TABLES[table]}
    for name, kind in zip(relation.columns, relation.types, strict=True):
        if name not in known:
            connection.execute(f'ALTER TABLE {table} ADD COLUMN "{name.replace(chr(34), chr(34) * 2)}" {kind}')
    connection.execute(
        f"INSERT INTO {table} BY NAME SELECT * FROM read_parquet(?, union_by_name=true)",
        [files],
    )


def read_labels(
    connection: duckdb.DuckDBPyConnection, root: Path, slide_ids: Sequence[str] | None = None
) -> dict[str, CohortLabels]:
    """What the imported clinical tables say, by cohort: all of it, or what may concern some slides."""
    files = _tables(root, SLIDE_LABELS_PREFIX)
    patients, slides = (
        "SELECT cohort, patient_id FROM patients",
        "SELECT cohort, slide_id, patient_id FROM read_parquet(?)",
    )
    if slide_ids is None:
        found = connection.execute(patients).fetchall()
        return collect(found, connection.execute(slides, [files]).fetchall() if files else [])
    possible = sorted({patient_id for slide_id in slide_ids for patient_id in possible_patients(slide_id)})
    listed = connection.execute(f"{slides} WHERE {AMONG}", [files, list(slide_ids)]).fetchall() if files else []
    return collect(
        connection.execute(f"{patients} WHERE patient_id IN (SELECT unnest(?::VARCHAR[]))", [possible]).fetchall(),
        listed,
    )


def _resolve_slides(connection: duckdb.DuckDBPyConnection, root: Path, slide_ids: Sequence[str] | None = None) -> None:
    """Fill `slides` anew, or those rows of it; the labels have to be what they were when the others were filled."""
    some, parameters = ("true", []) if slide_ids is None else (AMONG, [list(slide_ids)])  # type: str, list[Any]
    query = (
        "SELECT slide_id, max(cohort), arg_min(folder, split_part(shard, '/', 3)) "  # shard names sort by time
        f"FROM internal.shard_slides WHERE {some} GROUP BY slide_id ORDER BY slide_id"
    )
    found = connection.execute(query, parameters).fetchall()
    resolver = Resolver(read_labels(connection, root, slide_ids))
    owners = [resolver.owner(slide_id, given, folder) for slide_id, given, folder in found]
    if slide_ids is None:
        connection.execute(ddl("slides"))
    else:
        connection.execute(f"DELETE FROM slides WHERE {AMONG}", parameters)
    if found:
        rows = {
            "slide_id": [slide_id for slide_id, _, _ in found],
            "patient_id": pa.array([owner.patient_id for owner in owners], pa.string()),
            "cohort": [owner.cohort for owner in owners],
        }
        _insert(connection, "slides", pa.table(rows))


def _table_digests(root: Path) -> dict[str, str]:
    """The files of `tables/` and the digest of each."""
    prefixes = (PATIENTS_PREFIX, SLIDE_LABELS_PREFIX, SPLITS_PREFIX, SKIPPED_PREFIX)
    files = [Path(name) for prefix in prefixes for name in _tables(root, prefix)]
    return {path.name: digest_of_file(path) for path in files}


def digest_of_file(path: Path) -> str:
    """xxh3-128 of a file of `tables/`."""
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"


def _name_table_objects(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Give every file of `tables/` that is new or changed an object name that no other ever had."""
    known = {file: (digest, name) for file, digest, name in table_objects(connection)}
    connection.execute("DELETE FROM internal.table_objects")
    for path in sorted((root / TABLES_DIR).glob("[!.]*.parquet")):
        digest, name = digest_of_file(path), f"{TABLES_DIR}/{uuid.uuid4().hex}/{path.name}"
        held = known.get(path.name, ("", ""))
        row = [path.name, digest, held[1] if held[0] == digest else name]
        connection.execute("INSERT INTO internal.table_objects VALUES (?, ?, ?)", row)


def table_objects(connection: duckdb.DuckDBPyConnection) -> list[tuple[str, str, str]]:
    """File of `tables/`, its digest and its object in a bucket; none where they are called as in a folder."""
    if not derived_tables.has_table(connection, "table_objects", "internal"):
        return []
    return connection.execute("SELECT file, digest, object FROM internal.table_objects ORDER BY file").fetchall()


@dataclass(frozen=True)
class Named:
    """The objects of a bucket that a catalog names.

    Parameters
    ----------
    shards, derived
        Their names; those of shards are what the names of their objects begin with.
    tables
        By file of `tables/`, its digest and its object.
    swept
        Shards and objects that were taken for left behind: nothing may name them any more.
    """

    shards: frozenset[str]
    derived: frozenset[str]
    tables: Mapping[str, tuple[str, str]]
    swept: frozenset[str]

    def holds(self, name: str) -> bool:
        """Whether a shard or object is named."""
        return name in self.shards or name in self.derived or any(name == key for _, key in self.tables.values())


def read_named(root: Path) -> Named:
    """What the catalog names."""
    with connect(root) as connection:
        shards = connection.execute("SELECT shard FROM internal.shards").fetchall()
        has_swept = derived_tables.has_table(connection, "swept", "internal")
        swept = connection.execute("SELECT name FROM internal.swept").fetchall() if has_swept else []
        return Named(
            frozenset(shard for (shard,) in shards),
            frozenset(derived_tables.known_files(connection)),
            {file: (digest, name) for file, digest, name in table_objects(connection)},
            frozenset(name for (name,) in swept),
        )


def note_swept(root: Path, names: Iterable[str]) -> None:
    """Write down that these uploads are given up. Needs the write lock."""
    with _edit(root) as connection:
        _insert(connection, "internal.swept", pa.table({"name": pa.array(sorted(names), pa.string())}))


def _known_tables(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    return dict(connection.execute("SELECT file, digest FROM internal.tables").fetchall())


def _check_tables(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Look at the checksums of changed files, which DuckDB does not, and remember all."""
    digests, known = _table_digests(root), _known_tables(connection)
    for name, digest in digests.items():
        if known.get(name) != digest:
            path = root / TABLES_DIR / name
            try:
                pq.read_table(path, page_checksum_verification=True)
            except (OSError, pa.ArrowException) as error:
                message = f"{path}: damaged ({_first_line(error)}); restore it, or remove it and import its table again"
                raise StoreFormatError(message) from error
    connection.execute("DELETE FROM internal.tables")
    if digests:
        _insert(connection, "internal.tables", pa.table({"file": list(digests), "digest": list(digests.values())}))


def _load_tables(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    _check_tables(connection, root)
    _load_table(connection, root, "patients", PATIENTS_PREFIX)
    _load_table(connection, root, "splits", SPLITS_PREFIX)
    _load_skipped(connection, root)
    _resolve_slides(connection, root)


def _load_skipped(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    _load_table(connection, root, "skipped", SKIPPED_PREFIX)
    connection.execute("DELETE FROM skipped WHERE source IN (SELECT source FROM bags)")


def _follow(connection: duckdb.DuckDBPyConnection, root: Path, slide_ids: Sequence[str]) -> None:
    """Bring what depends on bags up to date after those of some slides have changed: as `_load_tables`, but sooner."""
    if _known_tables(connection) == _table_digests(root):
        _load_skipped(connection, root)
        _resolve_slides(connection, root, slide_ids)
    else:
        _load_tables(connection, root)
    derived_tables.follow_slides(connection, slide_ids)


def _add_shards(
    connection: duckdb.DuckDBPyConnection,
    root: Path,
    records: Iterable[ShardRecord],
    places: Mapping[str, Sequence[Extent]] = MappingProxyType({}),
) -> set[str]:
    """Returns the slides whose bags are not what they were."""
    removed, changed = read_removed(root), set()  # type: set[tuple[str, str]], set[str]
    for record in records:
        extents = places[record.shard] if record.shard in places else read_shard(root, record.shard)[1]
        slides = [slide for slide in record.slides if (record.shard, slide.slide_id) not in removed]
        kept = {slide.slide_id for slide in slides}
        changed |= kept.union(*(_drop_shard(connection, replaced) for replaced in record.replaces))
        _add_shard(connection, replace(record, slides=tuple(slides)), [e for e in extents if e.slide_id in kept])
    return changed


def _add_shard(connection: duckdb.DuckDBPyConnection, record: ShardRecord, extents: Sequence[Extent]) -> None:
    known = [record.shard, record.chunk_rows, list(record.replaces)]
    connection.execute("INSERT INTO internal.shards VALUES (?, ?, ?)", known)
    if not record.slides:
        return
    _insert(connection, "bags", _bag_rows(record, {(e.slide_id, e.scale, e.array): e for e in extents}))
    named = ("slide_id", "cohort", "folder")
    slides = [{"shard": record.shard, **{name: getattr(slide, name) for name in named}} for slide in record.slides]
    strings = pa.schema([(name, pa.string()) for name in ("shard", *named)])
    _insert(connection, "internal.shard_slides", pa.Table.from_pylist(slides, schema=strings))
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
    _insert(connection, "internal.extents", pa.table(columns))


def _drop_shard(connection: duckdb.DuckDBPyConnection, shard: str) -> set[str]:
    """Returns its slides."""
    query = "SELECT slide_id FROM internal.shard_slides WHERE shard = ?"
    slides = {slide_id for (slide_id,) in connection.execute(query, [shard]).fetchall()}
    for table in _OF_SHARDS:
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
            f"{path}: cannot be read ({_first_line(error)}); restore it, or delete it and run `cfstore reindex`: "
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


def register(
    root: Path, records: Sequence[ShardRecord], places: Mapping[str, Sequence[Extent]] = MappingProxyType({})
) -> None:
    """Make published shards visible; `places` are those of shards that were read already. Needs the write lock.

    It looks at the slides of these shards only. The snapshot, written as a whole, trails until `reload_tables`.
    """
    with _edit(root, with_snapshot=False) as connection:
        _follow(connection, root, sorted(_add_shards(connection, root, records, places)))
        connection.execute("DELETE FROM internal.trailing")
        connection.execute("INSERT INTO internal.trailing VALUES (?)", [SNAPSHOT_FILE])


def forget(root: Path, removed: Iterable[tuple[str, str]]) -> None:
    """Take removed slides, (shard, slide_id), out of the catalog. Needs the write lock."""
    pairs = list(removed)
    with _edit(root) as connection:
        for pair in pairs:
            for table in ("bags", "internal.shard_slides", "internal.extents"):
                connection.execute(f"DELETE FROM {table} WHERE shard = ? AND slide_id = ?", list(pair))
        _follow(connection, root, sorted({slide_id for _, slide_id in pairs}))


def drop_shards(root: Path, shards: Iterable[str]) -> None:
    """Take deleted shards out of the catalog. Needs the write lock."""
    with _edit(root) as connection:
        slides = {slide_id for shard in shards for slide_id in _drop_shard(connection, shard)}
        _follow(connection, root, sorted(slides))


def reload_tables(root: Path) -> None:
    """Take over changed files of `tables/`, and write the snapshot where it trails. Needs the write lock."""
    with connect(root) as connection:
        unchanged = _known_tables(connection) == _table_digests(root)
        if unchanged and (root / SNAPSHOT_FILE).exists() and not _trails(connection):
            return
    with _edit(root) as connection:
        if not unchanged:
            _load_tables(connection, root)


def _trails(connection: duckdb.DuckDBPyConnection, database: str = "") -> bool:
    """Whether the snapshot is behind. A catalog made by an earlier version has no such table: it always wrote both."""
    if not derived_tables.has_table(connection, "trailing", "internal", database):
        return False
    table = f"{database}.internal.trailing" if database else "internal.trailing"
    return bool(connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])


def reload_derived(root: Path, *, everything: bool = False) -> None:
    """Take over changed files of `derived/`; with `everything`, list anew what counts of any. Needs the write lock."""
    with _edit(root, with_snapshot=False) as connection:
        (derived_tables.load if everything else derived_tables.follow)(connection, root)


def dead_derived_files(root: Path) -> list[str]:
    """Derived files that no bag there is now needs."""
    with connect(root) as connection:
        if not derived_tables.has_table(connection, "derived"):
            return []
        return derived_tables.dead_files(connection)


def rebuild(root: Path) -> None:
    """Make the catalog anew from shards, `tables/` and `derived/` alone. Needs the write lock.

    Raises
    ------
    StoreFormatError
        A shard cannot be read; the catalog stays as it was.
    """
    with _edit(root, afresh=True) as connection:
        try:
            _add_shards(connection, root, live_records(root, published_shards(root)))
        except DamagedShardError as error:
            message = (
                f"{error}. The catalog stays as it was. Without a copy to restore: delete the shard, "
                "`cfstore reindex`, and ingest its slides again"
            )
            raise DamagedShardError(message) from error
        _load_tables(connection, root)
        derived_tables.load(connection, root)


def live_records(root: Path, shards: Iterable[str]) -> list[ShardRecord]:
    """The records of `shards`, without those that another one of them replaces."""
    records = [read_record(root, shard) for shard in shards]
    replaced = {shard for record in records for shard in record.replaces}
    return [record for record in records if record.shard not in replaced]


def reconcile(root: Path) -> int:
    """Bring the catalog up to date with what other processes left, dying; how many shards it lacked.

    Needs the write lock.
    """
    missing = adopt(root)
    with _asking(root) as connection:
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
    with _asking(root) as connection:
        known = {shard for (shard,) in connection.execute("SELECT shard FROM internal.shards").fetchall()}
        known |= _replaced(connection)
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


@contextmanager
def _asking(root: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection; StoreFormatError, with what to do, where the catalog cannot answer."""
    try:
        with connect(root) as connection:
            yield connection
    except duckdb.Error as error:
        message = f"{root / CATALOG_FILE}: cannot be read ({_first_line(error)}); `cfstore reindex` makes it anew"
        raise StoreFormatError(message) from error


def _replaced(connection: duckdb.DuckDBPyConnection) -> set[str]:
    rows = connection.execute("SELECT DISTINCT unnest(replaces) FROM internal.shards").fetchall()
    return {shard for (shard,) in rows}


def replaced_shards(root: Path) -> list[str]:
    """Shards still on disk that a registered one stands for."""
    with connect(root) as connection:
        gone = _replaced(connection)
    return [shard for shard in published_shards(root) if shard in gone]


def slides_per_shard(root: Path) -> dict[str, int]:
    """How many slides of every registered shard count; StoreFormatError where the catalog cannot say."""
    query = (
        "SELECT shard, count(slide_id) FROM internal.shards LEFT JOIN internal.shard_slides USING (shard) GROUP BY ALL"
    )
    with _asking(root) as connection:
        return dict(connection.execute(query).fetchall())


def known_bags(root: Path, encoder: str, slide_ids: Iterable[str]) -> set[tuple[str, int]]:
    """(slide_id, scale) of every bag of an encoder that some slides have."""
    query = f"SELECT slide_id, scale FROM bags WHERE encoder = ? AND {AMONG}"
    with connect(root) as connection:
        return set(connection.execute(query, [encoder, list(slide_ids)]).fetchall())


def sql_string(path: Path) -> str:
    """`path` as an SQL string, where a statement takes no parameter."""
    quoted = str(path).replace("'", "''")
    return f"'{quoted}'"


@dataclass(frozen=True)
class Difference:
    """Rows of the catalog that are not what `rebuild` would make: of which table, about what."""

    table: str
    slide_id: str | None
    shard: str | None


def differences(root: Path) -> tuple[list[Difference], dict[str, StoreFormatError]]:
    """Where the catalog is not what shards and `tables/` say, and which shards cannot be asked.

    Raises
    ------
    StoreFormatError
        The catalog is missing or damaged, or a file of `tables/` is.
    """
    with connect_alone(root) as connection:
        try:
            connection.execute("USE memory.main")
            _create_tables(connection)
            unreadable = _fill(connection, root)
            lost: dict[str, StoreFormatError] = {}
            _load_tables(connection, root)
            derived_tables.load(connection, root, lost)
            connection.execute("CREATE TEMP TABLE unreadable (shard VARCHAR)")
            for shard in unreadable:
                connection.execute("INSERT INTO unreadable VALUES (?)", [shard])
            found = list(_compare(connection, root, complete=not unreadable))
            return [*found, *_compare_derived(connection, lost)], unreadable
        except duckdb.Error as error:
            path = root / CATALOG_FILE
            message = f"{path}: the catalog is damaged ({_first_line(error)}); `cfstore reindex` makes it anew"
            raise StoreFormatError(message) from error


def _fill(connection: duckdb.DuckDBPyConnection, root: Path) -> dict[str, StoreFormatError]:
    records, unreadable = [], {}
    for shard in published_shards(root):
        try:
            records.append(read_shard(root, shard)[0])
        except StoreFormatError as error:
            unreadable[shard] = error
    replaced = {shard for record in records for shard in record.replaces}
    _add_shards(connection, root, [record for record in records if record.shard not in replaced])
    return {shard: error for shard, error in unreadable.items() if shard not in replaced}


def _compare(connection: duckdb.DuckDBPyConnection, root: Path, *, complete: bool) -> Iterator[Difference]:
    hidden = "shard IN (SELECT shard FROM temp.unreadable)"
    about = {
        **dict.fromkeys(_OF_SHARDS, f"WHERE NOT {hidden}"),
        "internal.tables": "",
        "slides": f"WHERE slide_id NOT IN (SELECT slide_id FROM store.bags WHERE {hidden})",
        "patients": "",
        "splits": "",
        **({"skipped": ""} if complete else {}),
    }
    for table, condition in about.items():
        yield from _table_differences(connection, table, f"store.{table}", condition)
    if complete and not _trails(connection, "store"):
        connection.execute(f"CREATE TEMP VIEW snapshot AS {_SNAPSHOT}")
        path = root / SNAPSHOT_FILE
        try:
            found = list(_table_differences(connection, "temp.snapshot", f"read_parquet({sql_string(path)})", ""))
        except duckdb.Error:
            found = [Difference(SNAPSHOT_FILE, None, None)]
        yield from (Difference(SNAPSHOT_FILE, each.slide_id, each.shard) for each in found)


def _compare_derived(connection: duckdb.DuckDBPyConnection, unreadable: Iterable[str]) -> Iterator[Difference]:
    """Files that cannot be read are left to who looks into them; nothing is asked of a catalog from before them."""
    connection.execute("CREATE TEMP TABLE lost (file VARCHAR)")
    for file in unreadable:
        connection.execute("INSERT INTO lost VALUES (?)", [file])
    for table in derived_tables.COMPARED:
        schema, _, name = table.rpartition(".")
        if derived_tables.has_table(connection, name, schema or "main", "store"):
            held = f"store.{table}"
        else:
            held = f"(SELECT * FROM {table} LIMIT 0)"
        yield from _table_differences(connection, table, held, "WHERE file NOT IN (SELECT file FROM temp.lost)")


def _table_differences(
    connection: duckdb.DuckDBPyConnection, table: str, held: str, condition: str
) -> Iterator[Difference]:
    """What is not the same in `table`, made anew, and in the catalog's, `held`."""

    def columns(relation: str) -> list[str]:
        return [name for name, *_ in connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()]

    names = columns(table)
    if sorted(columns(held)) != sorted(names):
        yield Difference(table, None, None)
        return
    every = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
    ours, theirs = (f"SELECT {every} FROM {relation} {condition}" for relation in (table, held))
    key = ", ".join(name if name in names else f"NULL AS {name}" for name in ("slide_id", "shard"))
    query = (
        f"SELECT DISTINCT {key} FROM ((({ours}) EXCEPT ALL ({theirs})) UNION ALL (({theirs}) EXCEPT ALL ({ours}))) "
        "ORDER BY ALL"
    )
    for slide_id, shard in connection.execute(query).fetchall():
        yield Difference(table, slide_id, shard)


class _Instance:
    """The DuckDB that all reading shares: starting one takes over 20 ms, attaching a catalog to it a few."""

    def __init__(self) -> None:
        self._memory: duckdb.DuckDBPyConnection | None = None
        self._lock = threading.Lock()
        self._attached = 0

    def attach(self, path: Path) -> tuple[duckdb.DuckDBPyConnection, str] | None:
        """A cursor that uses the catalog, and its name; None where that cannot be, as while it is attached already."""
        with self._lock:
            if self._memory is None:
                self._memory = duckdb.connect(":memory:")
            cursor = self._memory.cursor()
            self._attached += 1
            name = f"store_{self._attached}"
            try:
                cursor.execute(f"ATTACH {sql_string(path)} AS {name} (READ_ONLY)")
                cursor.execute(f"USE {name}")
            except duckdb.Error:
                self._let_go(cursor, name)
                return None
            return cursor, name

    def detach(self, cursor: duckdb.DuckDBPyConnection, name: str) -> None:
        """Close what `attach` gave."""
        with self._lock:
            self._let_go(cursor, name)

    def _let_go(self, cursor: duckdb.DuckDBPyConnection, name: str) -> None:
        try:
            cursor.execute("USE memory")
            cursor.execute(f"DETACH DATABASE IF EXISTS {name}")
        except duckdb.Error:  # a damaged catalog spoils the whole instance; the next one gets another
            self._memory = None
        cursor.close()


_instance: Final = _Instance()


@contextmanager
def connect(root: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection for the store's own queries (users' SQL goes through `query`).

    It sees the catalog as it was when it began, whatever writers rename into its place meanwhile.

    Raises
    ------
    StoreFormatError
        The catalog is missing or damaged.
    """
    shared = _instance.attach(_catalog_of(root))
    if shared is None:
        with connect_alone(root) as connection:
            yield connection
        return
    try:
        yield shared[0]
    finally:
        _instance.detach(*shared)


def _catalog_of(root: Path) -> Path:
    path = root / CATALOG_FILE
    if not path.exists():
        message = f"{path}: the catalog is missing; `cfstore reindex` rebuilds it from the shards"
        raise StoreFormatError(message)
    return path


def connect_alone(root: Path) -> duckdb.DuckDBPyConnection:
    """The same in a DuckDB of its own, in which the catalog is called `store`.

    Raises
    ------
    StoreFormatError
        The catalog is missing or damaged.
    """
    path = _catalog_of(root)
    connection = duckdb.connect(":memory:")
    try:  # not duckdb.connect(path): that hands out the process's open database, even when its file was replaced
        connection.execute(f"ATTACH {sql_string(path)} AS store (READ_ONLY)")
        connection.execute("USE store")
        return connection
    except duckdb.Error as error:
        connection.close()
        message = f"{path}: the catalog cannot be opened ({error}); `cfstore reindex` rebuilds it from the shards"
        raise StoreFormatError(message) from error
