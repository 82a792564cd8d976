"""What changes a store, wherever it lies: a change, committed at once or not at all.

In a folder that is the write lock; in a bucket a local folder stands for it (`remote.staging`), and `remote.commits`
has the rule.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from cfstore import catalog
from cfstore.errors import RemoteError, StoreWriteError
from cfstore.locks import LOCK_SECONDS, discard, hold, sweep, write_lock
from cfstore.mirrors import Remote, write_remote
from cfstore.remote import commits, creation, orphans, staging
from cfstore.remote.bucket import Bucket
from cfstore.remote.uploads import upload_tree
from cfstore.schema import STAGED_FILE
from cfstore.shards import Extent, ShardRecord, read_shard

Result = TypeVar("Result")
_STAGING: Final = "cfstore-staging"
_SESSION: Final = "session-"
_COMMITS: Final = ".commits"
"""Holds the lock of commits, which take as long as the server does; shards are begun under another one meanwhile."""


def is_staged(root: Path) -> bool:
    """Whether a folder stands for a store in a bucket, in a `session`."""
    return (root / STAGED_FILE).exists()


def commit(root: Path, change: Callable[[], Result], patience: float = LOCK_SECONDS) -> Result:
    """Do `change` under the store's write lock, waited for at most `patience` seconds; of a store in a bucket, on its
    newest state, and commit it there.

    There `change` may be called again: it must look at the store anew each time.

    Raises
    ------
    StoreBusyError
        Others have been writing for too long.
    StoreWriteError
        The store's folder cannot be written to.
    RemoteError
        The bucket cannot be written to.
    """
    bucket = staging.bucket_of(root)
    if bucket is None:
        with write_lock(root, patience):
            return change()
    with write_lock(root / _COMMITS, max(patience, 2 * commits.COMMIT_SECONDS)):  # of this writer's own processes
        return commits.commit(root, bucket, change)


@dataclass(frozen=True)
class UploadedShard:
    """A shard whose objects are in the bucket under their final names, and where its bags lie."""

    bucket: Bucket
    record: ShardRecord
    extents: Sequence[Extent]
    keys: Sequence[str]

    def register(self, root: Path) -> None:
        """Name it in the catalog. Part of a `commit`."""
        catalog.register(root, [self.record], {self.record.shard: self.extents})

    def is_registered(self, root: Path) -> bool:
        """Whether the catalog names it."""
        return self.record.shard in catalog.read_named(root).shards

    def discard(self) -> None:
        """Delete its objects: nothing names them, and nothing will."""
        with suppress(RemoteError):  # the next sweep finds them
            self.bucket.delete(self.keys)


def upload_shard(root: Path, temporary: Path, name: Callable[[Sequence[str]], str]) -> UploadedShard | None:
    """Put a finished shard into the bucket; None where the store is a folder, in which shards are renamed.

    `name` gives a name that nobody else uses, from those of the shards that there are.
    """
    bucket = staging.bucket_of(root)
    if bucket is None:
        return None
    record, extents = read_shard(root, temporary.relative_to(root).as_posix())
    record = replace(record, shard=name(sorted(catalog.read_named(root).shards)))
    return UploadedShard(bucket, record, list(extents), upload_tree(bucket, record.shard, temporary))


def bucket_of(root: Path) -> Bucket | None:
    """The bucket that a folder of a `session` stands for; None for a store that lies in the folder."""
    return staging.bucket_of(root)


def place_of(root: Path) -> Path | str:
    """Where other machines find the store: its folder, or the address of its bucket."""
    bucket = staging.bucket_of(root)
    return bucket.url if bucket else root


@contextmanager
def session(bucket: Bucket) -> Iterator[Path]:
    """A folder that stands for a store in a bucket while it is written to; below $TMPDIR.

    Shards lie in it until they are uploaded: one of up to 2 GiB for each process.

    Raises
    ------
    StoreNotFoundError
        There is no store.
    RemoteError
        The bucket cannot be written, or has no conditional writes.
    """
    creation.check_conditional(bucket)
    with _staged(bucket) as root:
        before = staging.version(bucket)
        commit(root, partial(catalog.reconcile, root))  # makes the first catalog, where there is none
        yield root
        if staging.version(bucket) != before or staging.snapshot_trails(bucket):
            with write_lock(root / _COMMITS):
                staging.put_snapshot(root, bucket)


@contextmanager
def session_of_task(url: str) -> Iterator[Path]:
    """Another such folder, for a task of a writer that has a `session` meanwhile, perhaps on another machine.

    What the writer does once is left to it: to try out the server's conditions, to make the first catalog, to put
    `catalog.parquet`.

    Raises
    ------
    StoreNotFoundError
        There is no store.
    RemoteError
        The bucket cannot be read.
    """
    with _staged(Bucket(url)) as root:
        refresh(root)
        yield root


def refresh(root: Path) -> None:
    """Make a folder of a session what the newest catalog says: others may have committed. A store's own is so."""
    bucket = staging.bucket_of(root)
    if bucket is not None:
        with write_lock(root / _COMMITS):
            staging.refresh(root, bucket)


@contextmanager
def _staged(bucket: Bucket) -> Iterator[Path]:
    """A folder with the store's header, nothing pulled yet."""
    root, held = _new_folder()
    with held:
        try:
            (root / _COMMITS).mkdir()
            staging.stage(root, bucket)
            header = creation.copy_header(bucket, root)
            write_remote(root, Remote(bucket.url, header.uuid, None, 0, None))  # bags are read from the bucket
            yield root
        finally:
            discard(root)


def create_in(bucket: Bucket) -> None:
    """Make an empty store in a bucket, where there is none yet.

    Raises
    ------
    StoreNotFoundError
        There are objects of something else.
    RemoteError
        The bucket cannot be written, or has no conditional writes.
    """
    root, held = _new_folder()
    with held:
        try:
            creation.create(bucket, root)
        finally:
            discard(root)
    if staging.version(bucket) is None:
        with session(bucket):
            pass


def _new_folder() -> tuple[Path, AbstractContextManager[None]]:
    """A new folder for one session, and what keeps others from sweeping it; those of the dead are swept."""
    parent = Path(tempfile.gettempdir(), f"{_STAGING}-{os.getuid()}")
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.stat().st_uid != os.getuid():
        raise StoreWriteError(f"{parent}: belongs to somebody else; name another folder with TMPDIR")
    with write_lock(parent):
        sweep(parent, _SESSION)
        root = Path(tempfile.mkdtemp(prefix=_SESSION, dir=parent))
        return root, hold(root)


def sweep_left_behind(root: Path) -> int:
    """Remove what writers that died left in the bucket, a day after; returns how many objects went."""
    bucket = staging.bucket_of(root)
    if bucket is None:
        return 0
    left = orphans.find(bucket, catalog.read_named(root))
    if not left:
        return 0

    def give_up() -> list[str]:
        named = catalog.read_named(root)
        names = [name for name in left if not named.holds(name)]
        catalog.note_swept(root, set(names) - named.swept)
        return names

    return orphans.remove(bucket, [key for name in commit(root, give_up) for key in left[name]])
