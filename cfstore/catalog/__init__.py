"""The DuckDB index of a store: what is where. Written by replacing the file, read without waiting for anyone."""

from cfstore.catalog.comparison import Difference, differences
from cfstore.catalog.connection import AMONG, connect, sql_string
from cfstore.catalog.editing import (
    adopt,
    drop_shards,
    forget,
    note_swept,
    rebuild,
    reconcile,
    register,
    reload_derived,
    reload_tables,
    sweep_temporary,
    write_snapshot,
)
from cfstore.catalog.questions import (
    Named,
    dead_derived_files,
    known_bags,
    read_named,
    replaced_shards,
    slides_per_shard,
)
from cfstore.catalog.shard_rows import live_records, read_removed, write_removed
from cfstore.catalog.table_rows import (
    PATIENTS_PREFIX,
    SKIPPED_PREFIX,
    SLIDE_LABELS_PREFIX,
    SPLITS_PREFIX,
    digest_of_file,
    read_labels,
    table_objects,
)

__all__ = [
    "AMONG", "PATIENTS_PREFIX", "SKIPPED_PREFIX", "SLIDE_LABELS_PREFIX", "SPLITS_PREFIX", "Difference", "Named",
    "adopt", "connect", "dead_derived_files", "differences", "digest_of_file", "drop_shards", "forget", "known_bags",
    "live_records", "note_swept", "read_labels", "read_named", "read_removed", "rebuild", "reconcile", "register",
    "reload_derived", "reload_tables", "replaced_shards", "slides_per_shard", "sql_string", "sweep_temporary",
    "table_objects", "write_removed", "write_snapshot",
]  # fmt: skip
