"""The ring of memory: pieces never overlap while somebody holds them, and come back when nobody does."""

from __future__ import annotations

import gc
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cfstore.ring import PAGE, Ring, page_aligned


def span(rows: NDArray[np.uint8]) -> tuple[int, int]:
    start: int = rows.__array_interface__["data"][0]
    return start, start + rows.nbytes


@pytest.mark.parametrize("pages", [1, 2, 7, 64])
@pytest.mark.parametrize("seed", range(8))
def test_live_pieces_never_overlap_and_keep_what_was_written(pages: int, seed: int) -> None:
    ring, rng = Ring(pages * PAGE), np.random.default_rng(seed)
    live: list[tuple[NDArray[np.uint8], int]] = []
    refused = 0
    for step in range(400):
        if live and rng.random() < 0.5:
            live.pop(rng.integers(len(live)))  # in any order
        size = int(rng.integers(0, pages * PAGE // 2 + 2))
        piece = ring.take(size)
        if piece is None:
            refused += 1
        else:
            assert (len(piece), span(piece)[0] % PAGE) == (size, 0)
            piece[:] = step % 251
            live.append((piece, step % 251))
        spans = sorted(span(rows) for rows, _ in live if rows.nbytes)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
        assert not spans or spans[-1][1] - spans[0][0] <= ring.nbytes
        assert all((rows == value).all() for rows, value in live)
    assert refused
    del piece
    live.clear()
    whole = ring.take(ring.nbytes)
    assert whole is not None


def test_a_full_ring_gives_none_until_the_oldest_piece_is_dropped() -> None:
    ring = Ring(4 * PAGE)
    pieces = [ring.take(PAGE) for _ in range(4)]
    assert ring.take(1) is None
    pieces[2] = None  # not the oldest: memory is given out in order
    assert ring.take(1) is None
    first = span(pieces[0])  # type: ignore[arg-type]
    pieces[0] = None
    again = ring.take(PAGE)
    assert again is not None
    assert span(again) == first


def test_a_ring_goes_round_and_skips_an_end_that_is_too_short() -> None:
    ring = Ring(5 * PAGE)
    a, b = ring.take(2 * PAGE), ring.take(2 * PAGE)
    assert a is not None
    start = span(a)[0]
    del a
    c = ring.take(2 * PAGE)  # one page is left at the end
    assert c is not None
    assert span(c)[0] == start
    assert ring.take(1) is None
    del b
    d = ring.take(3 * PAGE)
    assert d is not None
    assert span(d)[0] == start + 2 * PAGE


@pytest.mark.parametrize("nbytes", [5 * PAGE, 1 << 40])
def test_what_never_fits_is_none_and_leaves_the_ring_usable(nbytes: int) -> None:
    ring = Ring(4 * PAGE)
    assert ring.take(nbytes) is None
    assert ring.take(4 * PAGE) is not None


def test_memory_is_allocated_once_and_not_before_it_is_needed() -> None:
    asked: list[int] = []

    def allocate(nbytes: int) -> NDArray[np.uint8]:
        asked.append(nbytes)
        return page_aligned(nbytes)

    ring = Ring(3 * PAGE, allocate)
    assert asked == []
    for _ in range(50):
        assert ring.take(2 * PAGE) is not None
    assert asked == [3 * PAGE]


@pytest.mark.parametrize("view", [lambda rows: rows[5:9], lambda rows: rows.view(np.int32)[1:], torch.from_numpy])
def test_a_view_or_a_tensor_keeps_its_piece(view: Any) -> None:
    ring = Ring(PAGE)
    piece = ring.take(PAGE)
    assert piece is not None
    piece[:] = 7
    held = view(piece)
    del piece
    gc.collect()
    assert ring.take(1) is None
    assert bytes(held.numpy() if isinstance(held, torch.Tensor) else held)[:4] == b"\7\7\7\7"
    del held
    assert ring.take(1) is not None


def test_a_piece_outlives_its_ring() -> None:
    ring = Ring(PAGE)
    piece = ring.take(PAGE)
    assert piece is not None
    piece[:] = 9
    del ring
    gc.collect()
    assert (piece == 9).all()


def test_pieces_freed_by_the_garbage_collector_at_any_moment_neither_hang_nor_break_the_ring() -> None:
    """Arrays in reference cycles die inside the collector, which here runs at nearly every allocation."""
    ring, done = Ring(8 * PAGE), threading.Event()

    def work() -> None:
        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for step in range(3000):
                piece = ring.take(PAGE * (1 + step % 3))
                if piece is not None:
                    cycle: list[Any] = [piece]
                    cycle.append(cycle)
        finally:
            gc.set_threshold(*threshold)
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert done.wait(60)
    gc.collect()
    assert ring.take(8 * PAGE) is not None


def test_pieces_taken_and_dropped_by_many_threads_do_not_overlap() -> None:
    ring, wrong = Ring(16 * PAGE), []

    def work(value: int) -> None:
        rng = np.random.default_rng(value)
        for _ in range(500):
            piece = ring.take(int(rng.integers(1, 4 * PAGE)))
            if piece is not None:
                piece[:] = value
                wrong.extend([value] * bool((piece != value).any()))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert ring.take(16 * PAGE) is not None
