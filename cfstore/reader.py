"""Bags out of a store: by slide, or a stream of slides read ahead by threads.

The order belongs to the caller; the reader only executes it. Slides come out in exactly that
order whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cfstore.catalog import connect
from cfstore.errors import SlideNotFoundError
from cfstore.shards import ShardReader
from cfstore.types import Bag, SlideBags


@dataclass(frozen=True)
class BagLocation:
    """Where a bag's rows are: from the catalog, so that reading parses no metadata."""

    shard: str
    row_start: int
    n_patches: int
    has_coords: bool


class _Cache:
    """Decoded slides, least recently used out first, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._slides: OrderedDict[str, SlideBags] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, slide_id: str) -> SlideBags | None:
        with self._lock:
            if slide_id in self._slides:
                self._slides.move_to_end(slide_id)
            return self._slides.get(slide_id)

    def put(self, slide: SlideBags) -> None:
        with self._lock:
            if slide.nbytes > self._limit or slide.slide_id in self._slides:
                return
            self._slides[slide.slide_id] = slide
            self._held += slide.nbytes
            while self._held > self._limit:
                _, oldest = self._slides.popitem(last=False)
                self._held -= oldest.nbytes


class SlideReader:
    """Reads slides of one encoder at given scales.

    Parameters
    ----------
    root
        The store.
    encoder, scales
        What to read of each slide.
    slide_ids
        The slides that will be asked for.
    cache_bytes
        Decoded slides kept in memory, at most this many bytes. Arrays handed out may be
        shared with the cache: do not write to them.
    with_coords
        Whether `Bag.coords` is read too.

    Raises
    ------
    SlideNotFoundError
        A slide lacks one of the scales.
    """

    def __init__(
        self,
        root: Path,
        encoder: str,
        scales: Sequence[int],
        slide_ids: Iterable[str],
        *,
        cache_bytes: int = 0,
        with_coords: bool = False,
    ) -> None:
        self._root, self._encoder, self._with_coords = root, encoder, with_coords
        self._locations = _locate(root, encoder, scales, list(slide_ids))
        self._cache = _Cache(cache_bytes)
        self._shards: dict[str, ShardReader] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0

    def _shard(self, name: str) -> ShardReader:
        with self._lock:
            if name not in self._shards:
                self._shards[name] = ShardReader(self._root / name)
            return self._shards[name]

    def read(self, slide_id: str) -> SlideBags:
        """All asked-for bags of one slide."""
        cached = self._cache.get(slide_id)
        if cached is not None:
            return cached
        if slide_id not in self._locations:
            message = (
                f"slide {slide_id!r}: this reader was made for {len(self._locations)} other slides of {self._root}"
            )
            raise SlideNotFoundError(message)
        bags = {}
        for scale, place in self._locations[slide_id].items():
            stop = place.row_start + place.n_patches
            wanted = self._with_coords and place.has_coords
            features, coords = self._shard(place.shard).read(place.row_start, stop, coords=wanted)
            bags[scale] = Bag(features, coords)
        slide = SlideBags(slide_id, self._encoder, bags)
        with self._lock:
            self.bytes_read += slide.nbytes
        self._cache.put(slide)
        return slide

    def stream(self, slide_ids: Iterable[str], *, threads: int = 2, ahead: int = 4) -> Iterator[SlideBags]:
        """Yield slides in the given order while `threads` read up to `ahead` slides further on."""
        pending: deque[Future[SlideBags]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="cfstore-reader") as pool:
            try:
                for slide_id in slide_ids:
                    pending.append(pool.submit(self.read, slide_id))
                    if len(pending) > ahead:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()


def _locate(
    root: Path, encoder: str, scales: Sequence[int], slide_ids: list[str]
) -> Mapping[str, Mapping[int, BagLocation]]:
    query = (
        "SELECT slide_id, scale, shard, row_start, n_patches, has_coords FROM bags "
        "WHERE encoder = ? AND list_contains(?, scale) ORDER BY slide_id, scale"
    )
    with connect(root) as connection:
        rows = connection.execute(query, [encoder, list(scales)]).fetchall()
    wanted = set(slide_ids)
    found: dict[str, dict[int, BagLocation]] = {slide_id: {} for slide_id in slide_ids}
    for slide_id, scale, *place in rows:
        if slide_id in wanted:
            found[slide_id][scale] = BagLocation(*place)
    for slide_id, bags in found.items():
        lacking = [f"{scale}x" for scale in scales if scale not in bags]
        if lacking:
            message = f"slide {slide_id}: no {', '.join(lacking)} bag from encoder {encoder} in {root}"
            raise SlideNotFoundError(message)
    return found
