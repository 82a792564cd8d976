"""What is missing of what was asked for, who computes it, and what cannot be had."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from cfstore.attempts import anywhere
from cfstore.catalog import connect
from cfstore.derivation import Derivation
from cfstore.derive_job import DeriveTask, write_derived
from cfstore.derived_reader import Places, find_derived
from cfstore.derived_tables import unread_files
from cfstore.engines import EngineName, open_engine
from cfstore.errors import SlideNotFoundError
from cfstore.ingest import prepare
from cfstore.render import some
from cfstore.selection import shard_order
from cfstore.writing import place_of, refresh

SLIDES_PER_FILE: Final = 64
_MAX_PROCESSES: Final = 16
_FILES_PER_PROCESS: Final = 3
_WORK_PER_PROCESS: Final = 1 << 29  # multiplications; less is done sooner than a process starts
TASK_MEMORY: Final = 1 << 30
SIMILAR_MEMORY: Final = 2 << 30
"""Bytes that a Ray task reserves; more where it compares all features of a slide: see docs/cluster.md."""
_WORK_PER_FILE: Final = 1 << 44  # some minutes: more is not put at stake before it is on disk


@dataclass(frozen=True)
class DeriveReport:
    """What a derivation did.

    Parameters
    ----------
    n_done, n_held
        Arrays (of one slide and derivation each) that were computed, and that were there already.
    done, held
        The same by name of the derivation.
    excluded
        Slides that something cannot be derived of, by reason.
    n_slides, n_processes, seconds
        Slides asked for; processes that worked; time taken.
    n_restarted, n_recovered
        Tasks that were given out again because a worker died; of the arrays done, those written by one that died before
        it could say so.
    unread
        Derived files of the store that cannot be read and count as not there, each with the reason and the remedy.
    """

    n_done: int
    n_held: int
    done: Mapping[str, int]
    held: Mapping[str, int]
    excluded: Mapping[str, tuple[str, ...]]
    n_slides: int
    n_processes: int
    seconds: float
    n_restarted: int = 0
    n_recovered: int = 0
    unread: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Bag:
    n_patches: int
    dim: int
    has_coords: bool


_Bags = Mapping[str, Mapping[int, _Bag]]


def _read_bags(root: Path, encoder: str, slide_ids: Sequence[str]) -> _Bags:
    """The bags of an encoder by slide and scale; SlideNotFoundError where a slide has none."""
    query = (
        "SELECT slide_id, scale, n_patches, dim, has_coords FROM bags WHERE encoder = ? AND list_contains(?, slide_id)"
    )
    found: dict[str, dict[int, _Bag]] = {slide_id: {} for slide_id in slide_ids}
    with connect(root) as connection:
        for slide_id, scale, *rest in connection.execute(query, [encoder, list(slide_ids)]).fetchall():
            found[slide_id][scale] = _Bag(*rest)
    without = [slide_id for slide_id, bags in found.items() if not bags]
    if without:
        raise SlideNotFoundError(f"{some(without)}: no bags from encoder {encoder} in {root}")
    return found


def choose_slides(
    root: Path, encoder: str | None, cohort: str | None, slide_ids: Sequence[str] | None
) -> tuple[str, list[str]]:
    """The encoder, and its slides: the given ones, a cohort's, or all.

    Raises
    ------
    SlideNotFoundError
        No such slides, or several encoders have them and none is named.
    """
    query = (
        "SELECT encoder, list(DISTINCT slide_id) FROM bags JOIN slides USING (slide_id) "
        "WHERE (?::VARCHAR IS NULL OR cohort = ?) AND (? OR list_contains(?, slide_id)) "
        "GROUP BY encoder ORDER BY encoder"
    )
    with connect(root) as connection:
        held = dict(connection.execute(query, [cohort, cohort, slide_ids is None, list(slide_ids or [])]).fetchall())
    of = f"cohort {cohort}" if cohort else f"{root}"
    listed = ", ".join(held) or "none"
    if encoder is None and len(held) != 1:
        what = "has several encoders" if held else "has no such slides; encoders that have them"
        raise SlideNotFoundError(f"{of} {what}: {listed}" + ("; name one with --encoder" if held else ""))
    encoder = encoder or next(iter(held))
    if encoder not in held:
        raise SlideNotFoundError(f"{of} has no slides from encoder {encoder!r}; it has {listed}")
    return encoder, sorted(slide_ids if slide_ids is not None else held[encoder])


def default_derivations(root: Path, encoder: str, slide_ids: Sequence[str]) -> list[Derivation]:
    """What is computed where nothing is named.

    The 8 nearest patches and the mean at every scale; parents between neighbouring scales, and between the finest
    and the coarsest.
    """
    bags = _read_bags(root, encoder, slide_ids)
    scales = sorted({scale for own in bags.values() for scale in own}, reverse=True)
    pairs = {*pairwise(scales), *([(scales[0], scales[-1])] if len(scales) > 1 else [])}
    return [
        *(Derivation.nearest(scale) for scale in scales),
        *(Derivation.parents(*pair) for pair in sorted(pairs, reverse=True)),
        *(Derivation.mean(scale) for scale in scales),
    ]


def choose_jobs(work: int, jobs: int | None, n_slides: int, n_slots: int | None = None) -> int:
    """Tasks at once: as asked for, else as many as the engine has slots (or a process per core), if there is work."""
    if jobs is not None:
        return jobs
    n_slots = n_slots or min(os.cpu_count() or 1, _MAX_PROCESSES)
    return max(1, min(n_slots, n_slides, work // _WORK_PER_PROCESS))


def run_derive(
    root: Path,
    derivations: Iterable[Derivation],
    encoder: str,
    slide_ids: Sequence[str],
    *,
    jobs: int | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DeriveReport:
    """Compute what is missing of `derivations` for these slides, and register it.

    Raises
    ------
    SlideNotFoundError
        A slide has no bag from this encoder.
    DamagedShardError
        A bag cannot be read; what was computed before stays.
    StoreWriteError
        The store cannot be written; what was computed before stays.
    EngineError
        Ray cannot be had, a node of it is not fit for the work, or its workers died too often; what was computed
        before stays.
    """
    started = time.monotonic()
    root = root if engine == "local" else root.absolute()  # other machines have other working directories
    wanted, slide_ids = sorted(set(derivations)), list(dict.fromkeys(slide_ids))
    bags = _read_bags(root, encoder, slide_ids)
    held = find_derived(root, wanted, encoder, slide_ids)
    if not _all_there(root, held, slide_ids):  # else a store that cannot be written will do
        prepare(root)
        bags, held = _read_bags(root, encoder, slide_ids), find_derived(root, wanted, encoder, slide_ids)
    todo, excluded = _missing(wanted, bags, held)
    work = {slide_id: sum(_work(each, bags[slide_id]) for each in own) for slide_id, own in todo.items()}
    order = [slide_id for shard in shard_order(root, encoder, list(todo)) for slide_id in shard] if todo else []
    n_steps = 0

    def step() -> None:
        nonlocal n_steps
        n_steps += 1
        if progress:
            progress(n_steps, len(order))

    done: Counter[str] = Counter()
    n_recovered = 0
    similar = any(each.kind == "similar" for each in wanted)
    if not todo:
        engine, address = "local", None
    with open_engine(
        engine,
        address,
        store=place_of(root),
        memory=SIMILAR_MEMORY if similar else TASK_MEMORY,
        need="cfstore derive --engine ray",
    ) as run:
        n_jobs = choose_jobs(sum(work.values()), jobs, len(todo), run.n_slots)
        if jobs is None and similar and run.n_slots is None:
            n_jobs = 1  # its matrix products have a thread per core
        tasks = [
            DeriveTask(root, encoder, {slide_id: tuple(todo[slide_id]) for slide_id in part}, patience=run.patience)
            for part in _parts(order, work, n_jobs)
        ]
        job = write_derived if engine == "local" else anywhere(write_derived, root)
        for result in run(job, tasks, n_jobs, step):
            done.update({derivation.name: count for derivation, count in result.done.items() if count})
            n_recovered += result.n_recovered
            for reason, slide_id in result.excluded:
                excluded[reason].add(slide_id)
        if run.n_restarted:
            prepare(root)  # sweeps away what the dead were writing
    refresh(root)
    with connect(root) as connection:
        unread = unread_files(connection, root)
    there = {derivation.name: len(own) for derivation, own in held.items() if own}
    return DeriveReport(
        n_done=done.total(),
        n_held=sum(there.values()),
        done={each.name: done[each.name] for each in wanted if done[each.name]},
        held=there,
        excluded={reason: tuple(sorted(ids)) for reason, ids in sorted(excluded.items())},
        n_slides=len(slide_ids),
        n_processes=min(n_jobs, max(1, len(tasks))),
        seconds=time.monotonic() - started,
        n_restarted=run.n_restarted,
        n_recovered=n_recovered,
        unread=unread,
    )


def _missing(
    wanted: Iterable[Derivation], bags: _Bags, held: Places
) -> tuple[dict[str, list[Derivation]], dict[str, set[str]]]:
    """What to compute by slide, and the slides of which something cannot be, by reason."""
    excluded: dict[str, set[str]] = defaultdict(set)
    todo: dict[str, list[Derivation]] = defaultdict(list)
    for derivation in wanted:
        for slide_id in (slide_id for slide_id in bags if slide_id not in held[derivation]):
            reason = _why_not(derivation, bags[slide_id])
            if reason:
                excluded[reason].add(slide_id)
            else:
                todo[slide_id].append(derivation)
    return todo, excluded


def _all_there(root: Path, held: Places, slide_ids: Sequence[str]) -> bool:
    files = {place.file for places in held.values() for place in places.values()}
    return all(len(places) == len(slide_ids) for places in held.values()) and all(
        (root / file).exists() for file in files
    )


def _why_not(derivation: Derivation, bags: Mapping[int, _Bag]) -> str | None:
    """Why the catalog alone says that something cannot be derived; None if it does not."""
    for scale in derivation.scales:
        if scale not in bags:
            return f"no bag at {scale}x"
        if derivation.kind in ("nearest", "parents") and not bags[scale].has_coords:
            return f"no coordinates at {scale}x"
    return None


def _work(derivation: Derivation, bags: Mapping[int, _Bag]) -> int:
    """About how many multiplications something costs, or as much time as these."""
    bag = bags[derivation.scale]
    if derivation.kind == "similar":
        return bag.n_patches**2 * bag.dim
    return bag.n_patches * (bag.dim if derivation.kind == "mean" else 1000)


def _parts(slide_ids: Sequence[str], work: Mapping[str, int], jobs: int) -> Iterator[list[str]]:
    """Slides of one file each: a few files per process, so that none is left over at the end."""
    most = SLIDES_PER_FILE if jobs == 1 else min(SLIDES_PER_FILE, -(-len(slide_ids) // (_FILES_PER_PROCESS * jobs)))
    part: list[str] = []
    cost = 0
    for slide_id in slide_ids:
        if part and (len(part) == most or cost + work[slide_id] > _WORK_PER_FILE):
            yield part
            part, cost = [], 0
        part.append(slide_id)
        cost += work[slide_id]
    if part:
        yield part
