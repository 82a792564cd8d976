"""What `tables/` says, as rows of the catalog: patients, splits, skipped slides, and whose each slide is."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cfstore import derived_tables
from cfstore.catalog.connection import AMONG, first_line
from cfstore.catalog.internal import insert
from cfstore.errors import StoreFormatError
from cfstore.labels import CohortLabels, Resolver, collect, possible_patients
from cfstore.schema import TABLES, TABLES_DIR, ddl

PATIENTS_PREFIX: Final = "patients-"
SLIDE_LABELS_PREFIX: Final = "slides-"
SPLITS_PREFIX: Final = "splits-"
SKIPPED_PREFIX: Final = "skipped-"


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
    parameters: list[Any] = [] if slide_ids is None else [list(slide_ids)]
    some = "true" if slide_ids is None else AMONG
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
        insert(connection, "slides", pa.table(rows))


def table_digests(root: Path) -> dict[str, str]:
    """The files of `tables/` and the digest of each."""
    prefixes = (PATIENTS_PREFIX, SLIDE_LABELS_PREFIX, SPLITS_PREFIX, SKIPPED_PREFIX)
    files = [Path(name) for prefix in prefixes for name in _tables(root, prefix)]
    return {path.name: digest_of_file(path) for path in files}


def digest_of_file(path: Path) -> str:
    """xxh3-128 of a file of `tables/`."""
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"


def name_table_objects(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
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


def known_tables(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """The files of `tables/` that were taken over, and the digest that each had."""
    return dict(connection.execute("SELECT file, digest FROM internal.tables").fetchall())


def _check_tables(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Look at the checksums of changed files, which DuckDB does not, and remember all."""
    digests, known = table_digests(root), known_tables(connection)
    for name, digest in digests.items():
        if known.get(name) != digest:
            path = root / TABLES_DIR / name
            try:
                pq.read_table(path, page_checksum_verification=True)
            except (OSError, pa.ArrowException) as error:
                message = f"{path}: damaged ({first_line(error)}); restore it, or remove it and import its table again"
                raise StoreFormatError(message) from error
    connection.execute("DELETE FROM internal.tables")
    if digests:
        insert(connection, "internal.tables", pa.table({"file": list(digests), "digest": list(digests.values())}))


def load_tables(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """Fill everything that depends on `tables/` anew; StoreFormatError where a file of it is damaged."""
    _check_tables(connection, root)
    _load_table(connection, root, "patients", PATIENTS_PREFIX)
    _load_table(connection, root, "splits", SPLITS_PREFIX)
    _load_skipped(connection, root)
    _resolve_slides(connection, root)


def _load_skipped(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    _load_table(connection, root, "skipped", SKIPPED_PREFIX)
    connection.execute("DELETE FROM skipped WHERE source IN (SELECT source FROM bags)")


def follow(connection: duckdb.DuckDBPyConnection, root: Path, slide_ids: Sequence[str]) -> None:
    """Bring what depends on bags up to date after those of some slides have changed: as `load_tables`, but sooner."""
    if known_tables(connection) == table_digests(root):
        _load_skipped(connection, root)
        _resolve_slides(connection, root, slide_ids)
    else:
        load_tables(connection, root)
    derived_tables.follow_slides(connection, slide_ids)
