"""Is every byte of a store what was written? And, asked deeply: is it what the sources say?

Structure first: the catalog, row for row, against shards and `tables/`. Then every stored byte
of every shard against its digest, and every bag as a reader gives it out against the digest of
its rows. What is found is said per slide.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np

from cfstore import catalog, derived_tables
from cfstore.catalog import Difference
from cfstore.derived_check import derived_checks
from cfstore.derived_files import published_files
from cfstore.digests import stored_digest
from cfstore.errors import SourceError, StoreError, StoreFormatError
from cfstore.locks import write_lock
from cfstore.parsers import BagSource, open_bag
from cfstore.reader import SlideReader
from cfstore.schema import CATALOG_FILE, DERIVED_DIR, TABLES_DIR
from cfstore.shards import Check, ShardRecord, SlideRecord, published_shards, read_record, stored_checks
from cfstore.types import Bag, SlideBags

Progress = Callable[[int, int], None]
Listed = Mapping[str, Mapping[str, tuple[int, ...]]]  # by shard and slide: its scales

_REINDEX: Final = "`cfstore reindex` makes the catalog anew"
_OF_SHARDS: Final = ("bags", "internal.shards", "internal.shard_slides", "internal.extents")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the slide (None: no slide in particular), its shard or file, and what was found."""

    slide_id: str | None
    shard: str
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what is wrong. `n_without_source`: bags that could not be compared deeply;
    `n_derived`: derived arrays."""

    n_shards: int
    n_slides: int
    n_bags: int
    decoded_bytes: int
    n_without_source: int
    seconds: float
    findings: tuple[Finding, ...]
    n_derived: int = 0


@dataclass(frozen=True)
class _Seen:
    """What one task found, and what it looked at."""

    findings: tuple[Finding, ...]
    n_slides: int = 0
    n_bags: int = 0
    decoded_bytes: int = 0
    n_without_source: int = 0
    n_derived: int = 0


_Task = Callable[[], _Seen]


def verify(
    root: Path, *, deep: bool = False, threads: int | None = None, progress: Progress | None = None
) -> VerifyReport:
    """Check structure and digests of the whole store; nothing is written.

    Parameters
    ----------
    root
        The store.
    deep
        Also compare every value with the source files, within the recorded error, and what was derived (but for
        `similar`) with what the bags give.
    threads
        Slides checked at once; None: one per core.
    progress
        Called with slides done and in all.

    Raises
    ------
    StoreFormatError
        There is no catalog to compare with, or a file of `tables/` is damaged.
    """
    started = time.monotonic()
    differences, unreadable = _differences(root)
    listed, on_disk = _listed(root), published_shards(root)
    findings = [finding for each in differences for finding in _told(root, each, listed, on_disk)]
    suspect = {(each.shard, each.slide_id) for each in differences}
    total = sum(len(slides) for slides in listed.values())
    seen: list[_Seen] = []
    n_slides = 0
    n_threads = threads or os.cpu_count() or 1
    tasks = (
        task
        for shard in sorted(set(listed) & set(on_disk))
        for task in _tasks(root, shard, listed[shard], unreadable.get(shard), suspect, deep)
    )
    derived = (
        partial(_check_derived, file, look) for file, look in derived_checks(root, published_files(root), deep=deep)
    )
    with ThreadPoolExecutor(n_threads, thread_name_prefix="cfstore-verify") as pool:
        for result in _side_by_side(pool, chain(tasks, derived), 2 * n_threads):
            seen.append(result)
            n_slides += result.n_slides
            if progress and result.n_slides:
                progress(n_slides, total)
    findings += [finding for result in seen for finding in result.findings]
    return VerifyReport(
        n_shards=len(on_disk),
        n_slides=n_slides,
        n_bags=sum(result.n_bags for result in seen),
        decoded_bytes=sum(result.decoded_bytes for result in seen),
        n_without_source=sum(result.n_without_source for result in seen),
        seconds=time.monotonic() - started,
        findings=tuple(dict.fromkeys(_still_there(root, findings, listed))),
        n_derived=sum(result.n_derived for result in seen),
    )


def _side_by_side(pool: ThreadPoolExecutor, tasks: Iterator[_Task], ahead: int) -> Iterator[_Seen]:
    """Results in order; only `ahead` tasks are made and hold memory at once."""
    pending: deque[Future[_Seen]] = deque()
    for task in tasks:
        pending.append(pool.submit(task))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# -- the catalog ---------------------------------------------------------------------------------


def _differences(root: Path) -> tuple[list[Difference], dict[str, StoreFormatError]]:
    found, unreadable = catalog.differences(root)
    if not found and not unreadable:
        return [], {}
    try:
        with write_lock(root):  # whoever is registering, let them finish, and look again
            return catalog.differences(root)
    except StoreFormatError:
        raise
    except StoreError:  # a store that cannot be written to does not change either
        return found, unreadable


def _listed(root: Path) -> Listed:
    """The catalog's bags: scales by shard and slide."""
    listed: dict[str, dict[str, tuple[int, ...]]] = {shard: {} for shard in catalog.slides_per_shard(root)}
    with catalog.connect(root) as connection:
        query = "SELECT shard, slide_id, list(scale ORDER BY scale) FROM bags GROUP BY ALL ORDER BY ALL"
        for shard, slide_id, scales in connection.execute(query).fetchall():
            listed.setdefault(shard, {})[slide_id] = tuple(scales)
    return listed


def _told(root: Path, difference: Difference, listed: Listed, on_disk: Sequence[str]) -> Iterator[Finding]:
    table, slide_id, shard = difference.table, difference.slide_id, difference.shard
    if shard is None or table not in _OF_SHARDS:
        what = {
            "internal.tables": f"{root / TABLES_DIR}: files are not those that were taken over; "
            f"import changed tables again, or {_REINDEX}",
            **{
                table: f"{table}: not what {DERIVED_DIR}/ and the bags say; {_REINDEX}"
                for table in derived_tables.COMPARED
            },
            "slides": f"table slides: not what shards and {TABLES_DIR}/ say; {_REINDEX}",
        }.get(table, f"{table}: not what shards and {TABLES_DIR}/ say; {_REINDEX}")
        yield Finding(slide_id, shard or CATALOG_FILE, what)
    elif shard not in on_disk:
        message = f"{root / shard}: the shard is missing; restore it, or {_REINDEX} without it"
        yield from _of_all(listed.get(shard, {}), shard, message)
    elif shard not in listed:
        yield Finding(slide_id, shard, f"{root / shard}: the shard is not in the catalog; `cfstore reindex` adds it")
    else:
        message = f"the catalog ({table}) says otherwise than the shard; if nobody exchanged the shard, {_REINDEX}"
        yield from [Finding(slide_id, shard, message)] if slide_id else _of_all(listed[shard], shard, message)


def _of_all(slides: Mapping[str, object], shard: str, message: str) -> list[Finding]:
    return [Finding(slide_id, shard, message) for slide_id in slides] or [Finding(None, shard, message)]


def _still_there(root: Path, findings: Sequence[Finding], listed: Listed) -> list[Finding]:
    """Findings without those about shards that were compacted meanwhile: nobody counts on them any more."""
    if not findings:
        return []
    held = {*_listed(root), *published_shards(root)}
    return [finding for finding in findings if finding.shard in held or finding.shard not in listed]


# -- the shards ----------------------------------------------------------------------------------


def _tasks(
    root: Path,
    shard: str,
    listed: Mapping[str, tuple[int, ...]],
    unreadable: StoreFormatError | None,
    suspect: set[tuple[str | None, str | None]],
    deep: bool,
) -> Iterator[_Task]:
    """Everything to be looked at of one shard; slides that were removed are not."""
    try:
        checks = stored_checks(root, shard)
    except StoreFormatError as error:
        found = _of_all(listed, shard, str(error))
        yield lambda: _Seen(tuple(found), n_slides=len(listed))
        return
    for check in checks:
        if check.slide_id is None or check.slide_id in listed:
            yield partial(_look, root, shard, check, listed)
    if unreadable:
        yield partial(_unreadable, root, shard, checks, listed, unreadable)
        return
    record = read_record(root, shard)
    held = {slide.slide_id: slide for slide in record.slides}
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for slide_id, scales in listed.items():
        if slide_id in held and not {(shard, slide_id), (shard, None)} & suspect:
            groups[scales].append(slide_id)
        else:
            yield lambda: _Seen((), n_slides=1)  # what the catalog gets wrong was said
    for scales, slide_ids in groups.items():
        reader = SlideReader(root, record.encoder, scales, slide_ids, with_coords=True)
        for slide_id in slide_ids:
            yield partial(_check_slide, reader, record, held[slide_id], deep)


def _look(root: Path, shard: str, check: Check, listed: Mapping[str, object]) -> _Seen:
    try:
        messages = check.look()
    except (OSError, StoreFormatError) as error:
        messages = [f"{root / shard}: cannot be read ({error})"]
    messages = [f"{message}; {_remedy(check.slide_id)}" for message in messages]
    if check.slide_id is None:
        return _Seen(tuple(finding for message in messages for finding in _of_all(listed, shard, message)))
    return _Seen(tuple(Finding(check.slide_id, shard, message) for message in messages))


def _unreadable(
    root: Path, shard: str, checks: Sequence[Check], listed: Mapping[str, object], error: StoreFormatError
) -> _Seen:
    """A shard whose record cannot be trusted: said of every slide, unless a check names the one."""
    named = any(_look(root, shard, check, listed).findings for check in checks if check.slide_id in listed)
    return _Seen(() if named else tuple(_of_all(listed, shard, str(error))), n_slides=len(listed))


def _remedy(slide_id: str | None) -> str:
    if slide_id is None:
        return "restore the shard from a copy, or `cfstore rm` its slides and ingest them again"
    return f"restore the shard from a copy, or `cfstore rm {slide_id}` and ingest it again"


def _check_slide(reader: SlideReader, record: ShardRecord, slide: SlideRecord, deep: bool) -> _Seen:
    """Whether a reader gives out what was written and, deeply, what the sources hold."""
    try:
        held = reader.read(slide.slide_id)
    except StoreError as error:
        found = Finding(slide.slide_id, record.shard, f"{error}; {_remedy(slide.slide_id)}")
        return _Seen((found,), n_slides=1, n_bags=len(slide.bags))
    messages = [
        f"{bag.scale}x: the decoded rows are not what was written; {_remedy(slide.slide_id)}"
        for bag in slide.bags
        if stored_digest(held.bags[bag.scale]) != bag.digest
    ]
    missing = 0
    if deep:
        different, missing = _compare(record, slide, held)
        messages += different
    findings = tuple(Finding(slide.slide_id, record.shard, message) for message in messages)
    return _Seen(findings, 1, len(slide.bags), held.nbytes, missing)


def _check_derived(file: str, look: Callable[[], tuple[int, Sequence[tuple[str | None, str]]]]) -> _Seen:
    n_derived, found = look()
    return _Seen(tuple(Finding(slide_id, file, message) for slide_id, message in found), n_derived=n_derived)


# -- the sources ---------------------------------------------------------------------------------


def _compare(record: ShardRecord, slide: SlideRecord, held: SlideBags) -> tuple[list[str], int]:
    """What differs from the source files, and how many of these are gone."""
    messages, missing = [], 0
    for bag in slide.bags:
        source = BagSource(Path(bag.source), slide.slide_id, bag.scale, record.encoder)
        if not source.path.exists():
            missing += 1
            continue
        try:
            message = _difference(source, held.bags[bag.scale], bag.max_abs_error)
        except SourceError as error:
            message = str(error)
        except OSError as error:
            message = f"{source.path}: cannot be read ({error.strerror})"
        if message:
            messages.append(
                f"{bag.scale}x: {message}; if the source is right, `cfstore rm {slide.slide_id}` and ingest it again"
            )
    return messages, missing


def _difference(source: BagSource, bag: Bag, allowed: float) -> str | None:
    with open_bag(source) as opened:
        if (opened.head.n_patches, opened.head.dim) != (bag.n_patches, bag.dim):
            found = (opened.head.n_patches, opened.head.dim)
            return f"{source.path} has {found} features, the store {bag.features.shape}"
        at = 0
        for rows in opened.blocks():
            ours = Bag(bag.features[at : at + len(rows)], None, bag.affine).dequantised().features
            worst = float(np.abs(ours.astype(np.float64) - rows).max())
            if not worst <= allowed * (1 + 1e-6):  # also where the source holds NaN
                return f"{source.path}: rows {at} to {at + len(rows)} differ by {worst:.6g}, recorded was {allowed:.6g}"
            at += len(rows)
        coords = opened.coords()
    same = coords is bag.coords if coords is None or bag.coords is None else np.array_equal(coords, bag.coords)
    return None if same else f"{source.path}: other coordinates than in the store"
