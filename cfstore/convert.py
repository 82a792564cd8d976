"""Source rows to stored rows, a few at a time: precision, with its measured error, and nothing lost unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from cfstore.errors import NonFiniteError, PrecisionError, ShapeError
from cfstore.halves import convert_into, widened
from cfstore.types import Affine

__all__ = ["ARRAY_DTYPE", "DTYPES", "Affine", "BagConverter", "Dtype", "Measured", "RangeMeter", "dequantise"]

Dtype = Literal["float16", "float16-rounded", "float32", "int8"]
DTYPES: Final[tuple[Dtype, ...]] = ("float16", "float16-rounded", "float32", "int8")
ARRAY_DTYPE: Final[Mapping[str, str]] = MappingProxyType(
    {"float16": "float16", "float16-rounded": "float16", "float32": "float32", "int8": "uint8"}
)
"""The array dtype that holds each stored precision."""

_LIMIT: Final[Mapping[str, float]] = {
    "float16": 65_504.0,
    "float16-rounded": 65_280.0,  # the next step of 7 mantissa bits is infinity
    "float32": float(np.finfo(np.float32).max),
    "int8": float(np.finfo(np.float32).max) / 4,  # so that a channel's range stays finite
}
_LEVELS: Final = 255
_DROPPED_BITS: Final = 3
"""float16 has 10 explicit mantissa bits; "rounded" keeps 7, as bfloat16 does."""
_BLOCK_VALUES: Final = 1 << 16
"""Values worked on at once: a handful of arrays of them stay in the L2 cache."""


@dataclass(frozen=True)
class Measured:
    """What storing a bag came to.

    Parameters
    ----------
    n_patches
        Rows of the bag.
    digest
        `xxh3-128:<hex>` of the stored rows in C order, then of the coords (int32) if there are any;
        int8 begins with the bytes of scale and zero. All little-endian.
    max_abs_error
        Largest |stored - source|.
    rms_relative_error
        rms(stored - source) / rms(source); 0 where the source is all zero.
    """

    n_patches: int
    digest: str
    max_abs_error: float
    rms_relative_error: float


class RangeMeter:
    """int8's first pass: the range of each channel over all bags of a slide."""

    def __init__(self, dim: int) -> None:
        self._low = np.full(dim, np.inf)
        self._high = np.full(dim, -np.inf)
        self._path: Path | None = None
        self._seen = 0  # rows of self._path

    def add(self, path: Path, rows: NDArray[np.floating]) -> None:
        """Take in the next rows [n, D] of the file `path`.

        Raises
        ------
        NonFiniteError
            NaN or Inf among the rows.
        PrecisionError
            A value too large for a float32 scale.
        ShapeError
            Not [n, D].
        """
        if path != self._path:
            self._path, self._seen = path, 0
        for block in _blocks(_native(path, rows, len(self._low))):
            exact = widened(block)
            low, high = exact.min(axis=0), exact.max(axis=0)
            if not (high.max() <= _LIMIT["int8"] and low.min() >= -_LIMIT["int8"]):
                raise _refusal(path, "int8", rows, self._seen)
            np.minimum(self._low, low, out=self._low)
            np.maximum(self._high, high, out=self._high)
        self._seen += len(rows)

    def affine(self) -> Affine:
        """Scale and zero that map 0…255 onto the ranges; a constant channel has scale 0 and its value as zero."""
        known = self._low <= self._high
        low, high = np.where(known, self._low, 0.0), np.where(known, self._high, 0.0)
        scale = ((high - low) / _LEVELS).astype(np.float32)
        scale[scale < np.finfo(np.float32).tiny] = 0.0  # 1 / scale would be infinite
        return Affine(scale, low.astype(np.float32))


class BagConverter:
    """One bag on its way to the stored precision.

    Parameters
    ----------
    path
        The source file, for messages.
    dtype
        One of DTYPES.
    dim
        Feature dimension D.
    affine
        Scale and zero of the slide; for int8, and only for it.
    """

    def __init__(self, path: Path, dtype: str, dim: int, affine: Affine | None = None) -> None:
        if (affine is not None) != (dtype == "int8"):
            message = f"{path}: int8 needs the slide's scale and zero, {dtype} takes none"
            raise ValueError(message)
        self._path, self._dtype, self._dim, self._affine = path, dtype, dim, affine
        self._out = np.empty((0, dim), ARRAY_DTYPE[dtype])
        self._seen = 0
        self._worst = self._squared_error = self._squared = 0.0
        self._hash = xxhash.xxh3_128()
        if affine is not None:
            for values in (affine.scale, affine.zero):
                self._hash.update(np.ascontiguousarray(values, "<f4").data)
            with np.errstate(divide="ignore"):
                self._inverse = np.where(affine.scale > 0, 1 / affine.scale, np.float32(0))

    def convert(self, rows: NDArray[np.floating]) -> NDArray[Any]:
        """The next rows [n, D] (float16, 32 or 64) as they are stored: [n, D] of ARRAY_DTYPE.

        The result is valid until the next call, and is `rows` itself where nothing has to change.

        Raises
        ------
        NonFiniteError
            NaN or Inf among the rows.
        PrecisionError
            A value beyond what the dtype holds (float16: 65,504), or for int8 outside the slide's range.
        ShapeError
            Not [n, D].
        """
        source = _native(self._path, rows, self._dim)
        stored = source if self._is_stored(source) else self._room(len(source))
        for block, kept in zip(_blocks(source), _blocks(stored), strict=True):
            exact = widened(block)
            if not (exact.max() <= _LIMIT[self._dtype] and exact.min() >= -_LIMIT[self._dtype]):
                raise _refusal(self._path, self._dtype, source, self._seen)
            if stored is not source:
                self._store(exact, kept)
            if not self._is_lossless(source):
                self._measure(exact, kept)
        self._hash.update(stored.data)
        self._seen += len(source)
        return stored

    def finish(self, coords: NDArray[np.int32] | None) -> Measured:
        """Digest and errors of the whole bag, once all of its rows and its coords [N, 2] are known."""
        if coords is not None:
            self._hash.update(np.ascontiguousarray(coords, "<i4").data)
        relative = float(np.sqrt(self._squared_error / self._squared)) if self._squared else 0.0
        return Measured(self._seen, f"xxh3-128:{self._hash.hexdigest()}", self._worst, relative)

    def _is_stored(self, source: NDArray[Any]) -> bool:
        return source.dtype == self._out.dtype and self._dtype != "float16-rounded"

    def _is_lossless(self, source: NDArray[Any]) -> bool:
        return self._is_stored(source) or (self._dtype == "float32" and source.dtype == np.float16)

    def _room(self, n_rows: int) -> NDArray[Any]:
        if len(self._out) < n_rows:
            self._out = np.empty((n_rows, self._dim), self._out.dtype)
        return self._out[:n_rows]

    def _store(self, exact: NDArray[np.floating], kept: NDArray[Any]) -> None:
        if self._affine is not None:
            self._quantise(exact, kept, self._affine)
            return
        convert_into(exact, kept)
        if self._dtype == "float16-rounded":
            _round(kept.view(np.uint16))

    def _quantise(self, exact: NDArray[np.floating], kept: NDArray[np.uint8], affine: Affine) -> None:
        with np.errstate(over="ignore", under="ignore"):
            levels = np.subtract(exact, affine.zero).astype(np.float32, copy=False)
            levels *= self._inverse
            np.rint(levels, out=levels)
        if not (levels.max() <= _LEVELS and levels.min() >= 0):
            message = (
                f"{self._path}: a feature lies outside the range that its slide had a moment ago; "
                "the file has changed: ingest it again"
            )
            raise PrecisionError(message)
        np.copyto(kept, levels, casting="unsafe")

    def _measure(self, exact: NDArray[np.floating], kept: NDArray[Any]) -> None:
        if self._affine is not None:
            error = dequantise(kept, self._affine).astype(exact.dtype, copy=False)
        else:
            error = widened(kept).astype(exact.dtype, copy=kept.dtype != np.float16)
        error -= exact
        worst = max(float(error.max()), -float(error.min()))
        self._worst = max(self._worst, worst)
        self._squared += _sum_of_squares(exact)
        if worst:
            self._squared_error += _sum_of_squares(error)


def dequantise(rows: NDArray[np.uint8], affine: Affine, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """int8 rows [n, D] as numbers: `rows * scale + zero`, float32, into `out` where it is given."""
    values = np.multiply(rows, affine.scale, out=out, dtype=np.float32)
    return np.add(values, affine.zero, out=values)


def _native(path: Path, rows: NDArray[np.floating], dim: int) -> NDArray[np.floating]:
    """The rows in C order and native byte order."""
    if rows.ndim != 2 or rows.shape[1] != dim:
        message = f"{path}: features of shape {rows.shape}, expected [rows, {dim}]; extract the slide again"
        raise ShapeError(message)
    return np.ascontiguousarray(rows, rows.dtype.newbyteorder("="))


def _blocks(rows: NDArray[Any]) -> list[NDArray[Any]]:
    step = max(1, _BLOCK_VALUES // max(1, rows.shape[1]))
    return [rows[at : at + step] for at in range(0, len(rows), step)]


def _round(bits: NDArray[np.uint16]) -> None:
    """Round float16 bit patterns to 7 mantissa bits, ties to even. A carry into the exponent is right."""
    lift = bits >> _DROPPED_BITS
    lift &= 1
    lift += (1 << (_DROPPED_BITS - 1)) - 1
    bits += lift
    bits &= np.uint16(0xFFFF ^ ((1 << _DROPPED_BITS) - 1))


def _sum_of_squares(values: NDArray[np.floating]) -> float:
    """In the values' precision row by row; in float64 where that leaves its range. Not by BLAS: it starts threads."""
    total = float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))
    if 1e-25 < total < 1e38:
        return total
    wide = values.astype(np.float64)
    return float(np.einsum("ij,ij->", wide, wide))


def _refusal(path: Path, dtype: str, rows: NDArray[np.floating], before: int) -> NonFiniteError | PrecisionError:
    """Why `rows`, which `before` rows of the file precede, cannot be stored."""
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        return NonFiniteError(
            f"{path}: row {before + bad[0]} has NaN or Inf features "
            f"({len(bad)} of the first {before + len(rows)} patches do); extract the slide again"
        )
    largest = max(float(rows.max()), -float(rows.min()))
    wider = largest <= _LIMIT["float32"]
    remedy = "store this encoder with --dtype float32" if wider else "extract the slide again"
    return PrecisionError(
        f"{path}: a feature of magnitude {largest:,.6g} does not fit {dtype} (at most {_LIMIT[dtype]:,.6g}); {remedy}"
    )
