"""What a codec is, and the checksum that all but "none" share."""

from __future__ import annotations

from typing import Any, Final, Protocol, TypeAlias

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Buffer: TypeAlias = bytes | bytearray | memoryview
_CRC_BYTES: Final = 4
_RESIDUE: Final = 0x48674BC7
"""crc32c of any bytes that are followed by their own crc32c, little-endian."""


class ChunkError(ValueError):
    """Stored bytes are not a chunk of this codec: damaged."""


class Codec(Protocol):
    """One way to store a chunk; stateless, so threads may share it."""

    @property
    def name(self) -> str:
        """As in CODECS."""

    @property
    def checksummed(self) -> bool:
        """Whether stored chunks end with their crc32c, 4 bytes little-endian."""

    def encode(self, chunk: NDArray[Any]) -> bytes:
        """The complete stored bytes of a C-contiguous chunk [rows, D], little-endian."""

    def decode_into(self, stored: Buffer, out: NDArray[np.uint8], *, trusted: bool = False) -> None:
        """Decode into `out`: 1-D, contiguous, as long as the decoded chunk. Never writes past it.

        `trusted`: the caller knows the stored bytes by a digest of its own, so that the crc32c,
        a tenth of the time, need not be computed again. The GIL is free while decoding; google-crc32c
        keeps it for the checksum (100 us for 2 MiB) unless `stored` is `bytes` of 1 MiB or more.

        Raises
        ------
        ChunkError
            Wrong checksum, not a chunk of this codec, or one of another size; `out` may then hold anything.
        """

    def compressors(self) -> list[dict[str, Any]]:
        """What `zarr.create_array(compressors=...)` takes for arrays of such chunks."""


def seal(frame: NDArray[np.uint8], used: int) -> bytes:
    """The first `used` bytes of `frame` and their crc32c; `frame` has room for both."""
    end = used + _CRC_BYTES
    frame[used:end].view("<u4")[0] = google_crc32c.value(frame[:used])
    return frame[:end].tobytes()


def sealed(frame: bytes) -> bytes:
    """The frame and its crc32c."""
    checksum: int = google_crc32c.value(frame)
    return frame + checksum.to_bytes(_CRC_BYTES, "little")


def unseal(stored: Buffer, *, trusted: bool) -> NDArray[np.uint8]:
    """What stands before the crc32c at the end of `stored`, without a copy; `trusted` does not look at the crc32c.

    Raises
    ------
    ChunkError
        The checksum is wrong.
    """
    view = np.frombuffer(stored, np.uint8)
    # google-crc32c lets go of the GIL only for `bytes`, and takes no memoryview.
    checksum = _RESIDUE if trusted else google_crc32c.value(stored if type(stored) is bytes else view)
    if checksum != _RESIDUE or len(view) <= _CRC_BYTES:
        message = f"wrong checksum in a chunk of {len(view):,} bytes"
        raise ChunkError(message)
    return view[:-_CRC_BYTES]
