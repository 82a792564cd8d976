"""Which patient and cohort a slide belongs to, from the imported tables and the slide's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cfstore.names import tcga_patient_id


@dataclass
class CohortLabels:
    """What one cohort's clinical table knows: its patients, and the patients of its slides."""

    patients: set[str] = field(default_factory=set)
    slides: dict[str, str] = field(default_factory=dict)

    def patient_of(self, slide_id: str) -> str | None:
        """The slide's patient: as listed, else by TCGA barcode, else the longest patient id its name starts with."""
        listed = self.slides.get(slide_id)
        if listed is not None:
            return listed
        barcode = tcga_patient_id(slide_id)
        if barcode is not None:
            return barcode if barcode in self.patients else None
        ends = [match.start() for match in re.finditer(r"[-_. ]", slide_id)] + [len(slide_id)]
        return next((slide_id[:end] for end in reversed(ends) if slide_id[:end] in self.patients), None)


@dataclass(frozen=True)
class SlideOwner:
    """The resolved patient (None if unknown) and cohort of a slide."""

    patient_id: str | None
    cohort: str


def resolve(slide_id: str, given: str | None, folder: str, labels: Mapping[str, CohortLabels]) -> SlideOwner:
    """Patient and cohort of a slide.

    The cohort named at ingest stands. Without one it is the only cohort whose table knows the
    slide; failing that, the ingested folder's name.
    """
    if given is not None:
        known = labels.get(given)
        patient = known.patient_of(slide_id) if known else None
        return SlideOwner(patient or tcga_patient_id(slide_id), given)
    owners = {cohort: patient for cohort, table in labels.items() if (patient := table.patient_of(slide_id))}
    if len(owners) == 1:
        cohort, patient = next(iter(owners.items()))
        return SlideOwner(patient, cohort)
    return SlideOwner(tcga_patient_id(slide_id), folder)


def collect(patients: Iterable[tuple[str, str]], slides: Iterable[tuple[str, str, str]]) -> dict[str, CohortLabels]:
    """Labels by cohort from (cohort, patient_id) and (cohort, slide_id, patient_id) rows."""
    labels: dict[str, CohortLabels] = {}
    for cohort, patient_id in patients:
        labels.setdefault(cohort, CohortLabels()).patients.add(patient_id)
    for cohort, slide_id, patient_id in slides:
        labels.setdefault(cohort, CohortLabels()).slides[slide_id] = patient_id
    return labels
