"""Slides from the store to batches on the device that computes, read ahead and kept between epochs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cfstore import CohortSlide, SlideBags, SlideReader
from cftrain.cache import NO_CACHE, CachePlan
from cftrain.config import DataConfig
from cftrain.data import RunData
from cftrain.device import DeviceSlide, HostMemory, SlideCache, host_memory, on_device, pinned
from cftrain.models import BagBatch


@dataclass(frozen=True)
class Work:
    """What a feed has delivered; `bytes_read` are decoded bytes from the store, the caches' not counted."""

    n_slides: int
    n_patches: int
    bytes_read: int
    wait_seconds: float

    def since(self, earlier: Work) -> Work:
        return Work(
            self.n_slides - earlier.n_slides,
            self.n_patches - earlier.n_patches,
            self.bytes_read - earlier.bytes_read,
            self.wait_seconds - earlier.wait_seconds,
        )


def cohort_bytes(data: RunData) -> int:
    """Bytes of all the run's decoded bags, as stored; reads no features."""
    ids = [slide.slide_id for slide in data.cohort.slides]
    reader = data.store.reader(data.cohort.encoder, data.cohort.scales, ids)
    return sum(reader.buffer_bytes(slide_id) for slide_id in ids)


@dataclass
class Feed:
    """Reads slides and packs them into batches, and knows how long the model waited for it.

    A slide comes from the device's cache, else from RAM, else from the store. What comes is the same
    from each; the reader is asked only for what is in neither.
    """

    data: RunData
    scales: tuple[int, ...]
    config: DataConfig
    device: torch.device
    cache: CachePlan = NO_CACHE
    wait_seconds: float = 0.0
    n_slides: int = 0
    n_patches: int = 0
    _reader: SlideReader = field(init=False)
    _caches: tuple[SlideCache, ...] = field(init=False)
    _host: HostMemory = field(init=False)

    def __post_init__(self) -> None:
        ids = [slide.slide_id for slide in self.data.cohort.slides]
        memory: dict[str, Any] = {"allocate": pinned} if self.device.type == "cuda" else {}
        self._reader = self.data.store.reader(self.data.cohort.encoder, self.scales, ids, **memory)
        ram = SlideCache(torch.device("cpu"), self.cache.ram_bytes)
        self._caches = (SlideCache(self.device, self.cache.gpu_bytes), ram)
        self._host = host_memory(self.device)

    @property
    def work(self) -> Work:
        """What was delivered so far."""
        return Work(self.n_slides, self.n_patches, self._reader.bytes_read, self.wait_seconds)

    def batches(self, groups: Iterable[Sequence[CohortSlide]]) -> Iterator[tuple[BagBatch, Sequence[CohortSlide]]]:
        """One packed batch per group, in order; the next slides are read while the caller computes.

        A batch depends on its group alone: groups from the middle of an epoch give what the whole
        epoch would have given there, whatever the number of readers and what the caches hold.
        """
        listed = list(groups)
        ids = [slide.slide_id for group in listed for slide in group]
        to_read, coming = self._to_read(ids)
        read = iter(to_read)
        stream = self._reader.stream(
            [slide_id for slide_id, wanted in zip(ids, to_read, strict=True) if wanted],
            threads=self.config.readers,
            ahead=self.config.ahead,
            ahead_bytes=self.config.ahead_mib << 20,
        )
        try:
            for group in listed:
                batch = self._batch([(slide.slide_id, next(read)) for slide in group], stream)
                self.n_slides += len(group)
                self.n_patches += sum(sum(slide.n_patches.values()) for slide in group)
                yield batch, group
        finally:
            for cache in self._caches:
                cache.release(coming)

    def _to_read(self, slide_ids: Sequence[str]) -> tuple[list[bool], set[str]]:
        """Which of the visits need the reader, and the slides that will be kept once they were read."""
        coming: set[str] = set()
        wanted = []
        for slide_id in slide_ids:
            wanted.append(slide_id not in coming and not any(slide_id in cache for cache in self._caches))
            if wanted[-1]:
                nbytes = self._reader.buffer_bytes(slide_id)
                if any(cache.reserve(slide_id, nbytes) for cache in self._caches):
                    coming.add(slide_id)
        return wanted, coming

    def _batch(self, visits: Sequence[tuple[str, bool]], stream: Iterator[SlideBags]) -> BagBatch:
        """The slides of one batch on the device; those marked come from the stream."""
        self._host.release()
        slides, held = [], []
        for slide_id, read in visits:
            if read:
                started = time.perf_counter()
                slide = next(stream)
                self.wait_seconds += time.perf_counter() - started
                slides.append(self._moved(slide))
                held.append(slide)
            else:
                slides.append(self._from_cache(slide_id))
        bags = [{scale: slide[scale].features() for scale in self.scales} for slide in slides]
        self._host.hold(held)
        return BagBatch.pack([slide_id for slide_id, _ in visits], bags)

    def _moved(self, slide: SlideBags) -> DeviceSlide:
        """A slide that was read, on the device; kept in the cache that has room reserved for it."""
        for cache in self._caches:
            if cache.reserved(slide.slide_id):
                kept = on_device(slide, cache.device, keep=True)
                cache.put(slide.slide_id, kept)
                return {scale: bag.to(self.device) for scale, bag in kept.items()}
        return on_device(slide, self.device)

    def _from_cache(self, slide_id: str) -> DeviceSlide:
        kept = next(cache[slide_id] for cache in self._caches if slide_id in cache)
        return {scale: bag.to(self.device) for scale, bag in kept.items()}
