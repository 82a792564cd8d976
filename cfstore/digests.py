"""The digest of a bag as it is stored: of its numbers, not of the bytes that a codec makes of them."""

from __future__ import annotations

import numpy as np
import xxhash

from cfstore.types import Bag


def stored_digest(bag: Bag) -> str:
    """xxh3-128 over scale and zero (int8), the feature rows, and the coords, each in C order.

    Equal to what `convert.BagConverter` computes while rows pass by.
    """
    digest = xxhash.xxh3_128()
    if bag.affine is not None:
        digest.update(np.ascontiguousarray(bag.affine.scale).data)
        digest.update(np.ascontiguousarray(bag.affine.zero).data)
    digest.update(np.ascontiguousarray(bag.features).data)
    if bag.coords is not None:
        digest.update(np.ascontiguousarray(bag.coords).data)
    return f"xxh3-128:{digest.hexdigest()}"
