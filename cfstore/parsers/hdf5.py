"""HDF5 feature files: CLAM, TRIDENT, and plain `features` + `coords`.

CLAM writes float32 [N, D] and int32 coords without attributes; TRIDENT float16 or float32 with
attributes on both datasets; UNI2-h's published files have a leading 1.

HDF5 is asked where the rows lie. Plain rows are then read without it (`row_runs`); compressed,
big-endian or oddly chunked ones by it. Nothing outside the file is ever followed.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from cfstore.errors import MissingDatasetError, SourceError, UnreadableFileError
from cfstore.parsers.chunk_tree import Index, read_chunk_tree
from cfstore.parsers.row_runs import RowRuns
from cfstore.parsers.sources import (
    BagHead,
    FillRows,
    OpenBag,
    bag_shape,
    check_coords_dtype,
    check_coords_shape,
    check_float,
    check_regular,
    level0_coords,
    listed,
)

_ATTRIBUTES: Final = ("mpp", "level0_magnification", "target_magnification", "patch_size", "patch_size_level0")
_BAND_BYTES: Final = 8 << 20
# Compressed data may unpack to a thousand times its size: what is unpacked at once has to have a limit.
_MOST_UNPACKED: Final = 1 << 30
_MOST_PATCHES: Final = 1 << 24
_MOST_HOPS: Final = 8
_MANY_CHUNKS: Final = 64


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """A damaged file shows as whatever h5py makes of it: say which file it is."""
    try:
        yield
    except (SourceError, MemoryError):
        raise
    except Exception as error:
        found = " ".join(str(error).split())
        message = f"{path}: cannot be read as HDF5 ({found}); the file is damaged: extract it again"
        raise UnreadableFileError(message) from error


def _open(path: Path) -> h5py.File:
    check_regular(path)
    try:
        return h5py.File(path, "r")
    except (OSError, RuntimeError) as error:
        found = "empty file" if path.stat().st_size == 0 else " ".join(str(error).split())
        message = f"{path}: cannot be opened as HDF5 ({found}); it is truncated or of another format: extract it again"
        raise UnreadableFileError(message) from error


def _find(path: Path, name: str, group: h5py.Group, at: str, hops: int = _MOST_HOPS) -> h5py.Dataset | None:
    """What lies `at` below `group`, to be `name`; UnreadableFileError where links lead out of this file."""
    node = group
    for part in (part for part in at.split("/") if part not in ("", ".")):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            message = f"{path}: {name!r} is a link into another file ({listed([link.filename])}); copy the rows here"
            raise UnreadableFileError(message)
        if isinstance(link, h5py.SoftLink):
            base = node.file if link.path.startswith("/") else node
            node = _find(path, name, base, link.path, hops - 1) if hops else None
        else:
            node = node[part] if link is not None else None
    return node if isinstance(node, (h5py.Dataset, h5py.Group)) else None


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset | None:
    """The dataset `name`, if there is one and its rows are in this very file."""
    dataset = _find(path, name, file, name)
    if not isinstance(dataset, h5py.Dataset):
        return None
    created = dataset.id.get_create_plist()
    if created.get_layout() == h5py.h5d.VIRTUAL or created.get_external_count():  # before its shape: that opens files
        message = f"{path}: the rows of {name!r} lie in other files; copy them into one file"
        raise UnreadableFileError(message)
    return dataset


def _is_filtered(dataset: h5py.Dataset) -> bool:
    return bool(dataset.id.get_create_plist().get_nfilters())


def _n_chunks(dataset: h5py.Dataset) -> int:
    return math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))


def _check_whole(path: Path, name: str, dataset: h5py.Dataset) -> None:
    """Raise UnreadableFileError where rows were declared but never written, or unpack beyond measure."""
    declared = int(dataset.size) * dataset.dtype.itemsize
    held = min(dataset.id.get_storage_size(), path.stat().st_size)
    filtered = _is_filtered(dataset)
    whole = filtered or held >= declared  # compressed: bytes say nothing
    if whole and dataset.chunks:
        whole = dataset.id.get_num_chunks() >= _n_chunks(dataset)
    if not whole:
        message = (
            f"{path}: {name!r} declares {declared:,} bytes but holds {held:,}; "
            "writing it was cut short: extract it again"
        )
        raise UnreadableFileError(message)
    if filtered and (unpacked := _band_rows(dataset, 1) * _row_bytes(dataset)) > _MOST_UNPACKED:
        message = f"{path}: {name!r} unpacks {unpacked:,} bytes at once; write it in smaller chunks"
        raise UnreadableFileError(message)


def _features(path: Path, file: h5py.File) -> h5py.Dataset:
    dataset = _dataset(path, file, "features")
    if dataset is None:
        hint = "; 'feats' is STAMP's layout, which is not read yet" if "feats" in list(file) else ""
        message = f"{path}: no 'features' dataset (found: {listed(file)}){hint}; extract the slide again"
        raise MissingDatasetError(message)
    bag_shape(path, (0,) if dataset.shape is None else dataset.shape)  # an HDF5 null dataspace has no shape
    check_float(path, dataset.dtype.name)
    _check_whole(path, "features", dataset)
    return dataset


def _coords(path: Path, file: h5py.File, n_patches: int) -> h5py.Dataset | None:
    dataset = _dataset(path, file, "coords")
    if dataset is None:
        return None
    check_coords_shape(path, dataset.shape or (), n_patches)
    _check_whole(path, "coords", dataset)
    if n_patches > _MOST_PATCHES and _is_filtered(dataset):
        message = f"{path}: 'coords' unpacks to {n_patches:,} patches, more than a slide has; extract the slide again"
        raise UnreadableFileError(message)
    return dataset


def _attributes(*holders: h5py.Dataset | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for holder in filter(None, holders):
        for name in _ATTRIBUTES:
            if name not in found and name in holder.attrs and _is_number(holder.attrs.get_id(name)):
                found[name] = float(holder.attrs[name])
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _is_number(attribute: h5py.h5a.AttrID) -> bool:
    return bool(attribute.get_space().get_simple_extent_type() == h5py.h5s.SCALAR and attribute.dtype.kind in "biuf")


def _described(path: Path, file: h5py.File) -> tuple[BagHead, h5py.Dataset, h5py.Dataset | None]:
    """(head, features, coords), declared well and all there."""
    features = _features(path, file)
    n_patches, dim = bag_shape(path, features.shape)
    coords = _coords(path, file, n_patches)
    return BagHead(n_patches, dim, features.dtype.name, _attributes(coords, features)), features, coords


def head(path: Path) -> BagHead:
    """Declared shape, dtype and attributes; reads no rows."""
    with _damage_named(path), _open(path) as file:
        return _described(path, file)[0]


@contextmanager
def open_bag(path: Path) -> Iterator[OpenBag]:
    """The file's bag; HDF5 itself keeps the file open only where it has to read the rows."""
    with ExitStack() as stack:
        with _damage_named(path):
            bag = _open_bag(path, stack)
        yield bag


def _open_bag(path: Path, stack: ExitStack) -> OpenBag:
    file = stack.enter_context(_open(path))
    described, features, coords = _described(path, file)
    n_patches = described.n_patches
    dtype = features.dtype.newbyteorder("=")
    tables = [features] if coords is None else [features, coords]
    runs = [_runs(path, file, table) for table in tables]
    fills = [_fill_by_hdf5(path, table) for table in tables]
    if any(runs):
        # The very file that HDF5 looked at, even if another one has taken its name since.
        raw = stack.enter_context(os.fdopen(os.dup(file.id.get_vfd_handle()), "rb", buffering=0))
        fills = [_fill_by_address(path, raw, run) if run else fill for run, fill in zip(runs, fills, strict=True)]
    coords_dtype = None if coords is None else coords.dtype.newbyteorder("=")
    if all(runs):
        file.close()

    def read_coords() -> NDArray[np.int32] | None:
        if coords_dtype is None:
            return None
        check_coords_dtype(path, coords_dtype)
        places = np.empty((n_patches, 2), coords_dtype)
        fills[1](0, places)
        return level0_coords(path, places, n_patches)

    return OpenBag(described, dtype, fills[0], read_coords)


# --- rows without HDF5 ----------------------------------------------------------------------


def _fill_by_address(path: Path, raw: BinaryIO, runs: RowRuns) -> FillRows:
    def fill(start: int, out: NDArray[Any]) -> None:
        runs.read(path, raw, start, out)

    return fill


def _row_bytes(dataset: h5py.Dataset) -> int:
    return int(dataset.shape[-1]) * int(dataset.dtype.itemsize)


def _runs(path: Path, file: h5py.File, dataset: h5py.Dataset) -> RowRuns | None:
    """Where the rows lie, if they lie there as NumPy would have them; UnreadableFileError if that is past the end."""
    n_rows, row_bytes = dataset.shape[-2], _row_bytes(dataset)
    size = os.fstat(file.id.get_vfd_handle()).st_size if file.driver == "sec2" else 0
    plain = size and file.userblock_size == 0 and not _is_filtered(dataset) and _is_native(dataset)
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        if not plain or offset is None:
            return None
        _check_inside(path, offset + n_rows * row_bytes, size)
        return RowRuns(np.zeros(1, np.int64), np.array([offset], np.int64), n_rows, row_bytes)
    address, end, in_order = _chunks(file, dataset)
    if size and file.userblock_size == 0:
        _check_inside(path, end, size)
    whole_rows = dataset.chunks[-1] == dataset.shape[-1] and set(dataset.chunks[:-2]) <= {1}
    if not (plain and whole_rows and in_order):
        return None
    return RowRuns.of_chunks(address, dataset.chunks[-2], n_rows, row_bytes)


def _chunks(file: h5py.File, dataset: h5py.Dataset) -> tuple[NDArray[np.int64], int, bool]:
    """(addresses, where the last of them ends, whether they are plain chunks of consecutive rows)."""
    first, address, size = _chunk_index(file, dataset)
    if not len(address):
        return np.empty(0, np.int64), 0, False
    row = first[:, -2].astype(np.int64)
    end = int(address.max()) + int(size.max())  # as int: it cannot overflow
    order = np.argsort(row, kind="stable")
    expected = np.arange(_n_chunks(dataset), dtype=np.int64) * dataset.chunks[-2]
    whole = bool((size == math.prod(dataset.chunks) * dataset.dtype.itemsize).all())
    if not whole:  # compressed: the largest chunk need not be the last
        end = max(map(operator.add, address.tolist(), size.tolist()))
    return address.astype(np.int64)[order], end, whole and np.array_equal(row[order], expected)


def _chunk_index(file: h5py.File, dataset: h5py.Dataset) -> Index:
    """Where every chunk lies: read from the file where its format is plain and HDF5 agrees, else asked of HDF5."""
    rank, n_chunks = len(dataset.shape), _n_chunks(dataset)
    if n_chunks >= _MANY_CHUNKS and file.driver == "sec2" and file.userblock_size == 0:
        index = read_chunk_tree(file.id.get_vfd_handle(), h5py.h5o.get_info(dataset.id).addr, rank, n_chunks)
        if index is not None and len(index[1]) == n_chunks and _agrees(dataset, index):
            return index
    found: list[Any] = []
    dataset.id.chunk_iter(found.append)
    offsets, _, addresses, sizes = zip(*found, strict=True) if found else ((), (), (), ())
    first = np.array(offsets, np.uint64).reshape(len(found), rank)
    return first, np.array(addresses, np.uint64), np.array(sizes, np.uint64)


def _agrees(dataset: h5py.Dataset, index: Index) -> bool:
    """HDF5 says the same of the first chunk, the last, and one between."""
    first, address, size = index
    return all(
        (address[at], size[at]) == (chunk.byte_offset, chunk.size)
        for at in (0, len(address) // 2, len(address) - 1)
        for chunk in [dataset.id.get_chunk_info_by_coord(tuple(first[at].tolist()))]
    )


def _is_native(dataset: h5py.Dataset) -> bool:
    """Its bytes are what NumPy would have in memory."""
    dtype = dataset.dtype
    return dtype.kind in "iuf" and dtype.isnative and bool(dataset.id.get_type().equal(h5py.h5t.py_create(dtype)))


def _check_inside(path: Path, end: int, size: int) -> None:
    if end > size:
        message = f"{path}: its rows reach to byte {end:,} of {size:,}; the file is truncated: extract it again"
        raise UnreadableFileError(message)


# --- rows by HDF5 ---------------------------------------------------------------------------


def _band_rows(dataset: h5py.Dataset, max_bytes: int = _BAND_BYTES) -> int:
    """Rows that are unpacked together: as many whole chunks as fit `max_bytes`, at least one."""
    chunk_rows = dataset.chunks[-2] if dataset.chunks else 1
    return int(chunk_rows * max(1, max_bytes // (chunk_rows * max(1, _row_bytes(dataset)))))


def _fill_by_hdf5(path: Path, dataset: h5py.Dataset) -> FillRows:
    band_rows = _band_rows(dataset)
    leading = (0,) * (len(dataset.shape) - 2)
    last: tuple[int, NDArray[Any]] = (-1, np.empty(0))  # the band read last: blocks need not end where bands do

    def band(index: int) -> NDArray[Any]:
        nonlocal last
        number, rows = last
        if number != index:
            if not dataset:
                message = f"{path}: the bag is closed; read it inside its `with open_bag(...)`"
                raise ValueError(message)
            with _damage_named(path):
                rows = dataset[(*leading, slice(index * band_rows, (index + 1) * band_rows))]
            last = (index, rows)
        return rows

    def fill(start: int, out: NDArray[Any]) -> None:
        done = 0
        while done < len(out):
            index, skipped = divmod(start + done, band_rows)
            rows = band(index)[skipped : skipped + len(out) - done]
            out[done : done + len(rows)] = rows
            done += len(rows)

    return fill
