"""Bytes of remote stores on a local disk: never torn, never above the limit for long, never a reason to fail."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import upload

import cfstore
from cfstore import IngestOptions
from cfstore.derivation import Derivation
from cfstore.errors import CacheError, StoreFormatError
from cfstore.remote import disk_cache
from cfstore.remote.bucket import Bucket
from cfstore.remote.disk_cache import CacheWarning, DiskCache, cache_at, parse_cache, range_name, slide_name

MB = 1_000_000


def content(number: int, nbytes: int = 100_000) -> bytes:
    return np.random.default_rng(number).bytes(nbytes)


def kept(cache: DiskCache, slide: str, name: str, nbytes: int = 100_000) -> bytes | None:
    found = cache.read(slide, name, nbytes)
    return None if found is None else found.tobytes()


# -- how it is named -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "folder", "limit"),
    [
        ("disk:/scratch/c:200GB", "/scratch/c", 200 * 10**9),
        ("disk:/scratch/c:1.5TB", "/scratch/c", 1_500_000_000_000),
        ("disk:/a:b:512MiB", "/a:b", 512 << 20),
        ("disk:/c:2000000", "/c", 2_000_000),
        ("disk:/c:3g", "/c", 3 * 10**9),
    ],
)
def test_a_cache_is_a_folder_and_a_size(text, folder, limit):
    setting = parse_cache(text)
    assert (str(setting.folder), setting.limit) == (folder, limit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ram:8GB", "write disk:FOLDER:SIZE"),
        ("/scratch/c:8GB", "write disk:FOLDER:SIZE"),
        ("disk:/scratch/c", "write disk:FOLDER:SIZE"),
        ("disk:200GB", "write disk:FOLDER:SIZE"),
        ("disk:/scratch/c:", "'' is no size"),
        ("disk:/scratch/c:lots", "'lots' is no size"),
        ("disk:/scratch/c:-5GB", "is no size"),
        ("disk:/scratch/c:10kB", "keeps no slide"),
    ],
)
def test_what_is_not_so_named_is_refused_with_how_to_name_it(text, words):
    with pytest.raises(CacheError, match=words):
        parse_cache(text)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file: cannot be a cache"):
        DiskCache(tmp_path / "file", MB)


# -- keeping -------------------------------------------------------------------------------------


def test_what_was_kept_comes_back_to_another_process_and_what_was_not_does_not(tmp_path):
    cache = DiskCache(tmp_path, MB)
    slide, name = slide_name("store", "uni", "s1"), range_name("f", 5, 100_005)
    assert kept(cache, slide, name) is None
    cache.keep(slide, name, memoryview(content(1)))
    assert kept(DiskCache(tmp_path), slide, name) == content(1)
    assert kept(cache, slide, range_name("f", 6, 100_006)) is None
    assert kept(cache, slide_name("store", "uni", "s2"), name) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty", "zeros"])
def test_a_file_that_is_not_what_was_written_is_not_served_and_removed(tmp_path, damage):
    cache = DiskCache(tmp_path, MB)
    cache.keep("aa" * 16, "range", memoryview(content(1)))
    (path,) = tmp_path.glob("kept/*/*/range")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[50_000] ^= 1
    path.write_bytes(
        {"flip": data, "cut": data[:-1], "longer": data + b"0", "empty": b"", "zeros": bytes(len(data))}[damage]
    )
    assert kept(cache, "aa" * 16, "range") is None
    assert not path.exists()
    cache.keep("aa" * 16, "range", memoryview(content(1)))
    assert kept(cache, "aa" * 16, "range") == content(1)


def test_the_slide_that_was_used_least_recently_goes_first_and_goes_whole(tmp_path):
    cache = DiskCache(tmp_path, MB)
    slides = [slide_name(f"s{number}") for number in range(6)]
    for number, slide in enumerate(slides[:4]):
        for part in range(2):
            cache.keep(slide, f"part{part}", memoryview(content(2 * number + part)))
        os.utime(tmp_path / "kept" / slide[:2] / slide, (1000 + number, 1000 + number))
    cache.touch(slides[0])
    for part in range(2):
        cache.keep(slides[4], f"part{part}", memoryview(content(100 + part)))
    cache.keep(slides[5], "part0", memoryview(content(200)))
    left = [[kept(cache, slide, f"part{part}") is not None for part in range(2)] for slide in slides]
    assert left == [[True, True], [False, False], [True, True], [True, True], [True, True], [True, False]]
    assert cache.used() <= MB


def test_the_limit_holds_whatever_is_kept(tmp_path):
    cache = DiskCache(tmp_path, MB)
    for number in range(40):
        cache.keep(slide_name(str(number)), "range", memoryview(content(number)))
        assert cache.used() <= MB
    cache.keep(slide_name("huge"), "range", memoryview(bytes(2 * MB)))
    assert kept(cache, slide_name("huge"), "range", 2 * MB) is None
    assert kept(cache, slide_name("39"), "range") == content(39)


def test_a_smaller_limit_named_later_holds_for_what_is_there(tmp_path):
    cache = DiskCache(tmp_path, 4 * MB)
    for number in range(30):
        cache.keep(slide_name(str(number)), "range", memoryview(content(number)))
    smaller = cache_at(tmp_path, MB)
    assert smaller.limit == MB
    smaller.keep(slide_name("new"), "range", memoryview(content(99)))
    assert smaller.used() <= MB


def test_a_smaller_limit_named_by_another_process_holds_for_those_that_are_at_work(tmp_path):
    cache = DiskCache(tmp_path, 4 * MB)
    cache.keep(slide_name("0"), "range", memoryview(content(0)))
    DiskCache(tmp_path, MB)
    for number in range(30):
        cache.keep(slide_name(str(number)), "range", memoryview(content(number)))
        assert cache.used() <= MB


def test_what_others_keep_while_one_makes_room_counts_and_goes_as_well(tmp_path, monkeypatch):
    """A large cache takes seconds to go through, in which others keep gigabytes."""
    cache, other = DiskCache(tmp_path, MB), DiskCache(tmp_path, MB)
    numbers = iter(range(100, 120))
    discard = disk_cache.discard

    def discard_slowly(path: Path) -> None:
        for number in itertools.islice(numbers, 5):
            other.keep(slide_name(str(number)), "range", memoryview(content(number)))
        discard(path)

    monkeypatch.setattr(disk_cache, "discard", discard_slowly)
    for number in range(10):
        cache.keep(slide_name(str(number)), "range", memoryview(content(number)))
    assert next(numbers, None) is None
    assert cache.used() <= MB
    assert int((tmp_path / "used").read_text()) >= cache.used()


@pytest.mark.parametrize("left", [b"5\x00", b"", b"x"])
def test_a_count_that_was_cut_short_is_counted_anew(tmp_path, left):
    cache = DiskCache(tmp_path, MB)
    for number in range(5):
        cache.keep(slide_name(str(number)), "range", memoryview(content(number)))
    (tmp_path / "used").write_bytes(left)
    cache.keep(slide_name("5"), "range", memoryview(content(5)))
    assert int((tmp_path / "used").read_text()) == cache.used()


def test_a_disk_that_is_full_when_bytes_are_counted_does_not_make_the_next_process_forget_them(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, MB)
    for number in range(9):
        cache.keep(slide_name(str(number)), "range", memoryview(content(number)))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.warns(CacheWarning, match="the disk is full"):
            cache.keep(slide_name("9"), "range", memoryview(content(9)))
    later = DiskCache(tmp_path)
    for number in range(10, 19):
        later.keep(slide_name(str(number)), "range", memoryview(content(number)))
    assert later.used() <= MB + len(content(9)) + 32


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_is_full_or_fails_turns_the_cache_off_with_one_warning(tmp_path, monkeypatch, code):
    cache = DiskCache(tmp_path, MB)
    cache.keep("aa" * 16, "range", memoryview(content(1)))

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", fail)
    with pytest.warns(CacheWarning, match="reading goes on without") as told:
        _keep_three(cache)
    assert len(told) == 1
    assert list((tmp_path / "making").iterdir()) == []
    assert kept(cache, "aa" * 16, "range") == content(1)


def _keep_three(cache: DiskCache) -> None:
    for number in range(3):
        cache.keep("bb" * 16, f"range{number}", memoryview(content(2)))


# -- many processes, and their deaths ------------------------------------------------------------


def _use(folder: Path, seed: int, seconds: float, wrong: Any) -> None:
    cache = DiskCache(folder, MB)
    rng = np.random.default_rng(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = int(rng.integers(30))
        slide = slide_name(str(number))
        found = kept(cache, slide, "range")
        if found is None:
            cache.keep(slide, "range", memoryview(content(number)))
        elif found != content(number):
            wrong.value += 1
        cache.touch(slide)


def test_processes_that_share_a_cache_get_only_what_was_written(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    wrong = spawn.Value("i", 0)
    users = [spawn.Process(target=_use, args=(tmp_path, seed, 1.0, wrong)) for seed in range(3)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert ([user.exitcode for user in users], wrong.value) == ([0, 0, 0], 0)
    assert DiskCache(tmp_path).used() <= MB
    assert list((tmp_path / "making").iterdir()) == []


@pytest.mark.slow
def test_killed_at_any_moment_nothing_torn_is_served_and_leftovers_go(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[3])\n"
        "import multiprocessing, pathlib, test_disk_cache as t\n"
        "print('go', flush=True)\n"
        "t._use(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 60, multiprocessing.Value('i', 0))\n"
    )
    for seed in range(8):
        arguments = [sys.executable, "-c", code, str(tmp_path), str(seed), str(Path(__file__).parent)]
        user = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert user.stdout is not None
        user.stdout.readline()
        time.sleep(0.05 + 0.05 * seed)
        user.send_signal(signal.SIGKILL)
        user.wait()
        user.stdout.close()
        cache = DiskCache(tmp_path)
        for number in range(30):
            assert kept(cache, slide_name(str(number)), "range") in (None, content(number))
    assert list((tmp_path / "making").iterdir()) == []
    cache.keep(slide_name("new"), "range", memoryview(content(99)))
    for number in range(30, 45):
        cache.keep(slide_name(str(number)), "range", memoryview(content(number)))
    assert cache.used() <= MB


# -- under a reader ------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path, make_cohort, bucket_url):
    make_cohort(tmp_path / "C", dim=16)
    local = cfstore.open(tmp_path / "local", create=True)
    local.ingest(tmp_path / "C", IngestOptions(encoder="uni"), jobs=1)
    upload(local.path, bucket_url)
    return local, bucket_url, f"disk:{tmp_path / 'cache'}:100MB"


def test_a_slide_is_fetched_once_even_by_another_process(remote, s3):
    local, url, cache = remote
    for number in range(2):
        store = cfstore.open(url, cache=cache)
        before = s3.count("c/0/0")
        for slide_id in ("s1", "s2"):
            found, expected = store.slide(slide_id), local.slide(slide_id)
            for scale, bag in expected.bags.items():
                np.testing.assert_array_equal(found.bags[scale].features, bag.features)
                np.testing.assert_array_equal(found.bags[scale].coords, bag.coords)
        assert s3.count("c/0/0") - before == (4 if number == 0 else 0)


def test_the_environment_names_a_cache_too(remote, s3, monkeypatch):
    _, url, cache = remote
    monkeypatch.setenv("CFSTORE_CACHE", cache)
    cfstore.open(url).slide("s1")
    before = s3.count("c/0/0")
    cfstore.open(url).slide("s1")
    assert s3.count("c/0/0") == before


def test_what_is_damaged_in_the_cache_is_fetched_again(remote, s3, tmp_path):
    local, url, cache = remote
    store = cfstore.open(url, cache=cache)
    store.slide("s1")
    for path in (tmp_path / "cache" / "kept").glob("*/*/*"):
        data = bytearray(path.read_bytes())
        data[3] ^= 255
        path.write_bytes(data)
    before = s3.count("c/0/0")
    np.testing.assert_array_equal(store.slide("s1").bags[20].features, local.slide("s1").bags[20].features)
    assert s3.count("c/0/0") == before + 2


def test_what_is_whole_in_the_cache_but_not_the_stores_is_fetched_again(remote, s3, tmp_path):
    """As after a store was restored from another copy under the same names."""
    local, url, cache = remote
    store = cfstore.open(url, cache=cache)
    store.slide("s1")
    for path in (tmp_path / "cache" / "kept").glob("*/*/*"):
        size = path.stat().st_size - 32
        DiskCache(tmp_path / "cache").keep(path.parent.name, path.name, memoryview(bytes(size)))
    np.testing.assert_array_equal(store.slide("s1").bags[20].features, local.slide("s1").bags[20].features)


def test_a_full_disk_does_not_stop_a_reader(remote, monkeypatch, tmp_path):
    local, url, cache = remote
    store = cfstore.open(url, cache=cache)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(CacheWarning, match="the disk is full"):
        found = store.slide("s1")
    np.testing.assert_array_equal(found.bags[20].features, local.slide("s1").bags[20].features)


def test_derived_bytes_that_were_damaged_are_fetched_again_once_the_server_has_them_right(remote, tmp_path):
    local, url, cache = remote
    wanted = [Derivation.nearest(20, 2)]
    local.derive(wanted, jobs=1)
    upload(local.path, url)
    (path,) = (local.path / "derived").rglob("*.parquet")
    bucket, key, right = Bucket(url), path.relative_to(local.path).as_posix(), path.read_bytes()
    bucket.put(key, right[:8] + bytes(192) + right[200:])
    with pytest.raises(StoreFormatError, match=f"^slide s1: {url}/{key}: damaged"):
        cfstore.open(url, cache=cache).derived(wanted, "uni", ["s1"]).read("s1")
    bucket.put(key, right)
    found = cfstore.open(url, cache=cache).derived(wanted, "uni", ["s1"]).read("s1")
    expected = local.derived(wanted, "uni", ["s1"]).read("s1")
    np.testing.assert_array_equal(found[wanted[0]], expected[wanted[0]])


@pytest.mark.parametrize("which", [-1, 0], ids=["footer", "values"])
def test_derived_bytes_that_are_whole_in_the_cache_but_not_the_stores_are_fetched_again(remote, s3, tmp_path, which):
    local, url, cache = remote
    wanted = [Derivation.mean(20)]
    local.derive(wanted, jobs=1)
    upload(local.path, url)
    cfstore.open(url, cache=cache).derived(wanted, "uni", ["s1"]).read("s1")
    kept = sorted((tmp_path / "cache" / "kept").glob("*/*/*"), key=lambda path: path.stat().st_size)
    path = kept[which]
    DiskCache(tmp_path / "cache").keep(path.parent.name, path.name, memoryview(bytes(path.stat().st_size - 32)))
    before = s3.count("GET .*derived")
    found = cfstore.open(url, cache=cache).derived(wanted, "uni", ["s1"]).read("s1")
    np.testing.assert_array_equal(found[wanted[0]], local.derived(wanted, "uni", ["s1"]).read("s1")[wanted[0]])
    assert s3.count("GET .*derived") - before == 2
