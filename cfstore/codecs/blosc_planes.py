"""Blosc frames of floats whose noisy byte planes are left alone.

The low bytes of a float are noise: c-blosc's zstd spends most of the decoding time on undoing a
Huffman code that gained 8 % on them, or nothing. A Blosc block may hold each byte plane of its
shuffled values as a stream of its own, and a stream as long as its plane is the plane. So we write
the frames, compress the planes that pay and leave the others, and any Blosc reader decodes them:

    header   HEADER, flags SHUFFLE | zstd << 5, and not DONT_SPLIT (0x10)
    int32    where each block starts
    block    for each byte of a value, low to high: int32 length, then the stream

c-blosc never splits a shorter block at the end; here all blocks of a frame are of one length. Nor
does it split blocks under 128 values; such a chunk is stored as it is (flag MEMCPYED), and so is
one with no plane that pays.

Format: c-blosc 1.21, README_CHUNK_FORMAT.rst; blosc.c, blosc_d and serial_blosc.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from cfstore.codecs.base import seal
from cfstore.codecs.blosc import FORMAT_VERSION, FORMATS, HEADER, LEVEL, BloscCodec

_ZSTD_VERSION: Final = 1
_SHUFFLE: Final = 0x01
_MEMCPYED: Final = 0x02
_INT32: Final = np.dtype("<i4")
_CRC_BYTES: Final = 4
_PLANES_BLOCK_BYTES: Final = 128 << 10  # both buffers of a block stay in L2; its planes are compressed apart anyway
_MIN_BLOCK_BYTES: Final = 32 << 10
_MIN_SPLIT_VALUES: Final = 128
_GAIN: Final = 1.12
"""A plane is kept compressed if that makes it this much smaller: below, decoding costs more than reading."""
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 4 << 10
"""Four pieces of a plane tell whether the whole is worth an attempt; padding at its end is among them.

The plane of sign and exponent always is."""


class BloscPlanesCodec(BloscCodec):
    """`blosc-zstd` for floats of `typesize` bytes, plane by plane."""

    def __init__(self, name: str, typesize: int) -> None:
        super().__init__(name, "zstd", "shuffle", typesize)

    def encode(self, chunk: NDArray[Any]) -> bytes:
        values = np.ascontiguousarray(chunk).reshape(-1).view(f"<u{self.typesize}")
        n_blocks = _count_blocks(len(values), self.typesize)
        n_streams = n_blocks * self.typesize
        start = HEADER.size + n_blocks * _INT32.itemsize
        frame = np.empty(start + n_streams * _INT32.itemsize + values.nbytes + _CRC_BYTES, np.uint8)
        block_starts = frame[HEADER.size : start].view(_INT32)
        at, pays = start, False
        if len(values) >= _MIN_SPLIT_VALUES:
            for number, block in enumerate(values.reshape(n_blocks, -1)):
                block_starts[number] = at
                for byte in range(self.typesize):
                    at, paid = _write_stream(frame, at, block, byte)
                    pays |= paid
        flags = _SHUFFLE | FORMATS["zstd"] << 5
        if not pays:
            flags |= _MEMCPYED
            at = HEADER.size + values.nbytes
            frame[HEADER.size : at] = values.view(np.uint8)
        block_bytes = values.nbytes // n_blocks
        HEADER.pack_into(
            frame.data, 0, FORMAT_VERSION, _ZSTD_VERSION, flags, self.typesize, values.nbytes, block_bytes, at
        )
        return seal(frame, at)


def _count_blocks(n_values: int, typesize: int) -> int:
    """The fewest equal blocks of at most 128 KiB; one where no division is even."""
    nbytes = n_values * typesize
    fewest, most = -(-nbytes // _PLANES_BLOCK_BYTES), nbytes // _MIN_BLOCK_BYTES
    return next((count for count in range(fewest, most + 1) if n_values % count == 0), 1)


def _write_stream(frame: NDArray[np.uint8], at: int, block: NDArray[Any], byte: int) -> tuple[int, bool]:
    """Write one byte plane of `block` at `frame[at]`; where it ends, and whether compressing it paid."""
    begin = at + _INT32.itemsize
    plane = frame[begin : begin + len(block)]
    if byte:
        np.right_shift(block, 8 * byte, out=plane, casting="unsafe")
    else:
        np.copyto(plane, block, casting="unsafe")
    is_top = byte == block.itemsize - 1
    compressed = _compress(plane) if is_top or _is_promising(plane) else None
    if compressed is not None:
        plane[: len(compressed)] = np.frombuffer(compressed, np.uint8)
    length = len(plane) if compressed is None else len(compressed)
    frame[at:begin] = np.frombuffer(length.to_bytes(4, "little"), np.uint8)
    return begin + length, compressed is not None


def _is_promising(plane: NDArray[np.uint8]) -> bool:
    """Whether some of the plane compresses well enough; true of a short one."""
    if len(plane) <= 2 * _SAMPLES * _SAMPLE_BYTES:
        return True
    last = len(plane) - _SAMPLE_BYTES
    starts = [last * piece // (_SAMPLES - 1) for piece in range(_SAMPLES)]
    sample = np.concatenate([plane[start : start + _SAMPLE_BYTES] for start in starts])
    return len(zstd.compress(sample, LEVEL)) * _GAIN <= len(sample)


def _compress(plane: NDArray[np.uint8]) -> bytes | None:
    """The plane as a zstd frame, or None where that does not pay."""
    compressed: bytes = zstd.compress(plane, LEVEL)
    return compressed if len(compressed) * _GAIN <= len(plane) else None
