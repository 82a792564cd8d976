"""Is every derived array what was written? And, asked deeply: is it what the bags give?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from cfstore.catalog import connect
from cfstore.derivation import Derivation
from cfstore.derive_job import CannotDeriveError, SlideArrays
from cfstore.derived_files import (
    DerivedFile,
    PrototypesFile,
    digest_of,
    open_file,
    read_centroids,
    read_file,
    read_values,
)
from cfstore.derived_reader import command
from cfstore.derived_tables import derived_now, has_table
from cfstore.errors import StoreError

Found = list[tuple[str | None, str]]
"""What is wrong: the slide (None: no slide in particular), and what was found."""

_DEEP = ("nearest", "parents", "mean")  # what is similar took N^2 to find out


def derived_checks(
    root: Path, on_disk: list[str], *, deep: bool
) -> Iterator[tuple[str, Callable[[], tuple[int, Found]]]]:
    """For each file what looks at it: says how many arrays it saw, and what is wrong."""
    counted = _counted(root) if deep else {}
    for file in on_disk:
        yield file, partial(_look, root, file, counted.get(file, {}))


def _counted(root: Path) -> dict[str, dict[str, int]]:
    """Slides and row groups that count, by file."""
    with connect(root) as connection:
        if not has_table(connection, "derived"):
            return {}
        rows = connection.execute(f"SELECT file, slide_id, row_group FROM ({derived_now()}) ORDER BY ALL").fetchall()
    found: dict[str, dict[str, int]] = {}
    for file, slide_id, row_group in rows:
        found.setdefault(file, {})[slide_id] = row_group
    return found


def _look(root: Path, file: str, deeply: Mapping[str, int]) -> tuple[int, Found]:
    path = root / file
    try:
        about = read_file(root, file)
        if isinstance(about, PrototypesFile):
            read_centroids(path, about.digest)
            return 1, []
        found = _look_at_arrays(path, about)
        if not found and deeply and about.derivation.kind in _DEEP:
            found = _recompute(root, path, about, deeply)
    except FileNotFoundError:
        return 0, []  # dropped meanwhile
    except StoreError as error:
        return 0, [(None, str(error))]
    return len(about.entries), found


def _look_at_arrays(path: Path, about: DerivedFile) -> Found:
    found: Found = []
    remedy = f"delete it and run `cfstore derive {about.derivation.name} --encoder {about.encoder}` again"
    with open_file(path) as opened:
        n_groups = opened.num_row_groups
        if n_groups != len(about.entries):
            return [(None, f"{path}: {n_groups} row groups for {len(about.entries)} slides; {remedy}")]
        for number, entry in enumerate(about.entries):
            try:
                values = read_values(path, opened, about.derivation, number)
            except StoreError as error:
                found.append((entry.slide_id, str(error)))
                continue
            if digest_of(values) != entry.digest:
                found.append((entry.slide_id, f"{path}: {about.derivation.name} is not what was written; {remedy}"))
    return found


def _recompute(root: Path, path: Path, about: DerivedFile, slides: Mapping[str, int]) -> Found:
    derivation: Derivation = about.derivation
    arrays = SlideArrays.of(root, about.encoder, dict.fromkeys(slides, (derivation,)))
    found: Found = []
    with open_file(path) as opened:
        for slide_id, row_group in slides.items():
            held = read_values(path, opened, derivation, row_group)
            try:
                now = arrays.compute(slide_id, derivation).values
                same = np.array_equal(held, now) if held.dtype != np.float32 else np.allclose(held, now, 1e-6, 1e-12)
            except (CannotDeriveError, StoreError):
                same = False
            arrays.forget(slide_id)
            if not same:
                again = command(root, about.encoder, [derivation])
                found.append(
                    (slide_id, f"{path}: {derivation.name} is not what the bags give; delete it and run `{again}`")
                )
    return found
