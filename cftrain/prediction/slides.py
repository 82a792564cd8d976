"""The slides that a run is applied to, with labels or without; what may not be predicted is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cfstore
from cfstore import Cohort, CohortSlide, SplitSet, Store
from cftrain.data import RunData, with_coordinates
from cftrain.errors import ConfigError, LeakageError, MissingScaleError, ShapeError
from cftrain.examples import Example, make_examples
from cftrain.prediction.trained import TrainedRun

NO_LABEL: Final = "no label"
"""What `cfstore.Cohort.excluded` calls the slides that a trainer cannot use, and a prediction can."""


@dataclass(frozen=True, eq=False)
class Target:
    """What a run is applied to.

    Parameters
    ----------
    data
        As a feed takes it; examples without a label have time_months NaN (and an event that says nothing).
    source, of_tars
        The store, or the tars.
    where
        The condition that chose slides, if any.
    patients
        The patient of every slide; None where nobody knows.
    known
        Patients (slides, where the patient is not known) that the run was trained on.
    """

    data: RunData
    source: str
    of_tars: bool
    where: str | None
    patients: Mapping[str, str | None]
    known: tuple[str, ...]

    @property
    def labelled(self) -> list[int]:
        """Which of the examples have a label."""
        return [row for row, each in enumerate(self.data.examples) if not math.isnan(each.time_months)]

    @property
    def labelled_examples(self) -> list[Example]:
        """Those examples."""
        return [self.data.examples[row] for row in self.labelled]


def find_target(
    trained: TrainedRun,
    store: Path | str | None,
    *,
    cohort: str | None,
    where: str | None,
    encoder: str | None,
    shards: str | None,
    allow_training_patients: bool,
) -> Target:
    """Find the slides to predict: of a cohort or a condition, labelled or not; reads no features.

    Raises
    ------
    ConfigError
        Neither store nor tars are named, they lack the run's encoder, or no slide is left.
    MissingScaleError
        The encoder lacks a scale that the model reads.
    ShapeError
        The features are of another width than the model's.
    LeakageError
        The run was trained on some of the patients, and that is not allowed.
    StoreError
        What the store raises: no such cohort, several and none named, a condition it cannot read.
    """
    if shards is None and store is None:
        message = "name the store to predict with --store, or tars with --shards"
        raise ConfigError(message)
    opened = cfstore.open_tars(shards) if shards is not None else cfstore.open(store or "")
    what = str(shards if shards is not None else store)
    held = opened.encoders_of(cohort, where)
    chosen = _encoder(trained, encoder, held, f"cohort {cohort} of {what}" if cohort else what)
    found = opened.cohort(cohort, encoder=chosen, scales=sorted(trained.scales), where=where)
    if found.dim != trained.feature_dim:
        message = (
            f"{trained.path}: was trained on {trained.encoder} with D={trained.feature_dim}; {chosen} in {what} has "
            f"D={found.dim}: features of another network, which the model cannot read"
        )
        raise ShapeError(message)
    full, patients = _with_unlabelled(opened, found)
    full = with_coordinates(opened, full, {trained.config.model.name: trained.config.extras()}, of_tars=bool(shards))
    if not full.slides:
        left_out = "; ".join(f"{len(ids)} slides: {reason}" for reason, ids in full.excluded.items())
        message = f"cohort {full.name} of {what} has no slide to predict ({left_out})"
        raise ConfigError(message)
    known = _known(trained, full.slides, patients)
    if known and not allow_training_patients:
        raise LeakageError(_leak(trained, full, known, patients))
    examples = make_examples(full.slides, trained.config.data.unit)
    rows = _clinical(opened, full.slides)
    data = RunData(opened, full, SplitSet("none", {}), examples, [], full.excluded, rows)
    return Target(data, what, shards is not None, where, patients, known)


def _encoder(trained: TrainedRun, named: str | None, held: Mapping[str, Sequence[int]], what: str) -> str:
    """The named encoder, or the run's; it must be there with all scales."""
    chosen = named or trained.encoder
    listed = "; ".join(f"{name} ({_listed(scales)})" for name, scales in held.items())
    if chosen not in held:
        message = (
            f"{trained.path}: was trained on encoder {trained.encoder}; {what} has no encoder {chosen}, it has "
            f"{listed}. Where one of these is the same network by another name, name it with --encoder"
        )
        raise ConfigError(message)
    if not set(trained.scales) <= set(held[chosen]):
        message = (
            f"{trained.path}: its {trained.config.model.name} needs {_listed(trained.scales)}; "
            f"encoder {chosen} of {what} has {_listed(held[chosen])}"
        )
        raise MissingScaleError(message)
    return chosen


def _listed(scales: Sequence[int]) -> str:
    return ", ".join(f"{scale}x" for scale in scales)


def _with_unlabelled(store: Store, cohort: Cohort) -> tuple[Cohort, dict[str, str | None]]:
    """The cohort with its unlabelled slides among the others, and the patient of every slide."""
    excluded = {reason: list(ids) for reason, ids in cohort.excluded.items()}
    slides, patients = list(cohort.slides), dict[str, str | None]()
    patients |= {slide.slide_id: slide.patient_id for slide in slides}
    owners = {(_own_id(slide), slide.cohort) for slide in slides}
    rows = _bags(store, cohort.encoder, set(excluded.pop(NO_LABEL, ())))
    owners |= {(row["patient_id"], row["cohort"]) for row in rows.values()}
    for slide_id, row in rows.items():
        lacking = [scale for scale in cohort.scales if scale not in row["n_patches"]]
        if lacking:
            excluded.setdefault(f"no {_listed(lacking)}", []).append(slide_id)
            continue
        patients[slide_id] = _person(row["patient_id"], row["cohort"], owners)
        patches = {scale: row["n_patches"][scale] for scale in cohort.scales}
        person = patients[slide_id] or f"unknown patient of {slide_id}"
        slides.append(CohortSlide(slide_id, person, math.nan, False, patches, row["cohort"]))
    slides.sort(key=lambda slide: slide.slide_id)
    left_out = {reason: tuple(sorted(ids)) for reason, ids in excluded.items()}
    return dataclasses.replace(cohort, slides=tuple(slides), excluded=left_out), patients


def _bags(store: Store, encoder: str, slide_ids: set[str]) -> dict[str, dict[str, Any]]:
    """Cohort, patient and patches by scale of these slides."""
    quoted = encoder.replace("'", "''")
    query = (
        "SELECT slide_id, cohort, patient_id, scale, n_patches FROM bags JOIN slides USING (slide_id) "
        f"WHERE encoder = '{quoted}' ORDER BY slide_id, scale"
    )
    found: dict[str, dict[str, Any]] = {}
    for row in store.sql(query).to_pylist() if slide_ids else []:
        if row["slide_id"] in slide_ids:
            own = {"cohort": row["cohort"], "patient_id": row["patient_id"], "n_patches": {}}
            found.setdefault(row["slide_id"], own)["n_patches"][row["scale"]] = row["n_patches"]
    return found


def _person(patient: str | None, cohort: str, owners: set[tuple[Any, str]]) -> str | None:
    """The id of an unlabelled patient; with the cohort, where another cohort has a patient of that id."""
    if patient is None:
        return None
    shared = any(own == patient and other != cohort for own, other in owners)
    return f"{cohort}/{patient}" if shared else patient


def _own_id(slide: CohortSlide) -> str:
    """The patient's id in the slide's cohort; one of a query calls a patient "cohort/id" where ids are shared."""
    return slide.patient_id.removeprefix(f"{slide.cohort}/")


def _known(trained: TrainedRun, slides: Sequence[CohortSlide], patients: Mapping[str, str | None]) -> tuple[str, ...]:
    """Patients that the run knows, by any of their names or by a slide; a slide whose patient is unknown by itself."""
    found = []
    for slide in slides:
        names = {slide.patient_id, _own_id(slide), f"{slide.cohort}/{_own_id(slide)}"}
        if slide.slide_id in trained.slides or names & trained.patients.keys():
            found.append(patients[slide.slide_id] or slide.slide_id)
    return tuple(sorted(set(found)))


def _leak(trained: TrainedRun, cohort: Cohort, known: Sequence[str], patients: Mapping[str, str | None]) -> str:
    n_patients = len({slide.patient_id for slide in cohort.slides})
    who = "patients (or slides of unknown patients)" if None in patients.values() else "patients"
    named = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
    return (
        f"{trained.path}: was trained on {len(known)} of the {n_patients} {who} of cohort {cohort.name} ({named}), "
        "so that their predictions would validate nothing; leave them out with --where, or predict them all the same "
        "with --allow-training-patients"
    )


def _clinical(store: Store, slides: Sequence[CohortSlide]) -> dict[str, dict[str, Any]]:
    """What clinical tables say of the patients; nothing of those whom none knows."""
    rows = {(row["cohort"], row["patient_id"]): row for row in store.sql("SELECT * FROM patients").to_pylist()}
    keys = {slide.patient_id: (slide.cohort, _own_id(slide)) for slide in slides}
    return {patient: rows[key] for patient, key in keys.items() if key in rows}
