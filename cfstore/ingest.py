"""From a plan to published shards.

A shard is written aside, and appears and is registered under the store's write lock. Kill the
process anywhere: registered shards are whole, a published but unregistered one is registered by
the next ingest, and what was being written is swept away.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from cfstore import catalog
from cfstore.convert import StoredBag, convert
from cfstore.errors import SourceError, UnreadableFileError
from cfstore.locks import hold_folder, sweep, write_lock
from cfstore.parsers import BagHead, BagSource
from cfstore.plan import IngestPlan, Problem, SlideJob, raise_problems
from cfstore.schema import FEATURES_DIR
from cfstore.shards import BagRecord, ShardRecord, ShardWriter, SlideRecord
from cfstore.shards.zarr_shard import TEMPORARY_PREFIX

OnError = Literal["stop", "skip"]
_SLIDES_PER_SHARD: Final = 64
_BYTES_PER_SHARD: Final = 2 << 30


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did."""

    n_slides: int
    n_bags: int
    n_without_coords: int
    n_present: int
    n_shards: int
    problems: tuple[Problem, ...]
    source_bytes: int
    stored_bytes: int
    seconds: float


def _batches(plan: IngestPlan) -> Iterator[list[SlideJob]]:
    """Slides of one encoder, as many as make one shard."""
    size = 2 if plan.dtype == "float16" else 4
    for encoder, dim in plan.dims.items():
        batch: list[SlideJob] = []
        total = 0
        for job in (job for job in plan.jobs if job.encoder == encoder):
            if batch and (len(batch) == _SLIDES_PER_SHARD or total + job.n_rows * dim * size > _BYTES_PER_SHARD):
                yield batch
                batch, total = [], 0
            batch.append(job)
            total += job.n_rows * dim * size
        if batch:
            yield batch


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _take(source: BagSource, head: BagHead, dtype: str) -> tuple[StoredBag, os.stat_result]:
    """The bag and its file's size and time, as they were before it was read."""
    try:
        stat = source.path.stat()
    except OSError as error:
        message = f"{source.path}: cannot be read any more ({error.strerror}); run the ingest again"
        raise UnreadableFileError(message) from error
    bag = convert(source, dtype)
    if bag.features.shape != (head.n_patches, head.dim):
        message = (
            f"{source.path}: has {bag.features.shape} features, {(head.n_patches, head.dim)} a moment ago; "
            "it is still being written: run the ingest again when it is done"
        )
        raise UnreadableFileError(message)
    return bag, stat


def _bag_record(source: BagSource, stat: os.stat_result, head: BagHead, bag: StoredBag, row_start: int) -> BagRecord:
    return BagRecord(
        scale=source.scale,
        row_start=row_start,
        n_patches=len(bag.features),
        digest=bag.digest,
        has_coords=bag.coords is not None,
        source=str(source.path.resolve()),
        source_bytes=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
        source_dtype=head.dtype,
        max_abs_error=bag.max_abs_error,
        rms_relative_error=bag.rms_relative_error,
        mpp=head.attributes.get("mpp"),
        level0_magnification=head.attributes.get("level0_magnification"),
        patch_size=_whole(head.attributes.get("patch_size")),
        patch_size_level0=_whole(head.attributes.get("patch_size_level0")),
    )


class _Ingest:
    """One run of an ingest: what it was told, and what it has done so far."""

    def __init__(
        self,
        root: Path,
        plan: IngestPlan,
        cohort: str | None,
        on_error: OnError,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.root, self.plan, self.cohort, self.on_error = root, plan, cohort, on_error
        self.progress = progress
        self.problems = list(plan.problems)
        self.done = 0
        self.records: list[ShardRecord] = []

    def _write_slide(self, shard: ShardWriter, job: SlideJob) -> SlideRecord | None:
        bags = []
        for source, head in zip(job.sources, job.heads, strict=True):
            try:
                bags.append(_take(source, head, self.plan.dtype))
            except SourceError as error:
                problem = Problem(job.slide_id, job.encoder, str(source.path), error)
                if self.on_error == "stop":
                    raise_problems([problem])
                self.problems.append(problem)
                return None
        shard.begin_slide()
        records = tuple(
            _bag_record(source, stat, head, bag, shard.append(bag.features, bag.coords))
            for source, head, (bag, stat) in zip(job.sources, job.heads, bags, strict=True)
        )
        return SlideRecord(job.slide_id, self.cohort, self.plan.folder.resolve().name, records)

    def write_shard(self, batch: Sequence[SlideJob]) -> None:
        encoder, dim = batch[0].encoder, self.plan.dims[batch[0].encoder]
        now = datetime.now(UTC)
        name = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.zarr"
        relative = f"{FEATURES_DIR}/{encoder}/{name}"
        with write_lock(self.root):
            writer = ShardWriter(
                self.root / relative, dim=dim, dtype=self.plan.dtype, slide_rows=[job.n_rows for job in batch]
            )
            held = hold_folder(writer.temporary)
        with held, writer:
            slides = []
            for job in batch:
                written = self._write_slide(writer, job)
                if written:
                    slides.append(written)
                self.done += 1
                if self.progress:
                    self.progress(self.done, len(self.plan.jobs))
            if slides:
                record = ShardRecord(
                    relative, encoder, dim, self.plan.dtype, now.isoformat(timespec="seconds"), tuple(slides)
                )
                self._publish(writer, record)

    def _publish(self, writer: ShardWriter, record: ShardRecord) -> None:
        with write_lock(self.root):
            catalog.reconcile(self.root)
            record = catalog.without_known(self.root, record)
            if not record.slides:
                return  # another ingest of the same folder was faster; its shards hold these slides
            writer.publish(record)
            catalog.register(self.root, [record])
            self.records.append(record)


def prepare(root: Path) -> None:
    """Finish what an earlier ingest left: register published shards, remove unpublished ones."""
    with write_lock(root):
        for folder in (root / FEATURES_DIR).glob("*"):
            sweep(folder, TEMPORARY_PREFIX)
        catalog.reconcile(root)


def run_ingest(
    root: Path,
    plan: IngestPlan,
    *,
    cohort: str | None,
    on_error: OnError,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Write the plan's slides as shards and register them.

    Raises
    ------
    SourceError
        With on_error="stop": before anything is written for what the plan already found, else
        at the first slide that fails; slides of finished shards stay.
    """
    started = time.monotonic()
    if on_error == "stop":
        raise_problems(plan.problems)
    run = _Ingest(root, plan, cohort, on_error, progress)
    for batch in _batches(plan):
        run.write_shard(batch)
    bags = [bag for record in run.records for slide in record.slides for bag in slide.bags]
    shards = [root / record.shard for record in run.records]
    return IngestReport(
        n_slides=sum(len(record.slides) for record in run.records),
        n_bags=len(bags),
        n_without_coords=sum(not bag.has_coords for bag in bags),
        n_present=plan.n_present,
        n_shards=len(shards),
        problems=tuple(run.problems),
        source_bytes=sum(bag.source_bytes for bag in bags),
        stored_bytes=sum(path.stat().st_size for shard in shards for path in shard.rglob("*") if path.is_file()),
        seconds=time.monotonic() - started,
    )
