"""Stores into buckets, past what is tested, and what is read of them compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cfstore.remote.bucket import Bucket


def upload(folder: Path, url: str) -> None:
    """Copy a store into a bucket as `aws s3 sync` would, past the proxy."""
    bucket = Bucket(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            bucket.put(path.relative_to(folder).as_posix(), path.read_bytes())


def same_bags(one: Any, other: Any) -> None:
    """Bags of a slide, equal to the last bit, type and coordinate."""
    assert one.bags.keys() == other.bags.keys()
    for scale, bag in one.bags.items():
        np.testing.assert_array_equal(bag.features, other.bags[scale].features, strict=True)
        np.testing.assert_array_equal(bag.coords, other.bags[scale].coords)
