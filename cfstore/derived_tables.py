"""What the catalog says of derived files: which exist, and which of their entries are of the bags there are now.

`internal.derivations` and `internal.prototypes` list everything that lies on disk; the tables `derived` and
`prototypes` what of it counts: entries of the current version, of bags with the same digests. They are filled
anew whenever the catalog is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa

from cfstore.derivation import VERSIONS
from cfstore.derived_files import DerivedFile, PrototypesFile, published_files, read_file
from cfstore.errors import StoreFormatError
from cfstore.schema import DERIVED, PROTOTYPES, ddl

PROTOTYPES_VERSION: Final = 1
_ARROW: Final = {"VARCHAR": pa.string(), "INTEGER": pa.int32(), "BIGINT": pa.int64(), "DOUBLE": pa.float64()}


def _ddl(columns: Iterable[tuple[str, str, str]]) -> str:
    return ", ".join(f'"{name}" {kind}' for name, kind, _ in columns)


INTERNAL: Final = {
    "derived_files": "file VARCHAR",
    "derivations": _ddl(DERIVED),
    "prototypes": _ddl(PROTOTYPES),
    "prototype_slides": "file VARCHAR, slide_id VARCHAR, digest VARCHAR",
}
COMPARED: Final = ("internal.derived_files", "derived", "prototypes")
"""Tables that are the same whenever they are made anew."""

_EDGE: Final = "'@' || coalesce({bag}.patch_size_level0::VARCHAR, '?')"
SOURCE: Final = (
    f"CASE WHEN coarse.digest IS NULL THEN fine.digest "
    f"ELSE fine.digest || {_EDGE.format(bag='fine')} || ' ' || coarse.digest || {_EDGE.format(bag='coarse')} END"
)
"""Over the bags `fine` and (of parents) `coarse`: what an entry's `source` has to be."""
_PROTOTYPES_NOW: Final = f"""
    SELECT made.* FROM internal.prototypes AS made
    WHERE version = {PROTOTYPES_VERSION} AND NOT EXISTS (
        SELECT 1 FROM internal.prototype_slides AS used LEFT JOIN bags
        ON bags.slide_id = used.slide_id AND bags.digest = used.digest AND bags.encoder = made.encoder
            AND bags.scale = made.scale
        WHERE used.file = made.file AND bags.slide_id IS NULL)
"""


def derived_now(made: str = "internal.derivations") -> str:
    """SQL for the rows of `derived`, of the bags there are now; of all entries, or of those in `made`.

    The table itself is behind where a version wrote to the catalog that knows nothing of derived files.
    """
    cases = " ".join(f"WHEN starts_with(derivation, '{kind}') THEN {n}" for kind, n in VERSIONS.items())
    return f"""
        SELECT made.* FROM {made} AS made
        JOIN bags AS fine ON fine.slide_id = made.slide_id AND fine.encoder = made.encoder AND fine.scale = made.scale
        LEFT JOIN bags AS coarse
            ON coarse.slide_id = made.slide_id AND coarse.encoder = made.encoder AND coarse.scale = made.coarse
        WHERE made.source = {SOURCE} AND version = CASE {cases} END
        QUALIFY row_number() OVER (
            PARTITION BY made.slide_id, made.encoder, derivation ORDER BY created, file, row_group) = 1
    """


def is_behind(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether the tables list other rows than those of the bags there are now."""
    if not has_table(connection, "derived"):
        return False

    def differ(rows_now: str, table: str, key: str) -> bool:
        now, held = f"SELECT {key} FROM ({rows_now})", f"SELECT {key} FROM {table}"
        query = f"SELECT count(*) FROM (({now} EXCEPT {held}) UNION ALL ({held} EXCEPT {now}))"
        return bool(connection.execute(query).fetchall()[0][0])

    return differ(derived_now(), "derived", "file, row_group") or differ(_PROTOTYPES_NOW, "prototypes", "file")


def has_table(connection: duckdb.DuckDBPyConnection, table: str, schema: str = "main", catalog: str = "") -> bool:
    """Whether the catalog has a table: one made by an earlier version lacks those of derived files."""
    query = (
        "SELECT count(*) FROM duckdb_tables() WHERE table_name = ? AND schema_name = ? "
        "AND database_name = CASE WHEN ? = '' THEN current_database() ELSE ? END"
    )
    return bool(connection.execute(query, [table, schema, catalog, catalog]).fetchall()[0][0])


def known_files(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Derived files that the catalog has taken over."""
    if not has_table(connection, "derived_files", "internal"):
        return set()
    return {file for (file,) in connection.execute("SELECT file FROM internal.derived_files").fetchall()}


def dead_files(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Known files of which nothing counts any more."""
    query = (
        "SELECT file FROM internal.derived_files WHERE file NOT IN (SELECT file FROM derived) "
        "AND file NOT IN (SELECT file FROM prototypes) ORDER BY file"
    )
    return [file for (file,) in connection.execute(query).fetchall()]


def load(
    connection: duckdb.DuckDBPyConnection, root: Path, unreadable: dict[str, StoreFormatError] | None = None
) -> None:
    """Take over files that appeared, forget those that went, and list what counts.

    New files that cannot be read are left alone (`derive` and `verify` name them; what they held counts as not derived)
    and put into `unreadable`.
    """
    _follow_files(connection, root, unreadable)
    connection.execute(ddl("derived"))
    connection.execute(f"INSERT INTO derived BY NAME {derived_now()}")
    _list_prototypes(connection)


def follow(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    """The same, where what is listed is right but for the files that came and went."""
    follow_slides(connection, _follow_files(connection, root, None))


def follow_slides(connection: duckdb.DuckDBPyConnection, slide_ids: Iterable[str]) -> None:
    """List anew what counts of slides whose bags or entries have changed, and which prototypes do."""
    ids, some = list(slide_ids), "slide_id IN (SELECT unnest(?::VARCHAR[]))"
    connection.execute(f"DELETE FROM derived WHERE {some}", [ids])
    made = derived_now(f"(SELECT * FROM internal.derivations WHERE {some})")
    connection.execute(f"INSERT INTO derived BY NAME {made}", [ids])
    _list_prototypes(connection)


def _list_prototypes(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute(ddl("prototypes"))
    connection.execute(f"INSERT INTO prototypes BY NAME {_PROTOTYPES_NOW}")


def _follow_files(
    connection: duckdb.DuckDBPyConnection, root: Path, unreadable: dict[str, StoreFormatError] | None
) -> set[str]:
    """Take over and forget files; the slides of which they have entries."""
    known, on_disk = known_files(connection), set(published_files(root))
    slides: set[str] = set()
    for file in sorted(known - on_disk):
        query = "SELECT slide_id FROM internal.derivations WHERE file = ?"
        slides |= {slide_id for (slide_id,) in connection.execute(query, [file]).fetchall()}
        for table in INTERNAL:
            connection.execute(f"DELETE FROM internal.{table} WHERE file = ?", [file])
    for file in sorted(on_disk - known):
        try:
            found = read_file(root, file)
        except FileNotFoundError:
            continue  # gone meanwhile
        except StoreFormatError as error:
            if unreadable is not None:
                unreadable[file] = error
            continue
        _take_over(connection, found)
        if isinstance(found, DerivedFile):
            slides |= {entry.slide_id for entry in found.entries}
    return slides


def unread_files(connection: duckdb.DuckDBPyConnection, root: Path) -> dict[str, str]:
    """Derived files on disk that the catalog did not take over because they cannot be read, each with the reason."""
    unread = {}
    for file in sorted(set(published_files(root)) - known_files(connection)):
        try:
            read_file(root, file)
        except FileNotFoundError:
            continue  # gone meanwhile
        except StoreFormatError as error:
            unread[file] = str(error)
    return unread


def _take_over(connection: duckdb.DuckDBPyConnection, found: DerivedFile | PrototypesFile) -> None:
    connection.execute("INSERT INTO internal.derived_files VALUES (?)", [found.file])
    if isinstance(found, PrototypesFile):
        row = {name: getattr(found, name) for name, _, _ in PROTOTYPES if name != "n_slides"}
        _insert(connection, "prototypes", PROTOTYPES, [row | {"n_slides": len(found.slides)}])
        used = pa.table(
            {
                "file": pa.array([found.file] * len(found.slides), pa.string()),
                "slide_id": pa.array(list(found.slides), pa.string()),
                "digest": pa.array(list(found.slides.values()), pa.string()),
            }
        )
        connection.register("incoming", used)
        connection.execute("INSERT INTO internal.prototype_slides BY NAME SELECT * FROM incoming")
        connection.unregister("incoming")
        return
    derivation = found.derivation
    rows = [
        {
            "slide_id": entry.slide_id,
            "encoder": found.encoder,
            "derivation": derivation.name,
            "scale": derivation.scale,
            "coarse": derivation.coarse or None,
            "k": derivation.k or None,
            "version": found.version,
            "n_rows": entry.n_rows,
            "bytes": entry.nbytes,
            "file": found.file,
            "row_group": number,
            "digest": entry.digest,
            "source": entry.source,
            "fine_edge": entry.edges[0] if entry.edges else None,
            "coarse_edge": entry.edges[1] if entry.edges else None,
            "created": found.created,
        }
        for number, entry in enumerate(found.entries)
    ]
    _insert(connection, "derivations", DERIVED, rows)


def _insert(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    columns: Iterable[tuple[str, str, str]],
    rows: Sequence[Mapping[str, object]],
) -> None:
    schema = pa.schema([(name, _ARROW[kind]) for name, kind, _ in columns])
    connection.register("incoming", pa.Table.from_pylist(list(rows), schema=schema))
    connection.execute(f"INSERT INTO internal.{table} BY NAME SELECT * FROM incoming")
    connection.unregister("incoming")
