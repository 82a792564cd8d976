"""Cox regression against lifelines called directly, a case worked by hand, and columns that cannot be estimated."""

from __future__ import annotations

import math
from datetime import date

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from scipy.optimize import minimize

from cftrain.errors import NonFiniteError, ShapeError
from cftrain.survival.regression import RISK, covariates_of, cox_regression, standardised


def cohort(n=300, seed=0):
    """Patients whose hazard rises with risk, age and stage; whole months with ties; some values missing."""
    rng = np.random.default_rng(seed)
    risk, age, stage = (
        rng.normal(size=n),
        rng.normal(62, 11, n).round(),
        rng.choice(["I", "II", "III"], n, p=[0.5, 0.3, 0.2]),
    )
    hazard = 0.03 * np.exp(0.6 * risk + 0.02 * (age - 62) + 0.5 * (stage == "III"))
    death, censoring = rng.exponential(1 / hazard), rng.uniform(10, 90, n)
    return np.ceil(np.minimum(death, censoring)), death <= censoring, risk, {
        "age": age.tolist(),
        "sex": rng.choice(["female", "male"], n, p=[0.6, 0.4]).tolist(),
        "stage": stage.tolist(),
        "grade": rng.integers(1, 4, n).tolist(),
        "smoker": (rng.random(n) < 0.3).tolist(),
    }  # fmt: skip


def lifelines_rows(time, event, columns):
    """Hazard ratio, limits and p of every column, as lifelines prints them."""
    frame = pd.DataFrame(columns | {"T": time, "E": event}).dropna()
    table = CoxPHFitter().fit(frame, "T", "E").summary
    return {
        name: [row["exp(coef)"], row["exp(coef) lower 95%"], row["exp(coef) upper 95%"], row["p"]]
        for name, row in table.iterrows()
    }


def numbers(row):
    return [row["hazard_ratio"], row["lower"], row["upper"], row["p_value"]]


def design(risk, covariates):
    """The columns that the rules ask for, written out."""
    stage, sex = np.array(covariates["stage"]), np.array(covariates["sex"])
    return {
        RISK: risk,
        "age (per 10 years)": np.array(covariates["age"]) / 10,
        "sex: male vs female": (sex == "male").astype(float),
        "stage: II vs I": (stage == "II").astype(float),
        "stage: III vs I": (stage == "III").astype(float),
        "grade": np.array(covariates["grade"], dtype=float),
        "smoker: true vs false": np.array(covariates["smoker"], dtype=float),
    }


# ---- against lifelines ----


def test_all_together_are_what_lifelines_gives_the_same_columns():
    time, event, risk, covariates = cohort()
    table = cox_regression(time, event, risk, covariates)
    expected = lifelines_rows(time, event, design(risk, covariates))
    assert [row["covariate"] for row in table["multivariable"]] == list(expected)
    for row in table["multivariable"]:
        assert numbers(row) == pytest.approx(expected[row["covariate"]], rel=1e-6)
        assert (row["n"], row["n_events"]) == (300, event.sum())
    assert (table["n"], table["n_events"], table["multivariable_n"]) == (300, event.sum(), 300)
    assert (table["left_out"], table["notes"]) == ({}, [])


def test_each_alone_is_what_lifelines_gives_it_with_levels_of_one_column_together():
    time, event, risk, covariates = cohort()
    columns = design(risk, covariates)
    stages = [name for name in columns if name.startswith("stage")]
    groups = [stages, *([name] for name in columns if name not in stages)]
    expected = {}
    for group in groups:
        expected |= lifelines_rows(time, event, {name: columns[name] for name in group})
    rows = cox_regression(time, event, risk, covariates)["univariable"]
    assert [row["covariate"] for row in rows] == list(columns)
    for row in rows:
        assert numbers(row) == pytest.approx(expected[row["covariate"]], rel=1e-6)


def test_two_groups_have_the_hazard_ratio_that_a_pencil_gives():
    # risk 1 dies at 1, risk 0 at 2, risk 1 at 3, risk 0 is censored at 4; the partial likelihood in h = exp(coef) is
    # h/(2h+2) * 1/(h+2) * h/(h+1): the slope is 0 where 2/h = 2/(h+1) + 1/(h+2), so h² - h - 4 = 0
    table = cox_regression([1.0, 2.0, 3.0, 4.0], np.array([True, True, True, False]), [1.0, 0.0, 1.0, 0.0], {})
    assert table["univariable"][0]["hazard_ratio"] == pytest.approx((1 + math.sqrt(17)) / 2, rel=1e-5)
    assert table["univariable"] == table["multivariable"]
    assert table["notes"][0] == "risk: fewer than 5 deaths per coefficient (3 for 1)"


def test_units_do_not_matter_to_p_and_columns_of_any_size_converge():
    time, event, risk, covariates = cohort()
    grade = np.array(covariates["grade"])
    table = cox_regression(time, event, risk, {"small": grade * 1e-2, "large": grade**2 * 1e6, "tiny": grade * 1e-6})
    _, small, large, tiny = table["univariable"]
    expected = lifelines_rows(time, event, {"grade": grade})["grade"]
    assert small["p_value"] == pytest.approx(expected[3], rel=1e-6)
    assert small["hazard_ratio"] == pytest.approx(expected[0] ** 100, rel=1e-5)
    assert large["p_value"] == pytest.approx(lifelines_rows(time, event, {"g": grade**2})["g"][3], rel=1e-6)
    assert math.isnan(tiny["hazard_ratio"])
    assert table["notes"][0] == "tiny: a unit of tiny is too large a step to write its hazard ratio: no estimate"


# ---- missing values ----


def test_each_alone_takes_its_known_patients_and_together_those_known_in_all():
    time, event, risk, covariates = cohort()
    age, stage = covariates["age"], covariates["stage"]
    covariates = {
        "age": [None if i < 40 else math.nan if i < 50 else value for i, value in enumerate(age)],
        "stage": ["" if i >= 270 else value for i, value in enumerate(stage)],
    }
    table = cox_regression(time, event, risk, covariates)
    counts = {row["covariate"]: (row["n"], row["n_events"]) for row in table["univariable"]}
    assert counts[RISK] == (300, event.sum())
    assert counts["age (per 10 years)"] == (250, event[50:].sum())
    assert counts["stage: II vs I"] == (270, event[:270].sum())
    assert (table["multivariable_n"], table["multivariable_n_events"]) == (220, event[50:270].sum())
    own = slice(50, 270)
    expected = lifelines_rows(
        time[own],
        event[own],
        {
            RISK: risk[own],
            "age (per 10 years)": np.array(age[own]) / 10,
            "stage: II vs I": (np.array(stage[own]) == "II").astype(float),
            "stage: III vs I": (np.array(stage[own]) == "III").astype(float),
        },
    )
    for row in table["multivariable"]:
        assert numbers(row) == pytest.approx(expected[row["covariate"]], rel=1e-6)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1.5] * 40, "constant"),
        (["x"] * 39 + [None], "constant"),
        ([None] * 21 + [*range(19)], "missing in 21 of 40 patients"),
        ([f"case-{i}" for i in range(40)], "40 different values, more than 8"),
        ([1.0, "a"] * 20, "values of a kind that cannot be used (number, string)"),
        ([date(2010, 1, 1), date(2011, 1, 1)] * 20, "values of a kind that cannot be used (date)"),
        ([[1], [2]] * 20, "values of a kind that cannot be used (list)"),
    ],
    ids=["constant", "constant-where-known", "mostly-missing", "identifier", "mixed", "dates", "lists"],
)
def test_a_column_that_can_be_no_covariate_is_left_out_with_the_reason(values, reason):
    time, event, risk, _ = cohort(40)
    table = cox_regression(time, event, risk, {"odd": values})
    assert table["left_out"] == {"odd": reason}
    assert [row["covariate"] for row in table["multivariable"]] == [RISK]


def test_half_of_the_values_are_enough():
    time, event, risk, _ = cohort(40)
    table = cox_regression(time, event, risk, {"marker": [None] * 20 + [*range(20)]})
    assert table["left_out"] == {}
    assert table["univariable"][1]["n"] == 20


def test_only_the_first_fifty_covariates_are_fitted():
    time, event, risk, _ = cohort(80)
    rng = np.random.default_rng(1)
    table = cox_regression(time, event, risk, {f"gene{i}": rng.normal(size=80).tolist() for i in range(52)})
    assert table["left_out"] == dict.fromkeys(["gene50", "gene51"], "more than 50 covariates")
    assert len(table["univariable"]) == 51


def test_covariates_enter_together_as_long_as_there_are_five_deaths_per_coefficient():
    time, _, risk, _ = cohort(80)
    event = np.arange(80) % 4 == 0  # 20 deaths: four coefficients
    rng = np.random.default_rng(1)
    covariates = {f"marker{i}": rng.normal(size=80).tolist() for i in range(3)}
    covariates |= {"stage": rng.choice(["I", "II", "III"], 80).tolist(), "last": rng.normal(size=80).tolist()}
    table = cox_regression(time, event, risk, {name: covariates[name] for name in ("marker0", "stage", "last")})
    assert [row["covariate"] for row in table["multivariable"]][:2] == [RISK, "marker0"]
    assert len(table["multivariable"]) == 4
    assert table["notes"] == [
        "multivariable: without last: with each, there would be fewer than 5 deaths per coefficient, or values for "
        "fewer than half of the patients"
    ]
    table = cox_regression(time, event, risk, covariates)
    assert [row["covariate"] for row in table["multivariable"]] == [RISK, "marker0", "marker1", "marker2"]
    assert "without stage, last:" in table["notes"][-1]


# ---- what cannot be estimated ----


def test_a_level_where_nobody_died_has_no_estimate_and_does_not_spoil_the_others():
    time, event, risk, covariates = cohort()
    stage = np.array(covariates["stage"])
    alive = np.flatnonzero(~event)[:6]
    stage[alive] = "0"
    table = cox_regression(time, event, risk, {"stage": stage.tolist()})
    rows = {row["covariate"]: row for row in table["multivariable"]}
    assert math.isnan(rows["stage: 0 vs I"]["hazard_ratio"])
    assert "multivariable: nobody died in stage: 0 vs I: no estimate; patients not in the fit: 6" in table["notes"]
    rest = np.setdiff1d(np.arange(300), alive)
    columns = {RISK: risk, "stage: II vs I": (stage == "II") * 1.0, "stage: III vs I": (stage == "III") * 1.0}
    expected = lifelines_rows(time[rest], event[rest], {name: values[rest] for name, values in columns.items()})
    for name, values in expected.items():
        assert numbers(rows[name]) == pytest.approx(values, rel=1e-6)


def test_leaving_out_a_level_without_deaths_is_the_limit_of_the_likelihood():
    rng = np.random.default_rng(3)
    _, event, risk, covariates = cohort(120)
    time = rng.exponential(np.exp(-risk))  # no ties, so that the likelihood is a product of simple quotients
    stage = np.array(covariates["stage"])
    stage[np.flatnonzero(~event)[:12]] = "0"

    def minus_log_likelihood(b):
        score = b[0] * risk + b[1] * (stage == "II") + b[2] * (stage == "III") - 40 * (stage == "0")
        return sum(np.log(np.exp(score[time >= time[i]]).sum()) - score[i] for i in np.flatnonzero(event))

    limit = minimize(minus_log_likelihood, np.zeros(3), options={"gtol": 1e-6}).x
    rows = {
        row["covariate"]: row["hazard_ratio"]
        for row in cox_regression(time, event, risk, {"stage": stage.tolist()})["multivariable"]
    }
    assert [rows[RISK], rows["stage: II vs I"], rows["stage: III vs I"]] == pytest.approx(np.exp(limit), rel=1e-4)


def test_a_column_that_tells_who_dies_has_no_estimate():
    time, event, risk, covariates = cohort(60)
    alive = ["yes" if e else "no" for e in event]
    table = cox_regression(time, event, risk, {"dead": alive, "minus_time": (-time).tolist(), "age": covariates["age"]})
    rows = {row["covariate"]: row for row in table["univariable"]}
    for name in [name for name in rows if name.startswith(("dead", "minus_time"))]:
        assert all(math.isnan(number) for number in numbers(rows[name])), name
    assert len([note for note in table["notes"] if "no estimate" in note]) == 2
    assert [row["covariate"] for row in table["multivariable"]] == [RISK, "age (per 10 years)"]
    assert not math.isnan(table["multivariable"][0]["hazard_ratio"])


def test_a_column_that_follows_from_others_has_no_estimate_together():
    time, event, risk, covariates = cohort()
    age = covariates["age"]
    table = cox_regression(time, event, risk, {"age": age, "year_of_birth": [2010 - value for value in age]})
    rows = {row["covariate"]: row for row in table["multivariable"]}
    assert math.isnan(rows["year_of_birth"]["hazard_ratio"])
    expected = lifelines_rows(time, event, {RISK: risk, "age (per 10 years)": np.array(age) / 10})
    for name, values in expected.items():
        assert numbers(rows[name]) == pytest.approx(values, rel=1e-6)
    assert "multivariable: year_of_birth is constant or follows from the columns before it: no estimate" in table[
        "notes"
    ]  # fmt: skip


def test_without_deaths_there_is_no_estimate():
    time, _, risk, covariates = cohort(30)
    table = cox_regression(time, np.zeros(30, dtype=bool), risk, {"age": covariates["age"]})
    assert all(math.isnan(row["hazard_ratio"]) for row in table["univariable"])
    assert table["multivariable"] == []
    assert table["notes"][0] == "risk: fewer than 5 deaths per coefficient (0 for 1)"


def test_a_model_that_ranks_nobody_is_left_out_itself():
    time, event, _, covariates = cohort(50)
    table = cox_regression(time, event, np.zeros(50), {"age": covariates["age"]})
    assert table["left_out"] == {"risk": "constant"}
    assert [row["covariate"] for row in table["multivariable"]] == ["age (per 10 years)"]


def test_covariates_known_in_different_patients_do_not_empty_the_multivariable_fit():
    time, event, risk, covariates = cohort(100)
    age = covariates["age"]
    table = cox_regression(time, event, risk, {"a": [*age[:50], *[None] * 50], "b": [*[None] * 50, *age[50:]]})
    assert [row["covariate"] for row in table["multivariable"]] == [RISK, "a"]
    assert table["multivariable_n"] == 50
    assert table["notes"][0].startswith("multivariable: without b:")
    expected = lifelines_rows(time[:50], event[:50], {RISK: risk[:50], "a": np.array(age[:50])})
    for row in table["multivariable"]:
        assert numbers(row) == pytest.approx(expected[row["covariate"]], rel=1e-6)


def test_columns_that_do_not_fit_are_refused():
    time, event, risk, covariates = cohort(30)
    with pytest.raises(ShapeError, match="age: 29 values for 30 patients"):
        cox_regression(time, event, risk, {"age": covariates["age"][:29]})
    with pytest.raises(ShapeError, match="give"):
        cox_regression(time, event, risk[:29], {})
    with pytest.raises(NonFiniteError, match="risk"):
        cox_regression(time, event, np.full(30, math.nan), {})


# ---- risks of several folds ----


def test_risks_are_standardised_within_their_fold():
    z = standardised([1.0, 3.0, 10.0, 10.0, 102.0, 100.0, 104.0], [0, 0, 1, 1, 2, 2, 2])
    assert z.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0, 0, 0, -1, 1])


def test_offsets_between_folds_change_no_hazard_ratio():
    time, event, risk, _ = cohort()
    fold = np.arange(300) % 5
    plain = cox_regression(time, event, standardised(risk, fold), {})["univariable"][0]
    moved = cox_regression(time, event, standardised(7 * fold + risk * (1 + fold), fold), {})["univariable"][0]
    assert numbers(plain) == pytest.approx(numbers(moved), rel=1e-9)


def test_a_fold_for_another_number_of_patients_is_refused():
    with pytest.raises(ShapeError, match="per patient"):
        standardised([1.0, 2.0], [0])


# ---- columns of the store ----


def test_covariates_are_what_is_left_without_labels_names_outcomes_and_planted_columns():
    row = {
        "cohort": "DEMO", "patient_id": "P1", "time_months": 3.0, "event": True, "age": 61.0, "sex": "male",
        "site": "AB", "oncotree_code": "COAD", "synthetic": True, "oracle_risk": 1.0, "oracle_5x": 0.1,
        "case_id": "c", "Unnamed: 0": 4, "": 4, "DSS": 1, "DSS.time": 3.0, "PFI.time": 2.0, "OS_STATUS": "1:DECEASED",
        "survival_months_dss": 3.0, "censorship_pfi": 0, "demographic.vital_status": "Dead", "OTHER_PATIENT_ID": "u",
        "demographic.days_to_death": 30, "diagnoses.days_to_last_follow_up": 30, "FORM_COMPLETION_DATE": "1/1/10",
        "PERSON_NEOPLASM_CANCER_STATUS": "WITH TUMOR", "new_tumor_event_type": "x", "diagnoses.submitter_id": "d",
        "progression_or_recurrence": "no", "TP53_rnaseq": 1.0, "TP53_mut": 0, "TP53_cnv": 0, "case_id_2": "c",
        "cases.consent_type": "Consent by Death", "AJCC_STAGING_EDITION": "7TH",
        "ajcc_pathologic_stage": "II", "RACE": "x", "WEIGHT": 70, "is_midline": 1, "primary_diagnosis": "y",
    }  # fmt: skip
    found = covariates_of([row, row | {"age": None}])
    assert list(found) == [
        "age", "sex", "site", "oncotree_code", "ajcc_pathologic_stage", "RACE", "WEIGHT", "is_midline",
        "primary_diagnosis",
    ]  # fmt: skip
    assert found["age"] == [61.0, None]


def test_the_cohort_is_a_covariate_where_there_are_several():
    rows = [{"cohort": name, "patient_id": name} for name in ("BLCA", "LUAD")]
    assert covariates_of(rows) == {"cohort": ["BLCA", "LUAD"]}
    assert covariates_of(rows[:1]) == {}
    assert covariates_of([]) == {}
