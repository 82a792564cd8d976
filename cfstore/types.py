"""The values that travel through the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SCALES: Final = (5, 10, 20)
"""Nominal magnifications a bag can have, coarse to fine."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """How int8 features become numbers: `stored * scale + zero`, both float32 [D]."""

    scale: NDArray[np.float32]
    zero: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Bag:
    """The patches of one slide at one scale.

    Parameters
    ----------
    features : [N, D]
        One row per patch, in the order of the source file (10x order is meaning: models
        build their grid from it). float16, float32, or uint8 with `affine`.
    coords : [N, 2] int32, or None
        Top-left x, y in level-0 pixels; None where the source has none (`.pt` files).
    affine
        Of a store of `--dtype int8`, read as stored: what makes numbers of `features`.
    """

    features: NDArray[np.generic]
    coords: NDArray[np.int32] | None
    affine: Affine | None = None

    def dequantised(self) -> Bag:
        """The bag with float features: int8 as float32, anything else as it is."""
        if self.affine is None:
            return self
        features = self.features.astype(np.float32)
        features *= self.affine.scale
        features += self.affine.zero
        return Bag(features, self.coords)

    @property
    def n_patches(self) -> int:
        return int(self.features.shape[0])

    @property
    def dim(self) -> int:
        return int(self.features.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class SlideBags:
    """All bags of one slide from one encoder, by scale: `slide.bags[20].features`."""

    slide_id: str
    encoder: str
    bags: Mapping[int, Bag]

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded features."""
        return sum(int(bag.features.nbytes) for bag in self.bags.values())

    def dequantised(self) -> SlideBags:
        """The slide with float features: int8 as float32, anything else as it is."""
        return SlideBags(self.slide_id, self.encoder, {scale: bag.dequantised() for scale, bag in self.bags.items()})
