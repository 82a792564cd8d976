"""Survival tables as people find them: every kind read, every doubt refused or said."""

from __future__ import annotations

import csv
import hashlib
import time
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cfstore.clinical import ClinicalTable, looks_clinical, read_clinical
from cfstore.errors import ClinicalError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
CLINICAL = SHARED / "data" / "clinical"
FORMATS = CLINICAL / "formats"
needs_samples = pytest.mark.skipif(not CLINICAL.is_dir(), reason="no ../shared/data/clinical beside the repository")

CANONICAL = ["cohort", "patient_id", "time_months", "event", "age", "sex", "site", "oncotree_code"]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def read(tmp_path: Path, text: str, cohort: str | None = None) -> ClinicalTable:
    return read_clinical(write(tmp_path / "table.csv", text), cohort)


def labels(table: ClinicalTable) -> dict[str, Any]:
    columns = table.patients.select(["patient_id", "time_months", "event"]).to_pydict().values()
    return {patient: (months, event) for patient, months, event in zip(*columns, strict=True)}


def rows_of(path: Path, delimiter: str, skip: int = 0) -> list[dict[str, str]]:
    lines = path.read_text().splitlines()[skip:]
    return list(csv.DictReader(lines, delimiter=delimiter))


# --- real samples -------------------------------------------------------------------------


@needs_samples
@pytest.mark.parametrize(
    ("name", "kind", "n_rows", "n_patients", "n_events"),
    [
        ("tcga_gbmlgg_min.csv", "mcat", 1011, 569, 187),
        ("tcga_luad_min.csv", "mcat", 507, 444, 157),
        ("tcga_coad_min.csv", "mcat", 424, 416, 95),
        ("formats/crossfusion_coad_all_clean.csv", "crossfusion-coad", 424, 416, 95),
    ],
)
def test_slide_tables_hold_the_patients_and_deaths_of_the_facts(
    name: str, kind: str, n_rows: int, n_patients: int, n_events: int
) -> None:
    table = read_clinical(CLINICAL / name)
    assert (table.format, table.n_rows, table.slides.num_rows) == (kind, n_rows, n_rows)
    assert table.patients.num_rows == n_patients
    assert table.patients["event"].to_pylist().count(True) == n_events
    assert table.patients.column_names[:8] == CANONICAL


@needs_samples
def test_coad_case_ids_that_are_slide_names_become_patients() -> None:
    path = FORMATS / "crossfusion_coad_all_clean.csv"
    table = read_clinical(path, cohort="COAD")
    expected = {row["case_id"][:12]: float(row["survival_months"]) for row in rows_of(path, ",")}
    assert {patient: months for patient, (months, _) in labels(table).items()} == expected
    assert any("patients taken from 424 TCGA barcodes" in note for note in table.notes)
    assert set(table.patients["cohort"].to_pylist()) == {"COAD"}
    assert "survival_days" in table.patients.column_names


@needs_samples
def test_both_coad_tables_agree_on_every_patient() -> None:
    whole = read_clinical(FORMATS / "crossfusion_coad_all_clean.csv")
    assert labels(whole) == labels(read_clinical(CLINICAL / "tcga_coad_min.csv"))


@needs_samples
def test_sites_of_a_real_table_keep_their_zeros() -> None:
    sites = read_clinical(CLINICAL / "tcga_gbmlgg_min.csv").patients["site"].to_pylist()
    assert {"02", "06"} <= set(sites)


@needs_samples
def test_cbioportal_table_is_read_below_its_comment_lines() -> None:
    path = FORMATS / "cbioportal_brca_data_clinical_patient.txt"
    rows = rows_of(path, "\t", skip=4)
    table = read_clinical(path)
    expected = {row["PATIENT_ID"]: (float(row["OS_MONTHS"]), row["OS_STATUS"] == "1:DECEASED") for row in rows}
    assert table.format == "cbioportal"
    assert labels(table) == expected
    assert len(expected) == 1084
    assert table.patients["sex"].to_pylist().count("male") == 12


@needs_samples
def test_old_gdc_table_takes_death_of_the_dead_and_follow_up_of_the_living() -> None:
    path = FORMATS / "gdc_clinical_2019_brca.tsv"
    table = read_clinical(path)
    expected: dict[str, Any] = {}
    for row in rows_of(path, "\t"):
        dead = row["vital_status"] == "dead"
        days = row["days_to_death"] if dead else row["days_to_last_follow_up"]
        known = days != "--" and float(days) >= 0
        expected[row["submitter_id"]] = (pytest.approx(float(days) / 30.44) if known else None, dead)
    assert (table.format, len(expected)) == ("gdc-2019", 1084)
    assert labels(table) == expected
    assert set(table.patients["cohort"].to_pylist()) == {"BRCA"}


@needs_samples
def test_gdc_follow_up_before_diagnosis_is_missing_and_said() -> None:
    table = read_clinical(FORMATS / "gdc_clinical_2019_brca.tsv")
    assert labels(table)["TCGA-PL-A8LV"] == (None, False)
    assert any("negative days" in note and "TCGA-A8-A082" in note for note in table.notes)


@needs_samples
def test_new_gdc_table_of_many_rows_becomes_one_row_per_patient() -> None:
    path = FORMATS / "gdc_clinical_2024_coad.tsv"
    days: dict[str, list[float]] = defaultdict(list)
    vital: dict[str, str] = {}
    for row in rows_of(path, "\t"):
        patient = row["cases.submitter_id"]
        vital[patient] = row["demographic.vital_status"]
        column = {"Dead": "demographic.days_to_death", "Alive": "diagnoses.days_to_last_follow_up"}
        cell = row[column[vital[patient]]] if vital[patient] in column else "'--"
        days[patient] += [float(cell)] if cell != "'--" else []
    table = read_clinical(path)
    assert (table.format, table.n_rows, len(vital), table.patients.num_rows) == ("gdc-2024", 1790, 458, 458)
    for patient, (months, event) in labels(table).items():
        assert event == {"Dead": True, "Alive": False}.get(vital[patient])
        assert months == (pytest.approx(max(days[patient]) / 30.44) if days[patient] else None)
    assert "3 patients without follow-up (time or event missing)" in table.notes
    assert any("treatments.course_number" in note for note in table.notes)


@needs_samples
def test_a_manifest_and_a_splits_file_do_not_look_clinical() -> None:
    assert not looks_clinical(CLINICAL / "gdc_dx_manifest_gbmlgg.csv")
    assert not looks_clinical(SHARED / "data" / "splits" / "tcga_coad" / "splits_0.csv")


@needs_samples
def test_every_real_table_looks_clinical() -> None:
    tables = [*CLINICAL.glob("tcga_*.csv"), *(path for path in FORMATS.iterdir() if path.is_file())]
    assert len(tables) == 7
    assert all(looks_clinical(path) for path in tables)


# --- kinds without a sample ---------------------------------------------------------------


def test_our_own_words_always_work(tmp_path: Path) -> None:
    table = read(tmp_path, "patient_id,time_months,event\np1,12.5,1\np2,0,False\n")
    assert table.format == "cfstore"
    assert labels(table) == {"p1": (12.5, True), "p2": (0.0, False)}
    assert table.slides.num_rows == 0


def test_the_digest_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    text = "patient_id,time_months,event\np1,1,1\n"
    assert read(tmp_path, text).digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_censorship_is_turned_over(tmp_path: Path) -> None:
    text = "case_id,slide_id,survival_months,censorship\na,a1,1,0\nb,b1,2,1\nc,c1,3,0.0\nd,d1,4,1.0\n"
    assert [event for _, event in labels(read(tmp_path, text)).values()] == [True, False, True, False]


def test_survpath_keeps_its_other_endpoints(tmp_path: Path) -> None:
    text = "case_id,slide_id,survival_months,censorship,survival_months_dss,censorship_dss\na,a1.svs,9,1,8.5,0\n"
    table = read(tmp_path, text)
    assert table.format == "survpath"
    assert labels(table) == {"a": (9.0, False)}
    assert table.patients.select(["survival_months_dss", "censorship_dss"]).to_pylist() == [
        {"survival_months_dss": 8.5, "censorship_dss": 0}
    ]


def test_mmp_days_become_months(tmp_path: Path) -> None:
    table = read(tmp_path, "case_id,slide_id,os_survival_days,os_censorship,mpp\na,a1,304.4,0,0.25\n")
    assert table.format == "mmp"
    assert labels(table) == {"a": (pytest.approx(10.0), True)}


def test_tcga_cdr_is_read_with_its_missing_markers(tmp_path: Path) -> None:
    text = (
        ",bcr_patient_barcode,type,age_at_initial_pathologic_diagnosis,gender,OS,OS.time,Redaction\n"
        "1,TCGA-OR-A5J1,ACC,58,MALE,1,608.8,#N/A\n"
        "2,TCGA-OR-A5J2,ACC,[Not Available],FEMALE,#N/A,#N/A,Redacted\n"
    )
    table = read(tmp_path, text)
    assert table.format == "tcga-cdr"
    assert labels(table) == {"TCGA-OR-A5J1": (pytest.approx(20.0), True), "TCGA-OR-A5J2": (None, None)}
    assert table.patients.select(["cohort", "age", "sex", "Redaction"]).to_pylist() == [
        {"cohort": "ACC", "age": 58.0, "sex": "male", "Redaction": None},
        {"cohort": "ACC", "age": None, "sex": "female", "Redaction": "Redacted"},
    ]
    assert table.patients.column_names == [*CANONICAL, "Redaction"]


def test_cbioportal_status_is_read_as_text_or_bare_number(tmp_path: Path) -> None:
    rows = "a\t1\tLIVING\nb\t2\tDECEASED\nc\t3\t0\nd\t4\t1\ne\t\t\nf\t5\t1:DECEASED\n"
    text = "PATIENT_ID\tOS_MONTHS\tOS_STATUS\n" + rows
    assert [event for _, event in labels(read(tmp_path, text)).values()] == [
        False,
        True,
        False,
        True,
        None,
        True,
    ]


def test_gdc_table_of_the_years_between_is_read(tmp_path: Path) -> None:
    names = "case_id case_submitter_id project_id age_at_diagnosis vital_status days_to_death"
    header = "\t".join([*names.split(), "days_to_last_follow_up"]) + "\n"
    table = read(tmp_path, header + "uuid\tTCGA-A1-A0SB\tTCGA-BRCA\t7305\tAlive\t'--\t3044\n")
    assert labels(table) == {"TCGA-A1-A0SB": (pytest.approx(100.0), False)}
    assert table.patients["age"].to_pylist() == [20.0]


def test_gdc_takes_the_longest_follow_up_of_a_living_patient(tmp_path: Path) -> None:
    text = (
        "submitter_id,vital_status,days_to_death,days_to_last_follow_up\n"
        "a,Alive,--,30.44\na,Alive,--,304.4\na,Alive,--,--\nb,Not Reported,--,50\nc,Unknown,--,50\n"
    )
    assert labels(read(tmp_path, text)) == {
        "a": (pytest.approx(10.0), False),
        "b": (None, None),
        "c": (None, None),
    }


# --- files --------------------------------------------------------------------------------


def test_a_zip_is_read_whatever_its_member_is_called(tmp_path: Path) -> None:
    path = tmp_path / "tcga_x_all_clean.csv.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../dataset_csv/other.csv.zip", ",case_id,survival_months,censorship\n0,a,5,0\n")
        archive.writestr("__MACOSX/._other.csv", "shadow")
    assert looks_clinical(path)
    assert labels(read_clinical(path)) == {"a": (5.0, True)}


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "patient_id;time_months;event;note\r\na;1;1;x\r\n", "utf-8-sig")
    assert looks_clinical(path)
    assert read_clinical(path).patients["note"].to_pylist() == ["x"]


def test_a_table_saved_by_excel_on_windows_is_read_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "patient_id,time_months,event,doctor\na,1,1,Zoë\n", "cp1252")
    table = read_clinical(path)
    assert table.patients["doctor"].to_pylist() == ["Zoë"]
    assert any("Windows-1252" in note for note in table.notes)


def test_nameless_columns_of_row_numbers_are_left_out(tmp_path: Path) -> None:
    table = read(tmp_path, ",Unnamed: 0,patient_id,time_months,event\n0,0,a,1,1\n")
    assert table.patients.column_names == CANONICAL


def test_rows_without_anything_are_dropped_and_said(tmp_path: Path) -> None:
    table = read(tmp_path, "patient_id,time_months,event\na,1,1\n,,\n")
    assert table.patients.num_rows == 1
    assert "1 rows without patient dropped" in table.notes


def test_nine_thousand_columns_take_seconds(tmp_path: Path) -> None:
    genes = [f"G{number}_rnaseq" for number in range(9000)]
    cells = ",".join(f"{number % 97 / 7:.4f}" for number in range(9000))
    lines = [f"p{row // 2},p{row}.svs,{row // 2},1,{cells}" for row in range(1000)]
    text = ",".join(["case_id,slide_id,survival_months,censorship", *genes]) + "\n" + "\n".join(lines)
    path = write(tmp_path / "wide.csv", text)
    start = time.perf_counter()
    table = read_clinical(path)
    assert time.perf_counter() - start < 20  # about two on an idle machine; quadratic code takes minutes
    assert (table.patients.num_rows, table.patients.num_columns) == (500, 9008)
    assert table.patients.schema.field("G42_rnaseq").type == pa.float64()


# --- patients, slides, other columns ------------------------------------------------------


def test_slides_lose_known_suffixes_and_nothing_else(tmp_path: Path) -> None:
    text = "case_id,slide_id,survival_months,censorship\nTCGA-AA-0001,TCGA-AA-0001-01Z-00-DX1.4755D138.svs,1,1\n"
    assert read(tmp_path, text, "COAD").slides.to_pylist() == [
        {"slide_id": "TCGA-AA-0001-01Z-00-DX1.4755D138", "patient_id": "TCGA-AA-0001", "cohort": "COAD"}
    ]


def test_a_slide_listed_twice_is_one_slide(tmp_path: Path) -> None:
    text = "case_id,slide_id,survival_months,censorship\na,a1.svs,1,1\na,a1.svs,1,1\n"
    assert read(tmp_path, text).slides.num_rows == 1


def test_missing_markers_are_null(tmp_path: Path) -> None:
    markers = [
        "",
        "NA",
        "N/A",
        "nan",
        "--",
        "'--",
        "#N/A",
        "[Not Available]",
        "[Not Applicable]",
        "Not Reported",
    ]
    rows = "".join(f"p{number},{m},{m},{m},x\n" for number, m in enumerate(markers))
    table = read(tmp_path, "patient_id,time_months,event,age,y\n" + rows)
    assert set(labels(table).values()) == {(None, None)}
    assert table.patients["age"].null_count == len(markers)
    assert f"{len(markers)} patients without follow-up (time or event missing)" in table.notes


def test_other_columns_are_numbers_only_if_every_value_is_one(tmp_path: Path) -> None:
    text = (
        "patient_id,time_months,event,whole,real,code,mixed,reported,race\n"
        "a,1,1,3,0.5,05,1,7,Not Reported\nb,1,1,NA,2,11,x,not reported,white\n"
    )
    patients = read(tmp_path, text).patients
    assert patients.select(["whole", "real", "code", "mixed", "reported", "race"]).to_pydict() == {
        "whole": [3, None],
        "real": [0.5, 2.0],
        "code": ["05", "11"],
        "mixed": ["1", "x"],
        "reported": [7, None],
        "race": ["Not Reported", "white"],
    }
    kinds = [str(patients.schema.field(name).type) for name in ("whole", "real", "code")]
    assert kinds == ["int64", "double", "string"]


def test_identifiers_too_long_for_a_number_stay_text(tmp_path: Path) -> None:
    table = read(tmp_path, "patient_id,time_months,event,accession\na,1,1,12345678901234567890\n")
    assert table.patients["accession"].to_pylist() == ["12345678901234567890"]


def test_the_first_value_stands_where_a_patients_rows_differ(tmp_path: Path) -> None:
    text = "case_id,slide_id,survival_months,censorship,block,lab\na,a1,1,1,,L\na,a2,1,1,B,L\na,a3,1,1,C,L\n"
    table = read(tmp_path, text)
    assert table.patients.select(["block", "lab"]).to_pylist() == [{"block": "B", "lab": "L"}]
    assert "first value taken where a patient's rows differ: block" in table.notes


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("is_female", ("1.0", "0")),
        ("gender", ("FEMALE", "male")),
        ("SEX", ("Female", "M")),
        ("sex", ("f", "Male")),
    ],
)
def test_sex_is_female_or_male_whatever_the_column(tmp_path: Path, column: str, cells: tuple[str, str]) -> None:
    table = read(tmp_path, f"patient_id,time_months,event,{column}\na,1,1,{cells[0]}\nb,1,1,{cells[1]}\n")
    assert table.patients["sex"].to_pylist() == ["female", "male"]
    assert table.patients.column_names == CANONICAL


def test_months_that_are_days_are_pointed_out(tmp_path: Path) -> None:
    table = read(tmp_path, "case_id,survival_months,censorship\na,585,1\nb,912,0\nc,30,0\n")
    said = "survival_months has a median of 585 months (49 years): if these are days, divide them by 30.44"
    assert said in table.notes
    assert table.patients["time_months"].to_pylist() == [585.0, 912.0, 30.0]
    days = read(tmp_path, "case_id,os_survival_days,os_censorship\na,585,1\nb,912,0\nc,30,0\n")
    assert not any("days" in note for note in days.notes)


def test_an_age_that_is_no_number_is_empty_and_said(tmp_path: Path) -> None:
    table = read(tmp_path, "patient_id,time_months,event,age\na,1,1,>89\nb,1,1,64\n")
    assert table.patients["age"].to_pylist() == [None, 64.0]
    assert "age not understood, left empty: >89" in table.notes


def test_a_column_whose_name_is_taken_is_renamed(tmp_path: Path) -> None:
    table = read(tmp_path, "case_id,survival_months,censorship,event,TP53,tp53\na,1,1,relapse,1,2\n")
    assert table.patients.column_names == [*CANONICAL, "event_2", "TP53", "tp53_2"]


# --- cohorts ------------------------------------------------------------------------------

TWO_COHORTS = "cohort,patient_id,time_months,event\nBLCA,1,10,1\nLUAD,1,20,0\nLUAD,2,30,0\n"


def test_a_cohort_of_the_file_is_picked_in_any_case(tmp_path: Path) -> None:
    table = read(tmp_path, TWO_COHORTS, "luad")
    assert table.patients.select(["cohort", "patient_id"]).to_pydict() == {
        "cohort": ["luad", "luad"],
        "patient_id": ["1", "2"],
    }
    assert table.n_rows == 2


def test_the_same_identifier_in_two_cohorts_is_two_patients(tmp_path: Path) -> None:
    assert read(tmp_path, TWO_COHORTS).patients["time_months"].to_pylist() == [10.0, 20.0, 30.0]


def test_a_cohort_the_file_does_not_know_is_given_to_every_row(tmp_path: Path) -> None:
    text = "bcr_patient_barcode,type,OS,OS.time\nTCGA-02-0001,GBM,1,10\nTCGA-CS-4938,LGG,0,20\n"
    table = read(tmp_path, text, "GBMLGG")
    assert table.patients["cohort"].to_pylist() == ["GBMLGG", "GBMLGG"]
    assert table.patients["type"].to_pylist() == ["GBM", "LGG"]
    assert any("GBM, LGG" in note for note in table.notes)


def test_an_unknown_cohort_is_null(tmp_path: Path) -> None:
    table = read(tmp_path, "patient_id,time_months,event\na,1,1\n")
    assert table.patients["cohort"].to_pylist() == [None]
    assert table.patients.schema.field("cohort").type == pa.string()


# --- refusals -----------------------------------------------------------------------------


def test_an_unknown_table_is_refused_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(ClinicalError, match=r"table\.csv.*found: a, b.*patient_id, time_months, event"):
        read(tmp_path, "a,b\n1,2\n")


@pytest.mark.parametrize(
    ("cells", "what"),
    [
        ("-3,1", "time_months of patient p7 is '-3'"),
        ("soon,1", "time_months of patient p7 is 'soon'"),
        ("inf,1", "time_months of patient p7 is 'inf'"),
        ("3,2", "event of patient p7 is '2'"),
        ("3,dead", "event of patient p7 is 'dead'"),
    ],
)
def test_a_time_or_event_that_cannot_be_is_refused(tmp_path: Path, cells: str, what: str) -> None:
    with pytest.raises(ClinicalError, match=rf"table\.csv: {what}"):
        read(tmp_path, f"patient_id,time_months,event\np7,{cells}\n")


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClinicalError, match="OS_STATUS of patient a is 'RELAPSED'"):
        read(tmp_path, "PATIENT_ID,OS_MONTHS,OS_STATUS\na,1,RELAPSED\n")


def test_rows_of_one_patient_that_disagree_in_time_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"p{n},s{n}{k},{n + k},1\n" for n in range(7) for k in range(2))
    with pytest.raises(ClinicalError, match=r"time_months for 7 patients: p0 \(0 and 1\), .*p4 \(4 and 5\);"):
        read(tmp_path, "case_id,slide_id,survival_months,censorship\n" + rows)


def test_rows_of_one_patient_that_disagree_in_event_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ClinicalError, match=r"disagree in event for 1 patients: a \(1 and 0\)"):
        read(tmp_path, "case_id,slide_id,survival_months,censorship\na,a1,5,0\na,a2,5,1\n")


def test_a_gdc_patient_both_dead_and_alive_is_refused(tmp_path: Path) -> None:
    header = "submitter_id,vital_status,days_to_death,days_to_last_follow_up\n"
    with pytest.raises(ClinicalError, match=r"event for 1 patients: a \(0 and 1\)"):
        read(tmp_path, header + "a,Alive,--,10\na,Dead,20,--\n")


def test_a_label_without_patient_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClinicalError, match="row 2 after the header has no patient_id"):
        read(tmp_path, "patient_id,time_months,event\na,1,1\n,2,0\n")


def test_a_slide_of_two_patients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClinicalError, match="slide s belongs to two patients, a and b"):
        read(tmp_path, "case_id,slide_id,survival_months,censorship\na,s.svs,1,1\nb,s.svs,2,1\n")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"patient_id,time_months,event\n", "no row"),
        (b"", "no row"),
        (b"patient_id,time_months,event\n,,\n", "no row names a patient"),
        (b"patient_id,time_months,event\na,1,1,9\n", "do not fit its header of 3 columns"),
        ("patient_id,time_months,event\na,1,1\n".encode("utf-16"), "UTF-16"),
        (b"\x89HDF\r\n\x1a\n\0\0\0\0", "not a text table"),
        (b"PK\x03\x04 and no more", "cannot be read"),
    ],
    ids=["header only", "empty", "blank rows", "ragged", "utf-16", "hdf5", "broken zip"],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(ClinicalError, match=rf"t\.csv.*{what}"):
        read_clinical(path)


def test_a_zip_of_several_tables_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "x")
        archive.writestr("b.csv", "x")
    with pytest.raises(ClinicalError, match="a zip with 2 files"):
        read_clinical(path)


def test_a_zip_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", "patient_id,time_months,event\n" + "a,1,1\n" * 10_000)
    monkeypatch.setattr("cfstore.clinical.files.MAX_BYTES", 10_000)
    with pytest.raises(ClinicalError, match="more than a clinical table can have"):
        read_clinical(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ClinicalError, match=r"gone\.csv: cannot be read"):
        read_clinical(tmp_path / "gone.csv")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\1\2",
        b"PK\x03\x04 and no more",
        b"id\tfilename\tmd5\n",
        b",train,val\n0,a,b\n",
        b"\xff\xfe\xfa,\x80\n",
    ],
    ids=["empty", "binary", "broken zip", "manifest", "splits", "no utf-8"],
)
def test_other_files_do_not_look_clinical(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert not looks_clinical(path)


def test_folders_and_missing_files_do_not_look_clinical(tmp_path: Path) -> None:
    assert not looks_clinical(tmp_path)
    assert not looks_clinical(tmp_path / "gone.csv")
