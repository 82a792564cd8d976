"""Bags out of a store: into buffers of the caller, by slide, by rows, or as a stream read ahead.

Nothing between the catalog and the bytes: no metadata file is parsed, and no lock of the
interpreter is held while files are read and chunks are decoded. The order belongs to the caller;
slides come out in exactly that order whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cfstore.errors import DamagedShardError, RemoteError, SlideNotFoundError, StoreError
from cfstore.mirrors import refreshed, remote_of
from cfstore.parts import LocalParts
from cfstore.places import COORD_BYTES, BagPlace, Layout, find_bags, lay_out, row_range
from cfstore.remote_parts import RemoteParts
from cfstore.ring import Allocate, Buffer, Ring, page_aligned
from cfstore.types import Affine, Bag, SlideBags

_AHEAD_BYTES: Final = 1 << 30


@dataclass(frozen=True, eq=False)
class _Slide:
    """A slide's bags and how they are read into one buffer."""

    bags: dict[int, BagPlace]
    layout: Layout


class SlideReader:
    """Reads slides of one encoder at given scales, as they were when it was made. Safe to use from several threads.

    Parameters
    ----------
    root
        The store.
    encoder, scales
        What to read of each slide.
    slide_ids
        The slides that will be asked for.
    with_coords
        Whether `Bag.coords` is read too.
    allocate
        Where the memory of `stream` comes from; pinned memory for a GPU.

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
        with_coords: bool = False,
        allocate: Allocate = page_aligned,
    ) -> None:
        self._root, self._encoder, self._with_coords = root, encoder, with_coords
        self._scales, self._allocate = tuple(scales), allocate
        self._places = find_bags(root, encoder, scales, slide_ids)
        self._slides: dict[str, _Slide] = {}
        remote = remote_of(root)
        self._parts: LocalParts | RemoteParts = RemoteParts(remote) if remote else LocalParts(root)
        self._ring = Ring(0, allocate)
        self._checked: set[str] = set()  # slides whose plain chunks were compared with their digests
        self._lock = threading.Lock()
        self.bytes_read = 0
        """Decoded bytes of features read so far."""

    # -- one slide -------------------------------------------------------------------------------

    def buffer_bytes(self, slide_id: str) -> int:
        """Bytes that `read_into` needs for a slide (whole chunks: up to one chunk more than its rows)."""
        return self._slide(slide_id).layout.nbytes

    def read_into(self, slide_id: str, buffer: Buffer) -> SlideBags:
        """Read all asked-for bags of one slide into memory of the caller.

        Parameters
        ----------
        slide_id
            One of the reader's slides.
        buffer : [at least buffer_bytes(slide_id)] uint8
            Writable and contiguous; page-aligned memory is filled faster. The arrays of the
            returned bags are views of it: they are valid until it is used again.

        Raises
        ------
        SlideNotFoundError
            The reader was made for other slides.
        DamagedShardError
            A file is missing, cut short, or its bytes are not what was written.
        RemoteError
            Object storage fails, finally.
        ValueError
            The buffer is too small.
        """
        slide = self._slide(slide_id)
        if len(buffer) < slide.layout.nbytes:
            message = f"slide {slide_id} needs {slide.layout.nbytes:,} bytes, the buffer has {len(buffer):,}"
            raise ValueError(message)
        try:
            self._fill(slide_id, slide.layout, buffer, check=slide_id not in self._checked, whole=True)
        except DamagedShardError as error:
            self._follow(slide_id, slide, error)
            needed = self.buffer_bytes(slide_id)
            return self.read_into(slide_id, buffer if len(buffer) >= needed else self._allocate(needed))
        bags = self._views(slide, buffer)
        with self._lock:
            self._checked.add(slide_id)
            self.bytes_read += bags_bytes(bags)
        return SlideBags(slide_id, self._encoder, bags)

    def read(self, slide_id: str) -> SlideBags:
        """All asked-for bags of one slide, in memory of its own."""
        return self.read_into(slide_id, page_aligned(self.buffer_bytes(slide_id)))

    def read_rows(self, slide_id: str, scale: int, ranges: Sequence[tuple[int, int]]) -> Bag:
        """Some rows of one bag: those of each range [start, stop), one range after another.

        Only the chunks that hold them are read. Coordinates come along if the reader has them.

        Raises
        ------
        IndexError
            A range reaches beyond the bag.
        """
        slide = self._slide(slide_id)
        n_patches = slide.bags[scale].n_patches
        for start, stop in ranges:
            if not 0 <= start <= stop <= n_patches:
                message = f"slide {slide_id}: rows {start} to {stop} of {n_patches} patches at {scale}x"
                raise IndexError(message)
        try:
            return self._rows(slide_id, slide.bags[scale], ranges)
        except DamagedShardError as error:
            self._follow(slide_id, slide, error)
            return self.read_rows(slide_id, scale, ranges)

    def shape(self, slide_id: str, scale: int) -> tuple[int, int]:
        """Patches of one bag, and stored bytes of each."""
        place = self._slide(slide_id).bags[scale]
        return place.n_patches, place.row_bytes

    def read_coords(self, slide_id: str, scale: int) -> NDArray[np.int32] | None:
        """Only the coordinates of one bag, [N, 2]; None where its source had none. No feature is read."""
        slide = self._slide(slide_id)
        place = slide.bags[scale]
        if place.coords is None:
            return None
        layout = lay_out([place.coord_rows(place.coords)])
        buffer = page_aligned(layout.nbytes)
        try:
            self._fill(slide_id, layout, buffer, check=True)
        except DamagedShardError as error:
            self._follow(slide_id, slide, error)
            return self.read_coords(slide_id, scale)
        start = layout.starts[0]
        return buffer[start : start + place.n_patches * COORD_BYTES].view(np.int32).reshape(-1, 2)

    def _rows(self, slide_id: str, place: BagPlace, ranges: Sequence[tuple[int, int]]) -> Bag:
        order = sorted(range(len(ranges)), key=lambda i: ranges[i])
        wanted = [row_range(place.feature_rows, *ranges[i], place.row_bytes) for i in order]
        if place.coords and self._with_coords:
            rows = place.coord_rows(place.coords)
            wanted += [row_range(rows, *ranges[i], COORD_BYTES) for i in order]
        wanted += [place.affine_rows(array) for array in (place.scale, place.zero) if array]
        layout = lay_out(wanted)
        buffer = page_aligned(layout.nbytes)
        self._fill(slide_id, layout, buffer, check=True)
        pieces = [buffer[at : at + rows.nbytes] for at, rows in zip(layout.starts, wanted, strict=True)]
        back = np.argsort(order)
        features = np.concatenate([pieces[i] for i in back] or [buffer[:0]]).view(place.array_dtype)
        coords = None
        if place.coords and self._with_coords:
            coords = np.concatenate([pieces[len(order) + i] for i in back] or [buffer[:0]]).view(np.int32)
            coords = coords.reshape(-1, 2)
        affine = Affine(*(piece.view(np.float32) for piece in pieces[-2:])) if place.scale else None
        return Bag(features.reshape(-1, place.dim), coords, affine)

    # -- many slides -----------------------------------------------------------------------------

    def stream(
        self, slide_ids: Iterable[str], *, threads: int = 2, ahead: int = 16, ahead_bytes: int = _AHEAD_BYTES
    ) -> Generator[SlideBags, None, None]:
        """Yield slides in the given order while threads read further ones.

        Parameters
        ----------
        slide_ids
            The order.
        threads
            Readers; each reads whole slides. Where latency has to be hidden, more of them read, and further ahead.
        ahead, ahead_bytes
            At most so many slides, and bytes, are read or being read before they are asked for.
            A slide's memory is used again when nobody holds its arrays any more; a slide larger
            than all of it gets memory of its own.
        """
        threads, ahead = max(threads, self._parts.least_threads), max(ahead, self._parts.least_ahead)
        ring = self._ring = self._ring if self._ring.nbytes == ahead_bytes else Ring(ahead_bytes, self._allocate)
        pending: deque[Future[SlideBags]] = deque()
        todo = iter(slide_ids)
        with ThreadPoolExecutor(threads, thread_name_prefix="cfstore-reader") as pool:
            try:
                slide_id = next(todo, None)
                while slide_id is not None or pending:
                    while slide_id is not None and len(pending) <= ahead:
                        read = self._start(slide_id, ring, alone=not pending)
                        if read is None:
                            break
                        pending.append(pool.submit(read))
                        del read
                        slide_id = next(todo, None)
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _start(self, slide_id: str, ring: Ring, *, alone: bool) -> Callable[[], SlideBags] | None:
        """What reads a slide, once memory for it is found; None if there is none now."""
        buffer = ring.take(self.buffer_bytes(slide_id))
        if buffer is None:
            if not alone:
                return None
            buffer = self._allocate(self.buffer_bytes(slide_id))
        return _Reading(self, slide_id, buffer)

    # -- bytes -----------------------------------------------------------------------------------

    def _slide(self, slide_id: str) -> _Slide:
        slide = self._slides.get(slide_id)
        if slide is None:
            if slide_id not in self._places:
                message = (
                    f"slide {slide_id!r}: this reader was made for {len(self._places)} other slides of {self._root}"
                )
                raise SlideNotFoundError(message)
            bags = self._places[slide_id]
            slide = self._slides[slide_id] = _Slide(bags, lay_out(self._wanted(bags)))
        return slide

    def _wanted(self, bags: dict[int, BagPlace]) -> list[Any]:
        wanted = [bag.feature_rows for bag in bags.values()]
        if self._with_coords:
            wanted += [bag.coord_rows(bag.coords) for bag in bags.values() if bag.coords]
        for bag in bags.values():
            wanted += [bag.affine_rows(array) for array in (bag.scale, bag.zero) if array]
        return wanted

    def _views(self, slide: _Slide, buffer: Buffer) -> dict[int, Bag]:
        starts = iter(slide.layout.starts)

        def view(nbytes: int, dtype: Any) -> NDArray[Any]:
            at = next(starts)
            return buffer[at : at + nbytes].view(dtype)

        bags = slide.bags.items()
        features = {n: view(bag.n_patches * bag.row_bytes, bag.array_dtype).reshape(-1, bag.dim) for n, bag in bags}
        coords = {
            n: view(bag.n_patches * COORD_BYTES, np.int32).reshape(-1, 2)
            for n, bag in bags
            if bag.coords and self._with_coords
        }
        affines = {n: Affine(*(view(bag.dim * 4, np.float32) for _ in range(2))) for n, bag in bags if bag.scale}
        return {n: Bag(features[n], coords.get(n), affines.get(n)) for n in features}

    def _fill(self, slide_id: str, layout: Layout, buffer: Buffer, *, check: bool, whole: bool = False) -> None:
        """Read what a layout says of a slide; `whole`: that is all of it, which a cache may keep."""
        try:
            self._parts.fill(layout, buffer, verify=check, slide=(self._encoder, slide_id) if whole else None)
        except RemoteError as error:
            raise type(error)(f"slide {slide_id}: {error}") from error

    def _follow(self, slide_id: str, slide: _Slide, error: DamagedShardError) -> None:
        """Look where a slide is now that could not be read: its shard may have been compacted.

        Raises
        ------
        DamagedShardError
            It lies where it lay; names the slide.
        SlideNotFoundError
            What lies there now are other bags.
        StoreError
            The catalog cannot be looked at; names the slide.
        """
        message = f"slide {slide_id}: {error}"
        if isinstance(self._parts, RemoteParts):
            try:
                with self._lock:
                    self._root = refreshed(self._root)
            except StoreError as failed:
                raise type(failed)(f"{message}; looking where it is now: {failed}") from error
        try:
            found = find_bags(self._root, self._encoder, self._scales, [slide_id])[slide_id]
        except SlideNotFoundError:
            raise DamagedShardError(message) from error
        if found == slide.bags:
            raise DamagedShardError(message) from error
        if any(found[scale].digest != place.digest for scale, place in slide.bags.items()):
            message = (
                f"slide {slide_id}: its bags are gone, it was ingested with other values since this reader was made; "
                "start again with a new one"
            )
            raise SlideNotFoundError(message) from error
        with self._lock:
            self._places[slide_id] = found
            self._slides.pop(slide_id, None)
            self._checked.discard(slide_id)


class _Reading:
    """Reads one slide into a piece of the ring, and lets go of the piece."""

    def __init__(self, reader: SlideReader, slide_id: str, buffer: Buffer) -> None:
        self._reader, self._slide_id = reader, slide_id
        self._buffer: Buffer | None = buffer

    def __call__(self) -> SlideBags:
        buffer, self._buffer = self._buffer, None
        assert buffer is not None  # noqa: S101 - called once
        return self._reader.read_into(self._slide_id, buffer)


def bags_bytes(bags: dict[int, Bag]) -> int:
    """Bytes of the features of some bags."""
    return sum(int(bag.features.nbytes) for bag in bags.values())
