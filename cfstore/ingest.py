"""From a plan to published shards: which slides share a shard, and who writes it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from cfstore import catalog
from cfstore.attempts import anywhere
from cfstore.convert import ARRAY_DTYPE
from cfstore.engines import EngineName, open_engine
from cfstore.halves import WORTH_TORCH
from cfstore.locks import PROBE_PREFIX, discard, sweep
from cfstore.plan import IngestPlan, Problem, SlideJob, raise_problems
from cfstore.schema import DERIVED_DIR, FEATURES_DIR
from cfstore.shard_job import OnError, ShardDone, ShardTask, write_shard
from cfstore.shards import TEMPORARY_PREFIX, Format, ShardRecord
from cfstore.writing import commit, place_of, refresh, sweep_left_behind

SLIDES_PER_SHARD: Final = 64
BYTES_PER_SHARD: Final = 2 << 30
_BYTES_PER_PROCESS: Final = 128 << 20  # less than that is written sooner than a process starts
_MAX_PROCESSES: Final = 16
_SHARDS_PER_PROCESS: Final = 3
TASK_MEMORY: Final = 1 << 30
"""Bytes that a Ray task reserves; one holds a few chunks of 1 MiB, and what it has loaded: see docs/cluster.md."""


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did.

    `n_restarted` tasks were given out again because a worker died; `n_recovered` of the slides had been written by one
    that died before it could say so.
    """

    n_slides: int
    n_bags: int
    n_without_coords: int
    n_present: int
    n_shards: int
    n_processes: int
    problems: tuple[Problem, ...]
    source_bytes: int
    stored_bytes: int
    seconds: float
    n_restarted: int = 0
    n_recovered: int = 0


def choose_jobs(plan: IngestPlan, jobs: int | None, n_slots: int | None = None) -> int:
    """Tasks at once: as asked for, else as many as the engine has slots (or a process per core), if there is work."""
    if jobs is not None:
        return jobs
    n_slots = n_slots or min(os.cpu_count() or 1, _MAX_PROCESSES)
    return max(1, min(n_slots, plan.feature_bytes // _BYTES_PER_PROCESS))


def _batches(plan: IngestPlan, jobs: int) -> Iterator[tuple[SlideJob, ...]]:
    """Slides of one encoder, as many as make one shard; a few batches for each process, so that none is left over."""
    size = np.dtype(ARRAY_DTYPE[plan.dtype]).itemsize
    most = min(SLIDES_PER_SHARD, max(1, -(-len(plan.jobs) // jobs)))
    most_bytes = BYTES_PER_SHARD
    if jobs > 1:
        most_bytes = min(most_bytes, max(_BYTES_PER_PROCESS, plan.feature_bytes // (_SHARDS_PER_PROCESS * jobs)))
    for encoder, dim in plan.dims.items():
        batch: list[SlideJob] = []
        total = 0
        for job in (job for job in plan.jobs if job.encoder == encoder):
            if batch and (len(batch) == most or total + job.n_rows * dim * size > most_bytes):
                yield tuple(batch)
                batch, total = [], 0
            batch.append(job)
            total += job.n_rows * dim * size
        if batch:
            yield tuple(batch)


def prepare(root: Path) -> None:
    """Finish what an earlier process left: register published shards, remove unpublished and replaced ones."""

    def finish() -> None:
        for folder in (root / FEATURES_DIR).glob("*"):
            sweep(folder, TEMPORARY_PREFIX)
        for folder in (root / DERIVED_DIR).glob("*/*"):
            sweep(folder, TEMPORARY_PREFIX)
        sweep(root, PROBE_PREFIX)
        catalog.sweep_temporary(root)
        catalog.reconcile(root)
        for shard in catalog.replaced_shards(root):
            remove_shard(root, shard)

    commit(root, finish)
    sweep_left_behind(root)


def remove_shard(root: Path, shard: str) -> None:
    """Delete a shard that no longer counts; if this is cut short, `prepare` removes the rest."""
    path = root / shard
    doomed = path.with_name(TEMPORARY_PREFIX + path.name)
    path.rename(doomed)
    discard(doomed)


def run_ingest(
    root: Path,
    plan: IngestPlan,
    *,
    form: Format,
    codec: str,
    cohort: str | None,
    on_error: OnError,
    jobs: int | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Write the plan's slides as shards and register them.

    Raises
    ------
    SourceError
        With on_error="stop": before anything is written for what the plan already found, else
        at the first slide that fails; slides of finished shards stay.
    StoreWriteError
        The store cannot be written; finished shards stay.
    EngineError
        Ray cannot be had, a node of it is not fit for the work, or its workers died too often; finished shards stay.
    """
    started = time.monotonic()
    if on_error == "stop":
        raise_problems(plan.problems)
    if engine != "local":  # other machines have other working directories
        root, plan = root.absolute(), replace(plan, jobs=tuple(_absolute(job) for job in plan.jobs))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(plan.jobs))

    files = [job.sources[0].path for job in plan.jobs[:1]]
    need = "cfstore ingest --engine ray"
    if not plan.jobs:
        engine, address = "local", None
    with open_engine(engine, address, store=place_of(root), files=files, memory=TASK_MEMORY, need=need) as run:
        jobs = choose_jobs(plan, jobs, run.n_slots)
        tasks = _tasks(
            root, plan, ShardRecord("", form, "", 0, plan.dtype, codec, ""), cohort, on_error, jobs, run.patience
        )
        work = write_shard if engine == "local" else anywhere(write_shard, root)
        shards = list(run(work, tasks, jobs, step))
        if run.n_restarted:
            prepare(root)  # sweeps away what the dead were writing
    refresh(root)
    report = _report(plan, shards, min(jobs, max(1, len(tasks))), time.monotonic() - started)
    return replace(report, n_restarted=run.n_restarted)


def _absolute(job: SlideJob) -> SlideJob:
    return replace(job, sources=tuple(replace(source, path=source.path.absolute()) for source in job.sources))


def _tasks(
    root: Path, plan: IngestPlan, head: ShardRecord, cohort: str | None, on_error: OnError, jobs: int, patience: float
) -> list[ShardTask]:
    """The largest first, so that none is left over at the end."""
    values = plan.feature_bytes // np.dtype(ARRAY_DTYPE[plan.dtype]).itemsize
    return [
        ShardTask(
            root=root,
            head=replace(head, encoder=batch[0].encoder, dim=plan.dims[batch[0].encoder]),
            jobs=batch,
            cohort=cohort,
            folder=plan.folder.resolve().name,
            on_error=on_error,
            load_torch=values * 4 // jobs > WORTH_TORCH,
            patience=patience,
        )
        for batch in sorted(_batches(plan, jobs), key=lambda batch: -sum(job.n_rows for job in batch))
    ]


def _report(plan: IngestPlan, shards: Sequence[ShardDone], n_processes: int, seconds: float) -> IngestReport:
    written = [each for done in shards for each in done.shards]
    problems = (*plan.problems, *(problem for done in shards for problem in done.problems))
    return IngestReport(
        n_slides=sum(len(each.slide_ids) for each in written),
        n_bags=sum(each.n_bags for each in written),
        n_without_coords=sum(each.n_without_coords for each in written),
        n_present=plan.n_present,
        n_shards=len(written),
        n_processes=n_processes,
        problems=problems,
        source_bytes=sum(each.source_bytes for each in written),
        stored_bytes=sum(done.stored_bytes for done in shards),
        seconds=seconds,
        n_recovered=sum(done.n_recovered for done in shards),
    )
