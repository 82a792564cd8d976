"""How one chunk of an array becomes stored bytes and back.

Stored bytes are what Zarr v3's `bytes(little) -> compressor -> crc32c` makes of a chunk, so every
Zarr reader decodes them. "none" is the chunk itself, without a checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

import numpy as np

from cfstore.codecs.base import Buffer, ChunkError, Codec
from cfstore.codecs.blosc import BloscCodec
from cfstore.codecs.blosc_planes import BloscPlanesCodec
from cfstore.codecs.plain import NoCodec, ZstdCodec
from cfstore.errors import SourceError

__all__ = ["CODECS", "DEFAULT_CODEC", "Buffer", "ChunkError", "Codec", "get_codec"]

_DTYPES: Final = ("float16", "float32", "uint8", "int32")


def _blosc_zstd(dtype: np.dtype[np.generic]) -> Codec:
    if dtype.itemsize > 1:
        return BloscPlanesCodec("blosc-zstd", dtype.itemsize)
    return BloscCodec("blosc-zstd", "zstd", "noshuffle", dtype.itemsize)


def _blosc(name: str, cname: str, shuffle: str, dtype: np.dtype[np.generic]) -> Codec:
    return BloscCodec(name, cname, shuffle, dtype.itemsize)


_MAKE: Final[Mapping[str, Callable[[np.dtype[np.generic]], Codec]]] = {
    "none": lambda dtype: NoCodec(),
    "blosc-zstd": _blosc_zstd,
    "blosc-zstd-bitshuffle": partial(_blosc, "blosc-zstd-bitshuffle", "zstd", "bitshuffle"),
    "blosc-lz4": partial(_blosc, "blosc-lz4", "lz4", "shuffle"),
    "blosc-lz4-bitshuffle": partial(_blosc, "blosc-lz4-bitshuffle", "lz4", "bitshuffle"),
    "zstd": lambda dtype: ZstdCodec(),
}

CODECS: Final[tuple[str, ...]] = tuple(_MAKE)
"""Names of the codecs, as the catalog and `--codec` spell them."""

DEFAULT_CODEC: Final[Mapping[str, str]] = MappingProxyType(
    {"float16": "blosc-zstd", "float16-rounded": "blosc-zstd", "float32": "blosc-zstd", "int8": "none"}
)
"""The codec of each cfstore dtype where none was asked for."""


def get_codec(name: str, dtype: str | np.dtype[np.generic]) -> Codec:
    """The codec `name` for arrays of `dtype`: float16, float32 or uint8.

    Raises
    ------
    SourceError
        No such codec, or no such array dtype.
    """
    array_dtype = np.dtype(dtype)
    if array_dtype.name not in _DTYPES:
        message = f"no codec stores arrays of {array_dtype}; known: {', '.join(_DTYPES)}"
        raise SourceError(message)
    if name not in _MAKE:
        message = f"no codec {name!r}; known: {', '.join(CODECS)}"
        raise SourceError(message)
    return _MAKE[name](array_dtype)
