"""Folds of patients: read from `splits_<k>.csv`, or made, stratified by event.

Files list patients (MCAT, PORPOISE, CrossFusion) or slides (CLAM, CrossFusion's COAD) in ragged
`train`, `val` and sometimes `test` columns. Folds here always split patients: a slide stands for
its patient, and a patient on two sides of a fold is refused.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cfstore.errors import LeakageError, SplitsError
from cfstore.names import strip_suffixes

PARTS: Final = ("train", "val", "test")
_FILE: Final = re.compile(r"^splits_(\d+)\.csv$")


@dataclass(frozen=True)
class Fold:
    """One fold: patients to train on, patients to validate on, and patients kept apart."""

    train: frozenset[str]
    val: frozenset[str]
    test: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SplitSet:
    """All folds of one named split, by fold number."""

    name: str
    folds: Mapping[int, Fold]


def find_split_files(folder: Path) -> dict[int, Path]:
    """`splits_<k>.csv` files of a folder by k (CLAM's `_bool` and `_descriptor` variants are not splits)."""
    found = {int(match.group(1)): path for path in folder.iterdir() if (match := _FILE.match(path.name))}
    return dict(sorted(found.items()))


def _columns(path: Path) -> dict[str, list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = f"{path}: cannot be read as a splits file ({error})"
        raise SplitsError(message) from error
    held = [part for part in PARTS if rows and part in rows[0]]
    if "train" not in held or "val" not in held:
        found = ", ".join(filter(None, rows[0])) if rows else "no rows"
        message = f"{path}: expected columns 'train' and 'val', found {found}"
        raise SplitsError(message)
    return {part: [cell for row in rows if (cell := (row[part] or "").strip())] for part in held}


def read_splits(folder: Path, patient_of: Callable[[str], str]) -> dict[int, Fold]:
    """Read `splits_<k>.csv` files.

    Parameters
    ----------
    folder
        Holds one file per fold.
    patient_of
        Patient of an entry (a patient or slide id, known suffixes already stripped).

    Raises
    ------
    SplitsError
        No such file, a file without train and val columns, or an empty part.
    LeakageError
        A patient in two parts of one fold.
    """
    files = find_split_files(folder) if folder.is_dir() else {}
    if not files:
        message = f"{folder}: no splits_<k>.csv files here; make folds with `cfstore splits --make 5`"
        raise SplitsError(message)
    folds = {}
    for number, path in files.items():
        parts = {
            part: frozenset(patient_of(strip_suffixes(cell)) for cell in cells)
            for part, cells in _columns(path).items()
        }
        fold = Fold(**parts)
        check_fold(fold, str(path))
        folds[number] = fold
    return folds


def check_fold(fold: Fold, where: str) -> None:
    """Raise LeakageError where parts share patients, SplitsError where train or val is empty."""
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = sorted(getattr(fold, one) & getattr(fold, other))
        if shared:
            listed = ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
            message = (
                f"{where}: {len(shared)} patients are in both {one} and {other}: {listed}. A fold must split patients"
            )
            raise LeakageError(message)
    for part in ("train", "val"):
        if not getattr(fold, part):
            message = f"{where}: the {part} column is empty"
            raise SplitsError(message)


def make_folds(patients: Sequence[str], event: Sequence[bool], n_folds: int, seed: int) -> dict[int, Fold]:
    """Split patients into folds, stratified by event: every patient is in val exactly once.

    Raises
    ------
    SplitsError
        Fewer than two folds, or fewer patients than folds.
    """
    if n_folds < 2 or len(patients) < n_folds:
        message = f"cannot make {n_folds} folds of {len(patients)} labelled patients"
        raise SplitsError(message)
    if len(set(patients)) < len(patients):
        message = f"{len(patients) - len(set(patients))} patients are listed twice; list each patient once"
        raise SplitsError(message)
    order = sorted(zip(patients, event, strict=True))
    shuffled = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    dealt = [patient for flag in (True, False) for patient, dead in shuffled if dead == flag]
    parts = [frozenset(dealt[k::n_folds]) for k in range(n_folds)]
    return {k: Fold(train=frozenset(dealt) - part, val=part) for k, part in enumerate(parts)}
