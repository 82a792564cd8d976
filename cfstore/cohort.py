"""A cohort as a model sees it: labelled slides with all their scales, and what was left out and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cfstore.catalog import AMONG, connect
from cfstore.errors import QueryError, SlideNotFoundError
from cfstore.names import tcga_patient_id
from cfstore.selection import select_slides
from cfstore.splits import Fold, SplitSet

CUSTOM: Final = "custom"
"""Name of a cohort whose slides belong to several cohorts of the store."""
_SAME_TIME: Final = 1e-6  # months


@dataclass(frozen=True)
class CohortSlide:
    """One labelled slide: `n_patches` by scale; `event` is true where death was observed.

    `patient_id` tells persons apart within the cohort; see `read_cohort` on cohorts of a query.
    `cohort` is the one of the store that the slide belongs to.
    """

    slide_id: str
    patient_id: str
    time_months: float
    event: bool
    n_patches: Mapping[int, int]
    cohort: str = ""


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


def _encoders(root: Path, slide_ids: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Encoders that every cohort of these slides has, and the scales each has."""
    query = (
        "SELECT encoder, list_sort(list(DISTINCT scale)), list(DISTINCT cohort) FROM bags JOIN slides USING (slide_id) "
        f"WHERE {AMONG} GROUP BY encoder ORDER BY encoder"
    )
    with connect(root) as connection:
        rows = connection.execute(query, [list(slide_ids)]).fetchall()
    cohorts = {cohort for _, _, held in rows for cohort in held}
    common = {encoder: tuple(scales) for encoder, scales, held in rows if set(held) == cohorts}
    if not common:
        having = "; ".join(f"{encoder} has {', '.join(sorted(held))}" for encoder, _, held in rows)
        message = f"no encoder has slides of all of the cohorts {', '.join(sorted(cohorts))} ({having}); narrow --where"
        raise SlideNotFoundError(message)
    return common


def encoders_of(root: Path, cohort: str | None, where: str | None = None) -> dict[str, tuple[int, ...]]:
    """Encoders of a cohort, or of the slides for which `where` holds, and the scales each has.

    Raises
    ------
    SlideNotFoundError
        The store has no such slides; the message names the cohorts it has.
    """
    return _encoders(root, select_slides(root, where, cohort))


def choose_encoder(root: Path, cohort: str | None, encoder: str | None, where: str | None = None) -> str:
    """`encoder` if the cohort has it, or its only one.

    Raises
    ------
    SlideNotFoundError
        No such cohort or encoder, or several encoders and none named.
    """
    return _choose(encoders_of(root, cohort, where), f"cohort {cohort}" if cohort else "the selection", encoder)


def _choose(held: Mapping[str, tuple[int, ...]], what: str, encoder: str | None) -> str:
    listed = "; ".join(f"{name} ({', '.join(f'{s}x' for s in scales)})" for name, scales in held.items())
    if encoder is None and len(held) > 1:
        message = f"{what} has several encoders: {listed}; name one with --encoder"
        raise SlideNotFoundError(message)
    if encoder is not None and encoder not in held:
        message = f"{what} has no encoder {encoder!r}; it has {listed}"
        raise SlideNotFoundError(message)
    return encoder or next(iter(held))


@dataclass(frozen=True)
class _Row:
    slide_id: str
    cohort: str
    patient_id: str | None
    time_months: float | None
    event: bool | None
    patches: Mapping[int, int]
    dim: int

    @property
    def outcome(self) -> tuple[float, bool] | None:
        if self.patient_id is None or self.time_months is None or self.event is None:
            return None
        return float(self.time_months), bool(self.event)


def _rows(root: Path, slide_ids: Sequence[str], encoder: str) -> list[_Row]:
    query = (
        "SELECT slide_id, slides.cohort, slides.patient_id, time_months, event, list(scale), list(n_patches), "
        "any_value(dim) FROM bags JOIN slides USING (slide_id) "
        "LEFT JOIN patients ON patients.cohort = slides.cohort AND patients.patient_id = slides.patient_id "
        f"WHERE {AMONG} AND encoder = ? "
        "GROUP BY slide_id, slides.cohort, slides.patient_id, time_months, event ORDER BY slide_id"
    )
    with connect(root) as connection:
        rows = connection.execute(query, [list(slide_ids), encoder]).fetchall()
    return [
        _Row(slide_id, cohort, patient, time, event, dict(zip(held, counts, strict=True)), int(dim))
        for slide_id, cohort, patient, time, event, held, counts, dim in rows
    ]


def _persons(rows: Sequence[_Row]) -> dict[tuple[str, str], str]:
    """A patient's id within the rows, by (cohort, patient_id).

    Where cohorts share an id, a TCGA barcode is one person wherever it stands, so that no fold
    has that person on two sides; any other id is a person of its own cohort, "cohort/patient_id".
    """
    outcomes: dict[str, dict[str, tuple[float, bool]]] = defaultdict(dict)
    for row in rows:
        if row.patient_id is not None and row.outcome is not None:
            outcomes[row.patient_id][row.cohort] = row.outcome
    persons = {}
    for patient, by_cohort in outcomes.items():
        shared = len(by_cohort) > 1
        one = tcga_patient_id(patient) == patient
        (time, event), *others = by_cohort.values()
        if shared and one and any(event != e or abs(time - t) > _SAME_TIME for t, e in others):
            message = (
                f"patient {patient} has another follow-up in each of the cohorts {', '.join(by_cohort)}; "
                "choose one of them in --where"
            )
            raise QueryError(message)
        for cohort in by_cohort:
            persons[cohort, patient] = f"{cohort}/{patient}" if shared and not one else patient
    return persons


def read_cohort(
    root: Path, cohort: str | None, encoder: str | None, scales: Sequence[int], where: str | None = None
) -> Cohort:
    """Labelled slides that have every one of `scales`: of a cohort, or of a query.

    Parameters
    ----------
    cohort
        Slides of this cohort only. None: of all cohorts; without `where` the store must have
        only one. The result is called like the cohort all its slides belong to, else "custom".
    where
        An SQL condition; see `select_slides`. Patients of several cohorts are told apart: where
        two cohorts share an id that is no TCGA barcode, it becomes "cohort/patient_id".

    Raises
    ------
    SlideNotFoundError
        No such cohort, encoder or slides.
    QueryError
        `where` is refused, or one person has two outcomes in it.
    """
    slide_ids = select_slides(root, where, cohort)
    encoder = _choose(_encoders(root, slide_ids), f"cohort {cohort}" if cohort else "the selection", encoder)
    rows = _rows(root, slide_ids, encoder)
    cohorts = sorted({row.cohort for row in rows})
    if cohort is None and where is None and len(cohorts) > 1:
        message = f"{root} has the cohorts {', '.join(cohorts)}: name one, or choose slides by a condition"
        raise SlideNotFoundError(message)
    slides: list[CohortSlide] = []
    excluded: dict[str, list[str]] = defaultdict(list)
    without = set(slide_ids) - {row.slide_id for row in rows} if where is not None else set()
    if without:
        excluded[f"no features of {encoder}"] = sorted(without)
    persons = _persons(rows)
    for row in rows:
        lacking = [scale for scale in scales if scale not in row.patches]
        if row.outcome is None:
            excluded["no label"].append(row.slide_id)
        elif lacking:
            excluded["no " + ", ".join(f"{s}x" for s in lacking)].append(row.slide_id)
        else:
            wanted = {scale: int(row.patches[scale]) for scale in scales}
            person = persons[row.cohort, str(row.patient_id)]
            slides.append(CohortSlide(row.slide_id, person, *row.outcome, wanted, row.cohort))
    left_out = {reason: tuple(ids) for reason, ids in excluded.items()}
    name = cohort or (cohorts[0] if len(cohorts) == 1 else CUSTOM)
    return Cohort(name, encoder, rows[-1].dim, tuple(scales), tuple(slides), left_out)


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
    blank = {"train": frozenset[str](), "val": frozenset[str]()}  # slides of a part may all have stayed behind
    return SplitSet(name, {number: Fold(**{**blank, **parts[number]}) for number in sorted(parts)})
