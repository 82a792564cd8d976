"""Stores into buckets, past what is tested."""

from __future__ import annotations

from pathlib import Path

from cfstore.remote.bucket import Bucket


def upload(folder: Path, url: str) -> None:
    """Copy a store into a bucket as `aws s3 sync` would, past the proxy."""
    bucket = Bucket(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            bucket.put(path.relative_to(folder).as_posix(), path.read_bytes())
