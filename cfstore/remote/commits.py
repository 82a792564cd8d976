"""The commit rule of a store in a bucket.

There is no rename. What stands for it is one conditional PUT: the catalog is replaced if it still is the one that was
read (If-Match its ETag; If-None-Match for the first). Everything that it newly names was put before, under names that
nobody else uses; until then nothing names them, so nobody sees them. Who loses the race reads the newer catalog and
does its change again on top of that.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from cfstore.errors import StoreBusyError
from cfstore.remote.bucket import Bucket
from cfstore.remote.leases import Lease
from cfstore.remote.staging import pull, push

Result = TypeVar("Result")
COMMIT_SECONDS: Final = 900.0
_LONGEST_PAUSE: Final = 2.0


def commit(root: Path, bucket: Bucket, change: Callable[[], Result]) -> Result:
    """Do `change` to the folder that stands for the store and commit it; needs the folder's lock.

    `change` may be called several times, each time on the newest state, and must look at it anew.

    Raises
    ------
    StoreBusyError
        Other writers were faster for 15 minutes.
    """
    lease = Lease(bucket)
    started, lost = time.monotonic(), 0
    try:
        while True:
            lease.wait()
            pulled = pull(root, bucket)
            result = change()
            if push(root, bucket, pulled):
                return result
            lost += 1
            if time.monotonic() - started > COMMIT_SECONDS:
                message = f"{bucket.url}: other writers were faster {lost} times; run this again when they are done"
                raise StoreBusyError(message)
            time.sleep(random.uniform(0, min(0.05 * 2**lost, _LONGEST_PAUSE)))  # noqa: S311 - spreads writers out
            lease.take()
    finally:
        lease.release()
