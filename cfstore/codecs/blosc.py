"""Blosc frames as c-blosc writes them, and how any Blosc frame is decoded.

numcodecs lets Blosc start threads of its own, under a global lock, when it is called from the main
thread. zarr-python turns that off for the whole process when it is imported; so does this module,
unless somebody has chosen already.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from cfstore.codecs.base import Buffer, ChunkError, sealed, unseal

if blosc.use_threads is None:
    blosc.use_threads = False

BLOCK_BYTES: Final = 1 << 20
"""Decoded bytes of a block: with Blosc's own choice of a few KiB zstd is 2-3 times slower to decode."""
LEVEL: Final = 1
HEADER: Final = struct.Struct("<BBBBiii")
"""Format version, version of the compressor's format, flags, typesize, nbytes, blocksize, cbytes."""
FORMAT_VERSION: Final = 2
FORMATS: Final = {"lz4": 1, "zstd": 4}
"""Upper three bits of the flags."""
_SHUFFLES: Final = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


@dataclass(frozen=True)
class BloscCodec:
    """A Blosc frame of `cname`, level 1, in blocks of 1 MiB."""

    name: str
    cname: str
    shuffle: str
    typesize: int
    checksummed: bool = True

    def encode(self, chunk: NDArray[Any]) -> bytes:
        source = np.ascontiguousarray(chunk)
        frame = blosc.compress(
            source, self.cname.encode(), LEVEL, _SHUFFLES[self.shuffle], BLOCK_BYTES, typesize=self.typesize
        )
        return sealed(frame)

    def decode_into(self, stored: Buffer, out: NDArray[np.uint8], *, trusted: bool = False) -> None:
        frame = unseal(stored, trusted=trusted)
        check_header(frame, len(out), self.cname)
        try:
            blosc.decompress(frame, out)
        except RuntimeError as error:
            raise ChunkError(str(error)) from error

    def compressors(self) -> list[dict[str, Any]]:
        configuration = {
            "typesize": self.typesize,
            "cname": self.cname,
            "clevel": LEVEL,
            "shuffle": self.shuffle,
            "blocksize": BLOCK_BYTES,
        }
        return [{"name": "blosc", "configuration": configuration}, {"name": "crc32c"}]


def check_header(frame: NDArray[np.uint8], nbytes: int, cname: str) -> None:
    """Refuse a frame whose header would lead c-blosc out of its two buffers.

    c-blosc knows neither length: it believes the header, and checks all else against that.

    Raises
    ------
    ChunkError
        No Blosc frame, of another compressor, or of other lengths than it has.
    """
    if len(frame) < HEADER.size:
        message = f"a Blosc frame of {len(frame)} bytes has no header"
        raise ChunkError(message)
    version, _, flags, _, decoded, _, stored = HEADER.unpack_from(frame.data)
    if version != FORMAT_VERSION or flags >> 5 != FORMATS[cname]:
        message = f"not a Blosc frame of {cname} (version {version}, flags {flags:#04x})"
        raise ChunkError(message)
    if decoded != nbytes or stored != len(frame):
        message = f"a Blosc frame of {stored:,} for {decoded:,} bytes, expected {len(frame):,} for {nbytes:,}"
        raise ChunkError(message)
