"""Tasks of a store in a bucket, done on machines that share no folder, and what earlier attempts at them left.

Every attempt works in a session of its own, so there is no folder in which the next one could look for what the one
before it had published. The catalog says: names of shards and of derived files begin with the name of their task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from cfstore import catalog
from cfstore.derivation import Derivation
from cfstore.derived_tables import has_table
from cfstore.processes import Tell
from cfstore.shards import SUFFIXES, Format, ShardRecord
from cfstore.writing import bucket_of, session_of_task

Result = TypeVar("Result")


@dataclass(frozen=True)
class InOwnSession(Generic[Result]):
    """`function` of a task, in a session of the bucket `url` that begins and ends with the attempt. May be pickled."""

    function: Callable[[Any, Tell], Result]
    url: str

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, task: Any, tell: Tell) -> Result:
        with session_of_task(self.url) as root:
            return self.function(replace(task, root=root), tell)


def anywhere(function: Callable[[Any, Tell], Result], root: Path) -> Callable[[Any, Tell], Result]:
    """`function` of tasks whose `root` is the store's, for machines that see a store in a folder, but no session."""
    bucket = bucket_of(root)
    return InOwnSession(function, bucket.url) if bucket else function


@dataclass(frozen=True)
class ShardSummary:
    """A published shard, as far as a report counts it."""

    shard: str
    slide_ids: frozenset[str]
    n_bags: int
    n_without_coords: int
    source_bytes: int

    @classmethod
    def of(cls, record: ShardRecord) -> ShardSummary:
        """Of what a shard says about itself."""
        bags = [bag for slide in record.slides for bag in slide.bags]
        return cls(
            record.shard,
            frozenset(slide.slide_id for slide in record.slides),
            len(bags),
            sum(not bag.has_coords for bag in bags),
            sum(bag.source_bytes for bag in bags),
        )


def registered_shards(root: Path, encoder: str, form: Format, name: str) -> list[ShardSummary]:
    """Shards of an encoder that the catalog names and whose names, after their numbers, begin with `name`."""
    query = (
        "SELECT shard, slide_id, has_coords, source_bytes FROM bags WHERE encoder = ? AND ends_with(shard, ?) "
        "AND starts_with(split_part(parse_filename(shard), '-', 2), ?)"
    )
    with catalog.connect(root) as connection:
        rows = connection.execute(query, [encoder, SUFFIXES[form], name]).fetchall()
    found: dict[str, list[tuple[str, bool, int]]] = defaultdict(list)
    for shard, *bag in rows:
        found[shard].append(tuple(bag))
    return [
        ShardSummary(
            shard,
            frozenset(slide_id for slide_id, _, _ in bags),
            len(bags),
            sum(not has_coords for _, has_coords, _ in bags),
            sum(nbytes for _, _, nbytes in bags),
        )
        for shard, bags in sorted(found.items())
    ]


def registered_sources(root: Path, encoder: str, derivation: Derivation, name: str) -> Mapping[str, str] | None:
    """By slide, the source of each entry of the file of a derivation that the catalog knows and whose name begins
    with `name`; None where there is none.
    """
    query = (
        "SELECT slide_id, source FROM internal.derivations WHERE encoder = ? AND derivation = ? "
        "AND starts_with(parse_filename(file), ?)"
    )
    with catalog.connect(root) as connection:
        if not has_table(connection, "derivations", "internal"):
            return None
        return dict(connection.execute(query, [encoder, derivation.name, name]).fetchall()) or None


def uploaded_bytes(root: Path, shard: str) -> int:
    """Bytes of the objects of a shard in the bucket that `root` stands for."""
    bucket = bucket_of(root)
    if bucket is None:
        return 0
    head = bucket.head(shard)
    return head.size if head else sum(size for _, size in bucket.list(shard))
