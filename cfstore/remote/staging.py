"""A local folder that stands for a store in a bucket while it is written to.

It holds what a writer changes: the catalog, the files of `tables/`, and empty files for what the bucket has in
`derived/`; shards are in it only until their objects are. Every other object of a bucket has a name that is used
once and is never written again, so `pull` makes the folder what one version of the catalog says, and `push` puts what
changed, the catalog last and only if it still is the one that was pulled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cfstore import catalog
from cfstore.catalog import Named
from cfstore.derived_files import published_files
from cfstore.errors import (
    PreconditionFailedError,
    RemoteError,
    RemoteObjectMissingError,
    StoreFormatError,
)
from cfstore.remote.bucket import Bucket
from cfstore.remote.uploads import upload
from cfstore.schema import CATALOG_FILE, FEATURES_DIR, SNAPSHOT_FILE, STAGED_FILE, TABLES_DIR

_NOTHING: Final = Named(frozenset(), frozenset(), {}, frozenset())
_TRIES: Final = 20


@dataclass(frozen=True)
class Pulled:
    """A version of the catalog: its ETag (None: there is none yet), what it names, the local file."""

    etag: str | None
    named: Named
    stamp: tuple[int, ...]


def stage(root: Path, bucket: Bucket) -> None:
    """Make an empty folder stand for the store."""
    for folder in (FEATURES_DIR, TABLES_DIR):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _remember(root, bucket.url, None)


def bucket_of(root: Path) -> Bucket | None:
    """The bucket that a folder stands for; None for a store that lies in the folder."""
    path = root / STAGED_FILE
    return Bucket(json.loads(path.read_text())["url"]) if path.exists() else None


def _remember(root: Path, url: str, etag: str | None) -> None:
    """Which version of the catalog the folder holds, unchanged; None: it may be any."""
    temporary = root / f"{STAGED_FILE}.new"
    temporary.write_text(json.dumps({"url": url, "etag": etag}))
    temporary.replace(root / STAGED_FILE)


def pull(root: Path, bucket: Bucket) -> Pulled:
    """Make the folder what the newest catalog says. Needs the folder's lock.

    Raises
    ------
    StoreFormatError
        The bucket holds shards and no catalog.
    """
    for attempt in range(_TRIES):
        try:
            etag = _pull_catalog(root, bucket)
            named = _NOTHING if etag is None else catalog.read_named(root)
            _pull_tables(root, bucket, named, fresh=etag is None)
            break
        except RemoteObjectMissingError:  # replaced meanwhile: the newer catalog names other objects
            if attempt == _TRIES - 1 or version(bucket) == etag:
                raise
    _pull_derived(root, named)
    (root / SNAPSHOT_FILE).touch()  # made when the writing ends; see `put_snapshot`
    _remember(root, bucket.url, None)
    return Pulled(etag, named, _stamp(root))


def refresh(root: Path, bucket: Bucket) -> None:
    """`pull`, to look at and not to change. Needs the folder's lock."""
    pulled = pull(root, bucket)
    if pulled.etag is not None:
        _remember(root, bucket.url, pulled.etag)


def version(bucket: Bucket) -> str | None:
    """The ETag of the catalog; None where there is none."""
    head = bucket.head(CATALOG_FILE)
    return head.etag if head else None


def _stamp(root: Path) -> tuple[int, ...]:
    path = root / CATALOG_FILE
    if not path.exists():
        return ()
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _pull_catalog(root: Path, bucket: Bucket) -> str | None:
    path = root / CATALOG_FILE
    held = json.loads((root / STAGED_FILE).read_text())["etag"] if path.exists() else None
    try:
        fetched = bucket.fetch(CATALOG_FILE, unless=held)
    except RemoteObjectMissingError:
        if any(True for _ in bucket.list(FEATURES_DIR)):
            message = (
                f"{bucket.shown(CATALOG_FILE)}: missing, though there are shards; restore it (an earlier version of "
                "the object will do) or ingest into a new --store"
            )
            raise StoreFormatError(message) from None
        path.unlink(missing_ok=True)
        return None
    if fetched is None:
        return str(held)
    temporary = root / f".{CATALOG_FILE}.pulled"
    temporary.write_bytes(fetched.data)
    temporary.replace(path)
    return fetched.etag


def _pull_tables(root: Path, bucket: Bucket, named: Named, *, fresh: bool) -> None:
    objects = named.tables if named.tables or fresh else _plain_tables(bucket)
    folder = root / TABLES_DIR
    for path in folder.glob("*"):
        if path.name not in objects:
            path.unlink()
    for file, (digest, key) in objects.items():
        path = folder / file
        if not (path.exists() and catalog.digest_of_file(path) == digest):
            path.write_bytes(bucket.get(key))
        if digest and catalog.digest_of_file(path) != digest:
            message = f"{bucket.shown(key)}: not what was written; restore it (an earlier version of the object)"
            raise StoreFormatError(message)


def _plain_tables(bucket: Bucket) -> Mapping[str, tuple[str, str]]:
    """Files of `tables/` of a store that was made in a folder and copied to the bucket."""
    prefix = f"{TABLES_DIR}/"
    names = [key.removeprefix(prefix) for key, _ in bucket.list(TABLES_DIR)]
    return {name: ("", prefix + name) for name in names if "/" not in name and name.endswith(".parquet")}


def _pull_derived(root: Path, named: Named) -> None:
    """An empty file for each that the catalog names: what counts is that it is there. Others are about to be put."""
    for file in published_files(root):
        if file not in named.derived and not (root / file).stat().st_size:
            (root / file).unlink()
    for file in named.derived:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")  # also over what was put: once another writer removes it, it must not come back


def push(root: Path, bucket: Bucket, pulled: Pulled) -> bool:
    """Commit what changed since `pull` by one conditional PUT of the catalog; False if another writer was faster.

    Raises
    ------
    RemoteError
        The bucket cannot be written, or an upload that the catalog names was taken for left behind and swept.
    """
    if _stamp(root) == pulled.stamp and pulled.etag is not None:
        _remember(root, bucket.url, pulled.etag)
        return True
    named = catalog.read_named(root)
    files = {file: root / file for file in named.derived - pulled.named.derived}
    held = {key for _, key in pulled.named.tables.values()}
    files |= {key: root / TABLES_DIR / file for file, (_, key) in named.tables.items() if key not in held}
    _check_not_swept(bucket, [*(named.shards - pulled.named.shards), *files], pulled.named)
    upload(bucket, files)
    condition = {"if_match": pulled.etag} if pulled.etag else {"if_absent": True}
    try:
        etag = bucket.put(CATALOG_FILE, root / CATALOG_FILE, **condition)
    except PreconditionFailedError:
        # What was put stays: an answer that got lost may hide that this commit won and others built on it.
        return False
    _remember(root, bucket.url, etag)
    _pull_derived(root, named)
    with suppress(RemoteError):  # nothing names them any more: the next sweep finds them
        bucket.delete(list(_forgotten(pulled.named, named)))
    return True


def _check_not_swept(bucket: Bucket, names: list[str], pulled: Named) -> None:
    gone = sorted(pulled.swept.intersection(names))
    if gone:
        message = (
            f"{bucket.shown(gone[0])}: uploaded so long ago that another writer took it for left behind and removed "
            "it; what was committed is whole: run this again"
        )
        raise RemoteError(message)


def _forgotten(before: Named, now: Named) -> Iterator[str]:
    yield from before.derived - now.derived
    kept = {key for _, key in now.tables.values()}
    yield from (key for _, key in before.tables.values() if key not in kept)


def put_snapshot(root: Path, bucket: Bucket) -> None:
    """Put `catalog.parquet` for other tools. Needs the folder's lock.

    It follows the catalog and may trail it. A writer that put one looks whether its catalog still is the newest, so
    the last one put is of the newest catalog whatever order writers come in.
    """
    for _ in range(_TRIES):
        etag = pull(root, bucket).etag
        catalog.write_snapshot(root)
        bucket.put(SNAPSHOT_FILE, root / SNAPSHOT_FILE)
        _remember(root, bucket.url, etag)
        if version(bucket) == etag:
            return


def snapshot_trails(bucket: Bucket) -> bool:
    """Whether `catalog.parquet` may be of an earlier catalog: its writer died before it was put."""
    catalog_head, head = bucket.head(CATALOG_FILE), bucket.head(SNAPSHOT_FILE)
    if catalog_head is None or head is None:
        return catalog_head is not None
    return head.modified is None or catalog_head.modified is None or head.modified < catalog_head.modified
