"""Objects that nothing names: what writers that died had uploaded.

Listing minus catalog finds them, but also what living writers have uploaded and not committed yet. So only what is a
day old counts as left behind; and because a writer may sleep for a day and wake, names are given up in the catalog
before their objects are deleted: a commit of that writer then loses the race, sees that its upload was given up, and
does not name it (`staging.push`). Clocks decide how much work is lost, never what is true.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Final

from cfstore.catalog import Named
from cfstore.remote.bucket import Bucket
from cfstore.remote.creation import PROBES_DIR
from cfstore.schema import DERIVED_DIR, FEATURES_DIR, TABLES_DIR

GRACE: Final = timedelta(hours=24)


def find(bucket: Bucket, named: Named) -> Mapping[str, Sequence[str]]:
    """Uploads older than a day that nothing names: by name of the shard (else of the object), their objects."""
    keys: dict[str, list[str]] = defaultdict(list)
    newest: dict[str, datetime] = {}
    for name, key, modified in _uploads(bucket):
        keys[name].append(key)
        newest[name] = max(newest.get(name, modified), modified)
    before = datetime.now(UTC) - GRACE
    held = {*named.shards, *named.derived, *(key for _, key in named.tables.values())}
    return {name: own for name, own in keys.items() if name not in held and newest[name] < before}


def _uploads(bucket: Bucket) -> Iterator[tuple[str, str, datetime]]:
    """(shard or object, key, time) of every object with a name of its own."""
    for folder in (FEATURES_DIR, DERIVED_DIR, TABLES_DIR, PROBES_DIR):
        for key, modified in bucket.list_times(folder):
            parts = PurePosixPath(key).parts
            if folder == FEATURES_DIR and len(parts) > 2:
                yield "/".join(parts[:3]), key, modified
            elif folder != TABLES_DIR or len(parts) > 2:  # files right below tables/ were copied there by hand
                yield key, key, modified


def remove(bucket: Bucket, keys: Sequence[str]) -> int:
    """Delete objects whose names were given up; returns how many."""
    if keys:
        bucket.delete(keys)
    return len(keys)
