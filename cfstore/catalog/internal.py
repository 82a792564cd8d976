"""The tables of the catalog: the users' and those that only the store asks."""

from __future__ import annotations

from typing import Final

import duckdb
import pyarrow as pa

from cfstore import derived_tables
from cfstore.schema import TABLES, ddl

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
OF_SHARDS: Final = ("bags", "internal.shards", "internal.shard_slides", "internal.extents")
"""Tables whose rows name their shard."""
SNAPSHOT: Final = """
    SELECT bags.*, slides.cohort, slides.patient_id, patients.* EXCLUDE (cohort, patient_id)
    FROM bags JOIN slides USING (slide_id)
    LEFT JOIN patients ON patients.cohort = slides.cohort AND patients.patient_id = slides.patient_id
    ORDER BY bags.slide_id, bags.encoder, bags.scale
"""
"""What `catalog.parquet` holds."""


def create_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """All tables that are not there yet, empty."""
    connection.execute("CREATE SCHEMA IF NOT EXISTS internal")
    for table, columns in _INTERNAL.items():
        connection.execute(f"CREATE TABLE IF NOT EXISTS internal.{table} ({columns})")
    for table in TABLES:
        connection.execute(ddl(table).replace("OR REPLACE TABLE", "TABLE IF NOT EXISTS"))


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Add rows to a table, by the names of their columns."""
    connection.register("incoming", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
    connection.unregister("incoming")


def trails(connection: duckdb.DuckDBPyConnection, database: str = "") -> bool:
    """Whether the snapshot is behind. A catalog made by an earlier version has no such table: it always wrote both."""
    if not derived_tables.has_table(connection, "trailing", "internal", database):
        return False
    table = f"{database}.internal.trailing" if database else "internal.trailing"
    return bool(connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])
