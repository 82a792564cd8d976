"""A store on a plain web server: ranges, no listing, nothing written."""

from __future__ import annotations

import functools
import http.server
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from faulty_proxy import Fault, FaultyProxy
from range_server import RangeServer, _Handler

import cfstore
from cfstore import IngestOptions, RemoteError, StoreError
from cfstore.errors import StoreNotFoundError
from cfstore.remote.bucket import Bucket
from cfstore.remote.retry import Retry

pytest.importorskip("obstore", reason="needs the extra [remote]")


@pytest.fixture
def local(tmp_path, make_cohort, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    make_cohort(tmp_path / "C", dim=16)
    store = cfstore.open(tmp_path / "a store", create=True)
    store.ingest(tmp_path / "C", IngestOptions(encoder="uni"), jobs=1)
    return store


def test_it_is_read_as_from_a_folder(local, tmp_path):
    with RangeServer(tmp_path) as server:
        remote = cfstore.open(f"{server.url}/a store")
        assert remote.sql("SELECT * FROM bags ORDER BY ALL") == local.sql("SELECT * FROM bags ORDER BY ALL")
        for slide_id in ("s1", "s2", "s3"):
            here, there = local.slide(slide_id), remote.slide(slide_id)
            for scale, bag in here.bags.items():
                np.testing.assert_array_equal(there.bags[scale].features, bag.features)
                np.testing.assert_array_equal(there.bags[scale].coords, bag.coords)
        assert remote.info().path == f"{server.url}/a store"
        with pytest.raises(StoreError, match="needs the store in a folder"):
            remote.compact()


def test_a_server_that_names_no_versions_is_asked_for_the_catalog_each_time(local, tmp_path, monkeypatch):
    head = _Handler._head
    monkeypatch.setattr(
        _Handler, "_head", lambda self, status, length, **more: head(self, status, length, **_without(more, "ETag"))
    )
    with RangeServer(local.path) as server:
        first = cfstore.open(server.url)
        before = server.n_requests
        again = cfstore.open(server.url)
        assert server.n_requests > before + 2
        assert again.path == first.path
        assert again.slide("s2").bags.keys() == local.slide("s2").bags.keys()


def _without(headers, name):
    return {key: value for key, value in headers.items() if key != name}


def test_a_server_without_ranges_is_refused(local):
    with plain_server(str(local.path)) as url, pytest.raises(RemoteError, match="the server answers no ranges"):
        cfstore.open(url).slide("s1")


def test_an_address_without_a_store_is_named(tmp_path):
    with RangeServer(tmp_path) as server, pytest.raises(StoreNotFoundError, match=f"{server.url}/nothing: no store"):
        cfstore.open(f"{server.url}/nothing")


@pytest.mark.parametrize(
    "host", ["lab.s3.eu-west-1.amazonaws.com", "lab.dfs.core.windows.net", "lab.blob.core.windows.net", "example.org"]
)
def test_a_web_address_is_asked_as_it_is_written_also_where_it_is_a_clouds(host, monkeypatch):
    """And not by the cloud's own protocol, which signs requests, and goes where the cloud's variables lead."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_ENDPOINT_URL": "https://minio.example.org",
        "AZURE_STORAGE_ACCOUNT_KEY": "dGVzdHM=",
        "AZURE_STORAGE_ENDPOINT": "https://other.example.org",
    }.items():
        monkeypatch.setenv(name, value)
    with _ways_to(monkeypatch) as asked:
        with pytest.raises(RemoteError, match="cannot look at it"):
            Bucket(f"https://{host}/cohorts/store", retry=Retry(1)).head("store.json")
        assert asked == [f"CONNECT {host}:443 HTTP/1.1"]


def test_a_web_server_that_forbids_is_one_that_would_have_to_be_asked_otherwise(tmp_path):
    with RangeServer(tmp_path) as server, FaultyProxy(server.url.removeprefix("http://")) as proxy:
        proxy.faults.append(Fault("status", status=403))
        with pytest.raises(
            RemoteError, match=r"forbids to read it; .*without credentials: .* use s3://, gs:// or az://"
        ):
            cfstore.open(f"{proxy.url}/store")


@contextmanager
def _ways_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stands between this machine and all others: the first lines of what is asked of it; nothing gets through."""
    asked: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline().decode().strip())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


@contextmanager
def plain_server(folder: str) -> Iterator[str]:
    """What `python -m http.server` is."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
