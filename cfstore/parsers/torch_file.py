"""`.pt` feature files: a bare [N, D] tensor (CLAM, HistGen, HIPT), or a dict with `features` and `coords`.

Files are opened by torch's restricted unpickler only: a pickle that would run code is refused.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfstore.errors import MissingDatasetError, ShapeError, UnreadableFileError
from cfstore.parsers.sources import BagHead, RawBag, bag_shape, check_float, level0_coords


def _load(path: Path, *, rows: bool) -> tuple[Any, Any]:
    """(features, coords); without `rows` the file is mapped, not read, where its format allows."""
    import torch  # 1 s to import: only where .pt files are read

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on storages is not for our users
            mapped = not rows and zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises whatever its zip and pickle layers raise
        found = (str(error) or repr(error)).splitlines()[0][:120]
        message = (
            f"{path}: cannot be opened as plain tensors ({found}); "
            "it is truncated, or a pickle that would have to run code: save the bare tensor again"
        )
        raise UnreadableFileError(message) from error
    if isinstance(content, torch.Tensor):
        return content.detach().to_dense(), None
    if isinstance(content, dict) and isinstance(content.get("features"), torch.Tensor):
        return content["features"].detach().to_dense(), content.get("coords")
    found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    message = f"{path}: no tensor and no dict with 'features' in it (found: {found}); save the bare [N, D] tensor"
    raise MissingDatasetError(message)


def head(path: Path) -> BagHead:
    """Shape and dtype of the tensor."""
    features, _ = _load(path, rows=False)
    n_patches, dim = bag_shape(path, tuple(features.shape))
    dtype = str(features.dtype).removeprefix("torch.")
    check_float(path, dtype)
    return BagHead(n_patches, dim, dtype)


def read(path: Path) -> RawBag:
    """All rows; bfloat16 and float8 become float32, which holds them exactly (NumPy has neither)."""
    features, coords = _load(path, rows=True)
    n_patches, dim = bag_shape(path, tuple(features.shape))
    dtype = str(features.dtype).removeprefix("torch.")
    check_float(path, dtype)
    rows = _as_numpy(features).reshape(n_patches, dim)
    return RawBag(rows, None if coords is None else level0_coords(path, _coords(path, coords), n_patches))


def _as_numpy(tensor: Any) -> NDArray[Any]:
    known = ("float16", "float32", "float64")
    plain = not tensor.is_floating_point() or str(tensor.dtype).removeprefix("torch.") in known
    return np.asarray((tensor if plain else tensor.float()).numpy())


def _coords(path: Path, coords: Any) -> NDArray[Any]:
    if hasattr(coords, "detach"):
        return _as_numpy(coords.detach())
    try:
        return np.asarray(coords)
    except ValueError as error:
        message = f"{path}: 'coords' is no table of numbers ({error}); expected [N, 2]"
        raise ShapeError(message) from error
