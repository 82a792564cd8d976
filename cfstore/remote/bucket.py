"""Objects of one store on object storage: read by ranges, written whole, every request tried again.

obstore (the Rust crate object_store) speaks to the servers. Its own retries are off for all but uploads in parts, where
they save sending the others again: they do not reach into a body that is cut short, and hide how often was tried.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from cfstore.errors import PreconditionFailedError, RemoteError, RemoteObjectChangedError, RemoteObjectMissingError
from cfstore.remote.locate import allows_http, can_list, credentials_of, normal_url, settings_of
from cfstore.remote.retry import DEFAULT_RETRY, GaveUpError, Retry, TemporaryError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Result = TypeVar("Result")

_PART_BYTES: Final = 16 << 20
_SENT_IN_TIME: Final = 2 << 20  # bytes that a slow line, shared by many requests, takes within one timeout
_MOST_CONDITIONAL: Final = 5 * 10**9  # one request takes no more, on any cloud
_STATUS: Final = re.compile(r"status code: (\d{3})")
_QUERY: Final = re.compile(r"\?[^\s|]+")  # may hold a signature
_ENDED: Final = re.compile("InvalidBlockList|NoSuchUpload")  # Azure; some servers of S3's protocol
_ASKED_FOR_ROLE: Final = re.compile("latest/(api/token|meta-data)|computeMetadata|metadata/identity")
"""Addresses at which machines of a cloud are told their credentials; asked where the environment has none."""
_TRIES_FOR_ROLE: Final = 3
_TEMPORARY: Final = (408, 409, 425, 429)
_PLAIN_MD5: Final = re.compile(r'^"?([0-9a-f]{32})"?$')
_NO_RETRY: Final = {
    "max_retries": 0,
    "retry_timeout": timedelta(seconds=0),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=1), "base": 2},
}

_clients: dict[tuple[object, ...], ObjectStore] = {}
_first_in: dict[str, int] = {}
"""The process that spoke to a server first: this one, or one that it was forked from."""
_lock = threading.Lock()


@dataclass(frozen=True)
class Head:
    """Size of an object, what the server calls its content (None where it gives it no name), and when it was put."""

    size: int
    etag: str | None
    modified: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Fetched:
    """A whole object."""

    data: bytes
    etag: str | None


@dataclass(frozen=True)
class Range:
    """Some bytes of an object, in memory of the client."""

    data: memoryview
    etag: str | None


@dataclass(frozen=True)
class Bucket:
    """The objects below one address. Thread-safe; may be pickled: a process opens a client of its own.

    A process that was forked from one that had made requests cannot make any: the client's threads are not in it.

    Keys are relative to the address, with slashes. Every request is tried again where that may help.

    Parameters
    ----------
    url
        s3://bucket/folder, gs://..., az://..., or https:// and http:// of a web server that answers ranges.
    retry
        How often, and how long to wait between.
    timeout
        Seconds without a byte after which a request counts as failed; one that sends has as long for each 2 MiB,
        because the client counts from the beginning until the answer.
    settings
        What the client is told besides what it finds in the environment; by default `settings_of(url)`, as the
        environment was when the bucket was made.

    Raises
    ------
    StoreError
        The address cannot be one of a store.
    RemoteError
        obstore is not installed, or this process was forked too late (raised by the first request).
    """

    url: str
    retry: Retry = DEFAULT_RETRY
    timeout: float = 30.0
    settings: tuple[tuple[str, str], ...] | None = None
    _http: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", normal_url(self.url))
        if self.settings is None:
            object.__setattr__(self, "settings", tuple(sorted(settings_of(self.url).items())))
        object.__setattr__(self, "_http", self._http or allows_http(self.url))

    @property
    def can_list(self) -> bool:
        """Whether `list`, `put` and `delete` work: not on a plain web server."""
        return can_list(self.url)

    def shown(self, key: str) -> str:
        """The address of an object, for messages."""
        return f"{self.url}/{key}"

    # -- reading ---------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        """A whole object.

        Raises
        ------
        RemoteObjectMissingError
            There is none.
        RemoteError
            The request failed, finally.
        """
        found = self.fetch(key)
        assert found is not None  # noqa: S101 - only `unless` leads to None
        return found.data

    def fetch(self, key: str, *, unless: str | None = None) -> Fetched | None:
        """A whole object with its ETag; None where its ETag is still `unless`. Raises as `get`."""

        def request(_: int) -> Fetched | None:
            options = {"if_none_match": unless} if unless else {}
            result = _obstore().get(self._client(), key, options=options)
            data, size = bytes(result.bytes()), result.meta["size"]
            if len(data) != size:
                raise TemporaryError(f"{len(data):,} of {size:,} bytes came")
            return Fetched(data, result.meta["e_tag"])

        return self._run("read", key, request, unchanged=unless is not None)

    def get_range(self, key: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of an object, not empty: exactly stop - start of them. Raises as `read_range`."""
        return self.read_range(key, start, stop).data

    def read_into(self, key: str, start: int, memory: memoryview) -> str | None:
        """Fill `memory` (bytes, not empty) from byte `start` of an object; returns the object's ETag.

        Raises as `read_range`.
        """
        found = self.read_range(key, start, start + len(memory))
        np.copyto(np.frombuffer(memory, np.uint8), np.frombuffer(found.data, np.uint8))  # gives the interpreter free
        return found.etag

    def read_range(self, key: str, start: int, stop: int) -> Range:
        """Bytes [start, stop) of an object, not empty, and the object's ETag.

        Raises
        ------
        RemoteObjectMissingError
            There is no such object.
        RemoteObjectChangedError
            It ends before `stop`.
        RemoteError
            The request failed, finally.
        """

        def request(_: int) -> Range:
            result = _obstore().get(self._client(), key, options={"range": (start, stop)})
            meta = result.meta
            if meta["size"] < stop:
                raise RemoteObjectChangedError(
                    f"{self.shown(key)}: has {meta['size']:,} bytes, those up to {stop:,} were asked for: "
                    "it is not the one that was written"
                )
            data = memoryview(result.bytes())
            if len(data) != stop - start:
                raise TemporaryError(f"{len(data):,} of {stop - start:,} bytes came")
            return Range(data, meta["e_tag"])

        return self._run("read", key, request)

    def head(self, key: str) -> Head | None:
        """Size and ETag of an object; None where there is none. Raises RemoteError."""

        def request(_: int) -> Head:
            meta = _obstore().head(self._client(), key)
            return Head(meta["size"], meta["e_tag"], meta["last_modified"])

        try:
            return self._run("look at", key, request)
        except RemoteObjectMissingError:
            return None

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Key and size of every object below a folder, `prefix`, sorted by key.

        Raises
        ------
        RemoteError
            A plain web server, which cannot list; or the request failed, finally.
        """
        return ((key, size) for key, size, _ in self._listed(prefix))

    def list_times(self, prefix: str = "") -> Iterator[tuple[str, datetime]]:
        """Key of every object below a folder, and when it was put, sorted by key. Raises as `list`."""
        return ((key, modified) for key, _, modified in self._listed(prefix))

    def _listed(self, prefix: str) -> tuple[tuple[str, int, datetime], ...]:
        self._check_cloud("list")

        def request(_: int) -> tuple[tuple[str, int, datetime], ...]:
            chunks = _obstore().list(self._client(), prefix or None)
            return tuple(
                sorted((meta["path"], meta["size"], meta["last_modified"]) for chunk in chunks for meta in chunk)
            )

        return self._run("list", prefix, request)

    # -- writing ---------------------------------------------------------------------------------

    def put(
        self, key: str, content: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
    ) -> str | None:
        """Write a whole object, large files in parts; nobody ever sees half of one. Returns its ETag.

        Parameters
        ----------
        key, content
            Where, and the bytes or the file that holds them.
        if_absent
            Only where there is no such object yet.
        if_match
            Only in the place of the object with this ETag.

        Where an answer got lost and the next try finds the condition broken, the object is compared with `content`:
        if they are the same this call has won. So where it matters who of two writers it was, the content must name
        its writer. If another writer has put an object in the place of ours meanwhile, this counts as lost.

        Raises
        ------
        PreconditionFailedError
            The condition does not hold; nothing was written.
        RemoteError
            The request failed, finally. A conditional one may have been carried out all the same.
        """
        self._check_cloud("written to")
        if not if_absent and if_match is None:
            return self._put_any(key, content)
        data = content if isinstance(content, bytes) else content.read_bytes()
        if len(data) > _MOST_CONDITIONAL:
            raise RemoteError(f"{self.shown(key)}: {len(data):,} bytes are too many for one request with a condition")
        mode: Any = "create" if if_absent else {"e_tag": if_match}
        unclear = False

        def request(_: int) -> str | None:
            nonlocal unclear
            try:
                return self._put_once(key, data, mode)
            except TemporaryError:
                unclear = True
                raise
            except PreconditionFailedError:
                if unclear and (mine := self._etag_if_same(key, data)):
                    return mine
                raise

        return self._run("write", key, request)

    def _put_once(self, key: str, data: bytes, mode: Any) -> str | None:
        errors = _errors()
        try:
            put = _obstore().put(self._client(sends=len(data)), key, data, mode=mode, use_multipart=False)
        except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError) as error:
            # S3: another conditional request on the object has not ended yet. Azure: the object exists.
            if _status(error) == 409 and self.url.startswith("s3://"):
                raise TemporaryError(_line(error)) from error
            what = "exists already" if mode == "create" else "is not what it was"
            raise PreconditionFailedError(f"{self.shown(key)}: {what}; another process was first") from error
        except errors.BaseError as error:
            raise self._sorted_out(error, "write", key) from error
        etag: str | None = put["e_tag"]
        return etag

    def _put_any(self, key: str, content: bytes | Path) -> str | None:
        def request(_: int) -> str | None:
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            in_parts = size > _PART_BYTES
            client = self._client(sends=min(size, _PART_BYTES), in_parts=in_parts)
            try:
                put = _obstore().put(
                    client, key, content, use_multipart=in_parts, chunk_size=_PART_BYTES, max_concurrency=4
                )
            except (FileNotFoundError, _errors().BaseError) as error:
                if _ENDED.search(str(error)):  # the upload had ended, its answer got lost, and it was ended once more
                    raise TemporaryError(_line(error)) from error
                raise
            etag: str | None = put["e_tag"]
            return etag

        return self._run("write", key, request)

    def _etag_if_same(self, key: str, data: bytes) -> str | None:
        """The object's ETag if its content is `data`."""
        head = self.head(key)
        if head is None or head.size != len(data):
            return None
        if found := _PLAIN_MD5.match(head.etag or ""):
            same = found[1] == hashlib.md5(data, usedforsecurity=False).hexdigest()
            if same:
                return head.etag
        fetched = self.fetch(key)  # also where an ETag looks like a digest and is none, as with encrypted objects
        return fetched.etag if fetched is not None and fetched.data == data else None

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone already are no error. Raises RemoteError."""
        self._check_cloud("deleted from")
        listed = list(keys)
        errors = _errors()
        for at in range(0, len(listed), 1000):
            some = listed[at : at + 1000]

            def request(_: int, some: list[str] = some) -> None:
                try:
                    _obstore().delete(self._client(), some)
                except FileNotFoundError:
                    for key in some:
                        try:
                            _obstore().delete(self._client(), key)
                        except FileNotFoundError:
                            continue
                        except errors.BaseError as error:
                            raise self._sorted_out(error, "delete", key) from error

            self._run("delete", some[0], request)

    # -- requests --------------------------------------------------------------------------------

    def _check_cloud(self, what: str) -> None:
        if not self.can_list:
            raise RemoteError(f"{self.url}: a web server cannot be {what}; use s3://, gs:// or az://")

    def _client(self, *, sends: int = 0, in_parts: bool = False) -> ObjectStore:
        """A client whose requests send up to so many bytes; of as few kinds as will do."""
        _check_not_forked(self.url)
        times = 1 << ((max(sends, 1) - 1) // _SENT_IN_TIME).bit_length()
        key = (self.url, self.settings, self.timeout, self._http, times, in_parts)
        client = _clients.get(key)
        if client is None:
            with _lock:
                client = _clients.get(key) or self._opened(times, in_parts)
                _clients[key] = client
        return client

    def _opened(self, times: int, in_parts: bool) -> ObjectStore:
        retries: dict[str, Any] = {} if in_parts else {"retry_config": _NO_RETRY}
        options = {
            "allow_http": self._http,
            "connect_timeout": timedelta(seconds=min(10.0, self.timeout)),
            "read_timeout": timedelta(seconds=times * self.timeout),
            "timeout": timedelta(seconds=max(20, times) * self.timeout),
        }
        config: dict[str, Any] = {"config": dict(self.settings or ())} if self.settings else {}
        # A web address is no cloud's whatever its host: by https://ACCOUNT.blob.core.windows.net/... obstore would look
        # for credentials where it should ask.
        opens = _stores().from_url if self.can_list else _stores().HTTPStore.from_url
        try:
            opened: ObjectStore = opens(self.url, client_options=options, **config, **retries)
        except (ValueError, _errors().BaseError) as error:
            remedy = f"; set {credentials_of(self.url)}" if "Account must be specified" in str(error) else ""
            raise RemoteError(f"{self.url}: cannot be opened ({_line(error)}){remedy}") from error
        return opened

    def _run(self, what: str, key: str, request: Callable[[int], Result], *, unchanged: bool = False) -> Result:
        """Run a request again and again; `unchanged`: not modified is an answer, None."""
        errors = _errors()

        def sorted_out(number: int) -> Result:
            try:
                return request(number)
            except errors.NotModifiedError as error:
                if unchanged:
                    return None  # type: ignore[return-value]
                raise self._sorted_out(error, what, key) from error
            except (FileNotFoundError, PermissionError, ValueError, errors.BaseError) as error:
                raise self._sorted_out(error, what, key) from error

        def with_credentials(number: int) -> Result:
            try:
                return sorted_out(number)
            except TemporaryError as error:
                if number + 1 >= _TRIES_FOR_ROLE and _ASKED_FOR_ROLE.search(str(error)):
                    raise self._no_credentials(what, key, error) from error
                raise

        try:
            return self.retry.run(with_credentials)
        except GaveUpError as error:
            message = f"{self.shown(key)}: cannot {what} it, {error.tries} times in a row ({error})"
            raise RemoteError(f"{message}; the server or the way to it fails: try again later") from error

    def _sorted_out(self, error: BaseException, what: str, key: str) -> Exception:
        """An error of the client as what it means: to be tried again, missing, or final."""
        errors = _errors()
        if isinstance(error, FileNotFoundError) and _is_remote(error):
            return RemoteObjectMissingError(f"{self.shown(key)}: there is no such object")
        if isinstance(error, (PermissionError, errors.PermissionDeniedError, errors.UnauthenticatedError)):
            remedy = "check the cloud's credentials"
            if not self.can_list:
                remedy = "a web address is asked without credentials: with them, use s3://, gs:// or az://"
            return RemoteError(f"{self.shown(key)}: the server forbids to {what} it; {remedy}")
        status = _status(error)
        no_ranges = isinstance(error, errors.NotSupportedError) or "non-partial response" in str(error)
        final = isinstance(error, OSError | ValueError) or no_ranges
        if status is not None and 400 <= status < 500 and status not in _TEMPORARY:
            final = True
        if not final:
            return TemporaryError(_line(error))
        if _ASKED_FOR_ROLE.search(str(error)):
            return self._no_credentials(what, key, error)
        if status == 404 and what == "list":  # a folder that holds nothing is a list without entries
            return RemoteError(f"{self.url}: there is no such bucket; make it first, or mend the address")
        if status == 416:
            return RemoteObjectChangedError(f"{self.shown(key)}: is shorter than what was written")
        if no_ranges:
            return RemoteError(f"{self.shown(key)}: the server answers no ranges; use one that does")
        return RemoteError(f"{self.shown(key)}: cannot {what} it ({_line(error)})")

    def _no_credentials(self, what: str, key: str, error: BaseException) -> RemoteError:
        return RemoteError(
            f"{self.shown(key)}: cannot {what} it without credentials; set {credentials_of(self.url)} "
            f"(nor has this machine a role: {_line(error)})"
        )


def _check_not_forked(url: str) -> None:
    """Raise where a request would wait for ever, for threads that a fork does not copy."""
    if os.getpid() != _first_in.setdefault("pid", os.getpid()):
        message = (
            f"{url}: this process was forked from one that had spoken to object storage, which cannot go on in it: "
            "start it by spawn (of a DataLoader: multiprocessing_context='spawn')"
        )
        raise RemoteError(message)


def _is_remote(error: FileNotFoundError) -> bool:
    return error.filename is None  # the file that should be sent has a name


def _status(error: BaseException) -> int | None:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _line(error: BaseException) -> str:
    """What an error says, in one line, without signatures."""
    text = str(error).partition("Debug source")[0].strip() or type(error).__name__
    return _QUERY.sub("", " ".join(text.split()))[:300]


# -- obstore, loaded when it is needed ---------------------------------------------------------------


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        message = "stores on object storage need obstore: pip install 'crossfusion-store[remote]'"
        raise RemoteError(message) from error
    return obstore


def _stores() -> Any:
    _obstore()
    import obstore.store

    return obstore.store


def _errors() -> Any:
    _obstore()
    import obstore.exceptions

    return obstore.exceptions
