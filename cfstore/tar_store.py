"""A store made of WebDataset tars alone: their headers and JSON are indexed, no row is read or copied.

The index is an ordinary store in a temporary folder whose shards are the tars, where they lie;
so SQL, cohorts, folds, readers and the trainer need to know nothing of it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from cfstore import catalog, tables
from cfstore.clinical import ClinicalTable
from cfstore.errors import LeakageError, SourceError, StoreFormatError, StoreNotFoundError
from cfstore.locks import write_lock
from cfstore.schema import PATIENTS, create_header
from cfstore.shards import Extent, ShardRecord, tar_shard
from cfstore.splits import PARTS, Fold, SplitSet
from cfstore.store import Store

_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_RANGE: Final = re.compile(r"^(-?\d+)\.\.(-?\d+)$")
_GLOB: Final = re.compile(r"[*?\[]")
_MAX_URLS: Final = 1_000_000
_ARROW: Final = {
    "VARCHAR": pa.string(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
}


def open_tars(patterns: str | Path | Sequence[str | Path]) -> Store:
    """A read-only store of tar shards: those of `cfstore export`, or of `cfstore ingest --format webdataset`.

    Parameters
    ----------
    patterns
        Paths with brace ranges as WebDataset has them (`run/{000000..000031}.tar`, `{a,b}.tar`)
        or wildcards, or folders (every *.tar in them). Tars of several encoders may be mixed.

    Returns
    -------
    Store
        Its folder is temporary and goes when the store is garbage collected or the process ends.

    Raises
    ------
    StoreNotFoundError
        A file is missing, or a pattern matches none.
    StoreFormatError
        Not tars of cfstore, or two of them hold one slide or disagree about a patient.
    """
    listed = [patterns] if isinstance(patterns, (str, Path)) else list(patterns)
    paths = _find(listed)
    root = Path(tempfile.mkdtemp(prefix="cfstore-tars-"))
    try:
        create_header(root)
        _index(root, paths)
        store = Store(root, of_tars=True)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    weakref.finalize(store, _remove, root, os.getpid())
    return store


def _remove(root: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process forked from it
        shutil.rmtree(root, ignore_errors=True)


# -- paths ---------------------------------------------------------------------------------------


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that `{000..031}` and `{a,b}` stand for, as in a shell; other braces stay."""
    for match in _BRACES.finditer(pattern):
        inside = match[1]
        found = _RANGE.match(inside)
        if not found and "," not in inside:
            continue
        choices = _numbers(*found.groups()) if found else inside.split(",")
        for choice in choices:
            for rest in expand_braces(pattern[match.end() :]):
                yield pattern[: match.start()] + choice + rest
        return
    yield pattern


def _numbers(first: str, last: str) -> list[str]:
    start, stop = int(first), int(last)
    if abs(stop - start) >= _MAX_URLS:
        message = f"{{{first}..{last}}}: more than {_MAX_URLS:,} files"
        raise StoreNotFoundError(message)
    padded = any(number.lstrip("-").startswith("0") and len(number.lstrip("-")) > 1 for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if stop >= start else -1
    return [f"{number:0{width}d}" for number in range(start, stop + step, step)]


def _find(patterns: Sequence[str | Path]) -> list[Path]:
    """The tars, absolute, links resolved, each once."""
    found: dict[Path, None] = {}
    missing: list[str] = []
    for pattern in patterns:
        for name in [str(pattern)] if Path(pattern).exists() else expand_braces(str(pattern)):
            path = Path(name)
            if path.is_dir():
                matches = sorted(str(tar) for tar in path.glob("*.tar") if not tar.name.startswith("."))
            elif not path.exists() and _GLOB.search(name):
                matches = sorted(glob.glob(name))  # noqa: PTH207 - the pattern may be absolute
            else:
                matches = [name] if path.is_file() else []
            missing += [] if matches else [name]
            found.update(dict.fromkeys(Path(match).resolve() for match in matches))
    if missing or not found:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        message = f"{', '.join(missing[:5]) or 'no path'}{more}: no tar file there"
        raise StoreNotFoundError(message)
    odd = [path for path in found if path.suffix != tar_shard.SUFFIX or not path.is_file()]
    if odd:
        message = f"{odd[0]}: not named *.tar; compressed tars have to be unpacked to .tar first"
        raise StoreFormatError(message)
    return list(found)


# -- index ---------------------------------------------------------------------------------------


def _index(root: Path, paths: Sequence[Path]) -> None:
    records: list[ShardRecord] = []
    extents: dict[str, Sequence[Extent]] = {}
    owners: dict[tuple[str, str], Path] = {}
    dims: dict[str, tuple[int, Path]] = {}
    labels: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        record, extents[str(path)], jsons = tar_shard.read_shard(root, str(path))
        dim, other = dims.setdefault(record.encoder, (record.dim, path))
        if dim != record.dim:
            message = (
                f"{path}: dimension {record.dim} of encoder {record.encoder}, but {dim} in {other}; open one of them"
            )
            raise StoreFormatError(message)
        for slide_id in jsons:
            if (first := owners.setdefault((record.encoder, slide_id), path)) != path:
                message = (
                    f"slide {slide_id} of encoder {record.encoder} is both in {first} and in {path}; open one of them"
                )
                raise StoreFormatError(message)
        records.append(replace(record, replaces=()))  # it may name shards of another place
        labels += [(path, content) for content in jsons.values()]
    with write_lock(root):
        _write_labels(root, labels)
        _write_splits(root, labels)
        catalog.register(root, records, extents)


def _write_labels(root: Path, labels: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    patients: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    slides: dict[str, tuple[str, str]] = {}
    for path, content in labels:
        cohort, patient_id, more = (content.get(name) for name in ("cohort", "patient_id", "patient"))
        if not isinstance(cohort, str) or not isinstance(patient_id, str):
            continue
        slides[content["slide_id"]] = cohort, patient_id
        if isinstance(more, dict):
            row = {name: content.get(name) for name in ("time_months", "event")} | _scalars(path, more)
            first, known = patients.setdefault((cohort, patient_id), (path, row))
            if known != row:
                differ = sorted(name for name in {*known, *row} if known.get(name) != row.get(name))
                message = (
                    f"patient {patient_id} of cohort {cohort}: {first} and {path} disagree about "
                    f"{', '.join(differ[:5])}; export the slides anew, together"
                )
                raise StoreFormatError(message)
    if not patients:
        return
    names = dict.fromkeys([*(name for name, _, _ in PATIENTS), *(name for _, row in patients.values() for name in row)])
    rows = [{"cohort": cohort, "patient_id": patient, **row} for (cohort, patient), (_, row) in patients.items()]
    path = labels[0][0].parent
    table = ClinicalTable(
        format="webdataset",
        source=path,
        digest="sha256:" + hashlib.sha256(repr(rows).encode()).hexdigest(),
        patients=_table(path, names, rows),
        slides=pa.table(
            {
                "slide_id": pa.array(slides, pa.string()),
                "patient_id": pa.array([patient for _, patient in slides.values()], pa.string()),
                "cohort": pa.array([cohort for cohort, _ in slides.values()], pa.string()),
            }
        ),
        n_rows=len(rows),
        notes=(),
    )
    with _named(path):
        tables.write_clinical(root, table, "")


def _scalars(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    own = {name.casefold() for name in ("slide_id", "cohort", "patient_id", "time_months", "event")}
    for name, value in row.items():
        if name.casefold() in own or not isinstance(value, (str, int, float, bool, type(None))):
            message = f"{path}: a patient has {name!r} = {repr(value)[:50]}, which is no label; export the slides anew"
            raise StoreFormatError(message)
    return dict(row)


def _table(path: Path, names: Mapping[str, None], rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    known = {name: _ARROW[kind] for name, kind, _ in PATIENTS}
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values, known.get(name))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            if name in known:
                message = f"{path}: {name} of patients is no {known[name]} ({error}); export the slides anew"
                raise StoreFormatError(message) from error
            columns[name] = pa.array([None if value is None else str(value) for value in values], pa.string())
    return pa.table(columns)


def _write_splits(root: Path, labels: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    parts: dict[tuple[str, str], dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for path, content in labels:
        cohort, patient, sets = (content.get(name) for name in ("cohort", "patient_id", "splits"))
        if not isinstance(patient, str) or not isinstance(cohort, str) or not isinstance(sets, dict):
            continue
        for name, folds in sets.items():
            for fold, part in folds.items() if isinstance(folds, dict) else ():
                if not fold.isdecimal() or len(fold) > 6 or part not in PARTS:
                    message = f"{path}: slide {content['slide_id']}: fold {fold!r} of splits {name!r} is {part!r}"
                    raise StoreFormatError(message)
                if parts[cohort, name][int(fold)].setdefault(patient, part) != part:
                    message = (
                        f"{path}: splits {name}, fold {fold}: patient {patient} is in {part} here and elsewhere in "
                        "another part; export the slides anew, together"
                    )
                    raise LeakageError(message)
    for (cohort, name), folds in parts.items():
        sets_of = {
            number: Fold(**{part: frozenset(p for p, own in placed.items() if own == part) for part in PARTS})
            for number, placed in sorted(folds.items())
        }
        with _named(labels[0][0].parent):
            tables.write_splits(root, cohort, SplitSet(name, sets_of), str(labels[0][0].parent))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names of cohorts and splits become names of files: says where a bad one came from."""
    try:
        yield
    except SourceError as error:
        message = f"{path}: {error}"
        raise StoreFormatError(message) from error
