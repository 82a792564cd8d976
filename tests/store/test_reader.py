"""Reading slides: into the caller's memory, in the caller's order, whatever the threads."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import cfstore
import cfstore.ingest
from cfstore import SlideBags, SlideNotFoundError, Store
from cfstore.codecs import CODECS, get_codec

Make = Callable[..., Any]
SLIDES = tuple(f"s{i}" for i in range(9))
Cohort = dict[tuple[str, int], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


@pytest.fixture(scope="module")
def _filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Cohort]:
    """Nine slides in three shards; no test changes them."""
    root, rng, rows = tmp_path_factory.mktemp("reader"), np.random.default_rng(7), {}
    for i, slide in enumerate(SLIDES):
        for scale in (5, 10, 20):
            features = rng.normal(size=(1 + i + scale * (i % 3 + 1) // 4, 8)).astype(np.float32)
            rows[slide, scale] = features, rng.integers(0, 90_000, (len(features), 2)).astype(np.int32)
            path = root / "uni" / f"x{scale}" / "h5_files" / f"{slide}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["features"], file["coords"] = rows[slide, scale]
    filled = cfstore.open(root / "store", create=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfstore.ingest, "SLIDES_PER_SHARD", 3)
        assert filled.ingest(root / "uni").n_shards == 3
    return filled, rows


@pytest.fixture
def filled(_filled: tuple[Store, Cohort]) -> Store:
    return _filled[0]


@pytest.fixture
def cohort(_filled: tuple[Store, Cohort]) -> Cohort:
    return _filled[1]


def check(slide: SlideBags, cohort: Cohort, scales: tuple[int, ...] = (5, 10, 20)) -> None:
    assert tuple(slide.bags) == scales
    for scale, bag in slide.bags.items():
        np.testing.assert_array_equal(bag.features, cohort[slide.slide_id, scale][0].astype(np.float16))


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("ahead", [0, 1, 4, 50])
def test_a_stream_yields_the_callers_order(threads: int, ahead: int, filled: Store, cohort: Cohort) -> None:
    order = [SLIDES[i] for i in (8, 0, 0, 3, 7, 1, 8, 2)]  # with repeats, across shards
    reader = filled.reader("uni", [5, 10, 20], SLIDES)
    seen = list(reader.stream(order, threads=threads, ahead=ahead))
    assert [slide.slide_id for slide in seen] == order
    for slide in seen:
        check(slide, cohort)


def test_a_stream_keeps_the_order_when_early_slides_are_slow(
    filled: Store, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = filled.reader("uni", [20], SLIDES)
    read_into, finished = reader.read_into, []

    def slower_first(slide_id: str, buffer: Any) -> SlideBags:
        time.sleep(0.02 * (len(SLIDES) - SLIDES.index(slide_id)))
        slide = read_into(slide_id, buffer)
        finished.append(slide_id)
        return slide

    monkeypatch.setattr(reader, "read_into", slower_first)
    seen = []
    for slide in reader.stream(SLIDES, threads=4, ahead=6):
        seen.append(slide.slide_id)
        check(slide, cohort, (20,))
    assert seen == list(SLIDES)
    assert finished != seen


def test_a_stream_can_be_left_early_and_the_reader_used_again(filled: Store, cohort: Cohort) -> None:
    reader = filled.reader("uni", [20], SLIDES)
    stream = reader.stream(SLIDES, threads=2, ahead=4)
    assert next(stream).slide_id == "s0"
    stream.close()
    assert [slide.slide_id for slide in reader.stream(["s5"])] == ["s5"]


def test_a_stream_of_nothing_yields_nothing(filled: Store, cohort: Cohort) -> None:
    assert list(filled.reader("uni", [20], SLIDES).stream([])) == []


@pytest.mark.parametrize("scales", [(20,), (5, 20), (10,)])
def test_only_the_asked_for_scales_and_slides_are_read(scales: tuple[int, ...], filled: Store, cohort: Cohort) -> None:
    reader = filled.reader("uni", scales, ["s4", "s1"])
    check(reader.read("s1"), cohort, scales)
    assert reader.bytes_read == sum(cohort["s1", scale][0].size * 2 for scale in scales)


def test_coords_are_read_where_asked_for(filled: Store, cohort: Cohort) -> None:
    assert filled.reader("uni", [10], ["s1"]).read("s1").bags[10].coords is None
    bag = filled.reader("uni", [10], ["s1"], with_coords=True).read("s1").bags[10]
    np.testing.assert_array_equal(bag.coords, cohort["s1", 10][1])


def test_a_missing_slide_is_named(filled: Store, cohort: Cohort) -> None:
    with pytest.raises(SlideNotFoundError, match="slide nobody: no 5x, 20x bag from encoder uni"):
        filled.reader("uni", [5, 20], ["s1", "nobody"])


def test_a_missing_encoder_is_named(filled: Store, cohort: Cohort) -> None:
    with pytest.raises(SlideNotFoundError, match="slide s1: no 20x bag from encoder conch"):
        filled.reader("conch", [20], ["s1"])


def test_a_missing_scale_is_named(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", ("a",), scales=(20,))
    store.ingest(tmp_path / "uni")
    with pytest.raises(SlideNotFoundError, match="slide a: no 5x, 10x bag"):
        store.reader("uni", [5, 10, 20], ["a"])


def test_a_slide_that_was_not_announced_is_named(filled: Store, cohort: Cohort) -> None:
    reader = filled.reader("uni", [20], ["s1"])
    with pytest.raises(SlideNotFoundError, match="'s2'"):
        reader.read("s2")
    with pytest.raises(SlideNotFoundError, match="'s3'"):
        list(reader.stream(["s1", "s3", "s1"]))


def test_an_unknown_slide_of_the_store_is_named_with_its_encoders(filled: Store, cohort: Cohort) -> None:
    with pytest.raises(SlideNotFoundError, match=r"'nobody'.*encoders that have it: none"):
        filled.slide("nobody")
    with pytest.raises(SlideNotFoundError, match=r"'s1'.*encoder conch.*encoders that have it: uni"):
        filled.slide("s1", "conch")


def test_a_cohort_is_its_labelled_slides_with_all_scales_and_says_why_others_are_not(
    tmp_path: Path, store: Store, make_cohort: Make
) -> None:
    make_cohort(tmp_path / "uni", ("a", "b", "c"))
    make_cohort(tmp_path / "uni", ("d",), scales=(20,))
    (tmp_path / "uni" / "t.csv").write_text(
        "case_id,slide_id,survival_months,censorship\np1,a.svs,3,0\np1,b.svs,3,0\np2,d.svs,4,1\n"
    )
    store.ingest(tmp_path / "uni")
    cohort = store.cohort("uni")
    assert [(slide.slide_id, slide.patient_id, slide.event) for slide in cohort.slides] == [
        ("a", "p1", True),
        ("b", "p1", True),
    ]
    assert (cohort.encoder, cohort.dim, cohort.n_patients) == ("uni", 8, 1)
    assert cohort.excluded == {"no label": ("c",), "no 5x, 10x": ("d",)}
    assert [slide.slide_id for slide in store.cohort("uni", scales=[20]).slides] == ["a", "b", "d"]
    with pytest.raises(SlideNotFoundError, match=r"'LUAD' has no slides.*cohorts here: uni"):
        store.cohort("LUAD")


def test_the_next_slides_are_read_while_the_caller_works_on_this_one(filled: Store) -> None:
    reader = filled.reader("uni", [5, 10, 20], SLIDES)
    stream = reader.stream(SLIDES, threads=2, ahead=2)
    first = next(stream)
    deadline = time.monotonic() + 30
    while reader.bytes_read < 3 * first.nbytes // 2 and time.monotonic() < deadline:
        time.sleep(0.01)  # the caller's work
    assert reader.bytes_read > first.nbytes
    stream.close()


# --- memory of the caller, and memory that is used again ------------------------------------------------


def test_read_into_fills_the_callers_memory_and_that_memory_can_be_used_again(filled: Store, cohort: Cohort) -> None:
    reader = filled.reader("uni", [5, 10, 20], SLIDES, with_coords=True)
    buffer = np.full(max(reader.buffer_bytes(slide) for slide in SLIDES) + 100, 0xEE, np.uint8)
    for slide_id in SLIDES * 2:
        slide = reader.read_into(slide_id, buffer)
        check(slide, cohort)
        for scale, bag in slide.bags.items():
            assert bag.coords is not None
            assert np.shares_memory(bag.features, buffer)
            assert np.shares_memory(bag.coords, buffer)
            np.testing.assert_array_equal(bag.coords, cohort[slide_id, scale][1])
    assert (buffer[-100:] == 0xEE).all()  # never beyond what was asked for


def test_a_buffer_of_one_byte_less_is_refused_and_one_of_just_enough_is_not(filled: Store, cohort: Cohort) -> None:
    reader = filled.reader("uni", [5, 10, 20], SLIDES)
    needed = reader.buffer_bytes("s8")
    with pytest.raises(ValueError, match=rf"slide s8 needs {needed:,} bytes, the buffer has {needed - 1:,}"):
        reader.read_into("s8", np.empty(needed - 1, np.uint8))
    check(reader.read_into("s8", np.empty(needed, np.uint8)), cohort)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[np.ndarray[Any, Any]]]:
    """Six slides of 4 MB each (float16), compressed and not."""
    root, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(1)
    rows = [rng.normal(size=(2048 + i, 1024)).astype(np.float16) for i in range(6)]
    (root / "uni" / "x20").mkdir(parents=True)
    for i, features in enumerate(rows):
        with h5py.File(root / "uni" / "x20" / f"s{i}.h5", "w") as file:
            file["features"] = features
    store = cfstore.open(root / "store", create=True)
    store.ingest(root / "uni")
    return store, rows


LARGE = [f"s{i}" for i in range(6)]


def test_read_into_allocates_nothing_of_a_slides_size(large: tuple[Store, list[np.ndarray[Any, Any]]]) -> None:
    store, rows = large
    reader = store.reader("uni", [20], LARGE)
    buffer = np.empty(max(reader.buffer_bytes(slide) for slide in LARGE), np.uint8)
    reader.read_into("s0", buffer)  # files are opened, layouts and scratch memory are made
    tracemalloc.start()
    for slide in LARGE:
        reader.read_into(slide, buffer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < rows[0].nbytes / 8
    np.testing.assert_array_equal(buffer[: rows[5].nbytes].view(np.float16).reshape(rows[5].shape), rows[5])


class Counted:
    """Counts what is allocated."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        self.asked.append(nbytes)
        return np.zeros(nbytes, np.uint8)


def test_a_stream_uses_its_memory_again_when_arrays_are_dropped(large: tuple[Store, Any]) -> None:
    store, rows = large
    allocate, ahead_bytes = Counted(), 16 << 20
    reader = store.reader("uni", [20], LARGE, allocate=allocate)
    order = [LARGE[i] for i in np.random.default_rng(2).integers(0, 6, 40)]
    for slide in reader.stream(order, ahead=2, ahead_bytes=ahead_bytes):
        np.testing.assert_array_equal(slide.bags[20].features, rows[int(slide.slide_id[1:])])
        del slide
    for slide in reader.stream(order[:3], ahead=2, ahead_bytes=ahead_bytes):  # a second epoch
        del slide
    assert allocate.asked == [ahead_bytes]


@pytest.mark.parametrize("ahead_bytes", [1, 1 << 20, 5 << 20, 13 << 20, 64 << 20])
def test_whoever_keeps_all_slides_has_the_right_values(ahead_bytes: int, large: tuple[Store, Any]) -> None:
    store, rows = large
    reader = store.reader("uni", [20], LARGE)
    order = LARGE * 3
    kept = list(reader.stream(order, threads=3, ahead=4, ahead_bytes=ahead_bytes))
    for slide, slide_id in zip(kept, order, strict=True):
        assert slide.slide_id == slide_id
        np.testing.assert_array_equal(slide.bags[20].features, rows[int(slide_id[1:])])


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_slides_are_read_ahead_than_asked_for(ahead: int, large: tuple[Store, Any]) -> None:
    store, rows = large
    reader = store.reader("uni", [20], LARGE)
    stream = reader.stream(LARGE, threads=4, ahead=ahead)
    next(stream)
    time.sleep(0.5)
    assert reader.bytes_read <= sum(features.nbytes for features in rows[: 1 + ahead])
    assert len(list(stream)) == 5


def test_no_more_bytes_are_read_ahead_than_asked_for(large: tuple[Store, Any]) -> None:
    store, rows = large
    reader = store.reader("uni", [20], LARGE)
    stream = reader.stream(LARGE, threads=4, ahead=5, ahead_bytes=14 << 20)  # room for three, and not four
    first = next(stream)
    time.sleep(0.5)
    assert reader.bytes_read <= sum(features.nbytes for features in rows[:3])
    np.testing.assert_array_equal(first.bags[20].features, rows[0])
    assert len(list(stream)) == 5


def test_a_tensor_keeps_its_slide_while_the_stream_goes_on(large: tuple[Store, Any]) -> None:
    store, rows = large
    stream = store.reader("uni", [20], LARGE).stream(LARGE * 4, ahead=1, ahead_bytes=14 << 20)
    held = torch.from_numpy(next(stream).bags[20].features)
    for slide in stream:
        del slide
    np.testing.assert_array_equal(held.numpy(), rows[0])


@pytest.mark.parametrize("name", [name for name in CODECS if name != "none"])
def test_python_goes_on_while_a_chunk_is_decoded(name: str, rng: np.random.Generator) -> None:
    """A decoder that held the interpreter's lock would stop every other thread for as long as it takes."""
    chunk = rng.normal(size=(16_384, 1024)).astype(np.float16)
    codec = get_codec(name, "float16")
    stored, out = codec.encode(chunk), np.empty(chunk.nbytes, np.uint8)

    def longest_pause_and_duration() -> tuple[float, float]:
        """Of a thread that looks at the clock all the time, while the main thread decodes."""
        stop, pauses = threading.Event(), [0.0]

        def look() -> None:
            last = time.perf_counter()
            while not stop.is_set():
                now = time.perf_counter()
                pauses[0], last = max(pauses[0], now - last), now
                time.sleep(0.0001)

        watcher = threading.Thread(target=look)
        watcher.start()
        started = time.perf_counter()
        codec.decode_into(stored, out)
        duration = time.perf_counter() - started
        stop.set()
        watcher.join()
        return pauses[0], duration

    tries = (longest_pause_and_duration() for _ in range(20))  # on a busy machine a pause may be somebody else's
    assert any(pause < duration / 2 for pause, duration in tries)
    assert out.tobytes() == chunk.tobytes()
