"""The small files of a store on object storage, on a local disk: header, catalog, imported tables.

A mirror holds snapshots. A snapshot is a folder that looks like a store without shards and never changes; it is
named by its catalog's content and appears by one rename. Whatever asks the catalog of a store works on it; readers
see `remote.json` in it and take rows from the bucket. Which tables belong to a catalog, the catalog says itself, so
no server need list anything.

<mirrors>/s3-bucket-cohorts-store-5f1c.../
  lock                held while a snapshot is looked for or made
  current             the name of the newest
  9a3e.../            a snapshot; `remote.json` is locked, shared, by every process that uses it
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import duckdb
import xxhash

from cfstore.catalog import connect, table_objects
from cfstore.errors import (
    RemoteError,
    RemoteObjectMissingError,
    StoreError,
    StoreFormatError,
    StoreNotFoundError,
    show_as,
)
from cfstore.locks import discard, try_lock
from cfstore.remote.bucket import Bucket, Head
from cfstore.remote.disk_cache import CacheSetting, cache_at
from cfstore.schema import CATALOG_FILE, REMOVED_FILE, STORE_FILE, TABLES_DIR, read_header
from cfstore.shards.files import TEMPORARY_PREFIX, sync_tree

REMOTE_FILE: Final = "remote.json"
_MAKING: Final = ".making-"
_PIECE: Final = 8 << 20
_TRIES: Final = 5  # a writer may be at work between the catalog and its tables
_DOWNLOADS: Final = 8


@dataclass(frozen=True)
class Remote:
    """Where the store of a snapshot lies; `etag` is its catalog's. `cache` is where its rows are kept, if anywhere."""

    url: str
    uuid: str
    etag: str | None
    size: int
    cache: str | None

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.url)


def remote_of(root: Path) -> Remote | None:
    """The store on object storage that `root` is a snapshot of; None where it is a store of its own."""
    try:
        remote = Remote(**json.loads((root / REMOTE_FILE).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StoreFormatError(f"{root / REMOTE_FILE}: cannot be read ({error}); delete the folder {root}") from error
    show_as(str(root), remote.url)
    return remote


def write_remote(root: Path, remote: Remote) -> None:
    """Make `root` a snapshot of the store: what `remote_of` finds there."""
    (root / REMOTE_FILE).write_text(json.dumps(asdict(remote)))
    show_as(str(root), remote.url)


def mirrors_folder(cache: CacheSetting | None) -> Path:
    """Where mirrors are: in the cache, else in this user's folder of the system's temporary place.

    Raises
    ------
    StoreError
        That folder cannot be made, or somebody else could write to it.
    """
    if cache is not None:
        return cache.folder / "mirrors"
    own = Path(tempfile.gettempdir(), f"cfstore-{os.getuid()}")
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
    except OSError as error:
        raise StoreError(f"{own}: cannot be made ({error.strerror}); name a cache with --cache") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StoreError(f"{own}: others may write to it, so no mirror is kept there; remove it or name a --cache")
    return own / "mirrors"


def open_mirror(url: str, cache: CacheSetting | None = None) -> Path:
    """A snapshot of the store at `url` as it is now; it stays as long as this process.

    Raises
    ------
    StoreNotFoundError
        There is no store.
    StoreFormatError
        There is one of a newer format, or without a catalog.
    RemoteError
        The server fails or forbids to read.
    """
    bucket = Bucket(url)
    if cache is not None:
        cache_at(cache.folder, cache.limit)  # says what is wrong with it, if anything is
    mirror = mirrors_folder(cache) / _name_of(bucket.url)
    try:
        mirror.mkdir(parents=True, exist_ok=True)
        with _locked(mirror / "lock"):
            root = _find(mirror, bucket) or _make(mirror, bucket, cache)
            _hold(root)
            _sweep(mirror, root)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        reason = error.strerror or error
        raise StoreError(f"{mirror}: cannot be written ({reason}); free space or name a --cache") from error
    remote_of(root)
    return root


def refreshed(root: Path) -> Path:
    """A snapshot, of the store that `root` is a snapshot of, as it is now. Raises as `open_mirror`."""
    remote = remote_of(root)
    if remote is None:
        message = f"{root}: its mirror is gone, in the cache or below $TMPDIR; open the store again"
        raise StoreNotFoundError(message)
    cache = cache_at(Path(remote.cache)) if remote.cache else None
    return open_mirror(remote.url, CacheSetting(cache.folder, cache.limit) if cache else None)


def bring(root: Path, file: str) -> None:
    """Have a small immutable file of the store in its snapshot, if there is one; of a local store it is there."""
    remote, path = remote_of(root), root / file
    if remote is None or path.exists():
        return
    with suppress(RemoteObjectMissingError):
        content = remote.bucket.get(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        temporary.write_bytes(content)
        temporary.replace(path)


def _name_of(url: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", url)[:80].strip("-.")
    return f"{readable}-{xxhash.xxh3_64_hexdigest(url.encode())}"


# -- snapshots -----------------------------------------------------------------------------------


def _find(mirror: Path, bucket: Bucket) -> Path | None:
    """The current snapshot if the store's catalog is still its catalog."""
    with suppress(OSError, StoreFormatError):
        root = mirror / (mirror / "current").read_text()
        remote = remote_of(root)
        if remote is not None and remote.etag and bucket.head(CATALOG_FILE) == Head(remote.size, remote.etag):
            return root
    return None


def _make(mirror: Path, bucket: Bucket, cache: CacheSetting | None) -> Path:
    """Download a snapshot and put it in its place."""
    folder = mirror / f"{_MAKING}{uuid.uuid4().hex}"
    try:
        for number in range(_TRIES):
            discard(folder)
            (folder / TABLES_DIR).mkdir(parents=True)
            head = _download_header(bucket, folder)
            complete = _download_tables(bucket, folder, mirror)
            if complete or (number and bucket.head(CATALOG_FILE) == head):
                break  # a writer that died between tables and catalog leaves them so: as it is with a local store
        uuid_ = read_header(folder).uuid
        remote = Remote(bucket.url, uuid_, head.etag, head.size, str(cache.folder) if cache else None)
        write_remote(folder, remote)
        name = xxhash.xxh3_128_hexdigest(_digests(folder).encode())
        if not _is_sound(mirror / name, remote):
            sync_tree(folder)
            discard(mirror / name)
            folder.rename(mirror / name)
        temporary = mirror / f"{_MAKING}{uuid.uuid4().hex}"
        temporary.write_text(name)
        temporary.replace(mirror / "current")
        return mirror / name
    finally:
        discard(folder)


def _is_sound(root: Path, remote: Remote) -> bool:
    """Whether a snapshot is there, and of this store."""
    try:
        held = remote_of(root)
    except StoreFormatError:
        return False
    return held is not None and (held.url, held.cache) == (remote.url, remote.cache)


def _digests(folder: Path) -> str:
    """What tells a snapshot from all others: the content of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "\n".join(f"{path.relative_to(folder)} {_digest(path)}" for path in files)


def _digest(path: Path) -> str:
    hashed = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_PIECE):
            hashed.update(block)
    return hashed.hexdigest()


def _download_header(bucket: Bucket, folder: Path) -> Head:
    """store.json and the catalog; returns what the server says of the catalog."""
    try:
        (folder / STORE_FILE).write_bytes(bucket.get(STORE_FILE))
    except RemoteObjectMissingError as error:
        raise StoreNotFoundError(f"{bucket.url}: no store there (no {STORE_FILE}); check the address") from error
    show_as(str(folder), bucket.url)
    read_header(folder)
    for _ in range(_TRIES):
        head = bucket.head(CATALOG_FILE)
        if head is None:
            message = f"{bucket.shown(CATALOG_FILE)}: the catalog is missing; `cfstore reindex` on a copy makes it anew"
            raise StoreFormatError(message)
        if _download(bucket, CATALOG_FILE, folder / CATALOG_FILE, head):
            return head
    raise RemoteError(f"{bucket.shown(CATALOG_FILE)}: changes all the time; try again when writers are done")


def _download(bucket: Bucket, key: str, path: Path, head: Head) -> bool:
    """A large object into a file, in pieces; whether it stayed the same object meanwhile."""
    with path.open("wb") as file, ThreadPoolExecutor(_DOWNLOADS) as pool:
        file.truncate(head.size)

        def piece(start: int) -> str | None:
            found = bucket.read_range(key, start, min(start + _PIECE, head.size))
            os.pwrite(file.fileno(), found.data, start)
            return found.etag

        try:
            etags = list(pool.map(piece, range(0, head.size, _PIECE)))
        except RemoteError:
            if bucket.head(key) == head:
                raise
            return False
    return all(etag == head.etag for etag in etags)


def _download_tables(bucket: Bucket, folder: Path, mirror: Path) -> bool:
    """The files of `tables/` that the catalog names; whether they are those it was made of."""
    try:
        with connect(folder) as connection:
            wanted = dict(connection.execute("SELECT file, digest FROM internal.tables").fetchall())
            objects = {file: (digest, key) for file, digest, key in table_objects(connection)}
    except duckdb.Error as error:
        message = f"{bucket.shown(CATALOG_FILE)}: cannot be read; `cfstore reindex` on a copy makes it anew"
        raise StoreFormatError(message) from error
    held = {_digest(path): path for path in mirror.glob(f"*/{TABLES_DIR}/*.parquet")}
    complete = True
    if not objects:  # written into a folder, and copied to where it is now
        objects = {name: (wanted.get(name, ""), f"{TABLES_DIR}/{name}") for name in (*wanted, REMOVED_FILE)}
    for name, (digest, key) in objects.items():
        path = folder / TABLES_DIR / name
        known = held.get(digest.rpartition(":")[2]) if digest else None
        if known is not None:
            os.link(known, path)
            continue
        with suppress(RemoteObjectMissingError):
            path.write_bytes(bucket.get(key))
        if digest and not (path.exists() and f"xxh3-128:{_digest(path)}" == digest):
            complete = False
    return complete


# -- who uses what -------------------------------------------------------------------------------

_held: dict[Path, int] = {}
_holding = threading.Lock()


def _hold(root: Path) -> None:
    """Keep a snapshot from being swept until this process ends."""
    with _holding:
        held = _held.get(root)
        if held is not None and os.path.samestat(os.fstat(held), (root / REMOTE_FILE).stat()):
            return
        handle = os.open(root / REMOTE_FILE, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_SH)
        _held[root] = handle
        if held is not None:
            os.close(held)  # of one that was deleted, and made again


def _sweep(mirror: Path, current: Path) -> None:
    """Remove snapshots that nobody uses any more, and what a crash left. Needs the mirror's lock."""
    for entry in mirror.iterdir():
        if entry.name.startswith(_MAKING):
            discard(entry)
        elif entry.is_dir() and entry not in (current, *_held):
            with suppress(FileNotFoundError):
                handle = os.open(entry / REMOTE_FILE, os.O_RDONLY)
                try:
                    if not try_lock(handle):
                        continue
                    gone = mirror / f"{_MAKING}{uuid.uuid4().hex}"
                    entry.rename(gone)
                    discard(gone)
                finally:
                    os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
