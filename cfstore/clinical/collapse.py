"""Many rows of one patient become one, and disagreement about the outcome is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cfstore.errors import ClinicalError

_SAME_TIME: Final = 1e-6  # months; what a round trip through text can change
_N_NAMED: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class Patients:
    """Who is in each row. A patient is one identifier in one cohort, in order of appearance."""

    cohorts: tuple[str | None, ...]
    ids: tuple[str, ...]
    of_row: NDArray[np.int64]

    @staticmethod
    def of(cohorts: Sequence[str | None], ids: Sequence[str]) -> Patients:
        """Number the patients of the rows."""
        numbers: dict[tuple[str | None, str], int] = {}
        of_row = [numbers.setdefault(key, len(numbers)) for key in zip(cohorts, ids, strict=True)]
        return Patients(
            tuple(cohort for cohort, _ in numbers),
            tuple(patient for _, patient in numbers),
            np.array(of_row, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, valid: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The first valid row of each patient, -1 where none is."""
        rows = np.flatnonzero(valid)[::-1]
        first = np.full(len(self), -1, dtype=np.int64)
        first[self.of_row[rows]] = rows  # the last one assigned, the first row, stays
        return first

    def collapse(self, column: pa.Array) -> tuple[pa.Array, bool]:
        """Each patient's first value that is not null, and whether some patient has others."""
        if len(self) == len(self.of_row):
            return column, False
        valid = np.asarray(column.is_valid())
        first = self.first(valid)
        chosen = column.take(pa.array(first, mask=first < 0))
        codes = np.asarray(column.dictionary_encode().indices.fill_null(-1))
        differs = valid & (codes != codes[first[self.of_row]])
        return chosen, bool(differs.any())

    def agreed(self, path: Path, name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each patient's one value, NaN where no row has any.

        Raises
        ------
        ClinicalError
            If two rows of one patient hold different values.
        """
        valid = ~np.isnan(values)
        first = self.first(valid)
        chosen = np.where(first < 0, np.nan, values[first])
        differs = valid & (np.abs(values - chosen[self.of_row]) > _SAME_TIME)
        if differs.any():
            raise ClinicalError(self._conflict(path, name, values, chosen, np.flatnonzero(differs)))
        return chosen

    def _conflict(
        self,
        path: Path,
        name: str,
        values: NDArray[np.float64],
        chosen: NDArray[np.float64],
        rows: NDArray[np.int64],
    ) -> str:
        others = {int(self.of_row[row]): values[row] for row in rows[::-1]}
        named = ", ".join(
            f"{self.ids[patient]} ({chosen[patient]:.6g} and {others[patient]:.6g})"
            for patient in sorted(others)[:_N_NAMED]
        )
        return (
            f"{path.name}: rows of one patient disagree in {name} for {len(others)} patients: {named}; "
            f"keep the right row of each"
        )
