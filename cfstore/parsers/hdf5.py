"""HDF5 feature files: CLAM, TRIDENT, and plain `features` + `coords`.

CLAM writes float32 [N, D] and int32 coords without attributes; TRIDENT float16 or float32 with
attributes on both datasets; UNI2-h's published files have a leading 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from cfstore.errors import MissingDatasetError, UnreadableFileError
from cfstore.parsers.sources import BagHead, RawBag, bag_shape, check_float, level0_coords

_ATTRIBUTES = ("mpp", "level0_magnification", "target_magnification", "patch_size", "patch_size_level0")


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError) as error:
        found = "empty file" if path.is_file() and path.stat().st_size == 0 else str(error)
        message = f"{path}: cannot be opened as HDF5 ({found}); it is truncated or of another format: extract it again"
        raise UnreadableFileError(message) from error
    with file:
        yield file


def _features(path: Path, file: h5py.File) -> h5py.Dataset:
    dataset = file.get("features")
    if not isinstance(dataset, h5py.Dataset):
        hint = "; 'feats' is STAMP's layout, which is not read yet" if "feats" in file else ""
        message = f"{path}: no 'features' dataset (found: {', '.join(sorted(file)) or 'nothing'}){hint}"
        raise MissingDatasetError(message)
    declared = dataset.size * dataset.dtype.itemsize
    held = dataset.id.get_storage_size()
    if dataset.id.get_create_plist().get_nfilters() == 0 and held < declared:
        message = (
            f"{path}: 'features' declares {declared:,} bytes but holds {held:,}; "
            "writing it was cut short: extract it again"
        )
        raise UnreadableFileError(message)
    return dataset


def _attributes(file: h5py.File) -> dict[str, float]:
    found: dict[str, float] = {}
    for holder in (file.get("coords"), file.get("features")):
        if isinstance(holder, h5py.Dataset):
            for name in _ATTRIBUTES:
                value = holder.attrs.get(name)
                if name not in found and isinstance(value, (int, float, np.integer, np.floating)):
                    found[name] = float(value)
    return found


def head(path: Path) -> BagHead:
    """Declared shape, dtype and attributes; reads no rows."""
    with _open(path) as file:
        dataset = _features(path, file)
        n_patches, dim = bag_shape(path, dataset.shape)
        dtype = str(dataset.dtype)
        check_float(path, dtype)
        coords = file.get("coords")
        if isinstance(coords, h5py.Dataset) and coords.size != 2 * n_patches:
            level0_coords(path, np.empty(coords.shape, dtype=np.int8), n_patches)
        return BagHead(n_patches, dim, dtype, _attributes(file))


def read(path: Path) -> RawBag:
    """All rows of the file's bag."""
    with _open(path) as file:
        dataset = _features(path, file)
        n_patches, dim = bag_shape(path, dataset.shape)
        check_float(path, str(dataset.dtype))
        try:
            features = dataset[()].reshape(n_patches, dim)
            coords = file.get("coords")
            raw = coords[()] if isinstance(coords, h5py.Dataset) else None
        except OSError as error:
            message = f"{path}: rows cannot be read ({error}); the file is damaged: extract it again"
            raise UnreadableFileError(message) from error
        return RawBag(features, None if raw is None else level0_coords(path, raw, n_patches))
