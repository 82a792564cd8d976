"""Shards: immutable Zarr v3 groups of a few dozen slides of one encoder, self-describing."""

from __future__ import annotations

from cfstore.shards.records import BagRecord, ShardRecord, SlideRecord
from cfstore.shards.zarr_shard import ShardReader, ShardWriter, digest_rows, read_record

__all__ = [
    "BagRecord",
    "ShardReader",
    "ShardRecord",
    "ShardWriter",
    "SlideRecord",
    "digest_rows",
    "read_record",
]
