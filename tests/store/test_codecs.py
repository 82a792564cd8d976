"""Chunks to stored bytes and back; zarr-python and numcodecs say what the bytes mean."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from cfstore.codecs import CODECS, DEFAULT_CODEC, ChunkError, get_codec
from cfstore.errors import SourceError

DTYPES = ("float16", "float32", "uint8")
CHECKSUMMED = [name for name in CODECS if name != "none"]
SHAPES = [(1, 1), (1, 8), (3, 7), (32, 192), (65, 129), (127, 1), (128, 1), (1024, 384), (513, 1025), (1031, 2053)]


@pytest.fixture
def draw_chunk(rng: np.random.Generator) -> Any:
    """Features as encoders make them: normal, with exact zeros; small integers as uint8."""

    def make(shape: tuple[int, int], dtype: str) -> NDArray[Any]:
        values = rng.normal(scale=3, size=shape) * (rng.random(shape) > 0.15)
        return np.abs(values * 20).astype(dtype) if dtype == "uint8" else values.astype(dtype)

    return make


def decode(codec: Any, stored: Any, like: NDArray[Any]) -> NDArray[Any]:
    out = np.full(like.nbytes, 0xEE, np.uint8)
    codec.decode_into(stored, out)
    return out.view(like.dtype).reshape(like.shape)


def resealed(payload: bytes) -> bytes:
    """Bytes with a right checksum, as somebody who means harm would write them."""
    return payload + google_crc32c.value(payload).to_bytes(4, "little")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chunk_comes_back_bit_by_bit(name: str, dtype: str, shape: tuple[int, int], draw_chunk: Any) -> None:
    chunk, codec = draw_chunk(shape, dtype), get_codec(name, dtype)
    stored = codec.encode(chunk)
    for given in (stored, memoryview(stored), memoryview(bytearray(stored))):
        assert decode(codec, given, chunk).tobytes() == chunk.tobytes()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (32, 192), (65, 129), (513, 1025), (1031, 2053)], ids=str)
def test_zarr_python_decodes_our_chunks_and_we_decode_its(
    name: str, dtype: str, shape: tuple[int, int], draw_chunk: Any, tmp_path: Path
) -> None:
    chunk, codec = draw_chunk(shape, dtype), get_codec(name, dtype)
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=shape, chunks=shape, dtype=dtype, compressors=codec.compressors() or None
    )
    array[:] = chunk
    file = tmp_path / "a.zarr" / "c" / "0" / "0"
    assert decode(codec, file.read_bytes(), chunk).tobytes() == chunk.tobytes()
    file.write_bytes(codec.encode(chunk))
    read: Any = zarr.open_array(tmp_path / "a.zarr", mode="r")[:]
    assert read.tobytes() == chunk.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_planes_of_noise_are_left_alone_and_planes_of_exponents_are_not(dtype: str, draw_chunk: Any) -> None:
    chunk = draw_chunk((1024, 1024), dtype)
    stored = len(get_codec("blosc-zstd", dtype).encode(chunk))
    assert 1.05 < chunk.nbytes / stored < 1.5
    codec = numcodecs.Blosc("zstd", 1, 1, 1 << 20, typesize=chunk.itemsize)
    assert stored < len(codec.encode(chunk)) * 1.12


def test_a_constant_chunk_shrinks_in_every_plane() -> None:
    chunk = np.full((1024, 1024), 1.2345, np.float32)
    assert len(get_codec("blosc-zstd", "float32").encode(chunk)) < 10_000


def test_rows_of_padding_are_seen_wherever_they_are(rng: np.random.Generator) -> None:
    chunk = rng.integers(0, 1 << 16, (1024, 1024), np.uint16).view(np.float16)
    chunk[200:] = 0
    assert len(get_codec("blosc-zstd", "float16").encode(chunk)) < chunk.nbytes / 4


@pytest.mark.parametrize("name", ["blosc-zstd", "none"])
def test_noise_grows_by_no_more_than_header_and_checksum(name: str, rng: np.random.Generator) -> None:
    chunk = rng.integers(0, 1 << 16, (1024, 1024), np.uint16).view(np.float16)
    stored = get_codec(name, "float16").encode(chunk)
    assert len(stored) - chunk.nbytes == (20 if name == "blosc-zstd" else 0)
    assert decode(get_codec(name, "float16"), stored, chunk).tobytes() == chunk.tobytes()


@pytest.mark.parametrize("name", CHECKSUMMED)
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_every_damaged_byte_is_refused(name: str, dtype: str, draw_chunk: Any) -> None:
    codec, chunk = get_codec(name, dtype), draw_chunk((16, 24), dtype)
    stored = codec.encode(chunk)
    for at in range(len(stored)):
        damaged = bytearray(stored)
        damaged[at] ^= 0x41
        with pytest.raises(ChunkError):
            decode(codec, memoryview(damaged), chunk)


@pytest.mark.parametrize("name", CODECS)
def test_bytes_cut_short_or_added_are_refused(name: str, draw_chunk: Any) -> None:
    codec, chunk = get_codec(name, "float16"), draw_chunk((16, 24), "float16")
    stored = codec.encode(chunk)
    for wrong in (b"", stored[:3], stored[:4], stored[:-1], stored[:-5], stored + b"\0", stored * 2):
        with pytest.raises(ChunkError):
            decode(codec, wrong, chunk)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("rows", [15, 17])
def test_a_chunk_of_another_size_is_refused_and_nothing_is_written_beyond_its_place(
    name: str, rows: int, draw_chunk: Any
) -> None:
    codec = get_codec(name, "float16")
    around = np.full(4096, 0xEE, np.uint8)
    with pytest.raises(ChunkError):
        codec.decode_into(codec.encode(draw_chunk((rows, 24), "float16")), around[1000 : 1000 + 16 * 24 * 2])
    assert (around[:1000] == 0xEE).all()
    assert (around[1000 + 16 * 24 * 2 :] == 0xEE).all()


@pytest.mark.parametrize("name", CHECKSUMMED)
def test_damage_under_a_right_checksum_stays_within_its_place(name: str, draw_chunk: Any) -> None:
    codec, chunk = get_codec(name, "float16"), draw_chunk((16, 24), "float16")
    payload = codec.encode(chunk)[:-4]
    around = np.full(chunk.nbytes + 2000, 0xEE, np.uint8)
    refused = 0
    for at in range(min(len(payload), 200)):
        for flip in (0x01, 0x10, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[at] ^= flip
            try:
                codec.decode_into(resealed(bytes(damaged)), around[1000:-1000])
            except ChunkError:
                refused += 1
            assert (around[:1000] == 0xEE).all()
            assert (around[-1000:] == 0xEE).all()
    assert refused > 20


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [
        (0, "B", 3),
        (2, "B", 0x01 | 4 << 5 | 0x08),
        (2, "B", 0x01 | 1 << 5),
        (3, "B", 0),
        (4, "<i", 1 << 30),
        (4, "<i", -1),
        (8, "<i", 0),
        (8, "<i", -4),
        (8, "<i", (1 << 31) - 1),
        (12, "<i", 1 << 30),
        (12, "<i", 0),
        (16, "<i", 1 << 30),
        (16, "<i", -1),
        (20, "<i", (1 << 31) - 1),
        (20, "<i", -1),
    ],
    ids=lambda value: str(value),
)
def test_a_hostile_blosc_header_is_refused(offset: int, layout: str, value: int, draw_chunk: Any) -> None:
    codec, chunk = get_codec("blosc-zstd", "float16"), draw_chunk((64, 96), "float16")
    payload = bytearray(codec.encode(chunk)[:-4])
    struct.pack_into(layout, payload, offset, value)
    with pytest.raises(ChunkError):
        decode(codec, resealed(bytes(payload)), chunk)


def test_a_zstd_frame_without_its_size_or_followed_by_another_is_refused() -> None:
    codec, chunk = get_codec("zstd", "uint8"), np.zeros((4, 100), np.uint8)
    frame = codec.encode(chunk)[:-4]
    assert decode(codec, resealed(frame), chunk).tobytes() == chunk.tobytes()
    unknown = b"\x28\xb5\x2f\xfd\x00\x58" + (400 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    assert numcodecs.Zstd().decode(unknown) == bytes(400)
    for wrong in (unknown, frame + frame, b"\x28\xb5\x2f\xfd\xe0", bytes(20)):
        with pytest.raises(ChunkError):
            decode(codec, resealed(wrong), chunk)


def test_threads_share_a_codec(draw_chunk: Any) -> None:
    codec = get_codec("blosc-zstd", "float16")
    chunks = [draw_chunk((256, 512), "float16") for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        stored = list(pool.map(codec.encode, chunks))
        read = pool.map(decode, [codec] * 16, stored, chunks)
        assert [rows.tobytes() for rows in read] == [chunk.tobytes() for chunk in chunks]


def test_an_unknown_codec_names_those_there_are() -> None:
    with pytest.raises(SourceError, match=r"no codec 'gzip'; known: none, blosc-zstd, .*zstd"):
        get_codec("gzip", "float16")
    with pytest.raises(SourceError, match="float64"):
        get_codec("none", "float64")


def test_every_dtype_has_a_default_among_the_codecs() -> None:
    assert set(DEFAULT_CODEC) == {"float16", "float16-rounded", "float32", "int8"}
    assert set(DEFAULT_CODEC.values()) <= set(CODECS)
    assert [get_codec(name, "float16").checksummed for name in CODECS] == [name != "none" for name in CODECS]
