"""Users' SQL: one read-only statement over the store's tables, with no way out of the store.

`read_only` alone is no sandbox in DuckDB: it still reads any file (`read_csv`) and writes files
(`COPY TO`). So the statement's kind is checked, external access is off, and the configuration
is locked before the statement is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa

from cfstore.catalog import connect, sql_string
from cfstore.derived_tables import has_table
from cfstore.errors import QueryError
from cfstore.schema import CATALOG_FILE, TABLES, ddl

_ALLOWED: Final = {"SELECT", "EXPLAIN"}
_OUTSIDE: Final = "cfstore sql reads this store's tables only"


def run_query(root: Path, query: str, extra: Mapping[str, pa.Table] | None = None) -> pa.Table:
    """Run one SELECT over the tables of `schema.TABLES` and the `extra` ones.

    Raises
    ------
    QueryError
        More than one statement, anything but a read, anything outside the store, or SQL that fails.
    """
    with connect(root):
        pass  # names what is wrong with the catalog, if anything is
    with duckdb.connect(":memory:", config={"python_enable_replacements": "false"}) as connection:
        connection.execute(f"ATTACH {sql_string(root / CATALOG_FILE)} AS store (READ_ONLY)")
        for name, rows in (extra or {}).items():
            connection.register(f"incoming_{name}", rows)
            connection.execute(f'CREATE TABLE "{name}" AS SELECT * FROM incoming_{name}')
            connection.unregister(f"incoming_{name}")
        for name in TABLES:
            if has_table(connection, name, catalog="store"):
                connection.execute(f"CREATE VIEW {name} AS SELECT * FROM store.{name}")
            else:  # the catalog is from before there was such a table
                connection.execute(ddl(name))
        connection.execute("SET temp_directory = ''")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        return _run(connection, query, (*TABLES, *(extra or ())))


def _run(connection: duckdb.DuckDBPyConnection, query: str, tables: Sequence[str]) -> pa.Table:
    try:
        statements = connection.extract_statements(query)
    except duckdb.Error as error:
        raise QueryError(_first_lines(error)) from error
    if len(statements) != 1:
        message = f"expected one SQL statement, found {len(statements)}"
        raise QueryError(message)
    kind = str(statements[0].type).rsplit(".", 1)[-1]
    if kind not in _ALLOWED:
        message = (
            f"{kind} is refused: {_OUTSIDE} and never writes; use SELECT, and -o FILE --format csv|parquet for files"
        )
        raise QueryError(message)
    try:
        return connection.sql(statements[0]).to_arrow_table()
    except duckdb.PermissionException as error:
        message = f"refused: {_OUTSIDE}, no other file ({_first_lines(error)})"
        raise QueryError(message) from error
    except duckdb.CatalogException as error:
        words = _first_lines(error)
        if words.startswith("Catalog Error: Table with name "):  # what DuckDB thinks was meant is a table of its own
            words = f"{words.splitlines()[0]} Tables: {', '.join(tables)}"
        raise QueryError(words) from error
    except duckdb.Error as error:
        raise QueryError(_first_lines(error)) from error


def _first_lines(error: duckdb.Error) -> str:
    text = str(error).strip()
    return text if len(text) < 600 else text[:600] + " ..."
