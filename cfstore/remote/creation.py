"""A store in a bucket begins: its header, and whether the server can do what commits rely on."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Final

from cfstore.errors import PreconditionFailedError, RemoteError, RemoteObjectMissingError, StoreNotFoundError
from cfstore.remote.bucket import Bucket
from cfstore.schema import STORE_FILE, StoreHeader, create_header, read_header

PROBES_DIR: Final = ".probes"
_REMEDY: Final = "use one with conditional writes, or ingest into a folder and copy that there"


def check_kind(bucket: Bucket) -> None:
    """Raise RemoteError where nothing can ever be written."""
    if not bucket.can_list:
        raise RemoteError(f"{bucket.url}: a web server cannot be written to; use s3:// or az://")
    if bucket.url.startswith("gs://"):  # its conditions name generations, which object storage's ETags are not
        raise RemoteError(
            f"{bucket.url}: stores on gs:// are only read so far; ingest into a folder and copy that there"
        )


_checked: Final[set[Bucket]] = set()


def check_conditional(bucket: Bucket) -> None:
    """Try on an object of its own whether the server refuses a second first PUT, and one of an older version.

    Once per process: a store may be moved to another server, whoever made it.

    Raises
    ------
    RemoteError
        It does not: two writers could overwrite each other's catalog.
    """
    check_kind(bucket)
    if bucket in _checked:
        return
    key = f"{PROBES_DIR}/{uuid.uuid4().hex}"
    try:
        first = bucket.put(key, b"first", if_absent=True)
        _expect_refusal(bucket, key)
        if first is None:
            raise RemoteError(f"{bucket.url}: this server names no versions (ETag); {_REMEDY}")
        bucket.put(key, b"second", if_match=first)
        _expect_refusal(bucket, key, if_match=first)
    finally:
        bucket.delete([key])
    _checked.add(bucket)


def _expect_refusal(bucket: Bucket, key: str, if_match: str | None = None) -> None:
    try:
        bucket.put(key, uuid.uuid4().bytes, if_absent=if_match is None, if_match=if_match)
    except PreconditionFailedError:
        return
    condition = "If-Match" if if_match else "If-None-Match"
    message = f"{bucket.url}: this server ignores {condition} of a PUT: writers could overwrite each other; {_REMEDY}"
    raise RemoteError(message)


def create(bucket: Bucket, folder: Path) -> StoreHeader:
    """Put the header of a new store, made in the empty local `folder`; the one that is there, if others were faster.

    Raises
    ------
    StoreNotFoundError
        There is no store, but objects of something else.
    RemoteError
        The bucket cannot be written, or has no conditional writes.
    """
    check_kind(bucket)
    if bucket.head(STORE_FILE) is None:
        other = next((key for key, _ in bucket.list() if not key.startswith(f"{PROBES_DIR}/")), None)
        if other is not None and bucket.head(STORE_FILE) is None:
            message = f"{bucket.url}: holds {other} but no store; name an empty or new prefix with --store"
            raise StoreNotFoundError(message)
        check_conditional(bucket)
        header = create_header(folder)
        try:
            bucket.put(STORE_FILE, folder / STORE_FILE, if_absent=True)
        except PreconditionFailedError:
            (folder / STORE_FILE).unlink()
        else:
            return header
    return copy_header(bucket, folder)


def copy_header(bucket: Bucket, folder: Path) -> StoreHeader:
    """Copy the header into `folder` and read it.

    Raises
    ------
    StoreNotFoundError
        There is no store.
    StoreFormatError
        It is not of a store, or of another format version.
    """
    try:
        (folder / STORE_FILE).write_bytes(bucket.get(STORE_FILE))
    except RemoteObjectMissingError as error:
        message = (
            f"{bucket.url}: no store here (no {STORE_FILE}); make one with `cfstore ingest H5DIR`, or name one with "
            "--store"
        )
        raise StoreNotFoundError(message) from error
    return read_header(folder)
