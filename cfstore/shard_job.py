"""One shard, from feature files to the catalog: written aside, renamed, registered.

Runs in the ingesting process, in one of several, or on another machine. Kill it anywhere: what was being written is
swept away by the next ingest, and a shard that was renamed but not registered is registered. Run it again for the same
task: it knows by its name the shard that it had published already, and answers with that.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from cfstore import catalog
from cfstore.attempts import ShardSummary, registered_shards, uploaded_bytes
from cfstore.convert import Affine, BagConverter, RangeMeter
from cfstore.errors import SourceError, UnreadableFileError
from cfstore.halves import prefer_torch
from cfstore.locks import LOCK_SECONDS, discard, disk_errors, hold, write_lock
from cfstore.parsers import BagHead, BagSource, open_bag
from cfstore.plan import Problem, SlideJob, raise_problems
from cfstore.schema import FEATURES_DIR
from cfstore.shards import (
    SUFFIXES,
    TEMPORARY_PREFIX,
    BagRecord,
    ShardRecord,
    ShardWriter,
    SlideRecord,
    open_writer,
    published_shards,
    read_record,
    sync,
)
from cfstore.writing import commit, is_staged, upload_shard

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class ShardTask:
    """What to write: `head` is the shard without slides and name, `folder` the ingested folder's name.

    `load_torch`: the process has so much to convert that importing torch for it pays. `name` ends the shard's name.
    `patience`: for how many seconds the task waits while others register.
    """

    root: Path
    head: ShardRecord
    jobs: tuple[SlideJob, ...]
    cohort: str | None
    folder: str
    on_error: OnError
    load_torch: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    patience: float = LOCK_SECONDS


@dataclass(frozen=True)
class ShardDone:
    """What became of it: the shards (none if nothing was left to write), their bytes, and slides left out.

    `n_recovered` slides had been published by an earlier attempt, whose process died before it could say so.
    """

    shards: tuple[ShardSummary, ...]
    stored_bytes: int
    problems: tuple[Problem, ...]
    n_recovered: int = 0


_NOTHING = ShardDone((), 0, ())


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        message = f"{path}: cannot be read any more ({error.strerror}); run the ingest again"
        raise UnreadableFileError(message) from error


@contextmanager
def _blocks(source: BagSource, head: BagHead) -> Iterator[Any]:
    """The opened bag, if it still is what it was when the folder was looked at."""
    with open_bag(source) as bag:
        found, expected = (bag.head.n_patches, bag.head.dim), (head.n_patches, head.dim)
        if found != expected:
            message = (
                f"{source.path}: has {found} features, {expected} a moment ago; "
                "it is still being written: run the ingest again when it is done"
            )
            raise UnreadableFileError(message)
        yield bag


def _affine(job: SlideJob, dim: int) -> Affine:
    """Scale and zero of each channel over all bags of a slide. Their files are read twice: the second time from RAM."""
    meter = RangeMeter(dim)
    for source, head in zip(job.sources, job.heads, strict=True):
        with _blocks(source, head) as bag:
            for rows in bag.blocks():
                meter.add(source.path, rows)
    return meter.affine()


def _write_bag(writer: ShardWriter, source: BagSource, head: BagHead, dtype: str, affine: Affine | None) -> BagRecord:
    stat = _stat(source.path)
    converter = BagConverter(source.path, dtype, head.dim, affine)
    with _blocks(source, head) as bag:
        row_start = writer.begin_bag(source.scale, head.n_patches)
        for rows in bag.blocks():
            stored: NDArray[Any] = converter.convert(rows)
            writer.append(stored)
        coords = bag.coords()
    writer.end_bag(coords, head.n_patches)
    measured = converter.finish(coords)
    return BagRecord(
        scale=source.scale,
        row_start=row_start,
        n_patches=head.n_patches,
        digest=measured.digest,
        has_coords=coords is not None,
        source=str(source.path.resolve()),
        source_bytes=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
        source_dtype=head.dtype,
        max_abs_error=measured.max_abs_error,
        rms_relative_error=measured.rms_relative_error,
        mpp=head.attributes.get("mpp"),
        level0_magnification=head.attributes.get("level0_magnification"),
        patch_size=_whole(head.attributes.get("patch_size")),
        patch_size_level0=_whole(head.attributes.get("patch_size_level0")),
    )


def _write_slide(writer: ShardWriter, task: ShardTask, job: SlideJob) -> SlideRecord | Problem:
    dtype, path = task.head.dtype, job.sources[0].path
    try:
        affine = _affine(job, task.head.dim) if dtype == "int8" else None
    except SourceError as error:
        return Problem(job.slide_id, job.encoder, str(path), error)
    writer.begin_slide(job.slide_id, affine)
    try:
        bags = []
        for source, head in zip(job.sources, job.heads, strict=True):
            path = source.path
            bags.append(_write_bag(writer, source, head, dtype, affine))
    except SourceError as error:
        writer.abandon_slide()
        return Problem(job.slide_id, job.encoder, str(path), error)
    return writer.end_slide(job.slide_id, task.cohort, task.folder, bags)


@contextmanager
def new_shard(
    root: Path, head: ShardRecord, slide_rows: list[int], patience: float = LOCK_SECONDS
) -> Iterator[tuple[ShardWriter, Path]]:
    """A writer and its temporary place, locked against `sweep` and removed at the end if it is still there."""
    temporary = root / FEATURES_DIR / head.encoder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{SUFFIXES[head.format]}"
    with disk_errors(root):
        writer, held = None, nullcontext()  # type: ShardWriter | None, Any
        try:
            with write_lock(root, patience):
                writer = open_writer(temporary, head, slide_rows)
                held = hold(temporary)
            with held:
                yield writer, temporary
        finally:
            if writer:
                writer.close()
            discard(temporary)


def publish(root: Path, temporary: Path, record: ShardRecord, name: str | None = None) -> ShardRecord:
    """Rename a finished shard into place, numbered after all others, and register it. Needs the write lock."""
    shard = shard_name(published_shards(root), record, name or uuid.uuid4().hex[:8])
    temporary.rename(root / shard)
    for folder in (temporary.parent, temporary.parent.parent):
        sync(folder)
    record = replace(record, shard=shard)
    catalog.register(root, [record])
    return record


def shard_name(others: Iterable[str], record: ShardRecord, name: str) -> str:
    """Where a new shard called `name` lies, relative to the store: its number follows those of `others`."""
    number = max((int(Path(shard).name.partition("-")[0]) for shard in others), default=0) + 1
    return f"{FEATURES_DIR}/{record.encoder}/{number:06d}-{name}{SUFFIXES[record.format]}"


def size_on_disk(path: Path) -> int:
    """Bytes of a shard's files."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _published(task: ShardTask) -> ShardSummary | None:
    """The shard that an earlier attempt at this very task has published."""
    mine = {job.slide_id for job in task.jobs}
    return next((found for found in _named(task) if found.slide_ids and mine >= found.slide_ids), None)


def _named(task: ShardTask) -> Iterator[ShardSummary]:
    """Shards that have the task's name: on disk; of a store in a bucket, in the newest catalog that was pulled."""
    root, encoder, form = task.root, task.head.encoder, task.head.format
    if is_staged(root):
        yield from registered_shards(root, encoder, form, task.name)
        return
    for path in (root / FEATURES_DIR / encoder).glob(f"[0-9]*-{task.name}{SUFFIXES[form]}"):
        yield ShardSummary.of(read_record(root, path.relative_to(root).as_posix()))


def _recover(task: ShardTask, published: ShardSummary, tell: Callable[[], None]) -> ShardDone:
    """Answer for an earlier attempt, and write what it had left out: to find out again why."""
    commit(task.root, lambda: catalog.adopt(task.root), task.patience)
    found, shard = published.slide_ids, published.shard
    for _ in found:
        tell()
    left = tuple(job for job in task.jobs if job.slide_id not in found)
    name = f"{(int(task.name, 16) + 1) % (1 << 32):08x}"
    rest = write_shard(replace(task, jobs=left, name=name), tell) if left else _NOTHING
    nbytes = uploaded_bytes(task.root, shard) if is_staged(task.root) else size_on_disk(task.root / shard)
    return ShardDone(
        shards=(published, *rest.shards),
        stored_bytes=nbytes + rest.stored_bytes,
        problems=rest.problems,
        n_recovered=len(found) + rest.n_recovered,
    )


def _write_slides(
    writer: ShardWriter, task: ShardTask, tell: Callable[[], None]
) -> tuple[list[SlideRecord], list[Problem]]:
    slides, problems = [], []
    for job in task.jobs:
        written = _write_slide(writer, task, job)
        if isinstance(written, SlideRecord):
            slides.append(written)
        elif task.on_error == "stop":
            raise_problems([written])
        else:
            problems.append(written)
        tell()
    return slides, problems


def _publish_unless_taken(
    task: ShardTask, temporary: Path, record: ShardRecord
) -> tuple[ShardRecord | None, ShardSummary | None, list[SlideJob]]:
    """Publish a finished shard, unless an earlier attempt did, or some of its slides came into the store meanwhile.

    Gives what was published now, what by the earlier attempt, and what is left to write.
    """
    root = task.root
    name = f"{task.name}{uuid.uuid4().hex[len(task.name) :]}"  # the task's, and this attempt's alone
    uploaded = upload_shard(root, temporary, lambda others: shard_name(others, record, name))

    def publish_unless_taken() -> tuple[ShardRecord | None, ShardSummary | None, list[SlideJob]]:
        catalog.adopt(root)
        if uploaded and uploaded.is_registered(root):  # the answer to the commit got lost
            return uploaded.record, None, []
        published = _published(task)  # by an attempt that was given up for dead, but was not
        known = catalog.known_bags(root, record.encoder, [job.slide_id for job in task.jobs])
        left = [job for job in task.jobs if known.isdisjoint((job.slide_id, s.scale) for s in job.sources)]
        if published or len(left) < len(task.jobs):
            return None, published, left
        if uploaded:
            uploaded.register(root)
            return uploaded.record, None, []
        return publish(root, temporary, record, task.name), None, []

    mine, earlier, left = commit(root, publish_unless_taken, task.patience)
    if uploaded and not mine:
        uploaded.discard()
    return mine, earlier, left


def write_shard(task: ShardTask, tell: Callable[[], None]) -> ShardDone:
    """Write, publish and register one shard; `tell` is called after each slide.

    Raises
    ------
    SourceError
        With on_error="stop", at the first slide that fails.
    StoreWriteError
        The store cannot be written.
    """
    root = task.root
    if task.load_torch:
        prefer_torch()
    published = _published(task)
    if published:
        return _recover(task, published, tell)
    head = replace(task.head, created=datetime.now(UTC).isoformat(timespec="seconds"))
    with new_shard(root, head, [job.n_rows for job in task.jobs], task.patience) as (writer, temporary):
        slides, problems = _write_slides(writer, task, tell)
        if not slides:
            return replace(_NOTHING, problems=tuple(problems))
        record, nbytes = writer.finish(slides), size_on_disk(temporary)
        mine, published, left = _publish_unless_taken(task, temporary, record)
        if mine:
            return ShardDone((ShardSummary.of(mine),), nbytes, tuple(problems))
    if published:
        return _recover(task, published, lambda: None)
    # Another ingest of the same folder took some of these slides meanwhile: write only the others.
    failed = {problem.slide_id for problem in problems}
    again = replace(task, jobs=tuple(job for job in left if job.slide_id not in failed))
    done = write_shard(again, lambda: None) if again.jobs else _NOTHING
    return replace(done, problems=(*problems, *done.problems))
