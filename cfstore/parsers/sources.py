"""What a parser yields: where a bag lies, what its file declares, and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cfstore.errors import EmptyBagError, ShapeError


@dataclass(frozen=True)
class BagSource:
    """One file that holds one bag."""

    path: Path
    slide_id: str
    scale: int
    encoder: str


@dataclass(frozen=True)
class BagHead:
    """What a file declares about its bag.

    `attributes` holds, where the file says: mpp, level0_magnification, patch_size (pixels at
    the bag's scale), patch_size_level0 (level-0 pixels), target_magnification.
    """

    n_patches: int
    dim: int
    dtype: str
    attributes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RawBag:
    """Rows as the source has them: features [N, D] float, coords [N, 2] int32 or None."""

    features: NDArray[np.floating]
    coords: NDArray[np.int32] | None


def bag_shape(path: object, shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, D) of a declared features shape; a leading 1 (UNI2-h's [1, N, D]) is dropped.

    Raises
    ------
    EmptyBagError
        No patches.
    ShapeError
        One vector for the slide, or any other shape that is no bag.
    """
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if 0 in shape:
        message = f"{path}: 'features' is empty, shape {shape}; extract the slide again or leave its file out"
        raise EmptyBagError(message)
    if len(shape) == 1:
        message = (
            f"{path}: 'features' is one vector of shape {shape}: a slide embedding, "
            "not a bag; give patch features [N, D]"
        )
        raise ShapeError(message)
    if len(shape) != 2:
        message = f"{path}: 'features' has shape {shape}; expected patches x dimension, [N, D]"
        raise ShapeError(message)
    return shape[0], shape[1]


def check_float(path: object, dtype: str) -> None:
    """Raise ShapeError unless `dtype` names a float type."""
    if not dtype.startswith(("float", "bfloat")):
        message = f"{path}: 'features' holds {dtype}, expected floating-point embeddings; is this a feature file?"
        raise ShapeError(message)


def check_coords_shape(path: object, shape: tuple[int, ...], n_patches: int) -> None:
    """Raise ShapeError unless `shape` is [N, 2] (or UNI2-h's [1, N, 2])."""
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or shape[1] != 2:
        message = f"{path}: 'coords' has shape {shape}; expected [N, 2]"
        raise ShapeError(message)
    if shape[0] != n_patches:
        message = (
            f"{path}: 'features' has {n_patches} rows but 'coords' has {shape[0]}; "
            "the file is damaged: extract it again"
        )
        raise ShapeError(message)


def level0_coords(path: object, coords: NDArray[np.generic], n_patches: int) -> NDArray[np.int32]:
    """Coordinates as [N, 2] int32 level-0 pixels.

    Raises
    ------
    ShapeError
        Another length than the features, not two columns, not whole pixels, or beyond int32.
    """
    check_coords_shape(path, coords.shape, n_patches)
    coords = coords.reshape(n_patches, 2)
    if coords.dtype.kind not in "iuf":
        message = f"{path}: 'coords' holds {coords.dtype.name}, expected whole level-0 pixels"
        raise ShapeError(message)
    fractions = (coords % 1 != 0).any(axis=1) if coords.dtype.kind == "f" else np.zeros(n_patches, dtype=bool)
    if fractions.any():  # NaN % 1 is NaN, so NaN and Inf are among them
        message = (
            f"{path}: 'coords' holds {coords[fractions][0].tolist()}; level-0 pixels are whole numbers "
            "(STAMP writes microns: convert them first)"
        )
        raise ShapeError(message)
    smallest, largest = coords.min(), coords.max()
    if smallest < np.iinfo(np.int32).min or largest > np.iinfo(np.int32).max:
        message = f"{path}: 'coords' reaches from {smallest} to {largest}, beyond any slide's pixels"
        raise ShapeError(message)
    return coords.astype(np.int32)
