"""Slides out of a store, and the space they took.

Shards are never changed: removing a slide writes down that it is gone (`tables/removed.parquet`),
and compaction writes new shards of what is left. A compacted shard names those it replaces, so
that one rename decides which of them count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cfstore import catalog
from cfstore.digests import stored_digest
from cfstore.errors import DamagedShardError, SlideNotFoundError, StoreFormatError
from cfstore.ingest import BYTES_PER_SHARD, SLIDES_PER_SHARD, prepare, remove_shard
from cfstore.locks import write_lock
from cfstore.reader import SlideReader
from cfstore.shard_job import new_shard, publish, size_on_disk
from cfstore.shards import BagRecord, ShardRecord, ShardWriter, SlideRecord, published_shards, read_record
from cfstore.writing import commit

_SMALL_SLIDES: Final = SLIDES_PER_SHARD // 2
_SMALL_BYTES: Final = BYTES_PER_SHARD // 2


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did."""

    n_shards_before: int
    n_shards_after: int
    bytes_before: int
    bytes_after: int
    n_slides_rewritten: int


def remove_slides(root: Path, slide_ids: Sequence[str], encoder: str | None = None) -> int:
    """Take slides out of the store (of one encoder, if one is named); returns how many bags went.

    Their space is freed by `compact`.

    Raises
    ------
    SlideNotFoundError
        One of them is not in the store (nor removed from it since the last `compact`); nothing
        was removed then.
    """
    prepare(root)
    return commit(root, lambda: _remove(root, slide_ids, encoder))


def _remove(root: Path, slide_ids: Sequence[str], encoder: str | None) -> int:
    query = (
        "SELECT shard, slide_id, count(*) FROM bags WHERE list_contains(?, slide_id) "
        "AND (?::VARCHAR IS NULL OR encoder = ?) GROUP BY ALL ORDER BY ALL"
    )
    with catalog.connect(root) as connection:
        found = connection.execute(query, [list(slide_ids), encoder, encoder]).fetchall()
    removed = catalog.read_removed(root)
    # One that is gone already is no mistake: a run that was cut off is run again.
    known = {slide_id for shard, slide_id in removed if encoder is None or Path(shard).parent.name == encoder}
    unknown = sorted(set(slide_ids) - known - {slide_id for _, slide_id, _ in found})
    if unknown:
        what = f" from encoder {encoder}" if encoder else ""
        message = f"{', '.join(unknown[:5])}: not in {root}{what}; nothing was removed"
        raise SlideNotFoundError(message)
    gone = {(shard, slide_id) for shard, slide_id, _ in found}
    catalog.write_removed(root, removed | gone)
    catalog.forget(root, gone)
    _drop_derived(root)
    return sum(count for _, _, count in found)


@dataclass(frozen=True)
class ReindexReport:
    """What the catalog lists after it was made anew, and shards it listed before that are gone from disk."""

    n_shards: int
    n_slides: int
    n_bags: int
    gone: tuple[str, ...]


def reindex(root: Path) -> ReindexReport:
    """Make the catalog anew from the shards, `tables/` and `derived/` alone, whatever became of the old one.

    Raises
    ------
    StoreFormatError
        A shard, table or derived file cannot be read; it is named, and the catalog stays as it was.
    """
    with write_lock(root):
        try:
            before = catalog.slides_per_shard(root)
        except StoreFormatError:
            before = {}
        catalog.rebuild(root)
    prepare(root)
    with catalog.connect(root) as connection:
        n_slides, n_bags = connection.execute("SELECT count(DISTINCT slide_id), count(*) FROM bags").fetchall()[0]
    on_disk = published_shards(root)
    return ReindexReport(len(on_disk), n_slides, n_bags, tuple(sorted(set(before) - set(on_disk))))


@dataclass(frozen=True)
class _Live:
    """A shard and what of it still counts."""

    record: ShardRecord
    slides: tuple[SlideRecord, ...]
    nbytes: int

    @property
    def kind(self) -> tuple[object, ...]:
        record = self.record
        return record.format, record.encoder, record.dim, record.dtype, record.codec

    @property
    def wasteful(self) -> bool:
        return len(self.slides) < len(self.record.slides)

    @property
    def small(self) -> bool:
        return len(self.slides) <= _SMALL_SLIDES and self.nbytes <= _SMALL_BYTES


def _live_shards(root: Path) -> list[_Live]:
    removed = catalog.read_removed(root)
    shards = []
    for shard in published_shards(root):
        record = read_record(root, shard)
        slides = tuple(slide for slide in record.slides if (shard, slide.slide_id) not in removed)
        shards.append(_Live(record, slides, size_on_disk(root / shard)))
    return shards


def _groups(shards: Iterable[_Live]) -> Iterator[list[_Live]]:
    """Shards to be rewritten as one: those with removed slides, and small ones of a kind together."""
    kinds: dict[tuple[object, ...], list[_Live]] = defaultdict(list)
    for shard in shards:
        if shard.slides and (shard.wasteful or shard.small):
            kinds[shard.kind].append(shard)
    for members in kinds.values():
        group: list[_Live] = []
        for shard in members:
            slides = sum(len(other.slides) for other in group) + len(shard.slides)
            nbytes = sum(other.nbytes for other in group) + shard.nbytes
            if group and (slides > SLIDES_PER_SHARD or nbytes > BYTES_PER_SHARD):
                yield group
                group = []
            group.append(shard)
        yield group


def compact(root: Path, progress: Callable[[int, int], None] | None = None) -> CompactReport:
    """Rewrite shards that hold removed slides, and put small ones together.

    Every slide is compared with its digest while it is copied. Kill it anywhere: either the old
    shards count or the new one.

    Raises
    ------
    DamagedShardError
        A slide is not what was written; its shard is left as it is.
    StoreWriteError
        The store cannot be written.
    """
    prepare(root)
    on_disk = published_shards(root)
    bytes_before = sum(size_on_disk(root / shard) for shard in on_disk)
    _drop_empty(root)
    with write_lock(root):
        before = _live_shards(root)
    groups = [group for group in _groups(before) if len(group) > 1 or group[0].wasteful]
    total = sum(len(shard.slides) for group in groups for shard in group)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    rewritten = sum(_rewrite(root, group, step) for group in groups)
    with write_lock(root):
        _forget_deleted(root)
        _drop_derived(root)
        catalog.reload_tables(root)
    after = published_shards(root)
    return CompactReport(
        n_shards_before=len(on_disk),
        n_shards_after=len(after),
        bytes_before=bytes_before,
        bytes_after=sum(size_on_disk(root / shard) for shard in after),
        n_slides_rewritten=rewritten,
    )


def _drop_empty(root: Path) -> None:
    """Delete shards of which every slide was removed; they need not be readable.

    The catalog forgets a shard before it is deleted: cut off between the two, it is registered
    again, empty. The other way round the catalog would miss a shard.
    """
    with write_lock(root):
        held = catalog.slides_per_shard(root)
        empty = [shard for shard in published_shards(root) if held.get(shard) == 0]
        if empty:
            catalog.drop_shards(root, empty)
            for shard in empty:
                remove_shard(root, shard)


def _forget_deleted(root: Path) -> None:
    """Shorten the list of removed slides by those whose shard is neither on disk nor known any more."""
    held = {*catalog.slides_per_shard(root), *published_shards(root)}
    removed = catalog.read_removed(root)
    left = {pair for pair in removed if pair[0] in held}
    if left != removed:
        catalog.write_removed(root, left)


def _drop_derived(root: Path) -> None:
    """Delete derived files of which nothing counts any more: of removed slides, or computed twice."""
    dead = catalog.dead_derived_files(root)
    for file in dead:
        (root / file).unlink(missing_ok=True)
    if dead:
        catalog.reload_derived(root)


def _rewrite(root: Path, group: Sequence[_Live], step: Callable[[], None]) -> int:
    """One new shard in place of a group; returns the number of its slides."""
    names = [shard.record.shard for shard in group]
    replaces = [*names, *(older for shard in group for older in shard.record.replaces)]
    head = replace(
        group[0].record,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        replaces=tuple(replaces),
        slides=(),
    )
    rows = [sum(bag.n_patches for bag in slide.bags) for shard in group for slide in shard.slides]
    with new_shard(root, head, rows) as (writer, temporary):
        slides = []
        for shard in group:
            for slide in shard.slides:
                slides.append(_copy(root, shard.record, slide, writer))
                step()
        record = writer.finish(slides)
        with write_lock(root):
            now = {shard.record.shard: shard.slides for shard in _live_shards(root)}
            if any(now.get(shard.record.shard) != shard.slides for shard in group):
                return 0  # somebody removed slides of these shards meanwhile; the next compaction sees to it
            publish(root, temporary, record)
            for name in names:
                remove_shard(root, name)
    return len(slides)


def _copy(root: Path, shard: ShardRecord, slide: SlideRecord, writer: ShardWriter) -> SlideRecord:
    scales = [bag.scale for bag in slide.bags]
    held = SlideReader(root, shard.encoder, scales, [slide.slide_id], with_coords=True).read(slide.slide_id)
    bags: list[BagRecord] = []
    for number, record in enumerate(slide.bags):
        bag = held.bags[record.scale]
        if stored_digest(bag) != record.digest:
            message = (
                f"{shard.shard}: slide {slide.slide_id} at {record.scale}x is not what was written; restore the shard"
            )
            raise DamagedShardError(message)
        if number == 0:
            writer.begin_slide(slide.slide_id, bag.affine)
        row_start = writer.begin_bag(record.scale, record.n_patches)
        writer.append(bag.features)
        writer.end_bag(bag.coords, record.n_patches)
        bags.append(replace(record, row_start=row_start))
    return writer.end_slide(slide.slide_id, slide.cohort, slide.folder, bags)
