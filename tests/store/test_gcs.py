"""A store on Google Cloud Storage is read as one in a folder.

Google's XML API, which the client speaks, is that of S3 for GET, HEAD and lists
(https://cloud.google.com/storage/docs/interoperability): an S3 server answers it. What it has of its own is not shown
here: its ETags, its tokens, its errors; its conditions on writes are why nothing is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import same_bags, upload
from faulty_proxy import Fault, FaultyProxy

import cfstore
from cfstore import RemoteError, Store
from cfstore.errors import DamagedShardError, StoreNotFoundError
from cfstore.remote.bucket import Bucket
from cfstore.remote.locate import allows_http
from cfstore.remote.retry import Retry

SLIDES = ("s1", "s2", "s3")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are not what is tested here."""
    monkeypatch.setattr(Retry, "wait", lambda self, number: 0.001)


@pytest.fixture
def local(tmp_path: Path, make_cohort: Any) -> Store:
    """A store in a folder."""
    make_cohort(tmp_path / "C", SLIDES, dim=16)
    store = cfstore.open(tmp_path / "local", create=True)
    store.ingest(tmp_path / "C", cfstore.IngestOptions(encoder="uni"), jobs=1)
    return store


@pytest.fixture
def url(local: Store, bucket_url: str, s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of its copy; the environment leads to it, with a token."""
    upload(local.path, bucket_url)
    monkeypatch.setenv("GOOGLE_BASE_URL", s3.url)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "tests")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    return bucket_url.replace("s3://", "gs://")


def test_only_a_server_on_this_machine_is_spoken_to_without_encryption_unless_it_is_asked_for():
    assert allows_http("gs://b/s", {"GOOGLE_BASE_URL": "http://127.0.0.1:4443"})
    assert not allows_http("gs://b/s", {"GOOGLE_BASE_URL": "http://storage.example:4443"})
    assert not allows_http("gs://b/s", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"})
    assert allows_http("gs://b/s", {"GOOGLE_BASE_URL": "http://storage.example", "GOOGLE_ALLOW_HTTP": "true"})


def test_slides_rows_and_sql_are_those_of_the_folder(local: Store, url: str) -> None:
    remote = cfstore.open(url)
    for slide_id in SLIDES:
        same_bags(local.slide(slide_id), remote.slide(slide_id))
    readers = [store.reader("uni", [5, 20], SLIDES, with_coords=True) for store in (local, remote)]
    for one, other in zip(*(reader.stream(SLIDES) for reader in readers), strict=True):
        assert one.slide_id == other.slide_id
        same_bags(one, other)
    one, other = (reader.read_rows("s2", 20, [(0, 2), (1, 3)]) for reader in readers)
    np.testing.assert_array_equal(one.features, other.features)
    query = "SELECT slide_id, scale, n_patches, digest FROM bags ORDER BY ALL"
    assert remote.sql(query) == local.sql(query)
    assert remote.info().path == url


def test_opening_it_again_is_one_request_that_says_nothing_changed(url: str, s3: FaultyProxy) -> None:
    cfstore.open(url)
    before = len(s3.log)
    cfstore.open(url).sql("FROM bags")
    assert len(s3.log) == before + 1


def test_what_is_there_is_listed(local: Store, url: str) -> None:
    there = dict(Bucket(url).list())
    here = {path.relative_to(local.path).as_posix(): path.stat().st_size for path in local.path.rglob("*")}
    assert there
    assert there.items() <= here.items()
    assert any(key.startswith("features/") for key in there)


def test_a_server_that_fails_is_asked_again(local: Store, url: str, s3: FaultyProxy) -> None:
    remote = cfstore.open(url)
    s3.faults += [
        Fault("status", "GET .*c.*0.*0", status=503),
        Fault("reset", "GET .*c.*0.*0"),
        Fault("cut", "GET .*c"),
    ]
    same_bags(remote.slide("s2"), local.slide("s2"))
    assert [fault.hits for fault in s3.faults] == [1, 1, 1]


def test_faults_that_stay_and_vanished_objects_are_errors_that_name_slide_and_object(url: str, s3: FaultyProxy) -> None:
    remote = cfstore.open(url)
    s3.faults.append(Fault("status", "GET .*features", times=999))
    with pytest.raises(RemoteError, match=rf"^slide s2: {url}/features/uni/.*c/0/0: .* times in a row"):
        remote.slide("s2")
    s3.faults[:] = [Fault("gone", "GET .*features", times=999)]
    with pytest.raises(DamagedShardError, match=rf"^slide s2: {url}/features/uni/.*open it again"):
        remote.slide("s2")


def test_who_may_not_read_is_told_so_at_once(url: str, s3: FaultyProxy) -> None:
    s3.faults.append(Fault("status", "GET", status=403, times=999))
    with pytest.raises(RemoteError, match=r"forbids to read it; check the cloud's credentials"):
        cfstore.open(url)
    assert s3.faults[0].hits == 1


def test_an_address_without_a_store_is_named(url: str) -> None:
    with pytest.raises(StoreNotFoundError, match=f"^{url}/nothing: no store there"):
        cfstore.open(f"{url}/nothing")
