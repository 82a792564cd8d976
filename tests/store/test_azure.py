"""A store on Azure Blob Storage, against Microsoft's own emulator: its ETags, conditions and errors are not S3's.

The emulator (Azurite) comes from npm: `npm install --global azurite`. Without it these tests are skipped, visibly.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import itertools
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_proxy import Fault, FaultyProxy

import cfstore
from cfstore import ingest
from cfstore.errors import PreconditionFailedError, RemoteError, RemoteObjectMissingError, StoreNotFoundError
from cfstore.remote.bucket import Bucket
from cfstore.remote.creation import check_conditional
from cfstore.remote.locate import allows_http
from cfstore.remote.retry import Retry

pytestmark = pytest.mark.xdist_group("azurite")  # one server, gone when these tests are done
Make = Callable[..., Any]
ACCOUNT, KEY = "tests", base64.b64encode(b"a key of nothing").decode()
QUICK = Retry(tries=4, first=0.001, most=0.002)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the emulator."""
    pytest.importorskip("obstore", reason="needs the extra [remote]")
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("needs azurite: npm install --global azurite")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder = tmp_path_factory.mktemp("azurite")
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent", "--location", str(folder)]
    server = subprocess.Popen(
        [*command, "--skipApiVersionCheck", "--disableTelemetry"],
        env={"PATH": str(Path(program).parent) + ":/usr/bin:/bin", "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < until, "azurite does not listen"
            assert server.poll() is None, "azurite ended"
            time.sleep(0.05)
    yield port
    server.kill()
    server.wait()


@pytest.fixture
def proxy(azurite: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of it, to which the environment leads, with credentials."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with FaultyProxy(f"127.0.0.1:{azurite}") as proxy:
        for name, value in {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"{proxy.url}/{ACCOUNT}",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def url(proxy: FaultyProxy) -> str:
    """The address of a folder of an empty container of its own."""
    name = f"container-{next(_numbers)}"
    _make_container(proxy, name)
    return f"az://{name}/cohorts/store"


def _make_container(proxy: FaultyProxy, name: str) -> None:
    """Signed by hand, as Microsoft's documentation of Shared Key says: obstore makes no containers."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    signed = "".join(f"{key}:{value}\n" for key, value in sorted(headers.items()))
    text = f"PUT{chr(10) * 12}{signed}/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
    connection.request("PUT", f"/{ACCOUNT}/{name}?restype=container", headers=headers)
    assert connection.getresponse().status == 201
    connection.close()


@pytest.fixture
def folder(tmp_path: Path, make_cohort: Make) -> Path:
    """Three slides with a clinical table."""
    make_cohort(tmp_path / "uni", ("a", "b", "c"))
    (tmp_path / "uni" / "t.csv").write_text("case_id,slide_id,survival_months,censorship\np1,a.svs,3,0\n")
    return tmp_path / "uni"


def rows_of(store: cfstore.Store) -> Any:
    """All rows but for names of shards and places in them."""
    bags = store.sql("SELECT * EXCLUDE (shard, row_start, byte_start, byte_length) FROM bags ORDER BY ALL").to_pylist()
    return bags, [store.sql(f"SELECT * FROM {name} ORDER BY ALL").to_pylist() for name in ("slides", "patients")]


def test_the_emulator_on_this_machine_is_spoken_to_without_encryption_and_a_server_elsewhere_is_not():
    assert allows_http("az://c/s", {"AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:10000/tests"})
    assert not allows_http("az://c/s", {"AZURE_STORAGE_ENDPOINT": "http://storage.example/tests"})
    assert not allows_http("az://c/s", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"})
    assert allows_http("az://c/s", {"AZURE_ALLOW_HTTP": "true"})


def test_what_is_put_is_listed_read_by_ranges_and_deleted(url: str) -> None:
    bucket, content = Bucket(url, retry=QUICK), np.random.default_rng(0).bytes(40 << 20)
    bucket.put("a/large", content)  # in parts
    bucket.put("a/small", b"small")
    assert list(bucket.list("a")) == [("a/large", len(content)), ("a/small", 5)]
    assert bytes(bucket.get_range("a/large", 17 << 20, (17 << 20) + 99)) == content[17 << 20 : (17 << 20) + 99]
    assert bucket.get("a/large") == content
    bucket.delete(["a/large", "a/small", "a/never"])
    assert list(bucket.list()) == []
    with pytest.raises(RemoteObjectMissingError, match="a/small"):
        bucket.get("a/small")


def test_conditions_hold(url: str) -> None:
    bucket = Bucket(url, retry=QUICK)
    check_conditional(bucket)
    first = bucket.put("x", b"first", if_absent=True)
    with pytest.raises(PreconditionFailedError, match="exists already"):
        bucket.put("x", b"second", if_absent=True)
    second = bucket.put("x", b"second", if_match=first)
    with pytest.raises(PreconditionFailedError, match="not what it was"):
        bucket.put("x", b"third", if_match=first)
    assert bucket.get("x") == b"second"
    assert bucket.fetch("x", unless=second) is None
    assert bucket.fetch("x", unless=first).data == b"second"


def test_of_many_writers_at_once_one_wins_each_time(url: str) -> None:
    bucket = Bucket(url)
    etag = bucket.put("x", b"0", if_absent=True)
    for turn in range(5):
        together, answers = threading.Barrier(8), list[tuple[int, str]]()

        def write(number: int, turn: int = turn, etag: str | None = etag) -> None:
            together.wait()  # noqa: B023
            try:
                put = bucket.put("x", f"{turn}-{number}".encode(), if_match=etag)
            except PreconditionFailedError:
                return
            answers.append((number, put))  # noqa: B023

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 1
        assert bucket.get("x") == f"{turn}-{answers[0][0]}".encode()
        etag = answers[0][1]


def test_a_conditional_write_whose_answer_was_lost_has_won(url: str, proxy: FaultyProxy) -> None:
    bucket = Bucket(url, retry=QUICK)
    proxy.faults.append(Fault("lost", r"PUT .*/x"))
    etag = bucket.put("x", b"mine", if_absent=True)
    assert proxy.faults[0].hits == 1
    assert bucket.fetch("x", unless=etag) is None


def test_an_upload_in_parts_whose_answer_was_lost_is_whole(url: str, proxy: FaultyProxy) -> None:
    """Its parts are no parts any more when the client says once more that these make the object."""
    bucket, content = Bucket(url, retry=QUICK), np.random.default_rng(0).bytes(20 << 20)
    proxy.faults.append(Fault("lost", "PUT .*comp=blocklist"))
    etag = bucket.put("x", content)
    assert proxy.faults[0].hits == 1
    fetched = bucket.fetch("x")
    assert (fetched.data, fetched.etag) == (content, etag)


def test_a_server_that_fails_is_asked_again_and_a_wrong_key_is_refused_at_once(
    url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(url, retry=QUICK)
    bucket.put("x", b"content")
    proxy.faults += [Fault("status", "GET", status=503), Fault("reset", "GET"), Fault("cut", "GET")]
    assert bucket.get("x") == b"content"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"another").decode())
    before = proxy.count("GET")
    with pytest.raises(RemoteError, match="credentials"):
        Bucket(url, retry=QUICK, timeout=9.0).get("x")
    assert proxy.count("GET") == before + 1


def test_an_ingest_gives_what_one_into_a_folder_gives(url: str, folder: Path, tmp_path: Path) -> None:
    local, remote = cfstore.open(tmp_path / "store", create=True), cfstore.open(url, create=True)
    for store in (local, remote):
        store.ingest(folder)
    assert rows_of(cfstore.open(url)) == rows_of(local)
    here, there = (store.slide("b").bags for store in (local, cfstore.open(url)))
    assert sorted(there) == sorted(here)
    for scale, bag in here.items():
        np.testing.assert_array_equal(there[scale].features, bag.features)
        np.testing.assert_array_equal(there[scale].coords, bag.coords)


def test_three_writers_at_once_lose_nothing(
    url: str, tmp_path: Path, make_cohort: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "SLIDES_PER_SHARD", 2)
    slides = [[f"w{writer}-{number}" for number in range(5)] for writer in range(3)]
    for writer, names in enumerate(slides):
        make_cohort(tmp_path / f"{writer}" / "uni", names)
    cfstore.open(url, create=True)
    failures = []

    def write(writer: int) -> None:
        try:
            cfstore.open(url).ingest(tmp_path / f"{writer}" / "uni", jobs=1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = cfstore.open(url).sql("SELECT DISTINCT slide_id FROM bags ORDER BY 1")["slide_id"].to_pylist()
    assert found == sorted(name for names in slides for name in names)


def test_there_is_no_store_in_an_empty_container(url: str) -> None:
    with pytest.raises(StoreNotFoundError, match="no store there"):
        cfstore.open(url)


def test_a_container_that_is_not_there_is_an_error_that_says_so(proxy: FaultyProxy) -> None:
    with pytest.raises(RemoteError, match=r"^az://never-made/store: there is no such bucket; make it first"):
        cfstore.open("az://never-made/store", create=True)
