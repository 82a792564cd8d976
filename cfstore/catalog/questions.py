"""What the store asks its catalog about shards and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from cfstore import derived_tables
from cfstore.catalog.connection import AMONG, asking, connect
from cfstore.catalog.table_rows import table_objects
from cfstore.shards import published_shards


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


def dead_derived_files(root: Path) -> list[str]:
    """Derived files that no bag there is now needs."""
    with connect(root) as connection:
        if not derived_tables.has_table(connection, "derived"):
            return []
        return derived_tables.dead_files(connection)


def all_replaced(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Shards that a registered one stands for, on disk or not."""
    rows = connection.execute("SELECT DISTINCT unnest(replaces) FROM internal.shards").fetchall()
    return {shard for (shard,) in rows}


def replaced_shards(root: Path) -> list[str]:
    """Shards still on disk that a registered one stands for."""
    with connect(root) as connection:
        gone = all_replaced(connection)
    return [shard for shard in published_shards(root) if shard in gone]


def slides_per_shard(root: Path) -> dict[str, int]:
    """How many slides of every registered shard count; StoreFormatError where the catalog cannot say."""
    query = (
        "SELECT shard, count(slide_id) FROM internal.shards LEFT JOIN internal.shard_slides USING (shard) GROUP BY ALL"
    )
    with asking(root) as connection:
        return dict(connection.execute(query).fetchall())


def known_bags(root: Path, encoder: str, slide_ids: Iterable[str]) -> set[tuple[str, int]]:
    """(slide_id, scale) of every bag of an encoder that some slides have."""
    query = f"SELECT slide_id, scale FROM bags WHERE encoder = ? AND {AMONG}"
    with connect(root) as connection:
        return set(connection.execute(query, [encoder, list(slide_ids)]).fetchall())
