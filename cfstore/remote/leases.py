"""Writers of one bucket out of each other's way: politeness, not safety.

What a commit relies on is its condition (see `commits`). A writer that lost a race takes the lease, so that the others
let it through; one that never lost only looks whether somebody has it. Lost, ignored, taken over too early by a clock
that is wrong: all this costs another try and nothing else.
"""

from __future__ import annotations

import json
import time
import uuid
from contextlib import suppress
from typing import Final

from cfstore.errors import PreconditionFailedError, RemoteError, RemoteObjectMissingError
from cfstore.remote.bucket import Bucket

LEASE_FILE: Final = ".lease.json"
LEASE_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.1


class Lease:
    """The lease of a bucket, as one writer sees it: `wait`, `take` and `release` in any order."""

    def __init__(self, bucket: Bucket, seconds: float = LEASE_SECONDS) -> None:
        self._bucket, self._seconds = bucket, seconds
        self._etag: str | None = None

    def wait(self) -> None:
        """Until nobody else has the lease: given back, expired, or seen unchanged for as long as a lease lasts."""
        if self._etag is not None:
            return
        seen, since = None, time.monotonic()
        while (found := self._read()) is not None:
            if found != seen:
                seen, since = found, time.monotonic()
            if _expires(found) < time.time() or time.monotonic() - since > self._seconds:
                return
            time.sleep(_POLL_SECONDS)

    def take(self) -> bool:
        """Take the lease, or one that expired; False where others are faster."""
        content = json.dumps({"writer": uuid.uuid4().hex, "expires": time.time() + self._seconds}).encode()
        try:
            held = self._bucket.head(LEASE_FILE)
            if held is None:
                self._etag = self._bucket.put(LEASE_FILE, content, if_absent=True)
            else:
                self.wait()
                self._etag = self._bucket.put(LEASE_FILE, content, if_match=held.etag)
        except (PreconditionFailedError, RemoteObjectMissingError):
            return False
        return True

    def release(self) -> None:
        """Give the lease back, if it still is ours."""
        etag, self._etag = self._etag, None
        if etag is None:
            return
        with suppress(RemoteError):  # it expires
            held = self._bucket.head(LEASE_FILE)
            if held is not None and held.etag == etag:
                self._bucket.delete([LEASE_FILE])

    def _read(self) -> bytes | None:
        try:
            return self._bucket.get(LEASE_FILE)
        except RemoteObjectMissingError:
            return None


def _expires(content: bytes) -> float:
    """When a lease ends, seconds since 1970; 0 where it does not say."""
    try:
        return float(json.loads(content)["expires"])
    except (ValueError, KeyError, TypeError):
        return 0.0
