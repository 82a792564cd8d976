"""Bags in blocks: the rows that h5py and torch see, in little memory, whatever the file looks like inside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cfstore.parsers import BagSource, open_bag, read_bag, read_head

Make = Callable[..., Any]
RNG = np.random.default_rng(3)
ROWS = RNG.normal(size=(301, 24)).astype(np.float32)
COORDS = RNG.integers(0, 90_000, (301, 2)).astype(np.int32)


def source(path: Path) -> BagSource:
    return BagSource(path, path.stem, 20, "e")


def joined(path: Path, max_bytes: int) -> NDArray[Any]:
    """The rows of all blocks; every block is one row, or within the limit."""
    with open_bag(source(path)) as bag:
        copies = [block.copy() for block in bag.blocks(max_bytes)]
    assert all(len(block) == 1 or block.nbytes <= max_bytes for block in copies)
    return np.concatenate(copies)


def grown(file: h5py.File, rows: NDArray[Any], coords: NDArray[Any], step: int) -> None:
    """As CLAM writes: both datasets resized and appended to in turn."""
    for start in range(0, len(rows), step):
        for name, values in (("features", rows), ("coords", coords)):
            part = values[start : start + step]
            if name not in file:
                file.create_dataset(name, data=part, chunks=(32, values.shape[1]), maxshape=(None, values.shape[1]))
            else:
                file[name].resize(start + len(part), axis=0)
                file[name][start:] = part


def shuffled(file: h5py.File) -> None:
    """Chunks written last to first lie last to first."""
    rows = file.create_dataset("features", ROWS.shape, "f4", chunks=(16, 24))
    for start in reversed(range(0, 301, 16)):
        rows[start : start + 16] = ROWS[start : start + 16]
    file["coords"] = COORDS


def plain(**options: Any) -> Callable[[h5py.File], None]:
    def write(file: h5py.File) -> None:
        file.create_dataset("features", data=ROWS, **options)
        file["coords"] = COORDS

    return write


def leading_one(chunks: tuple[int, ...] | None) -> Callable[[h5py.File], None]:
    def write(file: h5py.File) -> None:
        file.create_dataset("features", data=ROWS[None], chunks=chunks)
        file["coords"] = COORDS[None]

    return write


def linked(file: h5py.File) -> None:
    file["group/rows"], file["coords"] = ROWS, COORDS
    file["alias"] = h5py.SoftLink("/group")
    file["features"] = h5py.SoftLink("alias/rows")


FILES: dict[str, tuple[Callable[[h5py.File], None], dict[str, Any]]] = {
    "contiguous": (plain(), {}),
    "chunks of 32 rows": (plain(chunks=(32, 24)), {}),
    "chunks of one row": (plain(chunks=(1, 24), maxshape=(None, 24)), {}),
    "one chunk": (plain(chunks=(301, 24)), {}),
    "chunk larger than the data": (plain(chunks=(512, 24), maxshape=(None, 24)), {}),
    "appended in turn": (lambda file: grown(file, ROWS, COORDS, 100), {}),
    "chunks in reverse": (shuffled, {}),
    "chunks split columns": (plain(chunks=(32, 10)), {}),
    "chunks wider than rows": (plain(chunks=(32, 32), maxshape=(None, None)), {}),
    "newest format": (plain(chunks=(1, 24), maxshape=(None, 24)), {"libver": "latest"}),
    "newest format, fixed": (plain(chunks=(32, 24)), {"libver": "latest"}),
    "userblock": (plain(chunks=(32, 24)), {"userblock_size": 4096}),
    "userblock, contiguous": (plain(), {"userblock_size": 512}),
    "gzip": (plain(chunks=(32, 24), compression="gzip"), {}),
    "gzip, split columns": (plain(chunks=(77, 5), compression="gzip", shuffle=True), {}),
    "checksummed": (plain(chunks=(32, 24), fletcher32=True), {}),
    "big-endian": (plain(chunks=(32, 24), dtype=">f4"), {}),
    "[1, N, D]": (leading_one(None), {}),
    "[1, N, D] in rows": (leading_one((1, 7, 24)), {}),
    "[1, N, D] split": (leading_one((1, 7, 5)), {}),
    "soft links": (linked, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("max_bytes", [1, 1000, 8 << 20])
def test_blocks_are_the_rows_however_hdf5_laid_them_out(name: str, max_bytes: int, tmp_path: Path) -> None:
    write, options = FILES[name]
    with h5py.File(tmp_path / "a.h5", "w", **options) as file:
        write(file)
    rows = joined(tmp_path / "a.h5", max_bytes)
    np.testing.assert_array_equal(rows, ROWS)
    assert rows.dtype == np.float32
    assert rows.dtype.isnative
    with open_bag(source(tmp_path / "a.h5")) as bag:
        assert (bag.head.n_patches, bag.head.dim, bag.head.dtype) == (301, 24, "float32")
        np.testing.assert_array_equal(bag.coords(), COORDS)
    whole = read_bag(source(tmp_path / "a.h5"))
    np.testing.assert_array_equal(whole.features, ROWS)
    np.testing.assert_array_equal(whole.coords, COORDS)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f2", ">f8"])
def test_blocks_keep_the_files_precision(dtype: str, tmp_path: Path) -> None:
    rows = RNG.normal(size=(50, 6)).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=rows, chunks=(1, 6))
    found = joined(tmp_path / "a.h5", 100)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found, rows)


def test_a_dataset_that_lies_in_its_header_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_layout(h5py.h5d.COMPACT)
        space, kind = h5py.h5s.create_simple((4, 24)), h5py.h5t.py_create(np.dtype("f4"))
        h5py.h5d.create(file.id, b"features", kind, space, created).write(h5py.h5s.ALL, h5py.h5s.ALL, ROWS[:4].copy())
    np.testing.assert_array_equal(joined(tmp_path / "a.h5", 100), ROWS[:4])


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_blocks_can_be_had_again_and_in_turns(compression: str | None, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=ROWS, chunks=(32, 24), compression=compression)
    with open_bag(source(tmp_path / "a.h5")) as bag:
        pairs = [(a.copy(), b.copy()) for a, b in zip(bag.blocks(1000), bag.blocks(1000), strict=True)]
        assert sum(map(len, bag.blocks())) == 301
    for side in (0, 1):
        np.testing.assert_array_equal(np.concatenate([pair[side] for pair in pairs]), ROWS)


def test_an_error_of_the_caller_is_not_called_damage(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "a.h5")
    with pytest.raises(KeyError, match="mine"), open_bag(source(tmp_path / "a.h5")):
        raise KeyError("mine")


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_closed_bag_gives_no_rows(compression: str | None, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=ROWS, chunks=(32, 24), compression=compression)
    with open_bag(source(tmp_path / "a.h5")) as bag:
        pass
    with pytest.raises(ValueError, match="closed"):
        next(bag.blocks())


def test_a_file_that_is_replaced_meanwhile_is_read_as_it_was(tmp_path: Path, make_clam_h5: Make) -> None:
    rows, coords = make_clam_h5(tmp_path / "a.h5", n_patches=100)
    make_clam_h5(tmp_path / "b.h5", n_patches=100)
    with open_bag(source(tmp_path / "a.h5")) as bag:
        (tmp_path / "b.h5").replace(tmp_path / "a.h5")
        np.testing.assert_array_equal(np.concatenate(list(bag.blocks())), rows)
        np.testing.assert_array_equal(bag.coords(), coords)


@pytest.mark.parametrize(
    ("dtype", "legacy"),
    [(d, old) for d in ("float16", "float32", "float64", "bfloat16") for old in (False, True)]
    + [("float8_e4m3fn", False)],  # torch itself cannot read its float8 from a legacy file
)
def test_pt_blocks_are_the_tensors_rows(dtype: str, legacy: bool, tmp_path: Path) -> None:
    tensor = torch.from_numpy(ROWS).to(getattr(torch, dtype))
    content = {"features": tensor, "coords": torch.from_numpy(COORDS)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    found = joined(tmp_path / "a.pt", 1000)
    assert found.dtype == (dtype if dtype in ("float16", "float32", "float64") else "float32")
    np.testing.assert_array_equal(found, tensor.double().numpy())
    with open_bag(source(tmp_path / "a.pt")) as bag:
        assert bag.head.dtype == dtype
        np.testing.assert_array_equal(bag.coords(), COORDS)


def test_a_transposed_or_sliced_tensor_is_read_as_it_looked(tmp_path: Path) -> None:
    for tensor in (torch.from_numpy(ROWS.T.copy()).T, torch.from_numpy(ROWS)[7:200, 3:], torch.from_numpy(ROWS)[None]):
        torch.save(tensor, tmp_path / "a.pt")
        np.testing.assert_array_equal(joined(tmp_path / "a.pt", 1000), tensor.numpy().reshape(-1, tensor.shape[-1]))


@pytest.mark.parametrize("kind", ["clam", "trident", "gzip"])
def test_a_large_bag_needs_the_memory_of_a_block(kind: str, tmp_path: Path) -> None:
    chunks = {"clam": (32, 1536), "trident": (1, 1536), "gzip": (32, 1536)}[kind]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        compression = "gzip" if kind == "gzip" else None
        rows = file.create_dataset("features", (40_000, 1536), "f4", chunks=chunks, compression=compression)
        for start in range(0, 40_000, 4000):
            rows[start : start + 4000] = np.float32(start)  # 246 MB
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom cfstore.parsers import BagSource, open_bag\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = used()\n"
        "with open_bag(BagSource(Path(sys.argv[1]), 'a', 20, 'e')) as bag:\n"
        "    n_rows = sum(len(block) for block in bag.blocks())\n"
        "print(n_rows, (used() - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.h5")], capture_output=True, text=True)
    n_rows, megabytes = map(int, done.stdout.split())
    assert n_rows == 40_000
    assert megabytes < 60


def test_blocks_of_real_files_are_what_h5py_reads(shared: Path) -> None:
    paths = sorted(path for path in (shared / "h5").rglob("*.h5") if "patches" not in path.parent.name)
    assert len(paths) == 12
    for path in paths:
        with h5py.File(path) as file:
            features, coords = file["features"][()], file["coords"][()]
        np.testing.assert_array_equal(joined(path, 4000), features)
        with open_bag(source(path)) as bag:
            np.testing.assert_array_equal(bag.coords(), coords)
            assert bag.head == read_head(source(path))
