"""A store on object storage is read as one in a folder: the same rows, the same answers, few requests."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from buckets import same_bags, upload
from click.testing import CliRunner
from faulty_proxy import Fault, FaultyProxy

import cfstore
from cfstore import Derivation, IngestOptions, RemoteError, SlideNotFoundError, Store, StoreError
from cfstore.cli import main
from cfstore.errors import DamagedShardError, NotDerivedError, StoreFormatError, StoreNotFoundError
from cfstore.mirrors import mirrors_folder, open_mirror
from cfstore.places import Layout, Part
from cfstore.remote.bucket import Bucket
from cfstore.remote.retry import Retry
from cfstore.remote_parts import GAP_BYTES, PIECE_BYTES, pieces

SLIDES = ("s1", "s2", "s3")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are not what is tested here."""
    monkeypatch.setattr(Retry, "wait", lambda self, number: 0.001)


@pytest.fixture
def folder(tmp_path: Path, make_cohort: Any) -> Path:
    make_cohort(tmp_path / "C", SLIDES, dim=16)
    (tmp_path / "C" / "clinical.csv").write_text(
        "slide_id,case_id,survival_months,censorship\n"
        + "".join(f"{s},p{s},{i + 1}.5,0\n" for i, s in enumerate(SLIDES))
    )
    return tmp_path / "C"


def ingested(tmp_path: Path, folder: Path, **options: Any) -> Store:
    store = cfstore.open(tmp_path / "local", create=True)
    store.ingest(folder, IngestOptions(encoder="uni", **options), jobs=1)
    return store


def pair(tmp_path: Path, folder: Path, url: str, **options: Any) -> tuple[Store, Store]:
    """A store in a folder, and its copy in a bucket."""
    local = ingested(tmp_path, folder, **options)
    upload(local.path, url)
    return local, cfstore.open(url)


# -- the same as in a folder ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "none"},
        {"codec": "blosc-zstd"},
        {"codec": "zstd"},
        {"dtype": "int8"},
        {"dtype": "float32", "codec": "blosc-lz4-bitshuffle"},
        {"format": "webdataset"},
        {"format": "webdataset", "dtype": "int8"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_slide_comes_as_from_a_folder_whatever_the_format(tmp_path, folder, bucket_url, options):
    local, remote = pair(tmp_path, folder, bucket_url, **options)
    for slide_id in SLIDES:
        same_bags(local.slide(slide_id), remote.slide(slide_id))
    for scales in ([20], [5, 20], [5, 10, 20]):
        for with_coords in (False, True):
            here, there = (store.reader("uni", scales, SLIDES, with_coords=with_coords) for store in (local, remote))
            for one, other in zip(here.stream(SLIDES), there.stream(SLIDES), strict=True):
                assert one.slide_id == other.slide_id
                same_bags(one.dequantised(), other.dequantised())
    rows = [(0, 2), (1, 3)]
    one, other = (
        store.reader("uni", [20], SLIDES, with_coords=True).read_rows("s2", 20, rows) for store in (local, remote)
    )
    np.testing.assert_array_equal(one.features, other.features)
    np.testing.assert_array_equal(one.coords, other.coords)
    np.testing.assert_array_equal(
        local.reader("uni", [20], SLIDES).read_coords("s2", 20),
        remote.reader("uni", [20], SLIDES).read_coords("s2", 20),
    )


def test_sql_info_rows_and_cohorts_are_those_of_the_folder(tmp_path, folder, bucket_url):
    local, remote = pair(tmp_path, folder, bucket_url)
    query = "SELECT slide_id, scale, n_patches, digest FROM bags ORDER BY ALL"
    assert remote.sql(query) == local.sql(query)
    assert remote.slide_rows("s1") == local.slide_rows("s1")
    assert remote.cohort("C") == local.cohort("C")
    here, there = local.info(), remote.info()
    assert (there.path, there.cohorts, there.encoders) == (bucket_url, here.cohorts, here.encoders)
    assert there.uuid == here.uuid
    assert 0 < there.stored_bytes <= here.stored_bytes


def test_a_slide_is_one_request_for_features_and_one_for_coordinates(tmp_path, folder, bucket_url, s3):
    _, remote = pair(tmp_path, folder, bucket_url)
    reader = remote.reader("uni", [5, 10, 20], SLIDES, with_coords=True)
    before = len(s3.log)
    reader.read("s2")
    new = s3.log[before:]
    assert sorted(re.search(r"/(features|coords)/c/0/0 bytes=", line)[1] for line in new) == ["coords", "features"]


def test_several_slides_are_under_way_at_once(tmp_path, make_cohort, bucket_url, s3: FaultyProxy):
    slides = tuple(f"s{number}" for number in range(24))
    make_cohort(tmp_path / "C", slides, scales=(20,))
    _, remote = pair(tmp_path, tmp_path / "C", bucket_url)
    reader = remote.reader("uni", [20], slides)
    s3.most_at_once = 0
    s3.faults.append(Fault("slow", "c/0/0", times=99, seconds=0.1))
    assert [slide.slide_id for slide in reader.stream(slides, threads=2, ahead=16)] == list(slides)
    assert s3.most_at_once >= 8


def test_derived_arrays_and_prototypes_are_read_and_one_request_brings_a_slides_array(tmp_path, folder, bucket_url, s3):
    local = ingested(tmp_path, folder)
    wanted = [Derivation.nearest(20, 2), Derivation.mean(20), Derivation.similar(20, 2)]
    local.derive(wanted, jobs=1)
    centroids = local.prototypes("uni", 20, SLIDES, 2)
    upload(local.path, bucket_url)
    remote = cfstore.open(bucket_url)
    here, there = (store.derived(wanted, "uni", SLIDES) for store in (local, remote))
    for slide_id in SLIDES:
        before = len(s3.log)
        found = there.read(slide_id)
        for derivation, values in here.read(slide_id).items():
            np.testing.assert_array_equal(found[derivation], values, strict=True)
    assert len(s3.log) - before == len(wanted)
    np.testing.assert_array_equal(remote.prototypes("uni", 20, SLIDES, 2), centroids)
    assert remote.underived([Derivation.nearest(20, 2)], "uni", SLIDES) == {}
    np.testing.assert_array_equal(
        remote.prototypes("uni", 20, SLIDES[:2], 2), local.prototypes("uni", 20, SLIDES[:2], 2)
    )


def test_it_can_be_exported(tmp_path, folder, bucket_url):
    _, remote = pair(tmp_path, folder, bucket_url)
    assert remote.export(tmp_path / "out").n_slides == 3
    same_bags(cfstore.open_tars(tmp_path / "out").slide("s1"), remote.slide("s1"))


def test_commands_that_look_take_an_address(tmp_path, folder, bucket_url, monkeypatch):
    pair(tmp_path, folder, bucket_url)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert bucket_url in run("info", "--store", bucket_url)
    assert "n_patches" in run("show", "s1", "--store", bucket_url + "/", "--json")
    monkeypatch.setenv("CFSTORE", bucket_url)
    assert run("sql", "SELECT count(*) AS n FROM bags", "--format", "csv").split() == ['"n"', "9"]
    run("export", str(tmp_path / "out"), "--cache", f"disk:{tmp_path / 'cache'}:1GB")
    assert list((tmp_path / "cache" / "kept").glob("*/*/*"))
    assert "CFSTORE_CACHE" not in os.environ


def test_commands_that_write_take_an_address(tmp_path, folder, bucket_url):
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, [*arguments, "--store", bucket_url])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "to write" in run("ingest", str(folder), "--dry-run")
    with pytest.raises(StoreNotFoundError):
        cfstore.open(bucket_url)
    run("ingest", str(folder))
    run("clinical", str(folder / "clinical.csv"), "--cohort", "C")
    assert "stays taken" in run("rm", "s1")  # `cfstore compact` works on folders
    assert cfstore.open(bucket_url).sql("SELECT DISTINCT slide_id FROM bags ORDER BY 1")["slide_id"].to_pylist() == [
        "s2", "s3",
    ]  # fmt: skip


def test_an_address_that_cannot_be_is_a_usage_error():
    done = CliRunner().invoke(main, ["info", "--store", "ftp://host/store"])
    assert done.exit_code == 2
    assert "s3://" in done.output


# -- refusals ------------------------------------------------------------------------------------


def test_what_needs_all_shards_here_is_refused_before_anything_is_done(tmp_path, folder, bucket_url, s3):
    _, remote = pair(tmp_path, folder, bucket_url)
    before = len(s3.log)
    for write in (remote.verify, remote.reindex, remote.compact):
        with pytest.raises(StoreError, match=f"{bucket_url}: .*needs the store in a folder"):
            write()
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9/store: a web server cannot be written to"):
        cfstore.open("http://127.0.0.1:9/store", create=True)
    with pytest.raises(StoreError, match=r"gs://lab/store: stores on gs:// are only read so far"):
        cfstore.open("gs://lab/store", create=True)
    assert s3.log[before:] == []


def test_an_address_without_a_store_is_named(bucket_url):
    with pytest.raises(StoreNotFoundError, match=f"{bucket_url}: no store there"):
        cfstore.open(bucket_url)


def test_messages_say_the_address_and_not_the_mirror(tmp_path, folder, bucket_url):
    _, remote = pair(tmp_path, folder, bucket_url)
    with pytest.raises(SlideNotFoundError) as caught:
        remote.slide_rows("nope")
    assert bucket_url in str(caught.value)
    assert str(remote.path) not in str(caught.value)


# -- mirrors -------------------------------------------------------------------------------------


def test_a_mirror_is_downloaded_once_and_again_when_the_catalog_changed(tmp_path, folder, bucket_url, make_cohort, s3):
    local, remote = pair(tmp_path, folder, bucket_url)
    before = len(s3.log)
    assert cfstore.open(bucket_url).path == remote.path
    assert [line.split()[0] for line in s3.log[before:]] == ["HEAD"]
    make_cohort(tmp_path / "D", ("t1",), dim=16)
    local.ingest(tmp_path / "D", IngestOptions(encoder="uni"), jobs=1)
    upload(local.path, bucket_url)
    newer = cfstore.open(bucket_url)
    assert newer.path != remote.path
    assert newer.sql("SELECT count(DISTINCT slide_id) AS n FROM bags").to_pylist() == [{"n": 4}]
    assert remote.sql("SELECT count(DISTINCT slide_id) AS n FROM bags").to_pylist() == [{"n": 3}]
    same_bags(local.slide("t1"), newer.slide("t1"))


def test_a_mirror_that_was_cut_off_is_made_again(tmp_path, folder, bucket_url, s3):
    local = ingested(tmp_path, folder)
    upload(local.path, bucket_url)
    s3.faults.append(Fault("status", "GET .*patients", times=99))
    with pytest.raises(RemoteError, match="patients"):
        open_mirror(bucket_url)
    s3.faults.clear()
    assert list(mirrors_folder(None).glob("*/current")) == []
    assert cfstore.open(bucket_url).cohort("C").n_patients == 3


def test_a_catalog_without_its_table_is_waited_for_and_taken_over_as_it_is_locally(tmp_path, folder, bucket_url):
    local = ingested(tmp_path, folder)
    for path in (local.path / "tables").glob("slides-*.parquet"):
        path.unlink()
    upload(local.path, bucket_url)
    assert cfstore.open(bucket_url).cohort("C").n_patients == 3


@pytest.mark.parametrize("missing", ["store.json", "catalog.duckdb"])
def test_a_store_with_a_file_missing_is_an_error(tmp_path, folder, bucket_url, missing):
    local = ingested(tmp_path, folder)
    (local.path / missing).unlink()
    upload(local.path, bucket_url)
    with pytest.raises((StoreNotFoundError, StoreFormatError), match=bucket_url):
        cfstore.open(bucket_url)


def test_a_catalog_that_is_no_catalog_is_an_error(tmp_path, folder, bucket_url):
    local = ingested(tmp_path, folder)
    (local.path / "catalog.duckdb").write_bytes(b"not a database" * 1000)
    upload(local.path, bucket_url)
    with pytest.raises(StoreFormatError, match=f"{bucket_url}/catalog.duckdb"):
        cfstore.open(bucket_url)


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["status", "reset", "cut", "short"])
def test_faults_that_pass_change_nothing(tmp_path, folder, bucket_url, s3, kind):
    local = ingested(tmp_path, folder)
    upload(local.path, bucket_url)
    s3.faults += [Fault(kind, "GET .*catalog", times=2), Fault(kind, "GET .*c/0/0", times=5)]
    remote = cfstore.open(bucket_url)
    for slide_id in SLIDES:
        same_bags(local.slide(slide_id), remote.slide(slide_id))
    assert [fault.hits for fault in s3.faults] == [2, 5]


@pytest.mark.parametrize("kind", ["status", "reset", "cut", "short"])
def test_faults_that_stay_are_an_error_that_names_slide_and_object(tmp_path, folder, bucket_url, s3, kind):
    _, remote = pair(tmp_path, folder, bucket_url)
    s3.faults.append(Fault(kind, "GET .*c/0/0", times=999))
    with pytest.raises(RemoteError, match=rf"^slide s2: {bucket_url}/features/uni/.*c/0/0: .* times in a row"):
        remote.slide("s2")


def test_an_object_that_vanished_is_an_error_that_names_slide_and_object(tmp_path, folder, bucket_url, s3):
    _, remote = pair(tmp_path, folder, bucket_url)
    s3.faults.append(Fault("gone", "GET .*c/0/0", times=999))
    with pytest.raises(DamagedShardError, match=rf"^slide s2: {bucket_url}/features/uni/.*open it again"):
        remote.slide("s2")
    with pytest.raises(DamagedShardError, match=r"^slide s3: "):
        list(remote.reader("uni", [20], SLIDES).stream(["s3", "s2"]))


@pytest.mark.parametrize(
    ("what", "words"), [("catalog", "times in a row"), ("store", "no store there"), ("mirror", "open the store again")]
)
def test_an_object_that_vanished_with_what_says_where_it_is_now_still_names_slide_and_object(
    tmp_path, folder, bucket_url, s3, what, words
):
    local = ingested(tmp_path, folder)
    wanted = [Derivation.mean(20)]
    local.derive(wanted, jobs=1)
    upload(local.path, bucket_url)
    remote = cfstore.open(bucket_url)
    reader, derived = remote.reader("uni", [20], ["s2"]), remote.derived(wanted, "uni", ["s2"])
    s3.faults.append(Fault("gone", "(GET|HEAD) .*(c/0/0|derived)", times=999))
    if what == "catalog":
        s3.faults.append(Fault("status", "HEAD .*catalog", times=999))
    elif what == "store":
        Bucket(bucket_url).delete(["store.json", "catalog.duckdb"])
    else:
        shutil.rmtree(remote.path)
    for read, file in ((reader.read, "features"), (derived.read, "derived")):
        with pytest.raises(StoreError, match=rf"^slide s2: {bucket_url}/{file}/.*{words}"):
            read("s2")


def test_a_shard_that_was_compacted_meanwhile_is_followed(tmp_path, folder, bucket_url):
    local, remote = pair(tmp_path, folder, bucket_url)
    reader = remote.reader("uni", [20], ["s2"])
    expected = reader.read("s2")
    local.remove(["s1"])
    local.compact()
    _replace(local, bucket_url)
    same_bags(reader.read("s2"), expected)


def test_a_slide_that_was_ingested_with_other_values_meanwhile_is_an_error(tmp_path, folder, bucket_url, make_cohort):
    local, remote = pair(tmp_path, folder, bucket_url)
    reader = remote.reader("uni", [20], ["s2"])
    local.remove(["s2"])
    local.compact()
    shutil.rmtree(folder)
    make_cohort(folder, SLIDES, dim=16)
    (folder / "x20" / "h5_files" / "s1.h5").unlink()
    local.ingest(folder, IngestOptions(encoder="uni"), on_error="skip", jobs=1)
    _replace(local, bucket_url)
    with pytest.raises(SlideNotFoundError, match="other values"):
        reader.read("s2")


def _replace(local: Store, url: str) -> None:
    """The bucket as the folder is now."""
    bucket = Bucket(url)
    bucket.delete([key for key, _ in bucket.list("features")])
    upload(local.path, url)


@pytest.mark.parametrize("codec", ["none", "blosc-zstd"])
def test_an_object_with_other_bytes_of_the_same_length_is_an_error(tmp_path, folder, bucket_url, codec):
    local, remote = pair(tmp_path, folder, bucket_url, codec=codec)
    (path,) = local.path.rglob("features/c/0/0")
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(reversed(content[: len(content) // 2]))
    reader = remote.reader("uni", [5, 10, 20], SLIDES)
    Bucket(bucket_url).put(path.relative_to(local.path).as_posix(), bytes(content))
    with pytest.raises(DamagedShardError, match=f"^slide s1: {bucket_url}/features/uni/"):
        reader.read("s1")


def test_an_object_that_becomes_another_one_is_an_error_even_where_nothing_is_compared(tmp_path, folder, bucket_url):
    local, remote = pair(tmp_path, folder, bucket_url, format="webdataset")
    (path,) = local.path.rglob("*.tar")
    reader = remote.reader("uni", [20], SLIDES)
    reader.read("s1")
    Bucket(bucket_url).put(path.relative_to(local.path).as_posix(), path.read_bytes() + bytes(512))
    with pytest.raises(DamagedShardError, match=r"^slide s2: .*the store changed, open it again"):
        reader.read("s2")


def test_a_shorter_object_is_an_error(tmp_path, folder, bucket_url):
    local, remote = pair(tmp_path, folder, bucket_url)
    (path,) = local.path.rglob("features/c/0/0")
    Bucket(bucket_url).put(path.relative_to(local.path).as_posix(), path.read_bytes()[:100])
    with pytest.raises(DamagedShardError, match=r"^slide s3: .*the store changed, open it again"):
        remote.slide("s3")


def test_a_derived_file_that_is_gone_or_damaged_is_named(tmp_path, folder, bucket_url):
    local = ingested(tmp_path, folder)
    local.derive([Derivation.nearest(20, 2)], jobs=1)
    upload(local.path, bucket_url)
    remote = cfstore.open(bucket_url)
    (path,) = (local.path / "derived").rglob("*.parquet")
    bucket, key = Bucket(bucket_url), path.relative_to(local.path).as_posix()
    bucket.put(key, path.read_bytes()[:-20])
    with pytest.raises(StoreFormatError, match=f"{bucket_url}/derived"):
        remote.derived([Derivation.nearest(20, 2)], "uni", SLIDES).read("s1")
    bucket.delete([key])
    with pytest.raises(NotDerivedError, match=f"^slide s1: {bucket_url}/derived.* --store {bucket_url}`"):
        remote.derived([Derivation.nearest(20, 2)], "uni", SLIDES).read("s1")


# -- requests ------------------------------------------------------------------------------------


def part(start: int, stored: int, to: int, *, file: str = "f", codec: str = "zstd", digest: int | None = 1) -> Part:
    return Part(file, start, stored, to, stored, codec, digest)


def test_chunks_become_pieces_of_eight_mib_that_begin_and_end_with_a_chunk():
    mib = 1 << 20
    parts = [part(number * mib, mib, number * mib) for number in range(20)]
    layout = Layout(tuple((each,) for each in parts), (0,), 20 * mib)
    assert [(piece.start, piece.stop) for piece in pieces(layout)] == [
        (0, 8 * mib),
        (8 * mib, 16 * mib),
        (16 * mib, 20 * mib),
    ]


def test_what_lies_close_together_is_one_piece_and_what_does_not_is_not():
    near, far = part(100 + GAP_BYTES, 50, 100), part(151 + 2 * GAP_BYTES, 50, 150)
    layout = Layout(((far,), (part(0, 100, 0),), (near,), (part(0, 10, 200, file="g"),)), (0,), 210)
    assert [(piece.file, piece.start, piece.stop, len(piece.parts)) for piece in pieces(layout)] == [
        ("f", 0, 150 + GAP_BYTES, 2),
        ("f", 151 + 2 * GAP_BYTES, 201 + 2 * GAP_BYTES, 1),
        ("g", 0, 10, 1),
    ]


def test_rows_of_a_tar_are_cut_anywhere():
    whole = part(7, 2 * PIECE_BYTES + 5, 0, codec="none", digest=None)
    layout = Layout(((whole,),), (0,), whole.stored)
    assert [(piece.start - 7, piece.stop - 7) for piece in pieces(layout)] == [
        (0, PIECE_BYTES),
        (PIECE_BYTES, 2 * PIECE_BYTES),
        (2 * PIECE_BYTES, 2 * PIECE_BYTES + 5),
    ]
    assert [piece.parts[0].to for piece in pieces(layout)] == [0, PIECE_BYTES, 2 * PIECE_BYTES]


def test_a_mirror_is_a_database_that_others_can_open(tmp_path, folder, bucket_url):
    _, remote = pair(tmp_path, folder, bucket_url)
    with duckdb.connect(str(remote.path / "catalog.duckdb"), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM bags").fetchall() == [(9,)]
