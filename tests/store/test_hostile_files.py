"""Files made to harm: refused by name, without running code, filling memory, waiting, or reading other files."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from cfstore.errors import EmptyBagError, MissingDatasetError, ShapeError, SourceError, UnreadableFileError
from cfstore.parsers import BagSource, discover, open_bag, read_head

Make = Callable[..., Any]
ROWS = np.random.default_rng(2).normal(size=(300, 16)).astype(np.float32)
COORDS = np.arange(600, dtype=np.int32).reshape(300, 2)


def source(path: Path) -> BagSource:
    return BagSource(path, "a", 20, "e")


def read_all(path: Path) -> np.ndarray[Any, Any]:
    with open_bag(source(path)) as bag:
        bag.coords()
        return np.concatenate([block.copy() for block in bag.blocks(4096)])


def read_with_little_memory(path: Path, spare: int = 300 << 20) -> str:
    """The error of reading `path` in a process that may take `spare` bytes more than it has after its imports."""
    code = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom cfstore.errors import SourceError\n"
        "from cfstore.parsers import BagSource, open_bag, read_head\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "for use in (lambda s: read_head(s), lambda s: open_bag(s).__enter__().coords()):\n"
        "    try:\n        use(BagSource(Path(sys.argv[1]), 'a', 20, 'e'))\n"
        "    except SourceError as error:\n        print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(spare)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- HDF5 that points elsewhere ---------------------------------------------------------------


def external_link(file: h5py.File, other: Path) -> None:
    file["features"] = h5py.ExternalLink(str(other), "features")


def soft_link_through_an_external_one(file: h5py.File, other: Path) -> None:
    file["other"] = h5py.ExternalLink(str(other), "/")
    file["features"] = h5py.SoftLink("/other/features")


def external_storage(file: h5py.File, other: Path) -> None:
    file.create_dataset("features", (4, 16), "f4", external=[(str(other), 0, 256)])


def virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout((300, 16), "f4")
    layout[:] = h5py.VirtualSource(str(other), "features", (300, 16))
    file.create_virtual_dataset("features", layout)


@pytest.mark.parametrize("name", ["features", "coords"])
@pytest.mark.parametrize("point", [external_link, soft_link_through_an_external_one, external_storage, virtual])
def test_rows_of_another_file_are_refused(point: Callable[..., None], name: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["features"] = ROWS
    with h5py.File(tmp_path / "a.h5", "w") as file:
        point(file, tmp_path / "secret.h5")
        if name == "coords":
            file.move("features", "coords")
            file["features"] = ROWS[:4]
    for use in (read_all, lambda path: read_head(source(path))):
        with pytest.raises(UnreadableFileError, match=rf"a\.h5.*'{name}'.*copy"):
            use(tmp_path / "a.h5")


def test_a_link_to_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(tmp_path / "pipe"), "/features")
    assert "link into another file" in read_with_little_memory(tmp_path / "a.h5")


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/features")
    with pytest.raises(MissingDatasetError, match=r"a\.h5.*no 'features'"):
        read_all(tmp_path / "a.h5")


# --- HDF5 that claims what it does not hold ----------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (32, 1024)}, {"chunks": (1, 1024)}, {"chunks": (32, 1024), "compression": "gzip"}],
    ids=["contiguous", "chunked", "rows", "gzip"],
)
def test_a_huge_shape_without_data_is_refused_in_little_memory(options: dict[str, Any], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (10**12, 1024), "f4", **options)
    found = read_with_little_memory(tmp_path / "a.h5")
    assert found.count("declares 4,096,000,000,000,000 bytes but holds 0") == 2


def test_a_chunk_that_unpacks_to_gigabytes_is_refused_in_little_memory(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        rows = file.create_dataset("features", (2**19, 1024), "f4", chunks=(2**19, 1024), compression="gzip")
        rows.id.write_direct_chunk((0, 0), b"x" * 1000)
    assert (tmp_path / "a.h5").stat().st_size < 100_000
    assert read_with_little_memory(tmp_path / "a.h5").count("smaller chunks") == 2


def test_coords_that_unpack_to_gigabytes_are_refused_in_little_memory(tmp_path: Path) -> None:
    n_rows = 2**26
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, columns, kind in (("features", 1, "f4"), ("coords", 2, "i8")):
            rows = file.create_dataset(name, (n_rows, columns), kind, chunks=(2**22, columns), compression="gzip")
            for start in range(0, n_rows, 2**22):
                rows.id.write_direct_chunk((start, 0), b"x" * 100)
    assert read_with_little_memory(tmp_path / "a.h5").count("more than a slide has") == 2


@pytest.mark.parametrize("chunks", [None, (1, 16), (32, 16)], ids=["contiguous", "rows", "chunked"])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_file_cut_anywhere_is_refused_or_read_truly(chunks: Any, libver: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset("features", data=ROWS, chunks=chunks)
        file.create_dataset("coords", data=COORDS, chunks=chunks and (chunks[0], 2))
    whole = path.read_bytes()
    cuts = sorted({*range(0, len(whole), len(whole) // 60), len(whole) - 1, len(whole) - 2000})
    refused = 0
    for cut in cuts:
        path.write_bytes(whole[:cut])
        try:
            np.testing.assert_array_equal(read_all(path), ROWS)
        except SourceError as error:
            refused += str(path) in str(error)
    assert refused == len(cuts)  # none of these tails is spare


@pytest.mark.parametrize("chunks", [None, (32, 16)], ids=["contiguous", "chunked"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_an_index_past_the_end_of_a_file_that_denies_being_cut_is_refused(
    chunks: Any, compression: str | None, tmp_path: Path
) -> None:
    """HDF5 itself reads zeros there, once the size in the file's superblock is made to agree."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=ROWS, chunks=chunks or bool(compression) or None, compression=compression)
    whole = bytearray(path.read_bytes())
    whole[40:48] = struct.pack("<Q", len(whole) - 500)  # superblock version 0: end of file address
    path.write_bytes(whole[:-500])
    with pytest.raises(UnreadableFileError, match=r"a\.h5.*extract it again"):
        read_all(path)


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = ROWS
    with open_bag(source(tmp_path / "a.h5")) as bag:
        os.truncate(tmp_path / "a.h5", 5000)
        with pytest.raises(UnreadableFileError, match=r"a\.h5.*cut while it was read"):
            list(bag.blocks())


def compound(file: h5py.File) -> None:
    file["features"] = np.zeros((3, 4), [("x", "f4"), ("y", "f4")])


def text(file: h5py.File) -> None:
    file.create_dataset("features", (3, 4), h5py.string_dtype())
    file["features"][:] = "1.0"


def references(file: h5py.File) -> None:
    file.create_dataset("features", (3, 4), h5py.ref_dtype)
    file["features"][:] = file.ref


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (compound, ShapeError),
        (text, ShapeError),
        (references, ShapeError),
        (lambda file: file.create_group("features"), MissingDatasetError),
        (lambda file: file.create_dataset("features", (0, 16), "f4", maxshape=(None, 16)), EmptyBagError),
        (lambda file: file.create_dataset("features", (16, 0), "f4", maxshape=(16, None)), EmptyBagError),
    ],
    ids=["compound", "text", "references", "group", "no rows", "no columns"],
)
def test_features_that_are_no_table_of_floats_are_refused(
    write: Callable[..., Any], error: type[SourceError], tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(file)
    with pytest.raises(error, match=r"a\.h5"):
        read_all(tmp_path / "a.h5")


# --- .pt ---------------------------------------------------------------------------------------


class Runs:
    """Unpickling it would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "a.pt", tmp_path / "it-ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Runs(marker)))
    else:
        torch.save([torch.ones(3, 4), Runs(marker)], path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(UnreadableFileError, match=r"a\.pt.*run code"):
        read_all(path)
    assert not marker.exists()


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """The zip file of torch.save with its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, change(name, content))


def rebuilt(path: Path, numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
    """A .pt of 64 floats whose pickle says that the storage has `numel`, and the tensor this shape and stride."""

    class Claim:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Stored(), offset, shape, stride, False, OrderedDict())

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(thing, Stored) else None

    torch.save(torch.arange(64.0), path)
    with (path.parent / "claim.pkl").open("wb") as file:
        Pickler(file, protocol=2).dump(Claim())
    claim = (path.parent / "claim.pkl").read_bytes()
    rewritten(path, lambda name, content: claim if name.endswith("data.pkl") else content)


def test_the_forged_pt_is_read_where_it_tells_the_truth(tmp_path: Path) -> None:
    rebuilt(tmp_path / "a.pt", 64, (8, 8), (8, 1))
    np.testing.assert_array_equal(read_all(tmp_path / "a.pt"), np.arange(64.0).reshape(8, 8))


@pytest.mark.parametrize(
    "claim",
    [
        (10**12, (10**9, 1000), (1000, 1)),
        (80, (10, 8), (8, 1)),
        (64, (10, 8), (8, 1)),
        (64, (8, 8), (8, 1), 10),
        (64, (8, 8), (-8, 1), 56),
        (64, (10**9, 8), (0, 1)),
        (64, (8, 8), (8, 1), -4),
    ],
    ids=[
        "huge storage",
        "storage beyond its record",
        "view beyond the storage",
        "offset beyond",
        "negative stride",
        "repeated row",
        "negative offset",
    ],
)
def test_a_tensor_that_claims_more_than_its_storage_is_refused(claim: tuple[Any, ...], tmp_path: Path) -> None:
    rebuilt(tmp_path / "a.pt", *claim)
    found = read_with_little_memory(tmp_path / "a.pt")
    assert found.count(str(tmp_path / "a.pt")) == 2
    assert len(found.splitlines()) == 2


def test_a_truncated_storage_is_refused(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(ROWS), tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda name, content: content[:100] if "/data/" in name else content)
    with pytest.raises(UnreadableFileError, match=r"a\.pt"):
        read_all(tmp_path / "a.pt")


@pytest.mark.parametrize("bomb", ["data.pkl", "data/0"])
def test_a_zip_bomb_is_not_unpacked(bomb: str, tmp_path: Path) -> None:
    torch.save(torch.from_numpy(ROWS), tmp_path / "a.pt")
    zeros = bytes(1 << 29)
    rewritten(tmp_path / "a.pt", lambda name, content: zeros if name.endswith(bomb) else content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 1 << 20
    assert read_with_little_memory(tmp_path / "a.pt").count("records are compressed") == 2


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11, of the tensor made here
def test_a_sparse_tensor_that_unfolds_to_terabytes_is_refused(tmp_path: Path) -> None:
    places = torch.empty(2, 0, dtype=torch.int64)
    empty = torch.sparse_coo_tensor(places, torch.empty(0), (10**9, 1024), check_invariants=True)
    torch.save(empty, tmp_path / "a.pt")
    assert read_with_little_memory(tmp_path / "a.pt").count(str(tmp_path / "a.pt")) == 2


def test_lists_that_hold_each_other_are_not_unfolded(tmp_path: Path) -> None:
    nested: list[Any] = [0] * 10
    for _ in range(11):
        nested = [nested] * 10  # 10^12 numbers in 300 bytes of pickle
    torch.save({"features": torch.ones(10, 8), "coords": nested}, tmp_path / "a.pt")
    assert read_with_little_memory(tmp_path / "a.pt").count("'coords' is no table of numbers") == 1


# --- names that are no files -------------------------------------------------------------------


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def circular(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("suffix", [".h5", ".pt"])
@pytest.mark.parametrize("make", [dangling, circular, device, os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_refused_without_waiting(make: Callable[[Path], Any], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    make(path)
    for use in (read_all, lambda path: read_head(source(path))):
        with pytest.raises(UnreadableFileError, match=rf"a\{suffix}.*(mend the link|move it out)"):
            use(path)


def test_a_link_to_a_file_is_read(tmp_path: Path, make_clam_h5: Make) -> None:
    rows, _ = make_clam_h5(tmp_path / "elsewhere" / "b.h5")
    (tmp_path / "a.h5").symlink_to(tmp_path / "elsewhere" / "b.h5")
    np.testing.assert_array_equal(read_all(tmp_path / "a.h5"), rows)


def test_discover_names_what_is_no_file_and_does_not_wait(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "good.h5")
    with h5py.File(tmp_path / "good.h5", "a") as file:
        file["coords"].attrs["target_magnification"] = 20
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "linked.h5").symlink_to(tmp_path / "folder.h5")
    os.mkfifo(tmp_path / "pipe.h5")
    device(tmp_path / "zero.h5")
    dangling(tmp_path / "gone.h5")
    found = discover(tmp_path)
    assert [bag.slide_id for bag in found.sources] == ["good"]
    assert {bag.slide_id for bag, _ in found.unreadable} == {"pipe", "zero", "gone"}
    assert "folder.h5: a folder, not a feature file: left out" in found.notes
    assert "linked.h5: a folder, not a feature file: left out" in found.notes
