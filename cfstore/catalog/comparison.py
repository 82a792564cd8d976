"""Is the catalog what the shards, `tables/` and `derived/` say?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb

from cfstore import derived_tables
from cfstore.catalog.connection import connect_alone, first_line, sql_string
from cfstore.catalog.internal import OF_SHARDS, SNAPSHOT, create_tables, trails
from cfstore.catalog.shard_rows import add_shards
from cfstore.catalog.table_rows import load_tables
from cfstore.errors import StoreFormatError
from cfstore.schema import CATALOG_FILE, SNAPSHOT_FILE
from cfstore.shards import published_shards, read_shard


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
            create_tables(connection)
            unreadable = _fill(connection, root)
            lost: dict[str, StoreFormatError] = {}
            load_tables(connection, root)
            derived_tables.load(connection, root, lost)
            connection.execute("CREATE TEMP TABLE unreadable (shard VARCHAR)")
            for shard in unreadable:
                connection.execute("INSERT INTO unreadable VALUES (?)", [shard])
            found = list(_compare(connection, root, complete=not unreadable))
            return [*found, *_compare_derived(connection, lost)], unreadable
        except duckdb.Error as error:
            path = root / CATALOG_FILE
            message = f"{path}: the catalog is damaged ({first_line(error)}); `cfstore reindex` makes it anew"
            raise StoreFormatError(message) from error


def _fill(connection: duckdb.DuckDBPyConnection, root: Path) -> dict[str, StoreFormatError]:
    records, unreadable = [], {}
    for shard in published_shards(root):
        try:
            records.append(read_shard(root, shard)[0])
        except StoreFormatError as error:
            unreadable[shard] = error
    replaced = {shard for record in records for shard in record.replaces}
    add_shards(connection, root, [record for record in records if record.shard not in replaced])
    return {shard: error for shard, error in unreadable.items() if shard not in replaced}


def _compare(connection: duckdb.DuckDBPyConnection, root: Path, *, complete: bool) -> Iterator[Difference]:
    hidden = "shard IN (SELECT shard FROM temp.unreadable)"
    about = {
        **dict.fromkeys(OF_SHARDS, f"WHERE NOT {hidden}"),
        "internal.tables": "",
        "slides": f"WHERE slide_id NOT IN (SELECT slide_id FROM store.bags WHERE {hidden})",
        "patients": "",
        "splits": "",
        **({"skipped": ""} if complete else {}),
    }
    for table, condition in about.items():
        yield from _table_differences(connection, table, f"store.{table}", condition)
    if complete and not trails(connection, "store"):
        connection.execute(f"CREATE TEMP VIEW snapshot AS {SNAPSHOT}")
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
