"""HDF5 feature files: CLAM, TRIDENT, and plain `features` + `coords`.

CLAM writes float32 [N, D] and int32 coords without attributes; TRIDENT float16 or float32 with
attributes on both datasets; UNI2-h's published files have a leading 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from cfstore.errors import MissingDatasetError, SourceError, UnreadableFileError
from cfstore.parsers.sources import BagHead, RawBag, bag_shape, check_coords_shape, check_float, level0_coords

_ATTRIBUTES = ("mpp", "level0_magnification", "target_magnification", "patch_size", "patch_size_level0")


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError) as error:
        found = "empty file" if path.is_file() and path.stat().st_size == 0 else str(error)
        message = f"{path}: cannot be opened as HDF5 ({found}); it is truncated or of another format: extract it again"
        raise UnreadableFileError(message) from error
    try:
        with file:
            yield file
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # a damaged file shows anywhere below, as whatever h5py makes of it
        message = f"{path}: cannot be read as HDF5 ({error}); the file is damaged: extract it again"
        raise UnreadableFileError(message) from error


def _check_whole(path: Path, dataset: h5py.Dataset) -> None:
    """Raise UnreadableFileError where rows were declared but never written."""
    declared = int(dataset.size) * dataset.dtype.itemsize
    held = dataset.id.get_storage_size()
    whole = held >= declared
    if dataset.chunks and dataset.id.get_create_plist().get_nfilters():  # compressed: bytes say nothing
        expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        whole = dataset.id.get_num_chunks() >= expected
    if not whole:
        message = (
            f"{path}: {dataset.name.strip('/')!r} declares {declared:,} bytes but holds {held:,}; "
            "writing it was cut short: extract it again"
        )
        raise UnreadableFileError(message)


def _features(path: Path, file: h5py.File) -> h5py.Dataset:
    dataset = file.get("features")
    if not isinstance(dataset, h5py.Dataset):
        hint = "; 'feats' is STAMP's layout, which is not read yet" if "feats" in file else ""
        found = ", ".join(sorted(map(str, file))) or "nothing"
        message = f"{path}: no 'features' dataset (found: {found}){hint}; extract the slide again"
        raise MissingDatasetError(message)
    bag_shape(path, (0,) if dataset.shape is None else dataset.shape)  # an HDF5 null dataspace has no shape
    check_float(path, dataset.dtype.name)
    _check_whole(path, dataset)
    return dataset


def _coords(path: Path, file: h5py.File, n_patches: int) -> h5py.Dataset | None:
    dataset = file.get("coords")
    if not isinstance(dataset, h5py.Dataset):
        return None
    check_coords_shape(path, dataset.shape or (), n_patches)
    _check_whole(path, dataset)
    return dataset


def _attributes(file: h5py.File) -> dict[str, float]:
    found: dict[str, float] = {}
    for holder in (file.get("coords"), file.get("features")):
        if isinstance(holder, h5py.Dataset):
            for name in _ATTRIBUTES:
                value = holder.attrs.get(name)
                if name not in found and isinstance(value, (int, float, np.integer, np.floating)):
                    found[name] = float(value)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def head(path: Path) -> BagHead:
    """Declared shape, dtype and attributes; reads no rows."""
    with _open(path) as file:
        dataset = _features(path, file)
        n_patches, dim = bag_shape(path, dataset.shape)
        _coords(path, file, n_patches)
        return BagHead(n_patches, dim, dataset.dtype.name, _attributes(file))


def read(path: Path) -> RawBag:
    """All rows of the file's bag."""
    with _open(path) as file:
        dataset = _features(path, file)
        n_patches, dim = bag_shape(path, dataset.shape)
        coords = _coords(path, file, n_patches)
        features = dataset[()].reshape(n_patches, dim)
        return RawBag(features, None if coords is None else level0_coords(path, coords[()], n_patches))
