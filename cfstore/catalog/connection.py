"""Read-only connections to the catalog, by a DuckDB that all of them share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import duckdb

from cfstore.errors import StoreFormatError
from cfstore.schema import CATALOG_FILE

AMONG: Final = "slide_id IN (SELECT unnest(?::VARCHAR[]))"
"""A condition: the slide is in a list, however long. Its parameter is the list."""


def first_line(error: BaseException) -> str:
    """What DuckDB, Arrow or the disk say, short enough for a message."""
    return (str(error).strip().splitlines() or [repr(error)])[0][:300]


def sql_string(path: Path) -> str:
    """`path` as an SQL string, where a statement takes no parameter."""
    quoted = str(path).replace("'", "''")
    return f"'{quoted}'"


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
    if not root.exists():
        message = (
            f"{root}: the folder is gone (of a store on object storage: its mirror, in the cache or below $TMPDIR); "
            "open the store again"
        )
        raise StoreFormatError(message)
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


@contextmanager
def asking(root: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection; StoreFormatError, with what to do, where the catalog cannot answer."""
    try:
        with connect(root) as connection:
            yield connection
    except duckdb.Error as error:
        message = f"{root / CATALOG_FILE}: cannot be read ({first_line(error)}); `cfstore reindex` makes it anew"
        raise StoreFormatError(message) from error
