"""Reading cells: what is missing, what is a number, and what says that a patient died."""

from __future__ import annotations

import math
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

_MARKERS: Final = ("", "NA", "N/A", "nan", "NaN", "--", "'--", "#N/A", "[Not Available]", "[Not Applicable]")
_MISSING: Final = pa.array(sorted({m for marker in _MARKERS for m in (marker, marker.lower(), marker.upper())}))
# An answer in a text column ("Not Reported" is not "unknown"), but no number and no status.
_NOT_REPORTED: Final = pa.array(["not reported", "Not Reported", "NOT REPORTED"])

# A site "05", a hexadecimal-looking code or a 20-digit identifier would not survive as a number.
_CODE: Final = "^0[0-9xX]"
_LARGEST: Final = 1e18
_N_PROBED: Final = 16

_FLAGS: Final = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}
_STATUSES: Final = {"living": 0.0, "alive": 0.0, "deceased": 1.0, "dead": 1.0}
_SEXES: Final = {"female": "female", "f": "female", "male": "male", "m": "male"}


def blank_missing(column: pa.Array) -> pa.Array:
    """The text column trimmed, with every missing marker null."""
    column = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(column, value_set=_MISSING), pa.scalar(None, pa.string()), column)


def blank_not_reported(column: pa.Array) -> pa.Array:
    """The column with "Not Reported" null too, as numbers and statuses need it."""
    unknown = pc.is_in(column, value_set=_NOT_REPORTED)
    return pc.if_else(unknown, pa.scalar(None, pa.string()), column) if pc.any(unknown).as_py() else column


def typed(column: pa.Array) -> pa.Array:
    """The text column as int64 or float64 if every value is a number, else as it is."""
    numbers = blank_not_reported(column)
    if numbers.null_count == len(numbers):
        return column
    found = _cast(numbers, pa.int64())
    if found is None:
        found = _cast(numbers, pa.float64())
    return column if found is None or _holds_codes(numbers, found) else found


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array | None:
    try:
        pc.cast(column.slice(0, _N_PROBED), kind)  # a cast that fails costs twenty that succeed
        return pc.cast(column, kind)
    except pa.ArrowInvalid:
        return None


def _holds_codes(column: pa.Array, numbers: pa.Array) -> bool:
    zeros = column.filter(pc.starts_with(column, "0"))
    coded = bool(len(zeros)) and pc.any(pc.match_substring_regex(zeros, _CODE)).as_py()
    lossy = pa.types.is_floating(numbers.type) and pc.max(pc.abs(numbers)).as_py() >= _LARGEST
    return bool(coded or lossy)


def read_number(cell: str) -> float:
    """A finite number; ValueError for anything else."""
    value = float(cell)
    if not math.isfinite(value) or "_" in cell:  # Python alone reads 1_000 as a number
        raise ValueError(cell)
    return value


def read_time(cell: str) -> float:
    """A finite number that is not negative; ValueError for anything else."""
    value = read_number(cell)
    if value < 0:
        raise ValueError(cell)
    return value


def read_flag(cell: str) -> float:
    """0 or 1, also as 0.0, 1.0, true or false; ValueError for anything else."""
    known = _FLAGS.get(cell.lower())
    value = read_number(cell) if known is None else known
    if value not in (0.0, 1.0):
        raise ValueError(cell)
    return value


def read_censorship(cell: str) -> float:
    """The event of a `censorship` cell: this is the one place where 1 = censored is turned over."""
    return 1.0 - read_flag(cell)


def read_status(cell: str) -> float:
    """The event of a cBioPortal status: `1:DECEASED`, `DECEASED` or a bare 1."""
    code, _, _ = cell.partition(":")
    known = _STATUSES.get(code.strip().lower())
    return read_flag(code.strip()) if known is None else known


def read_vital(cell: str) -> float:
    """The event of a GDC vital status; NaN where it is neither alive nor dead."""
    return _STATUSES.get(cell.lower(), math.nan)


def read_sex(cell: str) -> str:
    """`female` or `male`; ValueError for anything else."""
    try:
        return _SEXES[cell.lower()]
    except KeyError:
        raise ValueError(cell) from None


def read_is_female(cell: str) -> str:
    """`female` for 1, `male` for 0; ValueError for anything else."""
    return "female" if read_flag(cell) else "male"
