"""The DuckDB index: written by replacing the whole file, so readers are never locked out.

DuckDB lets no process read a file while another writes to it, and no process write while a
reader has it open. So a writer copies the catalog, changes the copy, and renames it into place
under the store's write lock; whoever has the old one open keeps reading it. Everything in it
can be rebuilt from the shards and `tables/`.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa

from cfstore.errors import StoreFormatError
from cfstore.labels import CohortLabels, collect, resolve
from cfstore.schema import BAGS, CATALOG_FILE, FEATURES_DIR, SNAPSHOT_FILE, TABLES, TABLES_DIR, ddl
from cfstore.shards import ShardRecord, read_record

PATIENTS_PREFIX: Final = "patients-"
SLIDE_LABELS_PREFIX: Final = "slides-"
SPLITS_PREFIX: Final = "splits-"
SKIPPED_PREFIX: Final = "skipped-"

# What the shards say of a slide before labels are looked up; hidden from SQL users by its schema.
_SHARD_SLIDES: Final = (
    "CREATE TABLE IF NOT EXISTS internal.shard_slides (slide_id VARCHAR, cohort VARCHAR, folder VARCHAR, shard VARCHAR)"
)
_SNAPSHOT: Final = """
    SELECT bags.*, slides.cohort, slides.patient_id, patients.* EXCLUDE (cohort, patient_id)
    FROM bags JOIN slides USING (slide_id)
    LEFT JOIN patients ON patients.cohort = slides.cohort AND patients.patient_id = slides.patient_id
    ORDER BY bags.slide_id, bags.encoder, bags.scale
"""


@contextmanager
def _edit(root: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a copy of the catalog, renamed into place on success. Needs the write lock."""
    current = root / CATALOG_FILE
    for stale in root.glob(f".{CATALOG_FILE}.*"):
        stale.unlink()
    copy = root / f".{CATALOG_FILE}.{uuid.uuid4().hex}"
    if current.exists():
        shutil.copyfile(current, copy)
    with duckdb.connect(copy) as connection:
        connection.execute("CREATE SCHEMA IF NOT EXISTS internal")
        connection.execute(_SHARD_SLIDES)
        for table in TABLES:
            connection.execute(ddl(table).replace("OR REPLACE TABLE", "TABLE IF NOT EXISTS"))
        yield connection
        _write_snapshot(connection, root)
        connection.execute("CHECKPOINT")
    copy.replace(current)


def _write_snapshot(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    temporary = root / f".{SNAPSHOT_FILE}"
    connection.execute(f"COPY ({_SNAPSHOT}) TO ? (FORMAT parquet)", [str(temporary)])
    temporary.replace(root / SNAPSHOT_FILE)


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    connection.register("incoming", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
    connection.unregister("incoming")


def _bag_rows(record: ShardRecord) -> pa.Table:
    size = np.dtype(record.dtype).itemsize
    rows = [
        {
            "slide_id": slide.slide_id,
            "encoder": record.encoder,
            "dim": record.dim,
            "dtype": record.dtype,
            "bytes": bag.n_patches * record.dim * size,
            "shard": record.shard,
            **{name: getattr(bag, name) for name, _, _ in BAGS if hasattr(bag, name)},
        }
        for slide in record.slides
        for bag in slide.bags
    ]
    return pa.Table.from_pylist(rows)


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


def read_labels(connection: duckdb.DuckDBPyConnection, root: Path) -> dict[str, CohortLabels]:
    """What the imported clinical tables say, by cohort."""
    patients = connection.execute("SELECT cohort, patient_id FROM patients").fetchall()
    files = _tables(root, SLIDE_LABELS_PREFIX)
    query = "SELECT cohort, slide_id, patient_id FROM read_parquet(?)"
    slides = connection.execute(query, [files]).fetchall() if files else []
    return collect(patients, slides)


def _resolve_slides(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    labels = read_labels(connection, root)
    query = (
        "SELECT slide_id, max(cohort), arg_min(folder, split_part(shard, '/', 3)) "  # shard names sort by time
        "FROM internal.shard_slides GROUP BY slide_id ORDER BY slide_id"
    )
    found = connection.execute(query).fetchall()
    owners = [resolve(slide_id, given, folder, labels) for slide_id, given, folder in found]
    connection.execute(ddl("slides"))
    if found:
        rows = {
            "slide_id": [slide_id for slide_id, _, _ in found],
            "patient_id": pa.array([owner.patient_id for owner in owners], pa.string()),
            "cohort": [owner.cohort for owner in owners],
        }
        _insert(connection, "slides", pa.table(rows))


def _load_tables(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    _load_table(connection, root, "patients", PATIENTS_PREFIX)
    _load_table(connection, root, "splits", SPLITS_PREFIX)
    _load_table(connection, root, "skipped", SKIPPED_PREFIX)
    connection.execute("DELETE FROM skipped WHERE source IN (SELECT source FROM bags)")
    _resolve_slides(connection, root)


def _add_shards(connection: duckdb.DuckDBPyConnection, records: Iterable[ShardRecord]) -> None:
    for record in records:
        _insert(connection, "bags", _bag_rows(record))
        slides = [
            {"slide_id": s.slide_id, "cohort": s.cohort, "folder": s.folder, "shard": record.shard}
            for s in record.slides
        ]
        schema = pa.schema([(name, pa.string()) for name in ("slide_id", "cohort", "folder", "shard")])
        _insert(connection, "internal.shard_slides", pa.Table.from_pylist(slides, schema=schema))


def published_shards(root: Path) -> list[str]:
    """Shards on disk, relative to the store."""
    found = (root / FEATURES_DIR).glob("*/*.zarr")
    return sorted(str(path.relative_to(root)) for path in found if not path.name.startswith("."))


def register(root: Path, records: Sequence[ShardRecord]) -> None:
    """Make published shards visible. Needs the write lock."""
    with _edit(root) as connection:
        _add_shards(connection, records)
        _load_tables(connection, root)


def reload_tables(root: Path) -> None:
    """Take over changed files of `tables/`. Needs the write lock."""
    register(root, [])


def reconcile(root: Path) -> int:
    """Register shards that were published but never registered (a process died between). Needs the write lock."""
    known: set[str] = set()
    if (root / CATALOG_FILE).exists():
        with connect(root) as connection:
            known = {
                shard for (shard,) in connection.execute("SELECT DISTINCT shard FROM internal.shard_slides").fetchall()
            }
    missing = [shard for shard in published_shards(root) if shard not in known]
    if missing or not (root / CATALOG_FILE).exists():
        register(root, [read_record(root, shard) for shard in missing])
    return len(missing)


def without_known(root: Path, record: ShardRecord) -> ShardRecord:
    """`record` without the slides of which the catalog already holds a bag at the same scale."""
    with connect(root) as connection:
        rows = connection.execute("SELECT slide_id, scale FROM bags WHERE encoder = ?", [record.encoder]).fetchall()
    known = set(rows)
    new = [slide for slide in record.slides if known.isdisjoint((slide.slide_id, bag.scale) for bag in slide.bags)]
    return replace(record, slides=tuple(new))


def sql_string(path: Path) -> str:
    """`path` as an SQL string, where a statement takes no parameter."""
    quoted = str(path).replace("'", "''")
    return f"'{quoted}'"


def connect(root: Path) -> duckdb.DuckDBPyConnection:
    """A read-only connection for the store's own queries (users' SQL goes through `query`).

    Raises
    ------
    StoreFormatError
        The catalog is missing or damaged.
    """
    path = root / CATALOG_FILE
    if not path.exists():
        message = f"{path}: the catalog is missing; `cfstore ingest` of any folder rebuilds it from the shards"
        raise StoreFormatError(message)
    connection = duckdb.connect(":memory:")
    try:  # not duckdb.connect(path): that hands out the process's open database, even when its file was replaced
        connection.execute(f"ATTACH {sql_string(path)} AS store (READ_ONLY)")
        connection.execute("USE store")
        return connection
    except duckdb.Error as error:
        connection.close()
        message = f"{path}: the catalog cannot be opened ({error}); delete it, the next `cfstore ingest` rebuilds it"
        raise StoreFormatError(message) from error
