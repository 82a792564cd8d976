"""Reading slides: the caller's order, whatever the threads; a cache that keeps its bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import cfstore
import cfstore.ingest
from cfstore import SlideBags, SlideNotFoundError, Store

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
        patch.setattr(cfstore.ingest, "_SLIDES_PER_SHARD", 3)
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
    read = reader.read

    def slower_first(slide_id: str) -> SlideBags:
        time.sleep(0.02 * (len(SLIDES) - SLIDES.index(slide_id)))
        return read(slide_id)

    monkeypatch.setattr(reader, "read", slower_first)
    assert [slide.slide_id for slide in reader.stream(SLIDES, threads=4, ahead=6)] == list(SLIDES)


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


def test_a_cached_slide_is_equal_and_costs_no_second_read(filled: Store, cohort: Cohort) -> None:
    reader = filled.reader("uni", [5, 10, 20], SLIDES, cache_bytes=1 << 20)
    for _ in range(3):
        for slide in SLIDES:
            check(reader.read(slide), cohort)
    assert reader.bytes_read == sum(features.size * 2 for features, _ in cohort.values())


@pytest.mark.parametrize("share", [0, 0.1, 0.5])
def test_the_cache_keeps_its_bound_and_forgets_the_oldest(share: float, filled: Store, cohort: Cohort) -> None:
    whole = sum(features.size * 2 for (_, scale), (features, _) in cohort.items() if scale == 20)
    limit = int(share * whole)
    reader = filled.reader("uni", [20], SLIDES, cache_bytes=limit)
    for slide in np.random.default_rng(0).choice(SLIDES, 60):
        check(reader.read(str(slide)), cohort, (20,))
        held = sum(bags.nbytes for bags in reader._cache._slides.values())
        assert held == reader._cache._held <= limit
    if share == 0:
        assert reader.bytes_read > 5 * whole
    last = reader.read("s0")
    before = reader.bytes_read
    reader.read("s0")
    assert (reader.bytes_read == before) == (last.nbytes <= limit)


def test_the_cache_keeps_its_bound_with_many_threads(filled: Store, cohort: Cohort) -> None:
    limit = 600
    reader = filled.reader("uni", [5, 10, 20], SLIDES, cache_bytes=limit)
    order = [str(slide) for slide in np.random.default_rng(1).choice(SLIDES, 200)]
    assert [slide.slide_id for slide in reader.stream(order, threads=8, ahead=16)] == order
    assert sum(bags.nbytes for bags in reader._cache._slides.values()) == reader._cache._held <= limit


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
