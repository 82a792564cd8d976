"""Coordinates of patches that fill a rectangle."""

import numpy as np
from numpy.typing import NDArray


def grid(width: int, height: int, edge: int) -> NDArray[np.int32]:
    """Top-left corners [width * height, 2], row by row, of patches of `edge` level-0 pixels."""
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2)
    return (places * edge).astype(np.int32)
