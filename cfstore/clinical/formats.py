"""The kinds of clinical table, told apart by their columns and never by the file's name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cfstore.clinical.cells import read_censorship, read_flag, read_status, read_vital
from cfstore.errors import ClinicalError

DAYS_PER_MONTH: Final = 30.44
DAYS_PER_YEAR: Final = 365.25


@dataclass(frozen=True, slots=True)
class Format:
    """Which columns of one kind of table hold the canonical fields.

    Parameters
    ----------
    patient, time, event
        The columns of the patient, the follow-up and the flag; all three must be there.
    read_event
        Turns one cell of `event` into 1.0 (death observed), 0.0 (censored) or NaN (unknown).
    days_per_unit
        Months are `time` divided by this: 1 where the table says months, 30.44 where days.
    needs
        Further columns without which it is another kind of table.
    cohort
        Where the cohort may stand, first choice first.
    death
        Only GDC: days to death; `time` is then the follow-up of those alive.
    """

    name: str
    patient: str
    time: str
    event: str
    read_event: Callable[[str], float]
    days_per_unit: float = 1.0
    needs: tuple[str, ...] = ()
    cohort: tuple[str, ...] = ("cohort",)
    death: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that make a table one of this kind."""
        death = (self.death,) if self.death else ()
        return (self.patient, self.time, self.event, *death, *self.needs)


def _case_table(name: str, *needs: str) -> Format:
    return Format(name, "case_id", "survival_months", "censorship", read_censorship, needs=needs)


def _gdc(name: str, patient: str, demographic: str = "", diagnoses: str = "", project: str = "") -> Format:
    return Format(
        name, patient, f"{diagnoses}days_to_last_follow_up", f"{demographic}vital_status", read_vital,
        DAYS_PER_MONTH, cohort=(f"{project}project_id", "cohort"), death=f"{demographic}days_to_death",
    )  # fmt: skip


# The first whose columns are all there is taken: the more particular stand first.
FORMATS: Final = (
    Format("cfstore", "patient_id", "time_months", "event", read_flag),
    Format("mmp", "case_id", "os_survival_days", "os_censorship", read_censorship, DAYS_PER_MONTH),
    _case_table("survpath", "survival_months_dss"),
    _case_table("survpath", "survival_months_pfi"),
    _case_table("crossfusion-coad", "slide_id", "survival_days"),
    _case_table("mcat"),
    Format(
        "tcga-cdr", "bcr_patient_barcode", "OS.time", "OS", read_flag, DAYS_PER_MONTH,
        cohort=("cohort", "type"),
    ),
    Format(
        "cbioportal", "PATIENT_ID", "OS_MONTHS", "OS_STATUS", read_status,
        cohort=("cohort", "CANCER_TYPE_ACRONYM"),
    ),
    _gdc("gdc-2024", "cases.submitter_id", "demographic.", "diagnoses.", "project."),
    _gdc("gdc-2019", "case_submitter_id"),  # the flat columns' name from 2020 to 2023
    _gdc("gdc-2019", "submitter_id"),
)  # fmt: skip


AGE_COLUMNS: Final = (
    "age", "age_at_initial_pathologic_diagnosis", "AGE", "age_at_index", "demographic.age_at_index",
)  # fmt: skip
# Days at the GDC; elsewhere a column of that name may hold either, and is left alone.
GDC_AGE_COLUMNS: Final = ("age_at_diagnosis", "diagnoses.age_at_diagnosis")
SEX_COLUMNS: Final = ("sex", "SEX", "gender", "demographic.gender", "demographic.sex_at_birth", "is_female")
SITE_COLUMNS: Final = ("site",)
ONCOTREE_COLUMNS: Final = ("oncotree_code", "ONCOTREE_CODE")
SLIDE_COLUMN: Final = "slide_id"


def first_of(candidates: Sequence[str], names: Collection[str]) -> str | None:
    """The first candidate among the names of a table, or None."""
    return next((name for name in candidates if name in names), None)


def age_column(form: Format, names: Collection[str]) -> tuple[str | None, float]:
    """The column of the age, and what its values are divided by to be years."""
    name = first_of(AGE_COLUMNS, names)
    if name is None and form.death:
        return first_of(GDC_AGE_COLUMNS, names), DAYS_PER_YEAR
    return name, 1.0


def recognise(names: Collection[str]) -> Format | None:
    """The kind of table that has these columns, or None."""
    known = set(names)
    return next((form for form in FORMATS if known.issuperset(form.required)), None)


def require_format(path: Path, names: Sequence[str]) -> Format:
    """The kind of table, or a ClinicalError that says which columns would do."""
    form = recognise(names)
    if form is not None:
        return form
    found = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
    known = {kind.name: ", ".join(kind.required) for kind in FORMATS[1:]}
    kinds = "; ".join(f"{name}: {columns}" for name, columns in known.items())
    message = (
        f"{path.name}: not a clinical table that is known; columns found: {found or 'none'}. "
        f"Name three columns patient_id, time_months, event (1 = death observed), "
        f"or bring those of a known kind ({kinds})"
    )
    raise ClinicalError(message)
