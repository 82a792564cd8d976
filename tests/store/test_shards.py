"""Shards on disk: what other readers of Zarr and tar find in them, and where the catalog says it lies."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

import cfstore
from cfstore import IngestOptions, Store, StoreFormatError, catalog
from cfstore.codecs import CODECS
from cfstore.convert import DTYPES
from cfstore.errors import StoreError
from cfstore.locks import write_lock
from cfstore.shards.files import BLANK_DIGEST, sign

Make = Callable[..., Any]
Rows = dict[tuple[str, int], tuple[NDArray[np.float32], NDArray[np.int32]]]

# Bags of one row, of less than a chunk (32 rows), of whole chunks and of a bit more, at 5x, 10x and 20x.
COUNTS = {"a": {5: 1, 10: 3, 20: 70}, "b": {5: 33}, "c": {20: 1}, "d": {10: 32, 20: 64}, "e": {5: 31, 10: 2, 20: 129}}


@pytest.fixture
def make_bags(tmp_path: Path, make_clam_h5: Make) -> Callable[..., Rows]:
    """The folder `uni` with the bags of COUNTS."""

    def make(dim: int = 37, counts: dict[str, dict[int, int]] = COUNTS, folder: str = "uni") -> Rows:
        return {
            (slide, scale): make_clam_h5(tmp_path / folder / f"x{scale}" / "h5_files" / f"{slide}.h5", n, dim)
            for slide, bags in counts.items()
            for scale, n in bags.items()
        }

    return make


def stored(features: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """What NumPy and numcodecs make of source rows; not for int8."""
    if dtype == "float16-rounded":
        return np.asarray(numcodecs.BitRound(keepbits=7).encode(features.astype(np.float16))).view(np.float16)
    return features.astype(dtype)


def read_zarr_python(path: Path) -> NDArray[Any]:
    values = zarr.open_array(path, mode="r")[:]
    assert isinstance(values, np.ndarray)
    return values


def read_zarrs(path: Path) -> NDArray[Any]:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return read_zarr_python(path)


def read_tensorstore(path: Path) -> NDArray[Any]:
    tensorstore = pytest.importorskip("tensorstore")
    opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
    return np.asarray(opened.read().result())


READERS = {"zarr-python": read_zarr_python, "zarrs": read_zarrs, "tensorstore": read_tensorstore}


def bag_rows(store: Store) -> list[dict[str, Any]]:
    return store.sql("SELECT * FROM bags ORDER BY shard, row_start").to_pylist()


def check_zarr(store: Store, rows: Rows, dtype: str, read: Callable[[Path], NDArray[Any]]) -> None:
    """Every bag of every shard, opened by `read`, equals its source."""
    found = bag_rows(store)
    assert {(row["slide_id"], row["scale"]) for row in found} == set(rows)
    positions: dict[str, list[str]] = {}
    for row in found:
        shard, here = store.path / row["shard"], slice(row["row_start"], row["row_start"] + row["n_patches"])
        features, coords = rows[row["slide_id"], row["scale"]]
        np.testing.assert_array_equal(read(shard / "coords")[here], coords)
        values = read(shard / "features")[here]
        if dtype != "int8":
            assert values.tobytes() == stored(features, dtype).tobytes()
            continue
        slides = positions.setdefault(row["shard"], [])
        slides += [row["slide_id"]] * (row["slide_id"] not in slides)
        own = np.concatenate([bag for (slide, _), (bag, _) in rows.items() if slide == row["slide_id"]])
        scale, zero = (read(shard / name)[slides.index(row["slide_id"])] for name in ("scale", "zero"))
        np.testing.assert_array_equal(zero, own.min(axis=0))
        np.testing.assert_allclose(scale * 255, np.ptp(own, axis=0), rtol=1e-5)
        assert (np.abs(values * scale + zero - features) <= scale * 0.5001 + 1e-6).all()


@pytest.fixture(scope="module")
def made() -> dict[Any, Any]:
    """Stores by codec and dtype, with their source rows; no test changes them."""
    return {}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_other_readers_of_zarr_find_the_source_values(
    codec: str, dtype: Any, reader: str, made: dict[Any, Any], tmp_path_factory: Any, make_bags: Make, tmp_path: Path
) -> None:
    if (codec, dtype) not in made:
        rows, store = make_bags(), cfstore.open(tmp_path_factory.mktemp("made"), create=True)
        store.ingest(tmp_path / "uni", IngestOptions(dtype=dtype, codec=codec))
        made[codec, dtype] = store, rows
    store, rows = made[codec, dtype]
    check_zarr(store, rows, dtype, READERS[reader])
    assert {row["codec"] for row in bag_rows(store)} == {codec}


@pytest.mark.parametrize("dim", [1, 2, 5, 1025, 2560])
@pytest.mark.parametrize(("codec", "dtype"), [("blosc-zstd", "float16"), ("none", "float32"), ("none", "int8")])
def test_any_dimension_is_readable_by_others_and_by_us(
    dim: int, codec: str, dtype: Any, store: Store, make_bags: Make, tmp_path: Path
) -> None:
    rows = make_bags(dim)
    store.ingest(tmp_path / "uni", IngestOptions(dtype=dtype, codec=codec))
    check_zarr(store, rows, dtype, read_zarr_python)
    for (slide, scale), (features, coords) in rows.items():
        bag = store.slide(slide).bags[scale]
        np.testing.assert_array_equal(bag.coords, coords)
        if dtype == "int8":
            np.testing.assert_allclose(bag.features, features, atol=0.15)
        else:
            assert bag.features.tobytes() == stored(features, dtype).tobytes()


def test_a_shard_is_one_file_per_array_and_its_group_opens_by_name(
    store: Store, make_bags: Make, tmp_path: Path
) -> None:
    make_bags()
    store.ingest(tmp_path / "uni", IngestOptions(dtype="int8"))
    [shard] = (store.path / "features" / "uni").iterdir()
    files = sorted(str(path.relative_to(shard)) for path in shard.rglob("*") if path.is_file())
    arrays = ("coords", "features", "scale", "zero")
    assert files == sorted([*(f"{a}/{f}" for a in arrays for f in ("c/0/0", "zarr.json")), "zarr.json"])
    group = zarr.open_group(shard, mode="r")
    assert sorted(group.array_keys()) == list(arrays)
    assert all(array.metadata.zarr_format == 3 for _, array in group.arrays())


# --- places ------------------------------------------------------------------------------------------


def index_of(path: Path, n_chunks: int) -> NDArray[np.uint64]:
    """Offset and length of every chunk: the last bytes of a Zarr shard, but for 4 of their checksum."""
    return np.frombuffer(path.read_bytes()[-16 * n_chunks - 4 : -4], "<u8").reshape(n_chunks, 2)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_a_slide_is_one_range_of_whole_chunks_and_the_catalog_says_which(
    codec: str, store: Store, make_bags: Make, tmp_path: Path
) -> None:
    make_bags()
    store.ingest(tmp_path / "uni", IngestOptions(codec=codec))
    found = bag_rows(store)
    path = store.path / found[0]["shard"] / "features"
    array = zarr.open_array(path, mode="r")
    chunk = array.chunks[0]
    index = index_of(path / "c" / "0" / "0", array.shape[0] // chunk)
    slides: dict[str, list[range]] = {}
    for row in found:
        first, last = row["row_start"] // chunk, (row["row_start"] + row["n_patches"] - 1) // chunk
        assert row["byte_start"] == index[first, 0]
        assert row["byte_length"] == index[first : last + 1, 1].sum()
        stop = row["byte_start"] + row["byte_length"]
        slides.setdefault(row["slide_id"], []).append(range(row["byte_start"], stop))
    end = 0
    for ranges in slides.values():  # slides follow each other without a gap; no byte belongs to two
        assert ranges[0].start == end
        assert all(after.start <= before.stop for before, after in pairwise(ranges))
        end = ranges[-1].stop
    assert end == (path / "c" / "0" / "0").stat().st_size - 16 * len(index) - 4


@pytest.mark.parametrize("dtype", ["float16", "float16-rounded", "float32"])
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_the_bytes_of_an_uncompressed_bag_are_its_rows(
    form: Any, dtype: Any, store: Store, make_bags: Make, tmp_path: Path
) -> None:
    rows = make_bags()
    store.ingest(tmp_path / "uni", IngestOptions(dtype=dtype, codec="none", format=form))
    for row in bag_rows(store):
        shard = store.path / row["shard"]
        content = (shard if form == "webdataset" else shard / "features" / "c" / "0" / "0").read_bytes()
        expected = stored(rows[row["slide_id"], row["scale"]][0], dtype).tobytes()
        assert row["codec"] == "none"
        assert row["byte_length"] == row["bytes"] == len(expected)
        assert content[row["byte_start"] : row["byte_start"] + row["byte_length"]] == expected
        assert (row["row_start"] is None) == (form == "webdataset")
        assert row["shard"].endswith(".tar" if form == "webdataset" else ".zarr")


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_tarfile_and_numpy_read_a_tar(dtype: Any, store: Store, make_bags: Make, tmp_path: Path) -> None:
    rows = make_bags()
    store.ingest(tmp_path / "uni", IngestOptions(dtype=dtype, format="webdataset"))
    [shard] = (store.path / "features" / "uni").iterdir()
    with tarfile.open(shard) as archive:
        members = {member.name: member for member in archive}
        load = {
            name: np.load(io.BytesIO(archive.extractfile(member).read()))  # type: ignore[union-attr]
            for name, member in members.items()
            if name.endswith(".npy")
        }
        for name in ("a", "b", "c", "d", "e"):
            content = json.loads(archive.extractfile(f"{name}.json").read())  # type: ignore[union-attr]
            assert content["n_patches"] == {f"{scale}x": n for scale, n in COUNTS[name].items()}
    for (slide, scale), (features, coords) in rows.items():
        values = load[f"{slide}.x{scale}.npy"]
        np.testing.assert_array_equal(load[f"{slide}.coords_x{scale}.npy"], coords)
        if dtype == "int8":
            steps = load[f"{slide}.scale.npy"]
            assert (np.abs(values * steps + load[f"{slide}.zero.npy"] - features) <= steps * 0.5001 + 1e-6).all()
        else:
            assert values.tobytes() == stored(features, dtype).tobytes()
    for row in bag_rows(store):
        assert row["byte_start"] % 4096 == 0


# --- names ---------------------------------------------------------------------------------------------

ODD_NAMES = ("Fall Müller 3", "it's", "100%", 'say "x"', "日本", "a.b.c", "%2E", "-", "x" * 180)


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("place", ["with space", "it's 100%", 'a "quoted" one', "Bücher-日本"])
def test_paths_and_slides_may_hold_any_letters(place: str, form: Any, tmp_path: Path, make_bags: Make) -> None:
    rows = make_bags(dim=8, counts={name: {5: 1, 20: 40} for name in ODD_NAMES}, folder=f"{place}/source")
    store = cfstore.open(tmp_path / place / "store", create=True)
    store.ingest(tmp_path / place / "source", IngestOptions(format=form, encoder="uni"))
    with write_lock(store.path):
        catalog.rebuild(store.path)
    assert {(row["slide_id"], row["scale"]) for row in bag_rows(store)} == set(rows)
    for (slide, scale), (features, coords) in rows.items():
        bag = store.slide(slide).bags[scale]
        assert bag.features.tobytes() == features.astype(np.float16).tobytes()
        np.testing.assert_array_equal(bag.coords, coords)


# --- records -------------------------------------------------------------------------------------------


@pytest.fixture(params=["zarr", "webdataset"])
def one_shard(request: pytest.FixtureRequest, store: Store, make_bags: Make, tmp_path: Path) -> Path:
    make_bags(dim=8)
    store.ingest(tmp_path / "uni", IngestOptions(format=request.param, dtype="int8", cohort="LUAD"))
    [shard] = (store.path / "features" / "uni").iterdir()
    return shard


def test_a_shard_copied_to_another_store_says_the_same_of_its_slides(
    one_shard: Path, store: Store, tmp_path: Path
) -> None:
    other = cfstore.open(tmp_path / "other", create=True)
    (other.path / "features" / "uni").mkdir()
    copied = other.path / "features" / "uni" / one_shard.name
    shutil.copytree(one_shard, copied) if one_shard.is_dir() else shutil.copy(one_shard, copied)
    with write_lock(other.path):
        catalog.rebuild(other.path)
    for query in ("SELECT * FROM bags ORDER BY ALL", "SELECT * FROM slides ORDER BY ALL"):
        assert other.sql(query).to_pylist() == store.sql(query).to_pylist() != []
    for slide in COUNTS:
        for scale, bag in store.slide(slide).bags.items():
            np.testing.assert_array_equal(other.slide(slide).bags[scale].features, bag.features)


def rewrite(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a shard says about itself (a tar: what each sample says), and sign it again."""
    if shard.is_dir():
        path = shard / "zarr.json"
        content = json.loads(path.read_text())
        change(content["attributes"]["cfstore"])
        content["attributes"]["cfstore"]["digest"] = BLANK_DIGEST
        path.write_text(sign(json.dumps(content)))
        return
    out = io.BytesIO()
    with tarfile.open(shard) as source, tarfile.open(fileobj=out, mode="w") as target:
        for member in source:
            data = source.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".json"):
                content = json.loads(data)
                record = {**content["cfstore"]["shard"], "slides": [content["cfstore"]["slide"]]}
                change(record)
                slides = record.pop("slides", None)
                slide = slides[0] if isinstance(slides, list) and slides else slides
                content["cfstore"] = {"slide": slide, "shard": record, "digest": BLANK_DIGEST}
                data = sign(json.dumps(content)).encode()
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    shard.write_bytes(out.getvalue())


@pytest.mark.parametrize(("version", "remedy"), [(3, "upgrade"), (1, "ingest into a new --store"), ("2", "restore")])
def test_a_shard_of_another_format_is_refused_by_name_and_the_catalog_stays(
    version: object, remedy: str, one_shard: Path, store: Store
) -> None:
    rewrite(one_shard, lambda record: record.update(format_version=version))
    before = bag_rows(store)
    with pytest.raises(StoreFormatError, match=rf"{one_shard.name}.*{version!r}.*{remedy}"), write_lock(store.path):
        catalog.rebuild(store.path)
    assert bag_rows(store) == before


def places_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value, one of each list."""
    keys = list(content) if isinstance(content, dict) else range(min(1, len(content)))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from places_in(content[key])


@pytest.mark.slow
def test_a_record_with_any_field_garbled_is_read_or_refused_by_name_but_nothing_else_happens(
    one_shard: Path, store: Store
) -> None:
    backup = one_shard.with_name("backup")
    shutil.move(one_shard, backup)
    refused = 0
    for number in range(60):
        for value in (None, -1, 2**62, "../../etc", []):
            shutil.copytree(backup, one_shard) if backup.is_dir() else shutil.copy(backup, one_shard)
            reached: list[Any] = []

            def garble(
                record: dict[str, Any], number: int = number, value: Any = value, reached: Any = reached
            ) -> None:
                for index, (container, key) in enumerate(places_in(record)):
                    if index == number:
                        container[key] = value
                        reached.append(key)
                        return

            rewrite(one_shard, garble)
            try:
                with write_lock(store.path):
                    catalog.rebuild(store.path)
                for row in bag_rows(store):
                    assert 0 < row["n_patches"] < 1000
                    store.slide(row["slide_id"])
            except StoreError as error:
                refused += 1
                assert one_shard.name in str(error) or "slide" in str(error)  # noqa: PT017
            shutil.rmtree(one_shard) if one_shard.is_dir() else one_shard.unlink()
            if not reached:
                return
    assert refused > 100
