"""A store is found, opened, or made where there is none."""

from __future__ import annotations

import os
from pathlib import Path

from cfstore.errors import StoreError, StoreNotFoundError
from cfstore.ingest import prepare
from cfstore.mirrors import open_mirror
from cfstore.remote.bucket import Bucket
from cfstore.remote.disk_cache import CACHE_VARIABLE, parse_cache
from cfstore.remote.locate import is_url
from cfstore.schema import FEATURES_DIR, STORE_FILE, TABLES_DIR, create_header
from cfstore.store import Store
from cfstore.writing import create_in


def has_store(path: Path | str) -> bool:
    """Whether there is a store, whatever its state; RemoteError where a bucket cannot be asked."""
    if is_url(path):
        return Bucket(str(path)).head(STORE_FILE) is not None
    return (Path(path) / STORE_FILE).exists()


def open_store(path: Path | str, *, create: bool = False, cache: str | None = None) -> Store:
    """Open the store at `path`.

    Parameters
    ----------
    path
        The store's directory, or its address: s3://bucket/folder, gs://, az://, or https:// of a web server that
        answers ranges. By an address it is read as it is now; open it again to see what was written since.
    create
        Make an empty store where there is none yet.
    cache
        "disk:FOLDER:SIZE": keep on a local disk what is read of a store on object storage, up to that size; None:
        what $CFSTORE_CACHE says, if anything.

    Raises
    ------
    StoreNotFoundError
        No store there and `create` is false, or files of something else are in the way.
    StoreFormatError
        A store of a newer format.
    RemoteError
        Object storage fails or forbids to read.
    CacheError
        The cache is not named so, or cannot be used.
    """
    said = cache if cache is not None else os.environ.get(CACHE_VARIABLE)
    setting = parse_cache(said) if said else None
    if is_url(path):
        if create:
            create_in(Bucket(str(path)))
        return Store(open_mirror(str(path), setting))
    root = Path(path)
    if create and not has_store(root):
        if not root.exists() or (root.is_dir() and _is_blank(root)):
            _create(root)
            prepare(root)
        elif not has_store(root):  # else another process has just made it
            message = f"{root}: holds files but no store; name an empty or new folder with --store"
            raise StoreNotFoundError(message)
    return Store(root)


def _create(root: Path) -> None:
    if "?" in str(root.absolute()):
        message = f"{root}: DuckDB cannot use a path with '?' in it; name another --store"
        raise StoreError(message)
    try:
        root.mkdir(parents=True, exist_ok=True)
        create_header(root)
    except OSError as error:
        message = f"{root}: the store cannot be made ({error.strerror}); check permissions or name another --store"
        raise StoreError(message) from error


def _is_blank(root: Path) -> bool:
    """Whether `root` holds nothing, or what a process that died while making a store left there."""
    ours = (FEATURES_DIR, TABLES_DIR)
    return all(
        path.name.startswith(".") or (path.name in ours and path.is_dir() and not any(path.iterdir()))
        for path in root.iterdir()
    )
