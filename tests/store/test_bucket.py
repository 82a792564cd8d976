"""Requests to object storage, against a real S3-protocol server through a proxy that injects faults."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import threading
import warnings
from typing import Any

import pytest
from faulty_proxy import Fault, FaultyProxy

from cfstore.errors import (
    PreconditionFailedError,
    RemoteError,
    RemoteObjectChangedError,
    RemoteObjectMissingError,
    StoreError,
)
from cfstore.remote.bucket import Bucket
from cfstore.remote.locate import allows_http, can_list, is_url, normal_url, settings_of
from cfstore.remote.retry import GaveUpError, Retry, TemporaryError

QUICK = Retry(tries=4, first=0.001, most=0.002)


@pytest.fixture
def bucket(bucket_url: str) -> Bucket:
    return Bucket(bucket_url, retry=QUICK, timeout=2.0)


# -- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["s3://bucket/store", "gs://b/s", "az://account/c/s", "https://host/s", "ftp://x/y"])
def test_an_address_is_told_from_a_path(text):
    assert is_url(text)


@pytest.mark.parametrize("text", ["store", "/data/s3/store", "C:/store", "./s3:/x", "s3:/one-slash"])
def test_a_path_is_not_an_address(text):
    assert not is_url(text)


def test_an_address_has_one_spelling():
    assert normal_url("S3://Bucket-a//some/store/") == "s3://Bucket-a/some/store"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://host/store", "s3://"),
        ("s3:///store", "names no bucket"),
        ("https://name:secret@host/store", "no part of a store's address"),
        ("https://host/store?token=secret", "no part of a store's address"),
        ("s3://bucket/a/../b", "'..'"),
    ],
)
def test_an_address_that_cannot_be_a_stores_is_refused_without_showing_secrets(text, words):
    with pytest.raises(StoreError, match="://") as caught:
        normal_url(text)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_only_this_machine_is_spoken_to_without_encryption_unless_it_is_asked_for():
    assert allows_http("s3://b/s", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"})
    assert allows_http("s3://b/s", {"AWS_ENDPOINT_URL": "http://localhost:9000"})
    assert not allows_http("s3://b/s", {"AWS_ENDPOINT_URL": "http://storage.example:9000"})
    assert not allows_http("s3://b/s", {"AWS_ENDPOINT_URL": "http://localhost.example:9000"})
    assert allows_http("s3://b/s", {"AWS_ENDPOINT_URL": "http://storage.example", "AWS_ALLOW_HTTP": "true"})
    assert allows_http("http://storage.example/s", {})
    assert not allows_http("https://storage.example/s", {})


def test_only_clouds_list_and_take_writes():
    assert [can_list(f"{scheme}://b/s") for scheme in ("s3", "gs", "az", "https", "http")] == [True] * 3 + [False] * 2


def test_the_endpoint_of_s3_goes_before_the_general_one():
    both = {"AWS_ENDPOINT_URL": "https://a", "AWS_ENDPOINT_URL_S3": "https://b", "AWS_DEFAULT_REGION": "eu-west-1"}
    assert settings_of("s3://b/s", both) == {"endpoint": "https://b", "region": "eu-west-1"}
    assert settings_of("gs://b/s", both) == {}


# -- retrying ------------------------------------------------------------------------------------


def test_waits_double_up_to_a_limit_and_are_never_equal_for_all():
    retry = Retry(tries=9, first=0.2, most=5)
    for number, longest in enumerate([0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]):
        waits = [retry.wait(number) for _ in range(50)]
        assert longest / 2 <= min(waits)
        assert max(waits) <= longest
        assert len(set(waits)) > 40


def test_only_what_may_pass_is_tried_again():
    waited: list[float] = []
    seen: list[int] = []

    def third_time(number: int) -> str:
        seen.append(number)
        if number < 2:
            raise TemporaryError("503")
        return "there"

    assert Retry(tries=5).run(third_time, waited.append) == "there"
    assert (seen, len(waited)) == ([0, 1, 2], 2)

    def never(number: int) -> None:
        raise TemporaryError(f"failure {number}")

    with pytest.raises(GaveUpError, match="failure 4") as caught:
        Retry(tries=5).run(never, waited.append)
    assert caught.value.tries == 5

    def wrong(_: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        Retry().run(wrong, waited.append)


# -- one object ----------------------------------------------------------------------------------


def test_what_was_put_comes_back_whole_and_in_ranges(bucket):
    etag = bucket.put("features/a b/ü.bin", b"0123456789")
    assert etag == f'"{hashlib.md5(b"0123456789").hexdigest()}"'  # noqa: S324 - what S3 calls it
    assert bucket.get("features/a b/ü.bin") == b"0123456789"
    assert bucket.get_range("features/a b/ü.bin", 2, 5) == b"234"
    memory = bytearray(4)
    assert bucket.read_into("features/a b/ü.bin", 6, memoryview(memory)) == etag
    assert memory == b"6789"
    head = bucket.head("features/a b/ü.bin")
    assert (head.size, head.etag) == (10, etag)


def test_a_file_of_several_parts_comes_back_whole(bucket, tmp_path):
    content = bytes(range(256)) * 4096 * 33
    (tmp_path / "large").write_bytes(content)
    bucket.put("large", tmp_path / "large")
    assert bucket.head("large").size == len(content)
    assert bucket.get("large") == content


def test_a_folder_is_listed_with_all_that_lies_below_it_and_nothing_beside(bucket):
    for key in ("a/x/1", "a/x/2", "a/xy/3", "b"):
        bucket.put(key, key.encode())
    assert list(bucket.list("a/x")) == [("a/x/1", 5), ("a/x/2", 5)]
    assert [key for key, _ in bucket.list()] == ["a/x/1", "a/x/2", "a/xy/3", "b"]


def test_deleting_what_is_gone_is_no_error(bucket):
    bucket.put("a", b"1")
    bucket.put("b", b"2")
    bucket.delete(["a", "never there"])
    assert bucket.head("a") is None
    bucket.delete([])
    assert [key for key, _ in bucket.list()] == ["b"]


def test_an_unchanged_object_is_not_sent_again(bucket):
    etag = bucket.put("a", b"1")
    assert bucket.fetch("a", unless=etag) is None
    assert bucket.fetch("a", unless='"other"').data == b"1"


def test_an_object_that_is_missing_is_named(bucket):
    with pytest.raises(RemoteObjectMissingError, match=f"{bucket.url}/a: there is no such object"):
        bucket.get("a")
    with pytest.raises(RemoteObjectMissingError):
        bucket.get_range("a", 0, 3)
    assert bucket.head("a") is None


@pytest.mark.parametrize("start", [3, 30])
def test_an_object_shorter_than_asked_for_is_an_error_and_not_asked_for_again(bucket, s3, start):
    bucket.put("a", b"0123456789")
    before = len(s3.log)
    with pytest.raises(RemoteObjectChangedError, match="was written"):
        bucket.get_range("a", start, start + 8)
    assert len(s3.log) == before + 1


def test_a_bucket_goes_to_another_process_and_serves_many_threads(bucket):
    bucket.put("a", bytes(range(250)))
    twin = pickle.loads(pickle.dumps(bucket))
    assert twin == bucket
    found: dict[int, bytes] = {}

    def read(number: int) -> None:
        found[number] = twin.get_range("a", number, number + 10)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: bytes(range(number, number + 10)) for number in range(40)}


def _get(bucket: Bucket, answers: Any) -> None:
    try:
        answers.put(bucket.get("a"))
    except RemoteError as error:
        answers.put(str(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_was_forked_is_told_to_spawn_and_does_not_wait_for_ever(bucket, method):
    bucket.put("a", b"0123")
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    process = context.Process(target=_get, args=(bucket, answers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: that forking with threads is dangerous
        process.start()
    process.join(20)
    process.kill()
    process.join()
    assert not answers.empty()
    answer = answers.get()
    assert answer == b"0123" if method == "spawn" else "start it by spawn" in answer


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "GET", times=2, status=500),
        Fault("status", "GET", times=3, status=503),
        Fault("status", "GET", times=2, status=429),
        Fault("reset", "GET", times=3),
        Fault("cut", "GET", times=3),
        Fault("short", "GET", times=2),
        Fault("slow", "GET", times=2),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_what_passes_is_tried_again(bucket, s3: FaultyProxy, fault):
    bucket.put("a", bytes(range(200)))
    s3.faults.append(fault)
    times = fault.times
    assert bucket.get_range("a", 10, 110) == bytes(range(10, 110))
    assert fault.hits == (times if fault.kind != "slow" else 1)


def test_a_server_that_does_not_answer_is_given_up_after_the_timeout(bucket, s3):
    quick = Bucket(bucket.url, retry=Retry(2, 0.001, 0.001), timeout=0.1)
    bucket.put("a", b"0123")
    s3.faults.append(Fault("hang", "GET", times=9, seconds=1.0))
    with pytest.raises(RemoteError, match="2 times in a row"):
        quick.get("a")


@pytest.mark.parametrize(("n_mib", "options"), [(12, {"if_absent": True}), (12, {}), (40, {})])
def test_a_slow_line_is_no_reason_to_give_up_while_it_takes_what_is_sent(bucket, s3, n_mib, options):
    """A part of 16 MiB takes longer than 30 s where 32 of them share 100 Mbit/s."""
    content = bytes(n_mib << 20)
    once = Bucket(bucket.url, retry=Retry(1), timeout=0.5)
    s3.faults.append(Fault("sips", "PUT", times=99, seconds=0.08))
    once.put("a", content, **options)
    assert bucket.head("a").size == len(content)
    assert s3.count("PUT") == (1 if n_mib < 16 else 3)


@pytest.mark.parametrize("kind", ["status", "reset", "cut", "short"])
def test_what_stays_is_an_error_that_says_what_and_how_often(bucket, s3, kind):
    bucket.put("a", b"0123456789")
    s3.faults.append(Fault(kind, "GET", times=99))
    with pytest.raises(RemoteError, match=r"/a: cannot read it, 4 times in a row \(.+\).*try again later") as caught:
        bucket.get_range("a", 0, 8)
    assert "\n" not in str(caught.value)
    assert s3.faults[0].hits == 4


@pytest.mark.parametrize("options", [{"if_absent": True}, {}])
def test_what_fits_into_one_request_is_sent_as_often_as_is_said(bucket, s3, options):
    s3.faults.append(Fault("status", "PUT", times=99))
    with pytest.raises(RemoteError, match="cannot write it, 4 times in a row"):
        bucket.put("a", b"0123456789", **options)
    assert s3.count("PUT") == 4


@pytest.mark.parametrize("where", ["PUT .*partNumber=2", r"POST .*uploads=$", "POST .*uploadId="])
def test_an_upload_in_parts_survives_an_answer_that_gets_lost(bucket, s3, where):
    content = bytes(range(256)) * (80 << 10)
    s3.faults.append(Fault("lost", where))
    assert bucket.put("a", content) == bucket.head("a").etag
    assert s3.faults[0].hits == 1
    assert bucket.get("a") == content


def test_a_server_that_knows_an_upload_no_more_once_it_has_ended_gets_it_again(bucket, s3, monkeypatch):
    """As MinIO does; the server of these tests, and Amazon's for some minutes, answer as the first time."""
    content, at = bytes(range(256)) * (80 << 10), "POST .*uploadId="
    s3.faults += [Fault("lost", at), Fault("status", at, status=404)]
    monkeypatch.setattr("faulty_proxy.INJECTED", b"<Error><Code>NoSuchUpload</Code></Error>")
    assert bucket.put("a", content) == bucket.head("a").etag
    assert [fault.hits for fault in s3.faults] == [1, 1]
    assert bucket.get("a") == content


def test_forbidden_is_not_asked_for_again(bucket, s3):
    s3.faults.append(Fault("status", status=403, times=99))
    with pytest.raises(RemoteError, match="credentials"):
        bucket.get("a")
    assert len(s3.log) == 1


def test_a_listing_and_a_deletion_are_tried_again(bucket, s3):
    bucket.put("a", b"1")
    s3.faults += [Fault("status", "GET", times=2), Fault("reset", "POST|DELETE", times=2)]
    assert [key for key, _ in bucket.list()] == ["a"]
    bucket.delete(["a"])
    assert [key for key, _ in bucket.list()] == []


# -- writes with a condition ---------------------------------------------------------------------


def test_only_the_first_of_two_writers_makes_an_object(bucket):
    bucket.put("a", b"mine", if_absent=True)
    with pytest.raises(PreconditionFailedError, match="exists already"):
        bucket.put("a", b"yours", if_absent=True)
    assert bucket.get("a") == b"mine"


def test_an_object_is_replaced_only_while_it_is_what_it_was(bucket):
    first = bucket.put("a", b"1")
    second = bucket.put("a", b"2", if_match=first)
    with pytest.raises(PreconditionFailedError, match="is not what it was"):
        bucket.put("a", b"3", if_match=first)
    assert bucket.get("a") == b"2"
    assert bucket.put("a", b"3", if_match=second)


@pytest.mark.parametrize("fault", ["lost", "status", "reset"])
@pytest.mark.parametrize("condition", ["if_absent", "if_match"])
def test_a_conditional_write_whose_answer_was_lost_finds_out_that_it_had_won(bucket, s3, condition, fault):
    first = bucket.put("old", b"1")
    key = "new" if condition == "if_absent" else "old"
    s3.faults.append(Fault(fault, "PUT", times=2))
    etag = bucket.put(key, b"mine", **{condition: True if condition == "if_absent" else first})
    assert bucket.get(key) == b"mine"
    assert etag == bucket.head(key).etag


@pytest.mark.parametrize("length", [4, 5])
def test_a_conditional_write_that_never_arrived_finds_out_that_another_writer_was_first(bucket, s3, length):
    s3.faults.append(Fault("reset", "PUT", times=1))
    direct = Bucket(bucket.url, settings=(("endpoint", f"http://{s3.upstream}"), ("region", "us-east-1")))
    theirs = b"other"[:length]
    waits = Retry(3, 0.001, 0.001)
    slow = Bucket(bucket.url, retry=_Between(waits, lambda: direct.put("a", theirs)))
    with pytest.raises(PreconditionFailedError):
        slow.put("a", b"mine", if_absent=True)
    assert bucket.get("a") == theirs


class _Between(Retry):
    """Lets something happen between the first try and the second."""

    def __init__(self, waits: Retry, happens: object) -> None:
        super().__init__(waits.tries, waits.first, waits.most)
        object.__setattr__(self, "happens", happens)

    def run(self, request, sleep=None):
        return super().run(request, lambda _: self.happens())


def test_a_web_server_takes_no_writes_and_lists_nothing():
    web = Bucket("https://127.0.0.1:1/store")
    for refused in (lambda: web.put("a", b""), lambda: web.delete(["a"]), lambda: list(web.list())):
        with pytest.raises(RemoteError, match="a web server cannot be"):
            refused()


# -- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "asked_at", "words"),
    [
        ("s3://b/s", {"AWS_METADATA_ENDPOINT": "http://{}"}, "set AWS_ACCESS_KEY_ID and .* AWS_SKIP_SIGNATURE=true "),
        ("gs://b/s", {"GCE_METADATA_HOST": "{0}", "GCE_METADATA_IP": "{0}"}, "set GOOGLE_APPLICATION_CREDENTIALS or, "),
        (
            "az://b/s",
            {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_MSI_ENDPOINT": "http://{}/metadata/identity/oauth2/token"},
            "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
        ),
    ],
)
@pytest.mark.parametrize("answered", [False, True])
def test_without_credentials_the_variables_to_set_are_named_and_a_role_is_not_waited_for(
    monkeypatch, url, asked_at, words, answered
):
    """A workstation has nobody, or a web server, where a cloud's machines are told their credentials."""
    pytest.importorskip("obstore", reason="needs the extra [remote]")
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = f"{url}-{answered}"  # clients are kept by address
    waits: list[float] = []
    monkeypatch.setattr(Retry, "wait", lambda self, number: waits.append(number) or 0.001)
    with FaultyProxy("127.0.0.1:9") as nobody:
        nobody.faults.append(Fault("status" if answered else "reset", status=404, times=999))
        for name, value in asked_at.items():
            monkeypatch.setenv(name, value.format(f"127.0.0.1:{nobody.port}"))
        with pytest.raises(RemoteError, match=rf"^{url}/x: cannot read it without credentials; {words}"):
            Bucket(url).get("x")
        assert 1 <= len(nobody.log) <= 6
    assert len(waits) == (0 if answered else 2)


def test_an_account_that_was_not_named_is_asked_for(monkeypatch):
    pytest.importorskip("obstore", reason="needs the extra [remote]")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(RemoteError, match=r"^az://b/unnamed: cannot be opened .*; set AZURE_STORAGE_ACCOUNT_NAME"):
        Bucket("az://b/unnamed").get("x")
