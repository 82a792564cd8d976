"""Which patient and cohort a slide belongs to, from the imported tables and the slide's name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cfstore.names import tcga_patient_id


def possible_patients(slide_id: str) -> list[str]:
    """Ids that a slide's name may begin with, the likeliest first: its TCGA barcode alone, else the longest."""
    barcode = tcga_patient_id(slide_id)
    if barcode is not None:
        return [barcode]
    ends = [match.start() for match in re.finditer(r"[-_. ]", slide_id)] + [len(slide_id)]
    return [slide_id[:end] for end in reversed(ends)]


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
        return next((patient for patient in possible_patients(slide_id) if patient in self.patients), None)


@dataclass(frozen=True)
class SlideOwner:
    """The resolved patient (None if unknown) and cohort of a slide."""

    patient_id: str | None
    cohort: str


class Resolver:
    """Says whose a slide is. Made once of all labels, it looks each slide up, however many cohorts there are."""

    def __init__(self, labels: Mapping[str, CohortLabels]) -> None:
        self._labels = labels
        self._cohorts_of_patient: dict[str, list[str]] = defaultdict(list)
        self._cohorts_of_slide: dict[str, list[str]] = defaultdict(list)
        for cohort, known in labels.items():
            for patient_id in known.patients:
                self._cohorts_of_patient[patient_id].append(cohort)
            for slide_id in known.slides:
                self._cohorts_of_slide[slide_id].append(cohort)

    def owner(self, slide_id: str, given: str | None, folder: str) -> SlideOwner:
        """Patient and cohort of a slide.

        The cohort named at ingest stands. Without one it is the only cohort whose table knows the
        slide; failing that, the ingested folder's name.
        """
        if given is not None:
            known = self._labels.get(given)
            patient = known.patient_of(slide_id) if known else None
            return SlideOwner(patient or tcga_patient_id(slide_id), given)
        cohorts = set(self._cohorts_of_slide.get(slide_id, ()))
        for patient_id in possible_patients(slide_id):
            cohorts.update(self._cohorts_of_patient.get(patient_id, ()))
        owners = {cohort: patient for cohort in cohorts if (patient := self._labels[cohort].patient_of(slide_id))}
        if len(owners) == 1:
            ((cohort, patient),) = owners.items()
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
