"""Bad input: every kind of it, refused by name, and out of the store while the rest goes in."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import cfstore
from cfstore import IngestOptions, Store
from cfstore.errors import (
    DuplicateBagError,
    EmptyBagError,
    MissingDatasetError,
    NonFiniteError,
    PrecisionError,
    ShapeError,
    SourceError,
    UnreadableFileError,
)

Make = Callable[..., Any]
Break = Callable[[Path, Make], Path]  # (h5_files folder, make_clam_h5) -> the file an error should name
RNG = np.random.default_rng(11)
FEATURES = RNG.normal(size=(40, 8)).astype(np.float32)
COORDS = RNG.integers(0, 9000, (40, 2)).astype(np.int32)


def write(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, rows in datasets.items():
            file[name] = rows
    return path


def poisoned(value: float, row: int) -> np.ndarray[Any, Any]:
    rows = FEATURES.copy()
    rows[row, 3] = value
    return rows


def save_pt(folder: Path, content: object) -> Path:
    (folder.parent / "pt_files").mkdir(exist_ok=True)
    path = folder.parent / "pt_files" / "bad.pt"
    torch.save(content, path)
    return path


def truncated(folder: Path, make: Make) -> Path:
    make(folder / "bad.h5", n_patches=300)
    content = (folder / "bad.h5").read_bytes()
    (folder / "bad.h5").write_bytes(content[: len(content) // 2])
    return folder / "bad.h5"


def damaged_inside(folder: Path, make: Make) -> Path:
    make(folder / "bad.h5", n_patches=300)
    content = bytearray((folder / "bad.h5").read_bytes())
    at = content.find(b"TREE")
    content[at : at + 4] = b"EERT"
    (folder / "bad.h5").write_bytes(content)
    return folder / "bad.h5"


def raw(content: bytes) -> Break:
    def make_file(folder: Path, make: Make) -> Path:
        (folder / "bad.h5").write_bytes(content)
        return folder / "bad.h5"

    return make_file


def holding(**datasets: Any) -> Break:
    return lambda folder, make: write(folder / "bad.h5", **datasets)


def declaring(name: str, **options: Any) -> Break:
    """A file whose `name` says it is large, and holds nothing."""

    def make_file(folder: Path, make: Make) -> Path:
        with h5py.File(folder / "bad.h5", "w") as file:
            if name == "coords":
                file["features"] = FEATURES
            file.create_dataset(name, **options)
        return folder / "bad.h5"

    return make_file


def twice(folder: Path, make: Make) -> Path:
    make(folder / "bad.h5")
    make(folder / "bad.svs.h5")
    return folder / "bad.svs.h5"


def locked(folder: Path, make: Make) -> Path:
    make(folder / "bad.h5")
    (folder / "bad.h5.lock").write_text("")
    return folder / "bad.h5"


def misplaced(folder: Path, make: Make) -> Path:
    make(folder / "bad.h5")
    with h5py.File(folder / "bad.h5", "a") as file:
        file["coords"].attrs["target_magnification"] = 10
    return folder / "bad.h5"


def wider(folder: Path, make: Make) -> Path:
    make(folder / "bad.h5", dim=16)
    return folder / "bad.h5"


def unplugged(folder: Path, make: Make) -> Path:
    (folder / "bad.h5").symlink_to(folder / "on-a-disk-that-is-gone.h5")
    return folder / "bad.h5"


HUGE = {"shape": (10**9, 1024), "dtype": "f4"}
CASES: dict[str, tuple[Break, type[SourceError], str, str]] = {
    # id: what makes it, error class, what was found, what to do
    "truncated h5": (truncated, UnreadableFileError, "truncated", "extract it again"),
    "h5 damaged inside": (damaged_inside, UnreadableFileError, "cannot be read as HDF5", "extract it again"),
    "not HDF5": (raw(b"<html>Sign in to continue</html>" * 99), UnreadableFileError, "as HDF5", "extract it again"),
    "zero bytes": (raw(b""), UnreadableFileError, "empty file", "extract it again"),
    "dangling link": (unplugged, UnreadableFileError, "No such file", "extract it again"),
    "no features": (holding(coords=COORDS), MissingDatasetError, "found: coords", "extract the slide again"),
    "stamp": (holding(feats=FEATURES, coords=COORDS), MissingDatasetError, "found: coords, feats", "STAMP"),
    "nan": (holding(features=poisoned(np.nan, 7)), NonFiniteError, "row 7 has NaN", "extract the slide again"),
    "inf": (holding(features=poisoned(-np.inf, 39)), NonFiniteError, "row 39 has NaN or Inf", "extract the slide"),
    "fewer coords": (
        holding(features=FEATURES, coords=COORDS[:-1]),
        ShapeError,
        "'features' has 40 rows but 'coords' has 39",
        "extract it again",
    ),
    "coords turned": (holding(features=FEATURES, coords=COORDS.T), ShapeError, "shape (2, 40)", "expected [N, 2]"),
    "coords text": (
        holding(features=FEATURES, coords=COORDS.astype("S6")), ShapeError, "'coords' holds bytes", "expected whole",
    ),
    "coords in microns": (
        holding(features=FEATURES, coords=COORDS + np.float32(0.25)), ShapeError, ".25", "convert them first",
    ),
    "coords nan": (
        holding(features=FEATURES, coords=np.full((40, 2), np.nan)), ShapeError, "nan", "whole numbers",
    ),
    "coords beyond int32": (
        holding(features=FEATURES, coords=COORDS.astype("u8") + 2**40), ShapeError, "1099511", "beyond any slide",
    ),
    "other dimension": (wider, ShapeError, "dimension 16, but the other slides of encoder e have 8", "--encoder"),
    "empty (0, D)": (holding(features=FEATURES[:0]), EmptyBagError, "(0, 8)", "leave its file out"),
    "empty (0,)": (holding(features=np.zeros(0, np.float32)), EmptyBagError, "(0,)", "leave its file out"),
    "null dataspace": (holding(features=h5py.Empty("f4")), EmptyBagError, "empty", "leave its file out"),
    "slide embedding": (holding(features=FEATURES[0]), ShapeError, "slide embedding", "give patch features [N, D]"),
    "images": (holding(features=np.zeros((3, 8, 8, 3), "f4")), ShapeError, "(3, 8, 8, 3)", "[N, D]"),
    "two files for a slide": (twice, DuplicateBagError, "is also in", "keep one of the two"),
    "integers": (holding(features=FEATURES.astype(np.int32)), ShapeError, "holds int32", "is this a feature file"),
    "beyond float16": (holding(features=poisoned(1e6, 0)), PrecisionError, "1e+06", "--dtype float32"),
    "just beyond float16": (holding(features=poisoned(65_519, 0)), PrecisionError, "65,519", "--dtype float32"),
    "trident lock": (locked, UnreadableFileError, "bad.h5.lock", "finish it, or delete both"),
    "in the wrong folder": (misplaced, ShapeError, "the folder says 20x", "move the file"),
    "huge, contiguous": (declaring("features", **HUGE), UnreadableFileError, "holds 0", "extract it again"),
    "huge, chunked": (
        declaring("features", **HUGE, chunks=(32, 1024)), UnreadableFileError, "holds 0", "extract it again",
    ),
    "huge, compressed": (
        declaring("features", **HUGE, chunks=(32, 1024), compression="gzip"),
        UnreadableFileError,
        "declares 4,096,000,000,000 bytes but holds 0",
        "extract it again",
    ),
    "huge coords": (
        declaring("coords", shape=(10**13, 2), dtype="i4", chunks=(32, 2)), ShapeError, "10000000000000", "again",
    ),
    "coords never written": (
        declaring("coords", shape=(40, 2), dtype="i4"), UnreadableFileError, "'coords' declares 320", "again",
    ),
    "pt of a list": (
        lambda folder, make: save_pt(folder, [1, 2]), MissingDatasetError, "found: list", "save the bare",
    ),
    "pt of other keys": (
        lambda folder, make: save_pt(folder, {"feats": torch.ones(3, 8)}), MissingDatasetError, "feats", "save the",
    ),
    "pt of integers": (
        lambda folder, make: save_pt(folder, torch.ones(3, 8, dtype=torch.int64)), ShapeError, "int64", "feature file",
    ),
    "pt of ragged coords": (
        lambda folder, make: save_pt(folder, {"features": torch.ones(2, 8), "coords": [[1, 2], [3]]}),
        ShapeError,
        "'coords' is no table",
        "[N, 2]",
    ),
}  # fmt: skip


@dataclass
class Folder:
    """Slide `one` is good; `bad` is good at 10x and broken at 20x."""

    root: Path
    file: Path
    make: Make

    def mend(self) -> None:
        for path in (self.root / "x20").rglob("bad*"):
            path.unlink()
        self.make(self.root / "x20" / "h5_files" / "bad.h5")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, make_cohort: Make, make_clam_h5: Make, draw: Make) -> Folder:
    root = tmp_path / "e"
    make_cohort(root, ("bad", "one"), scales=(10, 20))
    (root / "x20" / "h5_files" / "bad.h5").unlink()
    return Folder(root, request.param(root / "x20" / "h5_files", make_clam_h5), make_clam_h5)


def each(column: int | None = None) -> pytest.MarkDecorator:
    names = ["folder", "error", "found", "remedy"] if column is None else ["folder"]
    values = [case if column is None else case[:1] for case in CASES.values()]
    return pytest.mark.parametrize(names, values, ids=list(CASES), indirect=["folder"])


def bags(store: Store) -> set[tuple[str, int]]:
    rows = store.sql("SELECT slide_id, scale FROM bags").to_pylist()
    assert len(rows) == len({(row["slide_id"], row["scale"]) for row in rows})
    return {(row["slide_id"], row["scale"]) for row in rows}


GOOD = {("one", 10), ("one", 20)}
BAD = {("bad", 10), ("bad", 20)}


@each()
def test_stop_raises_what_was_found_and_takes_nothing_of_the_slide(
    folder: Folder, error: type[SourceError], found: str, remedy: str, store: Store
) -> None:
    with pytest.raises(error) as caught:
        store.ingest(folder.root)
    message = str(caught.value)
    assert type(caught.value) is error
    assert str(folder.file) in message
    assert found in message
    assert remedy in message
    assert "\n" not in message
    assert not bags(store) & BAD
    assert not list((store.path / "features").rglob(".writing-*"))


@each(0)
def test_skip_leaves_out_that_slide_at_all_its_scales_until_it_is_mended(folder: Folder, store: Store) -> None:
    report = store.ingest(folder.root, on_error="skip")
    assert bags(store) == GOOD
    assert {problem.slide_id for problem in report.problems} == {"bad"}
    assert [problem.source for problem in report.problems] == [str(folder.file)]
    listed = store.sql("SELECT slide_id, encoder, source, error, message FROM skipped").to_pylist()
    assert [(row["slide_id"], row["encoder"]) for row in listed] == [("bad", "e")]
    assert listed[0]["error"] == type(report.problems[0].error).__name__
    assert str(folder.file) in listed[0]["message"]
    assert store.info().skipped == listed

    folder.mend()
    again = store.ingest(folder.root, on_error="skip")
    assert not again.problems
    assert again.n_bags == 2
    assert bags(store) == GOOD | BAD
    assert store.sql("SELECT * FROM skipped").num_rows == 0
    assert store.info().skipped == []


def test_all_bad_files_are_named_at_once(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "e", ("a", "b", "c"), scales=(20,))
    for name in "ab":
        (tmp_path / "e" / "x20" / "h5_files" / f"{name}.h5").write_bytes(b"")
    with pytest.raises(UnreadableFileError, match=r"a\.h5.*\n.*b\.h5"):
        store.ingest(tmp_path / "e")
    assert bags(store) == set()


def test_mending_from_another_folder_is_forgotten_in_skipped_too(
    tmp_path: Path, store: Store, make_cohort: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "e", ("a", "b"), scales=(20,))
    broken = tmp_path / "e" / "x20" / "h5_files" / "a.h5"
    content = broken.read_bytes()
    broken.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    store.ingest("e", on_error="skip")  # a relative path
    assert store.sql("SELECT source FROM skipped").to_pylist() == [{"source": str(broken.resolve())}]
    broken.write_bytes(content)
    store.ingest(tmp_path / "e" / "x20", IngestOptions(encoder="e"))
    assert store.sql("SELECT * FROM skipped").num_rows == 0


def test_dimension_that_differs_from_the_store_is_refused(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "first" / "uni", ("a",), dim=8)
    store.ingest(tmp_path / "first" / "uni")
    make_cohort(tmp_path / "second" / "uni", ("b", "c"), dim=16)
    with pytest.raises(ShapeError, match=r"dimension 16, but the other slides of encoder uni have 8.*--encoder"):
        store.ingest(tmp_path / "second" / "uni")
    assert {slide for slide, _ in bags(store)} == {"a"}
    store.ingest(tmp_path / "second" / "uni", IngestOptions(encoder="uni2"))
    assert {slide for slide, _ in bags(store)} == {"a", "b", "c"}


def test_float32_takes_what_float16_cannot_hold(tmp_path: Path, store: Store, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / "a.h5", features=poisoned(1e6, 0), coords=COORDS)
    with pytest.raises(PrecisionError):
        store.ingest(tmp_path / "e")
    store.ingest(tmp_path / "e", IngestOptions(dtype="float32"))
    np.testing.assert_array_equal(store.slide("a").bags[20].features, poisoned(1e6, 0))


def test_the_largest_float16_is_taken(tmp_path: Path, store: Store, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / "a.h5", features=poisoned(-65_504, 0), coords=COORDS)
    store.ingest(tmp_path / "e")
    assert store.slide("a").bags[20].features.min() == -65_504


class _Runs:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["torch", "pickle", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(kind: str, tmp_path: Path, store: Store) -> None:
    marker, path = tmp_path / "it-ran", tmp_path / "e" / "x20" / "pt_files" / "bad.pt"
    path.parent.mkdir(parents=True)
    content = {"features": torch.ones(3, 8), "extra": _Runs(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(UnreadableFileError, match=r"bad\.pt.*would have to run code: save the bare tensor again"):
        store.ingest(tmp_path / "e")
    assert not marker.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # the file was indeed armed


def test_a_truncated_pt_is_refused(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "e" / "x20" / "pt_files" / "bad.pt"
    path.parent.mkdir(parents=True)
    torch.save(torch.ones(300, 8), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UnreadableFileError, match=r"bad\.pt.*truncated"):
        store.ingest(tmp_path / "e")


@pytest.mark.parametrize("options", [{}, {"chunks": (32, 64)}, {"chunks": (32, 64), "compression": "gzip"}])
def test_a_shape_declared_without_data_is_refused_without_allocating(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "e" / "x20" / "a.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", shape=(4_000_000, 64), dtype="f4", **options)  # 1 GB
    tracemalloc.start()
    try:
        plan = cfstore.plan_ingest(tmp_path / "e", IngestOptions())
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert [type(problem.error) for problem in plan.problems] == [UnreadableFileError]


def test_a_bag_of_which_some_chunks_were_never_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e" / "x20" / "a.h5"
    path.parent.mkdir(parents=True)
    for options in ({}, {"compression": "gzip"}):
        with h5py.File(path, "w") as file:
            rows = file.create_dataset("features", shape=(64, 8), dtype="f4", chunks=(32, 8), **options)
            rows[:32] = FEATURES[:32]
        problems = cfstore.plan_ingest(tmp_path / "e", IngestOptions()).problems
        assert [type(problem.error) for problem in problems] == [UnreadableFileError]


def test_attributes_that_are_not_finite_count_as_unknown(tmp_path: Path, store: Store, make_clam_h5: Make) -> None:
    path = tmp_path / "e" / "x20" / "h5_files" / "a.h5"
    make_clam_h5(path)
    with h5py.File(path, "a") as file:
        file["coords"].attrs.update({"patch_size": np.nan, "mpp": np.inf, "target_magnification": np.nan})
    store.ingest(tmp_path / "e")
    assert store.sql("SELECT patch_size, mpp FROM bags").to_pylist() == [{"patch_size": None, "mpp": None}]


def test_a_file_that_grows_after_the_plan_is_refused(tmp_path: Path, store: Store, make_clam_h5: Make) -> None:
    path = tmp_path / "e" / "x20" / "h5_files" / "a.h5"
    make_clam_h5(path, n_patches=100)
    plan = store.plan(tmp_path / "e")
    with h5py.File(path, "a") as file:
        for name in ("features", "coords"):
            file[name].resize(150, axis=0)
            file[name][100:] = 1
    with pytest.raises(UnreadableFileError, match=r"a\.h5.*\(150, 8\).*still being written.*again"):
        store.ingest(tmp_path / "e", plan=plan)
    path.unlink()
    with pytest.raises(UnreadableFileError, match=r"a\.h5: cannot be read any more"):
        store.ingest(tmp_path / "e", plan=plan)
    assert bags(store) == set()


def test_flipped_bytes_end_in_rows_or_in_a_source_error(tmp_path: Path) -> None:
    """Fuzzing: a damaged file may still be readable, but nothing other than SourceError may come of it."""
    path = tmp_path / "e" / "x20" / "a.h5"
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(5)
    for compression in (None, "gzip"):
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=FEATURES, chunks=(8, 8), maxshape=(None, 8), compression=compression)
            file.create_dataset("coords", data=COORDS, chunks=(1, 2))
        whole = path.read_bytes()
        refused = 0
        for _ in range(150):
            broken = np.frombuffer(whole, np.uint8).copy()
            broken[rng.integers(len(broken), size=3)] = rng.integers(0, 256, 3)
            path.write_bytes(broken.tobytes())
            refused += len(cfstore.plan_ingest(tmp_path / "e", IngestOptions()).problems)
        assert refused > 20
