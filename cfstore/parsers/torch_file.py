"""`.pt` feature files: a bare [N, D] tensor (CLAM, HistGen, HIPT), or a dict with `features` and `coords`.

Files are opened by torch's restricted unpickler only: a pickle that would run code is refused.
torch.save's zip files are mapped, not read; those of torch before 1.6 are read whole.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cfstore.errors import MissingDatasetError, ShapeError, UnreadableFileError
from cfstore.parsers.sources import (
    BagHead,
    OpenBag,
    bag_shape,
    check_coords_shape,
    check_float,
    check_regular,
    level0_coords,
    listed,
)

_NUMPY_FLOATS: Final = ("float16", "float32", "float64")


def _unreadable(path: Path, error: Exception) -> UnreadableFileError:
    found = " ".join((str(error) or repr(error)).splitlines()[0].split())[:120]
    message = (
        f"{path}: cannot be opened as plain tensors ({found}); "
        "it is truncated, or a pickle that would have to run code: save the bare tensor again"
    )
    return UnreadableFileError(message)


def _record_sizes(path: Path) -> frozenset[int] | None:
    """Sizes of the storages in torch.save's zip file; None if the file is no zip.

    Raises UnreadableFileError for compressed records: torch.save writes none, and they may unpack without end.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what torch goes by
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:
        raise _unreadable(path, error) from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            message = f"{path}: its records are compressed, which torch.save never does; save the bare tensor again"
            raise UnreadableFileError(message)
    return frozenset(record.file_size for record in records)


def _load(path: Path) -> tuple[Any, Any]:
    """(features, coords): a plain tensor that lies in the file, and whatever the file calls coords."""
    check_regular(path)
    sizes = _record_sizes(path)

    import torch  # 1 s to import: only where .pt files are read

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on storages is not for our users
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=sizes is not None)
    except Exception as error:  # torch.load raises whatever its zip and pickle layers raise
        raise _unreadable(path, error) from error
    if isinstance(content, torch.Tensor):
        return _plain(path, "features", content, sizes), None
    if isinstance(content, dict) and isinstance(content.get("features"), torch.Tensor):
        coords = content.get("coords")
        if isinstance(coords, torch.Tensor):
            coords = _plain(path, "coords", coords, sizes)
        return _plain(path, "features", content["features"], sizes), coords
    found = listed(content) if isinstance(content, dict) else type(content).__name__
    message = f"{path}: no tensor and no dict with 'features' in it (found: {found}); save the bare [N, D] tensor"
    raise MissingDatasetError(message)


def _plain(path: Path, name: str, tensor: Any, sizes: frozenset[int] | None) -> Any:
    """`tensor`, if each of its values has its own place in the file; else UnreadableFileError."""
    import torch

    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        message = f"{path}: {name!r} is a {tensor.layout} tensor on {tensor.device}; save it dense, as plain floats"
        raise UnreadableFileError(message)
    declared, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if declared > held or (sizes is not None and held and held not in sizes):
        message = (
            f"{path}: {name!r} declares {declared:,} bytes that the file does not hold; save the bare tensor again"
        )
        raise UnreadableFileError(message)
    return tensor


def _describe(path: Path, features: Any) -> BagHead:
    n_patches, dim = bag_shape(path, tuple(features.shape))
    dtype = str(features.dtype).removeprefix("torch.")
    check_float(path, dtype)
    return BagHead(n_patches, dim, dtype)


def head(path: Path) -> BagHead:
    """Shape and dtype of the tensor."""
    return _describe(path, _load(path)[0])


@contextmanager
def open_bag(path: Path) -> Iterator[OpenBag]:
    """The file's bag; bfloat16 and float8 become float32, which holds them exactly (NumPy has neither)."""
    features, coords = _load(path)
    described = _describe(path, features)
    rows = features.reshape(described.n_patches, described.dim)
    plain = described.dtype in _NUMPY_FLOATS

    def fill(start: int, out: NDArray[Any]) -> None:
        try:
            out[:] = _as_numpy(rows[start : start + len(out)])
        except (RuntimeError, TypeError) as error:  # a float type that torch itself cannot convert
            raise _unreadable(path, error) from error

    def read_coords() -> NDArray[np.int32] | None:
        return None if coords is None else level0_coords(path, _coords(path, coords, len(rows)), len(rows))

    yield OpenBag(described, np.dtype(described.dtype if plain else "float32"), fill, read_coords)


def _as_numpy(tensor: Any) -> NDArray[Any]:
    plain = not tensor.is_floating_point() or str(tensor.dtype).removeprefix("torch.") in _NUMPY_FLOATS
    return np.asarray((tensor if plain else tensor.float()).numpy())


def _coords(path: Path, coords: Any, n_patches: int) -> NDArray[Any]:
    if hasattr(coords, "detach"):
        check_coords_shape(path, tuple(coords.shape), n_patches)
        return _as_numpy(coords)
    if not _is_table(coords):  # a pickle's lists may hold each other, and unfold to more than memory holds
        message = f"{path}: 'coords' is no table of numbers ({type(coords).__name__}); expected [N, 2]"
        raise ShapeError(message)
    return np.asarray(coords)


def _is_table(rows: object) -> bool:
    return isinstance(rows, Sequence) and all(
        isinstance(row, (list, tuple)) and len(row) == 2 and all(isinstance(value, (int, float)) for value in row)
        for row in rows
    )
