"""Examples from the store to batches on the device that computes: read ahead, held while needed, kept between epochs.

One pass over the cohort feeds every learner that visits an example: it is read, copied and decoded once per pass,
and held until the last step that needs it is done.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from cfstore import SlideBags, SlideReader
from cftrain.arrivals import Arrivals
from cftrain.cache import NO_CACHE, CachePlan
from cftrain.config import DataConfig
from cftrain.data import RunData
from cftrain.device import DeviceSlide, HostMemory, SlideCache, host_memory, on_device, pinned
from cftrain.examples import Example
from cftrain.extras import ExtraReader, extra_bytes
from cftrain.models import BagBatch
from cftrain.order import Step, Visit
from cftrain.zoo import Extra

_RING_STEP: Final = 256 << 20
Arrival = tuple[int, list[DeviceSlide], int]
"""A place, its slides on the device, and the bytes that were read for them."""


@dataclass(frozen=True)
class Work:
    """What was delivered; `bytes_read` are decoded bytes from the store, the caches' not counted."""

    n_slides: int = 0
    n_patches: int = 0
    bytes_read: int = 0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0

    def plus(self, other: Work) -> Work:
        return Work(
            self.n_slides + other.n_slides,
            self.n_patches + other.n_patches,
            self.bytes_read + other.bytes_read,
            self.wait_seconds + other.wait_seconds,
            self.compute_seconds + other.compute_seconds,
        )


def cohort_bytes(data: RunData, extras: Sequence[Extra] = ()) -> int:
    """Bytes of all the run's decoded bags, as stored, and of these extras; reads no features."""
    slides = data.cohort.slides
    reader = data.store.reader(data.cohort.encoder, data.cohort.scales, [slide.slide_id for slide in slides])
    return sum(reader.buffer_bytes(slide.slide_id) + extra_bytes(extras, slide.n_patches) for slide in slides)


@dataclass
class Feed:
    """Reads examples and packs them into batches, and knows how long the learners waited for it.

    A slide comes from the device's cache, else from RAM, else from the store. What comes is the same
    from each; the reader is asked only for what is in neither.
    """

    data: RunData
    scales: tuple[int, ...]
    config: DataConfig
    device: torch.device
    cache: CachePlan = NO_CACHE
    extras: tuple[Extra, ...] = ()
    wait_seconds: float = 0.0
    bytes_read: int = 0
    """Decoded bytes from the store that have arrived so far; the caches' are not counted."""
    _reader: SlideReader = field(init=False)
    _extra_reader: ExtraReader = field(init=False)
    _extra_bytes: dict[str, int] = field(init=False)
    _caches: tuple[SlideCache, ...] = field(init=False)
    _host: HostMemory = field(init=False)
    _ring_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        ids = [slide.slide_id for slide in self.data.cohort.slides]
        memory: dict[str, Any] = {"allocate": pinned} if self.device.type == "cuda" else {}
        encoder, store = self.data.cohort.encoder, self.data.store
        self._extra_reader = ExtraReader(store, encoder, self.extras, ids)
        self._extra_bytes = {
            slide.slide_id: extra_bytes(self.extras, slide.n_patches) for slide in self.data.cohort.slides
        }
        with_coords = self._extra_reader.with_coords
        self._reader = store.reader(encoder, self.scales, ids, with_coords=with_coords, **memory)
        ram = SlideCache(torch.device("cpu"), self.cache.ram_bytes)
        self._caches = (SlideCache(self.device, self.cache.gpu_bytes), ram)
        self._host = host_memory(self.device)
        self._ring_bytes = self.config.ahead_mib << 20

    @contextmanager
    def window(self, steps: Sequence[Sequence[Visit]]) -> Iterator[Window]:
        """What `steps` need, in their order, for as long as each is needed.

        Parameters
        ----------
        steps
            The visits of each step; a step's places are never before those that an earlier step was ready at.
            What comes depends on them alone, whatever the number of readers and what the caches hold.
        """
        visits = {visit.place: visit.example for step in steps for visit in step}
        ordered = sorted(visits.items())
        slide_ids = [slide_id for _, example in ordered for slide_id in example.slide_ids]
        to_read, coming = self._to_read(slide_ids)
        stream = self._reader.stream(
            [slide_id for slide_id, wanted in zip(slide_ids, to_read, strict=True) if wanted],
            threads=self.config.readers,
            ahead=self.config.ahead,
            ahead_bytes=self._room_for(steps),
        )
        arriving = Arrivals(self._arriving(ordered, iter(to_read), stream), self.device)
        try:
            yield Window(self, arriving, _last_uses(steps))
        finally:
            arriving.close()
            stream.close()
            for cache in self._caches:
                cache.release(coming)

    def _room_for(self, steps: Sequence[Sequence[Visit]]) -> int:
        """Bytes of the reader's memory: what is read ahead, and on a CPU also what steps hold, which is not copied."""
        if self.device.type == "cpu":
            needed = (self.config.ahead_mib << 20) + self.held_bytes(steps)
            self._ring_bytes = max(self._ring_bytes, -(-needed // _RING_STEP) * _RING_STEP)
        return self._ring_bytes

    def held_bytes(self, steps: Sequence[Sequence[Visit]]) -> int:
        """The most bytes of bags that `steps` hold at any one time; reads no features."""
        last, sizes = _last_uses(steps), dict[int, int]()
        most = held = 0
        for number, step in enumerate(steps):
            for visit in step:
                if visit.place not in sizes:
                    sizes[visit.place] = sum(self._reader.buffer_bytes(each) for each in visit.example.slide_ids)
                    held += sizes[visit.place]
            most = max(most, held)
            held -= sum(sizes[place] for place in {visit.place for visit in step} if last[place] == number)
        return most

    def _to_read(self, slide_ids: Sequence[str]) -> tuple[list[bool], set[str]]:
        """Which of the slides need the reader, and those that will be kept once they were read."""
        coming: set[str] = set()
        wanted = []
        for slide_id in slide_ids:
            wanted.append(slide_id not in coming and not any(slide_id in cache for cache in self._caches))
            if wanted[-1]:
                nbytes = self._reader.buffer_bytes(slide_id) + self._extra_bytes[slide_id]
                if any(cache.reserve(slide_id, nbytes) for cache in self._caches):
                    coming.add(slide_id)
        return wanted, coming

    def _arriving(
        self, visits: Sequence[tuple[int, Example]], to_read: Iterator[bool], stream: Iterator[SlideBags]
    ) -> Generator[Arrival, None, None]:
        """The examples in the order of their places, each with its slides on the device."""
        for place, example in visits:
            self._host.release()
            slides, held = [], []
            for slide_id in example.slide_ids:
                if next(to_read):
                    held.append(next(stream))
                    slides.append(self._moved(held[-1]))
                else:
                    slides.append(self._from_cache(slide_id))
            nbytes = sum(slide.nbytes for slide in held)
            self._host.hold(held)
            del held
            yield place, slides, nbytes
            del slides

    def _moved(self, slide: SlideBags) -> DeviceSlide:
        """A slide that was read, on the device; kept in the cache that has room reserved for it."""
        extras = self._extra_reader.read(slide)
        for cache in self._caches:
            if cache.reserved(slide.slide_id):
                kept = on_device(slide, cache.device, extras, keep=True)
                cache.put(slide.slide_id, kept)
                return kept.to(self.device)
        return on_device(slide, self.device, extras)

    def _from_cache(self, slide_id: str) -> DeviceSlide:
        kept = next(cache[slide_id] for cache in self._caches if slide_id in cache)
        return kept.to(self.device)


class Window:
    """The examples that steps in progress hold."""

    def __init__(self, feed: Feed, arriving: Arrivals[Arrival], last_uses: dict[int, int]) -> None:
        self._feed, self._arriving = feed, arriving
        self._last_uses, self._done = last_uses, 0
        self._held: dict[int, list[DeviceSlide]] = {}

    def batch(self, pack: Sequence[Visit], scales: Sequence[int], extras: Sequence[Extra] = ()) -> BagBatch:
        """The bags of a pack, one per visit, on the device, with these extras; waits until they have arrived."""
        started = time.perf_counter()
        while any(visit.place not in self._held for visit in pack):
            place, slides, nbytes = next(self._arriving)
            self._held[place] = slides
            self._feed.bytes_read += nbytes
        self._feed.wait_seconds += time.perf_counter() - started
        slides = [slide for visit in pack for slide in self._held[visit.place]]
        packed = BagBatch.pack(
            [slide_id for visit in pack for slide_id in visit.example.slide_ids],
            [{scale: slide.bags[scale].features() for scale in scales} for slide in slides],
            [{extra: slide.extras[extra] for extra in extras} for slide in slides],
        )
        return packed.grouped([visit.example.name for visit in pack], [len(visit.example.slide_ids) for visit in pack])

    def done(self, step: Sequence[Visit]) -> None:
        """Let go of what no later step needs; called once for every step, in their order."""
        for place in {visit.place for visit in step}:
            if self._last_uses[place] == self._done:
                self._held.pop(place, None)
        self._done += 1


def step_visits(step: Step, packs: Sequence[int]) -> list[Visit]:
    """The visits of those packs of a step."""
    return [visit for index in packs for visit in step.packs[index]]


def _last_uses(steps: Sequence[Sequence[Visit]]) -> dict[int, int]:
    """The last step that visits each place."""
    return {visit.place: number for number, step in enumerate(steps) for visit in step}
