"""A store on a plain web server: ranges, no listing, nothing written."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from range_server import RangeServer, _Handler

import cfstore
from cfstore import IngestOptions, RemoteError, StoreError
from cfstore.errors import StoreNotFoundError

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
