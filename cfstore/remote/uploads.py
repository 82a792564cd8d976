"""Files to objects: side by side, and looked at afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from cfstore.errors import RemoteError
from cfstore.remote.bucket import Bucket

_AT_ONCE: Final = 8


def upload(bucket: Bucket, files: Mapping[str, Path]) -> None:
    """Put files, by key, where nothing names them yet; when this returns, each is there with its size.

    Raises
    ------
    RemoteError
        An object could not be put, or is not what was sent. What was put before stays, unnamed.
    """
    with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(files)))) as pool:
        for _ in pool.map(lambda key: _upload(bucket, key, files[key]), files):
            pass


def upload_tree(bucket: Bucket, prefix: str, path: Path) -> list[str]:
    """Put a file as `prefix`, or all files of a folder below `prefix`; returns the keys."""
    if path.is_file():
        files = {prefix: path}
    else:
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        files = {f"{prefix}/{file.relative_to(path).as_posix()}": file for file in inside}
    upload(bucket, files)
    return list(files)


def _upload(bucket: Bucket, key: str, path: Path) -> None:
    etag = bucket.put(key, path)
    found, size = bucket.head(key), path.stat().st_size
    if found is None or found.size != size or found.etag != etag:
        what = "is missing" if found is None else f"has {found.size:,} bytes"
        message = (
            f"{bucket.shown(key)}: {what} after {size:,} bytes were put; nothing names it, and what was committed is "
            "whole: run this again"
        )
        raise RemoteError(message)
