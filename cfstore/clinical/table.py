"""One row per patient with `time_months` and `event`, whatever the file calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cfstore.clinical.cells import (
    blank_not_reported,
    read_is_female,
    read_number,
    read_sex,
    read_time,
    typed,
)
from cfstore.clinical.collapse import Patients
from cfstore.clinical.files import UNREADABLE, RawTable, read_names, read_raw
from cfstore.clinical.formats import (
    DAYS_PER_MONTH,
    ONCOTREE_COLUMNS,
    SEX_COLUMNS,
    SITE_COLUMNS,
    SLIDE_COLUMN,
    Format,
    age_column,
    first_of,
    recognise,
    require_format,
)
from cfstore.errors import ClinicalError
from cfstore.names import strip_suffixes, tcga_patient_id

_BARCODE_LENGTH: Final = 12  # TCGA-XX-XXXX
_N_NAMED: Final = 20
_UNLIKELY_MONTHS: Final = 240.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ClinicalTable:
    """A clinical table, one row per patient.

    Parameters
    ----------
    format
        The kind of table that its columns show: `mcat`, `crossfusion-coad`, `survpath`, `mmp`,
        `tcga-cdr`, `cbioportal`, `gdc-2019`, `gdc-2024`, or `cfstore` for our own words.
    source, digest
        The file, and `sha256:<hex>` of its bytes.
    patients
        cohort, patient_id, time_months (null = unknown), event (True = death observed, null =
        unknown), age (years), sex (`female`, `male`), site, oncotree_code; then every other
        column of the file.
    slides
        slide_id, patient_id, cohort of every slide that the table lists.
    n_rows
        Rows of the file that were taken.
    notes
        What a user should know about how the file was understood.
    """

    format: str
    source: Path
    digest: str
    patients: pa.Table
    slides: pa.Table
    n_rows: int
    notes: tuple[str, ...]


def read_clinical(path: Path, cohort: str | None = None) -> ClinicalTable:
    """Read a survival table as people find it.

    The kind of table is told by its columns. Days become months by / 30.44. `censorship` is
    turned over into `event`. A patient's rows must agree in time and event, to 1e-6 months; of
    other columns the first value that is not missing is taken. GDC tables have a row per
    treatment: of a living patient's the longest follow-up counts, and one before the diagnosis
    (negative days, which the GDC does publish) counts as none. Patients without time or event
    stay, with nulls.

    Parameters
    ----------
    path
        csv, tsv or txt, or a zip that holds one of them.
    cohort
        If the file's cohort column has this value, in any case, only its rows are taken; if not,
        all are. Either way every patient gets this cohort, as written here. None: the file's
        cohort column, else null.

    Raises
    ------
    ClinicalError
        If the file cannot be read or its columns are of no known kind; if a time is negative or
        no number, or an event neither 0 nor 1; if rows of one patient disagree in time or event,
        or one slide belongs to two patients.

    Examples
    --------
    >>> read_clinical(Path("tcga_luad_all_clean.csv.zip"), cohort="LUAD").format  # doctest: +SKIP
    'mcat'
    """
    raw = read_raw(path)
    form = require_format(path, raw.names)
    raw, blank_notes = _without_blank_rows(raw, form)
    raw, cohorts, cohort_column, cohort_notes = _in_cohort(raw, form, cohort)
    ids, id_notes = _patient_ids(raw, form)
    who = Patients.of(cohorts, ids)
    labels, label_notes = _labels(raw, form, who)
    traits, taken, trait_notes = _traits(raw, form)
    taken |= {form.patient, SLIDE_COLUMN, cohort_column}
    taken |= set() if form.death else {form.time, form.event}  # the GDC's are not one column's value
    patients, column_notes = _patients(raw, who, labels | traits, taken)
    notes = (*raw.notes, *blank_notes, *cohort_notes, *id_notes, *label_notes, *trait_notes, *column_notes)
    slides = _slides(raw, cohorts, ids)
    return ClinicalTable(form.name, path, raw.digest, patients, slides, raw.n_rows, notes)


def looks_clinical(path: Path) -> bool:
    """Whether the header is one of a known clinical table. Never raises.

    Parameters
    ----------
    path
        Any file; only its first bytes are read.
    """
    try:
        return recognise([name.strip() for name in read_names(path)]) is not None
    except (ClinicalError, *UNREADABLE):
        return False


def _without_blank_rows(raw: RawTable, form: Format) -> tuple[RawTable, list[str]]:
    named = np.asarray(raw.column(form.patient).is_valid())
    if named.all():
        return raw, []
    labelled = np.asarray(raw.column(form.time).is_valid()) | np.asarray(raw.column(form.event).is_valid())
    nameless = np.flatnonzero(~named & labelled)
    if len(nameless):
        where = f"row {nameless[0] + 1} after the header"
        message = f"{raw.path.name}: {where} has no {form.patient}; fill it or drop the row"
        raise ClinicalError(message)
    return _rows_left(raw, np.flatnonzero(named)), [f"{int((~named).sum())} rows without patient dropped"]


def _rows_left(raw: RawTable, rows: NDArray[np.int64]) -> RawTable:
    if not len(rows):
        message = f"{raw.path.name}: no row names a patient"
        raise ClinicalError(message)
    return raw.take(rows)


def _in_cohort(
    raw: RawTable, form: Format, cohort: str | None
) -> tuple[RawTable, list[str | None], str | None, list[str]]:
    """The rows of the cohort, the cohort of each, the column that says so, and notes."""
    name = first_of(form.cohort, raw.names)
    cells: list[str | None] = raw.column(name).to_pylist() if name else [None] * raw.n_rows
    found = [_cohort_name(cell) if cell else None for cell in cells]
    if cohort is None:
        return raw, found, name, []
    wanted = _cohort_name(cohort.strip()).casefold()
    rows = [row for row, value in enumerate(found) if value is not None and value.casefold() == wanted]
    if rows:
        kept = raw if len(rows) == raw.n_rows else raw.take(np.array(rows, dtype=np.int64))
        return kept, [cohort] * len(rows), name, []
    others = sorted({value for value in found if value is not None})
    notes = [f"no row has {name} {cohort!r} ({_listed(others)}): every row is taken as it"] if others else []
    return raw, [cohort] * raw.n_rows, None, notes


def _patient_ids(raw: RawTable, form: Format) -> tuple[list[str], list[str]]:
    cells = raw.column(form.patient).to_pylist()
    ids = [(len(cell) > _BARCODE_LENGTH and tcga_patient_id(cell)) or cell for cell in cells]
    longer = sum(cell != patient for cell, patient in zip(cells, ids, strict=True))
    if not longer:
        return ids, []
    return ids, [f"{form.patient} holds slide or sample names: patients taken from {longer} TCGA barcodes"]


def _labels(raw: RawTable, form: Format, who: Patients) -> tuple[dict[str, pa.Array], list[str]]:
    event = _cells(raw, form.event, who, form.read_event, "expected 0 or 1 (a status: LIVING or DECEASED)")
    if form.death:
        time, notes = _gdc_time(raw, form, who, event)
    else:
        time, notes = _cells(raw, form.time, who, read_time, "expected a number, 0 or more"), []
    event = who.agreed(raw.path, "event", event)
    time = who.agreed(raw.path, "time_months", time / form.days_per_unit)
    unlabelled = int((np.isnan(time) | np.isnan(event)).sum())
    notes += [f"{unlabelled} patients without follow-up (time or event missing)"] if unlabelled else []
    at_zero = int((time == 0).sum())
    notes += [f"{at_zero} patients with time 0"] if at_zero else []
    notes += _unlikely(form, time)
    labels = {
        "time_months": pa.array(time, mask=np.isnan(time)),
        "event": pa.array(event == 1.0, mask=np.isnan(event)),
    }
    return labels, notes


def _unlikely(form: Format, time: Floats) -> list[str]:
    """Half of the patients followed for more than 20 years: a column that is named months may hold days."""
    known = time[~np.isnan(time)]
    if not known.size or (median := float(np.median(known))) <= _UNLIKELY_MONTHS:
        return []
    return [
        f"{form.time} has a median of {median:,.0f} months ({median / 12:.0f} years): "
        f"if these are days, divide them by {DAYS_PER_MONTH}"
    ]


def _gdc_time(raw: RawTable, form: Format, who: Patients, event: Floats) -> tuple[Floats, list[str]]:
    """Days: to death of the dead, the longest follow-up of the living, NaN of all others."""
    death = _cells(raw, form.death or "", who, read_time, "expected a number, 0 or more")
    follow_up = _cells(raw, form.time, who, read_number, "expected a number")
    early = (event == 0) & (follow_up < 0)
    alive = np.where((event == 0) & ~early, follow_up, np.nan)
    longest = np.full(len(who), np.nan)
    np.fmax.at(longest, who.of_row, alive)
    time = np.where(event == 1, death, np.where(event == 0, longest[who.of_row], np.nan))
    names = [who.ids[number] for number in np.unique(who.of_row[early])]
    notes = [f"follow-up before diagnosis (negative days) taken as missing: {_listed(names)}"] if names else []
    return time, notes


def _cells(raw: RawTable, name: str, who: Patients, read: Callable[[str], float], expected: str) -> Floats:
    values = np.full(raw.n_rows, np.nan)
    for row, cell in enumerate(blank_not_reported(raw.column(name)).to_pylist()):
        if cell is None:
            continue
        try:
            values[row] = read(cell)
        except ValueError:
            message = f"{raw.path.name}: {name} of patient {who.ids[who.of_row[row]]} is {cell!r}; {expected}"
            raise ClinicalError(message) from None
    return values


def _traits(raw: RawTable, form: Format) -> tuple[dict[str, pa.Array], set[str | None], list[str]]:
    """Age, sex, site and OncoTree code of each row, the columns they came from, and notes."""
    age, per_year = age_column(form, raw.names)
    sex = first_of(SEX_COLUMNS, raw.names)
    site = first_of(SITE_COLUMNS, raw.names)
    code = first_of(ONCOTREE_COLUMNS, raw.names)
    ages, age_notes = _lenient(raw, age, lambda cell: read_number(cell) / per_year)
    sexes, sex_notes = _lenient(raw, sex, read_is_female if sex == "is_female" else read_sex)
    traits = {
        "age": pa.array(ages, pa.float64()),
        "sex": pa.array(sexes, pa.string()),
        "site": raw.column(site) if site else pa.nulls(raw.n_rows, pa.string()),
        "oncotree_code": raw.column(code) if code else pa.nulls(raw.n_rows, pa.string()),
    }
    return traits, {age, sex, site, code}, age_notes + sex_notes


def _lenient(
    raw: RawTable, name: str | None, read: Callable[[str], float | str]
) -> tuple[list[float | str | None], list[str]]:
    """Values of a column that no result hangs on: what cannot be read is null, with a note."""
    values: list[float | str | None] = [None] * raw.n_rows
    odd: dict[str, None] = {}
    for row, cell in enumerate(blank_not_reported(raw.column(name)).to_pylist() if name else ()):
        try:
            values[row] = None if cell is None else read(cell)
        except ValueError:
            odd[cell] = None
    return values, [f"{name} not understood, left empty: {_listed(list(odd))}"] if odd else []


def _patients(
    raw: RawTable, who: Patients, fields: dict[str, pa.Array], taken: set[str | None]
) -> tuple[pa.Table, list[str]]:
    columns = {
        "cohort": pa.array(who.cohorts, pa.string()),
        "patient_id": pa.array(who.ids, pa.string()),
        "time_months": fields.pop("time_months"),
        "event": fields.pop("event"),
    }
    skipped = {raw.names.index(name) for name in taken if name in raw.names}
    others = [(n, typed(c)) for i, (n, c) in enumerate(zip(raw.names, raw.columns, strict=True)) if i not in skipped]
    names, renamed = _distinct([*columns, *fields], [name for name, _ in others])
    several = []
    for name, column in (*fields.items(), *zip(names, (c for _, c in others), strict=True)):
        columns[name], differs = who.collapse(column)
        several += [name] if differs else []
    notes = [f"columns renamed, their names being taken: {_listed(renamed)}"] if renamed else []
    notes += [f"first value taken where a patient's rows differ: {_listed(several)}"] if several else []
    return pa.table(columns), notes


def _distinct(used: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names with _2, _3, ... where another has it already; SQL does not tell A from a."""
    seen = {name.casefold() for name in used}
    distinct, renamed = [], []
    for name in names:
        new, number = name, 2
        while new.casefold() in seen:
            new, number = f"{name}_{number}", number + 1
        seen.add(new.casefold())
        distinct.append(new)
        renamed += [f"{name} -> {new}"] if new != name else []
    return distinct, renamed


def _slides(raw: RawTable, cohorts: Sequence[str | None], ids: Sequence[str]) -> pa.Table:
    cells = raw.column(SLIDE_COLUMN).to_pylist() if SLIDE_COLUMN in raw.names else []
    owners: dict[tuple[str | None, str], str] = {}
    for cell, cohort, patient in zip(cells, cohorts, ids, strict=False):
        owner = owners.setdefault((cohort, strip_suffixes(cell)), patient) if cell else patient
        if owner != patient:
            slide = strip_suffixes(cell)
            message = f"{raw.path.name}: slide {slide} belongs to two patients, {owner} and {patient}"
            raise ClinicalError(message)
    columns = {
        "slide_id": pa.array([slide for _, slide in owners], pa.string()),
        "patient_id": pa.array(owners.values(), pa.string()),
        "cohort": pa.array([cohort for cohort, _ in owners], pa.string()),
    }
    return pa.table(columns)


def _cohort_name(value: str) -> str:
    return value.removeprefix("TCGA-")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
    return ", ".join(names[:_N_NAMED]) + more
