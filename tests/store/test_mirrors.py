"""Mirrors of remote catalogs: shared by processes, swept when nobody uses them, whole whoever dies."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import upload
from faulty_proxy import Fault

import cfstore
from cfstore import IngestOptions, StoreError
from cfstore.errors import StoreFormatError
from cfstore.locks import try_lock
from cfstore.mirrors import mirrors_folder, open_mirror
from cfstore.remote.disk_cache import CacheWarning, parse_cache

_OPEN = (
    "import sys, cfstore\n"
    "store = cfstore.open(sys.argv[1], cache=sys.argv[2])\n"
    "print(store.path, flush=True)\n"
    "sys.stdin.readline()\n"
    "print(store.sql('SELECT count(*) AS n FROM bags').to_pylist()[0]['n'], flush=True)\n"
)


@pytest.fixture
def store(tmp_path, make_cohort, bucket_url):
    make_cohort(tmp_path / "C", dim=16)
    local = cfstore.open(tmp_path / "local", create=True)
    local.ingest(tmp_path / "C", IngestOptions(encoder="uni"), jobs=1)
    upload(local.path, bucket_url)
    return local


def change(store: cfstore.Store, tmp_path: Path, make_cohort: Any, url: str) -> None:
    make_cohort(tmp_path / "D", ("t1",), dim=16)
    store.ingest(tmp_path / "D", IngestOptions(encoder="uni"), jobs=1)
    upload(store.path, url)


def process(url: str, cache: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", _OPEN, url, cache]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_snapshot_stays_while_a_process_uses_it_and_goes_afterwards(store, tmp_path, make_cohort, bucket_url):
    cache = f"disk:{tmp_path / 'cache'}:1GB"
    with process(bucket_url, cache) as other:
        old = Path(other.stdout.readline().strip())
        change(store, tmp_path, make_cohort, bucket_url)
        new = cfstore.open(bucket_url, cache=cache)
        assert old.exists()
        assert new.path != old
        assert other.communicate("\n")[0].strip() == "9"
    assert cfstore.open(bucket_url, cache=cache).path == new.path
    assert not old.exists()
    assert new.sql("SELECT count(*) AS n FROM bags").to_pylist() == [{"n": 12}]


def _open(url: str, cache: str, found: Any) -> None:
    found.put(cfstore.open(url, cache=cache).sql("SELECT count(*) AS n FROM bags").to_pylist()[0]["n"])


def test_processes_that_open_at_once_download_once(store, tmp_path, bucket_url, s3):
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    cache = f"disk:{tmp_path / 'cache'}:1GB"
    before = s3.count("GET .*catalog.duckdb")
    users = [spawn.Process(target=_open, args=(bucket_url, cache, found)) for _ in range(3)]
    for user in users:
        user.start()
    assert [found.get(timeout=60) for _ in users] == [9, 9, 9]
    for user in users:
        user.join()
    assert s3.count("GET .*catalog.duckdb") == before + 1


def test_killed_while_it_downloads_the_next_one_begins_anew_and_sweeps(store, tmp_path, bucket_url, s3):
    cache = f"disk:{tmp_path / 'cache'}:1GB"
    s3.faults.append(Fault("slow", "GET .*tables", times=99, seconds=30))
    with process(bucket_url, cache) as other:
        while not list((tmp_path / "cache").glob("mirrors/*/.making-*/catalog.duckdb")):
            time.sleep(0.02)
        other.send_signal(signal.SIGKILL)
    s3.faults.clear()
    assert cfstore.open(bucket_url, cache=cache).info().cohorts[0]["n_slides"] == 3
    assert not list((tmp_path / "cache").glob("mirrors/*/.making-*"))


@pytest.mark.parametrize("damage", ["no pointer", "pointer to nowhere", "no remote.json", "remote.json cut"])
def test_a_mirror_that_lacks_something_is_made_again(store, bucket_url, damage):
    root = open_mirror(bucket_url)
    if damage == "no pointer":
        (root.parent / "current").unlink()
    elif damage == "pointer to nowhere":
        (root.parent / "current").write_text("nowhere")
    elif damage == "no remote.json":
        (root / "remote.json").unlink()
    else:
        (root / "remote.json").write_text('{"url"')
    assert cfstore.open(bucket_url).info().cohorts[0]["n_slides"] == 3


def test_without_a_cache_mirrors_lie_where_nobody_else_writes(store, bucket_url, tmp_path):
    root = open_mirror(bucket_url)
    own = mirrors_folder(None).parent
    assert root.is_relative_to(own)
    assert own.stat().st_mode & 0o077 == 0
    own.chmod(0o777)
    with pytest.raises(StoreError, match="others may write to it"):
        open_mirror(bucket_url)
    setting = parse_cache(f"disk:{tmp_path / 'cache'}:1GB")
    assert open_mirror(bucket_url, setting).is_relative_to(tmp_path / "cache")


def test_a_mirror_that_was_deleted_under_an_open_store_is_no_reason_to_rebuild_the_catalog(store, bucket_url, tmp_path):
    opened = cfstore.open(bucket_url, cache=f"disk:{tmp_path / 'cache'}:100MB")
    reader = opened.reader("uni", [20], ["s1"])
    shutil.rmtree(tmp_path / "cache")
    with pytest.warns(CacheWarning, match="reading goes on without"):
        np.testing.assert_array_equal(reader.read("s1").bags[20].features, store.slide("s1").bags[20].features)
    for ask in (lambda: opened.sql("SELECT 1"), lambda: opened.slide("s1"), lambda: opened.reader("uni", [20], ["s1"])):
        with pytest.raises(StoreFormatError, match=rf"^{bucket_url}: .*its mirror.*open the store again$") as caught:
            ask()
        assert "reindex" not in str(caught.value)
    again = cfstore.open(bucket_url, cache=f"disk:{tmp_path / 'cache'}:100MB")
    assert again.slide("s1").bags.keys() == store.slide("s1").bags.keys()
    with (again.path / "remote.json").open("rb") as file:
        assert not try_lock(file.fileno())  # it is held as the one before it was: nobody sweeps it


def test_unchanged_tables_are_not_downloaded_again(store, tmp_path, make_cohort, bucket_url, s3):
    (tmp_path / "t.csv").write_text("slide_id,case_id,survival_months,censorship\ns1,p1,3.5,0\n")
    store.import_clinical(tmp_path / "t.csv", "C")
    upload(store.path, bucket_url)
    cfstore.open(bucket_url)
    before = len(s3.log)
    change(store, tmp_path, make_cohort, bucket_url)
    before = len(s3.log)
    cfstore.open(bucket_url)
    assert [line for line in s3.log[before:] if "patients" in line] == []


def test_a_place_that_cannot_be_written_is_an_error_that_says_what_to_do(store, bucket_url, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StoreError, match=r"No space left.*--cache"):
        open_mirror(bucket_url)
