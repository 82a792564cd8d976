"""A cohort as a model sees it: labelled slides with all their scales, and what was left out and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from cfstore.catalog import connect
from cfstore.errors import SlideNotFoundError
from cfstore.splits import Fold, SplitSet


@dataclass(frozen=True)
class CohortSlide:
    """One labelled slide: `n_patches` by scale; `event` is true where death was observed."""

    slide_id: str
    patient_id: str
    time_months: float
    event: bool
    n_patches: Mapping[int, int]


@dataclass(frozen=True)
class Cohort:
    """The slides of one cohort from one encoder that carry a label and all asked-for scales.

    `excluded` names the slides that were left out, by reason.
    """

    name: str
    encoder: str
    dim: int
    scales: tuple[int, ...]
    slides: tuple[CohortSlide, ...]
    excluded: Mapping[str, tuple[str, ...]]

    @property
    def n_patients(self) -> int:
        return len({slide.patient_id for slide in self.slides})


def encoders_of(root: Path, cohort: str) -> dict[str, tuple[int, ...]]:
    """Encoders of a cohort and the scales each has.

    Raises
    ------
    SlideNotFoundError
        The store has no slides of that cohort; the message names the ones it has.
    """
    with connect(root) as connection:
        rows = connection.execute(
            "SELECT encoder, list_sort(list(DISTINCT scale)) FROM bags JOIN slides USING (slide_id) "
            "WHERE cohort = ? GROUP BY encoder ORDER BY encoder",
            [cohort],
        ).fetchall()
        if not rows:
            held = [name for (name,) in connection.execute("SELECT DISTINCT cohort FROM slides ORDER BY 1").fetchall()]
            message = f"cohort {cohort!r} has no slides in {root}; cohorts here: {', '.join(held) or 'none'}"
            raise SlideNotFoundError(message)
    return {encoder: tuple(scales) for encoder, scales in rows}


def choose_encoder(root: Path, cohort: str, encoder: str | None) -> str:
    """`encoder` if the cohort has it, or its only one.

    Raises
    ------
    SlideNotFoundError
        No such cohort or encoder, or several encoders and none named.
    """
    held = encoders_of(root, cohort)
    listed = "; ".join(f"{name} ({', '.join(f'{s}x' for s in scales)})" for name, scales in held.items())
    if encoder is None and len(held) > 1:
        message = f"cohort {cohort} has several encoders: {listed}; name one with --encoder"
        raise SlideNotFoundError(message)
    if encoder is not None and encoder not in held:
        message = f"cohort {cohort} has no encoder {encoder!r}; it has {listed}"
        raise SlideNotFoundError(message)
    return encoder or next(iter(held))


def _rows(connection: duckdb.DuckDBPyConnection, cohort: str, encoder: str) -> list[tuple[object, ...]]:
    return connection.execute(
        "SELECT slide_id, slides.patient_id, time_months, event, list(scale), list(n_patches), any_value(dim) "
        "FROM bags JOIN slides USING (slide_id) "
        "LEFT JOIN patients ON patients.cohort = slides.cohort AND patients.patient_id = slides.patient_id "
        "WHERE slides.cohort = ? AND encoder = ? "
        "GROUP BY slide_id, slides.patient_id, time_months, event ORDER BY slide_id",
        [cohort, encoder],
    ).fetchall()


def read_cohort(root: Path, cohort: str, encoder: str | None, scales: Sequence[int]) -> Cohort:
    """Labelled slides of a cohort that have every one of `scales`.

    Raises
    ------
    SlideNotFoundError
        No such cohort or encoder.
    """
    encoder = choose_encoder(root, cohort, encoder)
    with connect(root) as connection:
        rows = _rows(connection, cohort, encoder)
    slides: list[CohortSlide] = []
    excluded: dict[str, list[str]] = defaultdict(list)
    dim = 0
    for slide_id, patient, time_months, event, held, counts, width in rows:
        patches = dict(zip(held, counts, strict=True))  # type: ignore[call-overload]
        lacking = [scale for scale in scales if scale not in patches]
        dim = int(width)  # type: ignore[call-overload]
        if patient is None or time_months is None or event is None:
            excluded["no label"].append(str(slide_id))
        elif lacking:
            excluded["no " + ", ".join(f"{s}x" for s in lacking)].append(str(slide_id))
        else:
            wanted = {scale: int(patches[scale]) for scale in scales}
            slides.append(CohortSlide(str(slide_id), str(patient), float(time_months), bool(event), wanted))  # type: ignore[arg-type]
    left_out = {reason: tuple(ids) for reason, ids in excluded.items()}
    return Cohort(cohort, encoder, dim, tuple(scales), tuple(slides), left_out)


def split_names(root: Path, cohort: str) -> list[str]:
    """Names of the cohort's split sets."""
    with connect(root) as connection:
        query = "SELECT DISTINCT name FROM splits WHERE cohort = ? ORDER BY name"
        return [name for (name,) in connection.execute(query, [cohort]).fetchall()]


def read_split_set(root: Path, cohort: str, name: str) -> SplitSet:
    """One split set as folds.

    Raises
    ------
    SlideNotFoundError
        The cohort has no split set of that name.
    """
    with connect(root) as connection:
        query = "SELECT fold, part, list(patient_id) FROM splits WHERE cohort = ? AND name = ? GROUP BY ALL"
        rows = connection.execute(query, [cohort, name]).fetchall()
    if not rows:
        message = (
            f"cohort {cohort} has no splits named {name!r}; it has: {', '.join(split_names(root, cohort)) or 'none'}"
        )
        raise SlideNotFoundError(message)
    parts: dict[int, dict[str, frozenset[str]]] = defaultdict(dict)
    for fold, part, patients in rows:
        parts[fold][part] = frozenset(patients)
    return SplitSet(name, {number: Fold(**parts[number]) for number in sorted(parts)})
