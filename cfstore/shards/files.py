"""What shards of both formats share on disk: temporary names, flushing, staying inside, signed JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from cfstore.errors import DamagedShardError

TEMPORARY_PREFIX: Final = ".writing-"
BLANK_DIGEST: Final = "-cfstore-digest-"
"""Stands in a text where its digest will be, and is as long."""


class Check(NamedTuple):
    """Looks at some stored bytes: whose (None: of all slides), and a function that says what of them is wrong."""

    slide_id: str | None
    look: Callable[[], list[str]]


def sign(text: str) -> str:
    """`text` with BLANK_DIGEST replaced by the xxh3-64 of the text."""
    return text.replace(BLANK_DIGEST, xxhash.xxh3_64_hexdigest(text.encode()), 1)


def is_signed(text: str, digest: object) -> bool:
    """Whether `digest`, as found in the signed `text`, is the text's."""
    blank = text.replace(str(digest), BLANK_DIGEST, 1)
    return xxhash.xxh3_64_hexdigest(blank.encode()) == digest


def sync(path: Path) -> None:
    """Flush one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Flush everything below `root`, and `root`."""
    for folder, _, names in os.walk(root):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    if root.is_file():
        sync(root)


def commit(temporary: Path, path: Path) -> None:
    """Put a finished file in its place: flushed before the rename, the folder after it."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def check_inside(path: Path, shard: Path) -> Path:
    """`path`, if it is a file of the shard; a symbolic link that leads out of it is refused.

    Raises
    ------
    DamagedShardError
        The file is missing, or lies elsewhere.
    """
    inside = path.resolve().is_relative_to(shard.resolve()) and (path != shard or not path.is_symlink())
    if not inside or not path.is_file():
        message = f"{path}: missing, or a link out of its shard; restore the shard"
        raise DamagedShardError(message)
    return path
