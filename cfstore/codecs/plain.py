"""No compression, and plain zstd."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from cfstore.codecs.base import Buffer, ChunkError, sealed, unseal

_LEVEL: Final = 1
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_DICTIONARY_ID_BYTES: Final = (0, 1, 2, 4)
_CONTENT_SIZE: Final = ("", "<H", "<I", "<Q")


@dataclass(frozen=True)
class NoCodec:
    """The chunk's own bytes; nothing tells whether they were damaged."""

    name: str = "none"
    checksummed: bool = False

    def encode(self, chunk: NDArray[Any]) -> bytes:
        return np.ascontiguousarray(chunk).tobytes()

    def decode_into(self, stored: Buffer, out: NDArray[np.uint8], *, trusted: bool = False) -> None:
        if len(stored) != len(out):
            message = f"a chunk of {len(stored):,} bytes, expected {len(out):,}"
            raise ChunkError(message)
        out[:] = np.frombuffer(stored, np.uint8)

    def compressors(self) -> list[dict[str, Any]]:
        return []


def _content_size(frame: bytes) -> int | None:
    """Decoded bytes that the header of a zstd frame promises (RFC 8878, 3.1.1.1)."""
    if len(frame) < 6 or frame[:4] != _MAGIC:
        return None
    descriptor = frame[4]
    single_segment = bool(descriptor & 0x20)
    at = 5 + (not single_segment) + _DICTIONARY_ID_BYTES[descriptor & 3]
    kind = descriptor >> 6
    if kind == 0:
        return frame[at] if single_segment and at < len(frame) else None
    size = struct.calcsize(_CONTENT_SIZE[kind])
    if at + size > len(frame):
        return None
    value: int = struct.unpack_from(_CONTENT_SIZE[kind], frame, at)[0]
    return value + 256 if kind == 1 else value


@dataclass(frozen=True)
class ZstdCodec:
    """One zstd frame, level 1."""

    name: str = "zstd"
    checksummed: bool = True

    def encode(self, chunk: NDArray[Any]) -> bytes:
        return sealed(zstd.compress(np.ascontiguousarray(chunk), _LEVEL))

    def decode_into(self, stored: Buffer, out: NDArray[np.uint8], *, trusted: bool = False) -> None:
        frame = unseal(stored, trusted=trusted)
        promised = _content_size(frame[:18].tobytes())
        if promised != len(out):
            message = f"a zstd frame of {promised} bytes, expected {len(out):,}"
            raise ChunkError(message)
        try:
            zstd.decompress(frame, out)
        except (RuntimeError, ValueError) as error:  # ValueError: further frames, more than fits
            raise ChunkError(str(error)) from error

    def compressors(self) -> list[dict[str, Any]]:
        return [{"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}, {"name": "crc32c"}]
