"""Where bytes go: every array lands whole in the buffer, chunks are read once, and only those that are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import cfstore
import cfstore.ingest
from cfstore import IngestOptions, Store, catalog
from cfstore.files import OpenFiles
from cfstore.locks import write_lock
from cfstore.removal import compact

Make = Callable[..., Any]
KINDS = {
    "compressed": IngestOptions(),
    "plain": IngestOptions(codec="none"),
    "float32": IngestOptions(dtype="float32", codec="zstd"),
    "int8": IngestOptions(dtype="int8"),
    "int8 compressed": IngestOptions(dtype="int8", codec="blosc-lz4"),
    "tar": IngestOptions(format="webdataset"),
    "int8 tar": IngestOptions(dtype="int8", format="webdataset"),
}
COUNTS = {"a": {5: 1, 10: 40, 20: 301}, "b": {5: 33, 10: 2, 20: 64}, "c": {5: 31, 10: 1, 20: 1}}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@pytest.fixture
def make_bags(tmp_path: Path, make_clam_h5: Make) -> Callable[..., dict[tuple[str, int], Any]]:
    """Bags of COUNTS at some scales, in the folder `uni`; chunks have 32 rows."""

    def make(scales: tuple[int, ...] = (5, 10, 20), slides: str = "abc") -> dict[tuple[str, int], Any]:
        return {
            (slide, scale): make_clam_h5(
                tmp_path / "uni" / f"x{scale}" / "h5_files" / f"{slide}.h5", COUNTS[slide][scale], 11
            )
            for slide in slides
            for scale in scales
        }

    return make


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[IngestOptions], tuple[Store, dict[tuple[str, int], Any]]]:
    """A store of the given kind with every bag of COUNTS, made once; no test changes it."""
    root, rng = tmp_path_factory.mktemp("places"), np.random.default_rng(3)
    made: dict[IngestOptions, Store] = {}
    rows = {}
    for slide, counts in COUNTS.items():
        for scale, n in counts.items():
            rows[slide, scale] = rng.normal(scale=3, size=(n, 11)).astype("f4"), rng.integers(0, 9000, (n, 2), "i4")
            path = root / "uni" / f"x{scale}" / "h5_files" / f"{slide}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["features"], file["coords"] = rows[slide, scale]

    def make(options: IngestOptions) -> tuple[Store, dict[tuple[str, int], Any]]:
        if options not in made:
            made[options] = cfstore.open(root / f"store{len(made)}", create=True)
            made[options].ingest(root / "uni", options)
        return made[options], rows

    return make


def check(bag: cfstore.Bag, features: Any, coords: Any) -> None:
    """The source's rows, as exactly as the bag's precision allows."""
    if bag.affine is not None:
        steps = bag.affine.scale
        assert (np.abs(bag.dequantised().features - features) <= steps * 0.5001 + 1e-6).all()
    else:
        np.testing.assert_array_equal(bag.features, features.astype(bag.features.dtype))
    if bag.coords is not None:
        np.testing.assert_array_equal(bag.coords, coords)


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(file, start, length) of everything that is read."""
    seen: list[tuple[str, int, int]] = []
    original = OpenFiles.read_into

    def read_into(self: OpenFiles, file: str, start: int, buffer: memoryview) -> None:
        seen.append((file, start, len(buffer)))
        original(self, file, start, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", read_into)
    return seen


@every_kind
@pytest.mark.parametrize("scales", [(5,), (10,), (20,), (5, 20), (5, 10, 20)], ids=str)
@pytest.mark.parametrize("with_coords", [False, True])
def test_any_scales_of_a_slide_are_read_whole(
    options: IngestOptions, scales: tuple[int, ...], with_coords: bool, filled: Make
) -> None:
    store, rows = filled(options)
    reader = store.reader("uni", scales, "abc", with_coords=with_coords)
    for slide in "abc":
        found = reader.read(slide)
        assert tuple(found.bags) == scales
        for scale, bag in found.bags.items():
            assert (bag.coords is not None) == with_coords
            check(bag, *rows[slide, scale])


@every_kind
@pytest.mark.parametrize("order", [((5, 20), (10,)), ((20,), (10,), (5,))], ids=str)
def test_scales_that_came_in_later_do_not_disturb_those_that_share_a_chunk(
    options: IngestOptions, order: tuple[tuple[int, ...], ...], tmp_path: Path, store: Store, make_bags: Make
) -> None:
    rows: dict[tuple[str, int], Any] = {}
    for scales in order:
        rows |= make_bags(scales)
        store.ingest(tmp_path / "uni", options)
    reader = store.reader("uni", [5, 10, 20], "abc", with_coords=True)
    for slide in "abc":
        for scale, bag in reader.read(slide).bags.items():
            check(bag, *rows[slide, scale])


RANGES = {
    "none": [],
    "one row": [(0, 1)],
    "last row": [(300, 301)],
    "whole": [(0, 301)],
    "empty at both ends": [(0, 0), (301, 301)],
    "empty between": [(5, 9), (64, 64), (65, 65), (9, 12)],
    "unsorted": [(200, 210), (3, 5), (100, 164), (64, 96)],
    "overlapping": [(10, 100), (50, 60), (90, 260), (10, 100), (0, 11)],
    "across chunks": [(31, 33), (63, 65), (127, 129)],
    "all rows one by one": [(i, i + 1) for i in range(301)],
}


@every_kind
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_rows_of_ranges_equal_slices(options: IngestOptions, ranges: list[tuple[int, int]], filled: Make) -> None:
    store, rows = filled(options)
    features, coords = rows["a", 20]
    for with_coords in (False, True):
        bag = store.reader("uni", [20], ["a"], with_coords=with_coords).read_rows("a", 20, ranges)
        assert (bag.coords is not None) == with_coords
        assert bag.features.shape == (sum(stop - start for start, stop in ranges), 11)
        here = [np.arange(start, stop) for start, stop in ranges] or [np.arange(0)]
        check(bag, features[np.concatenate(here)], coords[np.concatenate(here)])


@pytest.mark.parametrize("bad", [(-1, 3), (0, 302), (5, 4), (400, 500)])
def test_rows_beyond_the_bag_are_refused(bad: tuple[int, int], filled: Make) -> None:
    store, _ = filled(IngestOptions())
    with pytest.raises(IndexError, match=rf"slide a: rows {bad[0]} to {bad[1]} of 301 patches at 20x"):
        store.reader("uni", [20], ["a"]).read_rows("a", 20, [(0, 1), bad])


@every_kind
def test_only_the_chunks_that_hold_the_rows_are_read(
    options: IngestOptions, filled: Make, read_bytes: list[tuple[str, int, int]]
) -> None:
    store, _ = filled(options)
    reader = store.reader("uni", [20], ["a"])
    [bag] = store.sql(
        "SELECT byte_start, byte_length, bytes / n_patches AS row_bytes FROM bags WHERE scale = 20 AND slide_id = 'a'"
    ).to_pylist()

    def count(ranges: list[tuple[int, int]]) -> int:
        read_bytes.clear()
        reader.read_rows("a", 20, ranges)
        inside = range(bag["byte_start"], bag["byte_start"] + bag["byte_length"])
        return sum(length for file, start, length in read_bytes if "/scale/" not in file and start in inside)

    one = count([(150, 151)])
    assert 0 < one <= 32 * bag["row_bytes"] + 64  # a chunk, which may not compress
    assert count([(0, 1), (150, 151), (151, 152), (300, 301)]) <= 4 * (32 * bag["row_bytes"] + 64)
    assert count([(150, 151), (150, 151), (151, 152), (150, 152)]) <= 2 * (32 * bag["row_bytes"] + 64)
    assert count([(64, 64)]) == count([]) == 0
    assert count([(0, 301)]) >= bag["byte_length"] * 0.9


@every_kind
def test_a_slide_is_read_without_a_metadata_file(
    options: IngestOptions, tmp_path: Path, store: Store, make_bags: Make, read_bytes: list[tuple[str, int, int]]
) -> None:
    rows = make_bags()
    store.ingest(tmp_path / "uni", options)
    garbled = list(store.path.rglob("zarr.json"))
    for number, path in enumerate(garbled):
        path.write_text("{") if number % 2 else path.unlink()
    assert bool(garbled) == (options.format == "zarr")
    reader = store.reader("uni", [5, 10, 20], "abc", with_coords=True)
    for slide in "abc":
        for scale, bag in reader.read(slide).bags.items():
            check(bag, *rows[slide, scale])
    assert not any(file.endswith(".json") for file, _, _ in read_bytes)


def test_the_three_bags_of_a_plain_slide_are_one_read(filled: Make, read_bytes: list[tuple[str, int, int]]) -> None:
    store, _ = filled(IngestOptions(codec="none"))
    store.reader("uni", [5, 10, 20], "abc").read("a")
    assert len(read_bytes) == 1


@pytest.mark.parametrize("options", [KINDS["compressed"], KINDS["int8 tar"]], ids=["compressed", "int8 tar"])
@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("how", ["read", "read_into", "stream", "read_rows"])
def test_an_old_reader_follows_slides_whose_shards_were_compacted(
    how: str, opened_before: bool, options: IngestOptions, tmp_path: Path, store: Store, make_bags: Make
) -> None:
    rows = {}
    for slide in "abc":
        rows |= make_bags(slides=slide)
        store.ingest(tmp_path / "uni", options)
    reader = store.reader("uni", [5, 10, 20], "abc", with_coords=True)
    if opened_before:
        reader.read("a")
    assert compact(store.path).n_shards_after == 1
    for slide in "abc":
        if how == "read":
            found = reader.read(slide).bags
        elif how == "read_into":
            found = reader.read_into(slide, np.empty(1 << 20, np.uint8)).bags
        elif how == "stream":
            [streamed] = reader.stream([slide])
            found = streamed.bags
        else:
            found = {n: reader.read_rows(slide, n, [(0, COUNTS[slide][n])]) for n in (5, 10, 20)}
        for scale, bag in found.items():
            check(bag, *rows[slide, scale])


def test_threads_that_ask_for_one_moved_slide_at_once_all_get_it(tmp_path: Path, store: Store, make_bags: Make) -> None:
    rows = {}
    for slide in "abc":
        rows |= make_bags(slides=slide)
        store.ingest(tmp_path / "uni")
    for _ in range(5):
        reader = store.reader("uni", [5, 10, 20], "abc")
        compact(store.path)
        for found in reader.stream(["a"] * 30, threads=8, ahead=16):
            for scale, bag in found.bags.items():
                check(bag, *rows["a", scale])
        for path in (tmp_path / "uni").rglob("b.h5"):
            path.rename(path.with_name(f"n{len(list(path.parent.iterdir()))}.h5"))
        store.ingest(tmp_path / "uni")


@every_kind
def test_a_rebuilt_catalog_says_the_same_places(
    options: IngestOptions, tmp_path: Path, store: Store, make_bags: Make
) -> None:
    make_bags()
    store.ingest(tmp_path / "uni", options)
    query = "SELECT * FROM bags ORDER BY slide_id, scale"
    before = store.sql(query).to_pylist()
    with write_lock(store.path):
        catalog.rebuild(store.path)
    assert store.sql(query).to_pylist() == before
