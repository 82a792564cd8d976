"""Source rows to stored rows: precision, with its measured error, and nothing lost unsaid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from cfstore.errors import NonFiniteError, PrecisionError
from cfstore.parsers import BagSource, read_bag
from cfstore.shards import digest_rows

Dtype = Literal["float16", "float32"]
DTYPES: Final[tuple[Dtype, ...]] = ("float16", "float32")
_BLOCK_ROWS: Final = 4096


@dataclass(frozen=True, eq=False)
class StoredBag:
    """Rows as they are stored, with the error that storing them makes."""

    features: NDArray[np.generic]
    coords: NDArray[np.int32] | None
    max_abs_error: float
    rms_relative_error: float

    @property
    def digest(self) -> str:
        return digest_rows(self.features, self.coords)


def _check_finite(source: BagSource, rows: NDArray[np.floating]) -> None:
    blocks = (rows[at : at + _BLOCK_ROWS] for at in range(0, len(rows), _BLOCK_ROWS))
    finite = np.concatenate([np.isfinite(block).all(axis=1) for block in blocks])
    if not finite.all():
        bad = np.flatnonzero(~finite)
        message = (
            f"{source.path}: {len(bad)} of {len(rows)} patches have NaN or Inf features (first: row {bad[0]}); "
            "extract the slide again"
        )
        raise NonFiniteError(message)


def convert(source: BagSource, dtype: str) -> StoredBag:
    """Read one bag and bring it to the stored precision.

    Raises
    ------
    NonFiniteError
        NaN or Inf among the features.
    PrecisionError
        A value beyond what `dtype` holds (float16: 65,504).
    SourceError
        Whatever reading the file raises.
    """
    raw = read_bag(source)
    _check_finite(source, raw.features)
    largest = max(float(raw.features.max()), -float(raw.features.min()))
    if largest > float(np.finfo(dtype).max):  # as float: NumPy would round `largest` to the dtype first
        message = (
            f"{source.path}: a feature of magnitude {largest:,.6g} does not fit {dtype} "
            f"(at most {np.finfo(dtype).max:,.0f}); store this encoder with --dtype float32"
        )
        raise PrecisionError(message)
    stored = raw.features.astype(dtype)
    worst, squared, total = 0.0, 0.0, 0.0
    for at in range(0, len(stored), _BLOCK_ROWS):
        exact = raw.features[at : at + _BLOCK_ROWS].astype(np.float64)
        error = stored[at : at + _BLOCK_ROWS] - exact
        worst = max(worst, float(np.abs(error).max()))
        squared += float(np.square(error).sum())
        total += float(np.square(exact).sum())
    relative = float(np.sqrt(squared / total)) if total else 0.0
    return StoredBag(stored, raw.coords, worst, relative)


def digest_of_source(source: BagSource, dtype: str) -> str:
    """The digest the store would record for this file."""
    return convert(source, dtype).digest
