"""Shards: immutable, self-describing files of a few dozen slides of one encoder.

Two formats, one face: a Zarr v3 group (compressed or not), or a WebDataset tar. A shard is
written under a temporary name by a `ShardWriter` and appears by one rename.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cfstore.convert import Affine
from cfstore.schema import FEATURES_DIR
from cfstore.shards import tar_shard, zarr_shard
from cfstore.shards.files import TEMPORARY_PREFIX, Check, check_inside, commit, sync
from cfstore.shards.records import BagRecord, Extent, Format, ShardRecord, SlideRecord
from cfstore.shards.zarr_shard import COORDS_CODEC

__all__ = [
    "COORDS_CODEC",
    "SUFFIXES",
    "TEMPORARY_PREFIX",
    "BagRecord",
    "Check",
    "Extent",
    "Format",
    "ShardRecord",
    "ShardWriter",
    "SlideRecord",
    "check_inside",
    "commit",
    "file_of",
    "open_writer",
    "published_shards",
    "read_record",
    "read_shard",
    "stored_checks",
    "sync",
]

SUFFIXES: Mapping[Format, str] = {"zarr": zarr_shard.SUFFIX, "webdataset": tar_shard.SUFFIX}


class ShardWriter(Protocol):
    """Slide after slide, bag after bag (coarse to fine), block after block of rows.

    begin_slide, then for each bag begin_bag, append..., end_bag, then end_slide; `abandon_slide`
    forgets a slide that was begun. `finish` flushes to disk; renaming is the caller's.
    """

    def begin_slide(self, slide_id: str, affine: Affine | None) -> None: ...
    def begin_bag(self, scale: int, n_patches: int) -> int | None: ...
    def append(self, rows: NDArray[Any]) -> None: ...
    def end_bag(self, coords: NDArray[np.int32] | None, n_patches: int) -> None: ...
    def end_slide(
        self,
        slide_id: str,
        cohort: str | None,
        folder: str,
        bags: Sequence[BagRecord],
        labels: Mapping[str, Any] | None = None,
    ) -> SlideRecord: ...
    def abandon_slide(self) -> None: ...
    def finish(self, slides: Sequence[SlideRecord]) -> ShardRecord: ...
    def close(self) -> None: ...


def open_writer(temporary: Path, head: ShardRecord, slide_rows: Sequence[int]) -> ShardWriter:
    """A writer of `head.format` at the path `temporary`, which must not exist.

    `slide_rows` are the rows of each slide to come, or an upper bound on them: they decide the
    chunk size.
    """
    kind = zarr_shard.ZarrShardWriter if head.format == "zarr" else tar_shard.TarShardWriter
    return kind(temporary, head, slide_rows)


def published_shards(root: Path) -> list[str]:
    """Shards on disk, relative to the store, in the order in which they were published."""
    folders = (root / FEATURES_DIR).glob("*/*")
    found = [path for path in folders if path.suffix in SUFFIXES.values() and not path.name.startswith(".")]
    return [str(path.relative_to(root)) for path in sorted(found, key=lambda path: (path.name, path.parent.name))]


def read_record(root: Path, shard: str) -> ShardRecord:
    """What a shard says about itself; raises StoreFormatError naming it."""
    return read_shard(root, shard)[0] if shard.endswith(tar_shard.SUFFIX) else zarr_shard.read_record(root, shard)


def read_shard(root: Path, shard: str) -> tuple[ShardRecord, Iterable[Extent]]:
    """A shard's record, and where the rows of its bags lie.

    Raises
    ------
    StoreFormatError
        Not a shard, or of another format version.
    DamagedShardError
        A file is missing, cut short, or its index is not what was written.
    """
    if shard.endswith(tar_shard.SUFFIX):
        record, extents, _ = tar_shard.read_shard(root, shard)
        return record, extents
    record = zarr_shard.read_record(root, shard)
    return record, list(zarr_shard.read_extents(root, record))


def stored_checks(root: Path, shard: str) -> list[Check]:
    """Checks which together look at every stored byte of a shard; may run in any order, in any thread.

    Raises
    ------
    StoreFormatError
        The shard cannot be looked into at all.
    """
    kind = tar_shard if shard.endswith(tar_shard.SUFFIX) else zarr_shard
    return list(kind.stored_checks(root, shard))


def file_of(shard: str, array: str) -> str:
    """The file that holds `array` (features, coords, scale, zero) of a shard, relative to the store."""
    return shard if shard.endswith(tar_shard.SUFFIX) else zarr_shard.file_of(shard, array)
