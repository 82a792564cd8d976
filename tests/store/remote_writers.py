"""Writers of a bucket in processes of their own, killed at a request; and what a bucket holds, by other means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import duckdb
from faulty_proxy import Fault, FaultyProxy

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import json, os, sys
import cfstore, cfstore.ingest, cfstore.cli, zarr, h5py, duckdb, obstore
cfstore.ingest.SLIDES_PER_SHARD = 2
for line in sys.stdin:
    url, folder = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            cfstore.open(url, create=True).ingest(folder, jobs=1)
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Writers:
    """A process that has imported everything and forks one child per ingest."""

    def __init__(self, temporary: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
            "TMPDIR": str(temporary),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, url: str, folder: Path) -> int:
        """Start an ingest; returns the number of its process."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([url, str(folder)]) + "\n")
        self._process.stdin.flush()
        return self._line()

    def end(self) -> int:
        """Wait for it; returns its exit code."""
        return self._line()

    def _line(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.communicate()


class Executioner(FaultyProxy):
    """Kills `victim` when it sends its request number `at` (from 0) that changes something: before or after it is
    done. PUTs are served one after another: the server's conditions are no single step in threads, as S3's are.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.victim: int | None = None
        self.known = threading.Event()
        self.at, self.when, self.n_changes = -1, "before", 0
        self._one_by_one = threading.Lock()
        self._mine = threading.local()  # of the request that this thread serves

    def aim(self, at: int, when: str) -> None:
        """At which request the next victim dies."""
        self.known.clear()
        self.at, self.when, self.n_changes = at, when, 0

    def enter(self, line: str) -> None:
        super().enter(line)
        self._mine.changes = line.startswith(("PUT", "POST", "DELETE"))
        self._mine.doomed = False
        if self._mine.changes:
            self._one_by_one.acquire()
            self._mine.doomed = self.n_changes == self.at
            self.n_changes += 1

    def fault_for(self, request: str) -> Fault | None:
        if self._mine.doomed and self.when == "before":
            self._kill()
            return Fault("reset")
        return super().fault_for(request)

    def asked(self, line: str) -> None:
        if self._mine.doomed and self.when == "after":
            self._kill()

    def leave(self) -> None:
        super().leave()
        if self._mine.changes:
            self._one_by_one.release()

    def _kill(self) -> None:
        self.known.wait()
        assert self.victim is not None
        os.kill(self.victim, signal.SIGKILL)


def client(port: int) -> Any:
    """Amazon's own client of the server on loopback."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="tests",
        aws_secret_access_key="tests",  # noqa: S106 - the server takes any
        region_name="us-east-1",
    )


def download(port: int, url: str, folder: Path) -> bool:
    """Copy what the catalog of a store names into `folder`, as a store there; False where there is no catalog yet."""
    parts = urlsplit(url)
    bucket, prefix = parts.netloc, parts.path.strip("/")
    s3 = client(port)

    def keys(below: str) -> list[str]:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/{below}")
        return [item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", [])]

    def fetch(key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.get_object(Bucket=bucket, Key=f"{prefix}/{key}")["Body"].read())

    try:
        if "catalog.duckdb" not in keys("catalog"):
            return False
        (folder / "tables").mkdir(parents=True)
        (folder / "features").mkdir()
        fetch("catalog.duckdb", folder / "catalog.duckdb")
        fetch("store.json", folder / "store.json")
        if "catalog.parquet" in keys("catalog"):
            fetch("catalog.parquet", folder / "catalog.parquet")
        with duckdb.connect(folder / "catalog.duckdb", read_only=True) as catalog:
            shards = catalog.execute("SELECT shard FROM internal.shards").fetchall()
            tables = catalog.execute("SELECT file, object FROM internal.table_objects").fetchall()
            derived = catalog.execute("SELECT file FROM internal.derived_files").fetchall()
        for (shard,) in shards:
            for key in keys(shard):
                fetch(key, folder / key)
        for file, key in tables:
            fetch(key, folder / "tables" / file)
        for (file,) in derived:
            fetch(file, folder / file)
    finally:
        s3.close()
    return True


def objects(port: int, url: str, below: str = "") -> list[str]:
    """Keys of all objects of a store."""
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    s3 = client(port)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=parts.netloc, Prefix=f"{prefix}/{below}")
    found = [item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", [])]
    s3.close()
    return found
