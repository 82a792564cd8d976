"""Metrics against scikit-survival's numbers, brute force, textbook formulas, and cases worked by hand."""

from __future__ import annotations

import math
import statistics
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2, norm

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.survival.metrics import (
    c_index,
    kaplan_meier,
    log_rank_median_split,
    numbers_at_risk,
    patient_level,
    summarise,
)

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "golden" / "metrics.npz"


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here")
    with np.load(GOLDEN) as arrays:
        return {name: arrays[name] for name in arrays.files}


def cohort(n, seed, *, months=40, ties_in_risk=True):
    """Follow-up in whole months with ties, some deaths, and risks with ties."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    time, event = rng.integers(0, months, n).astype(float), rng.random(n) < 0.6
    return time, event, risk.round(1) if ties_in_risk else risk


def c_index_by_pairs(time, event, risk):
    """Harrell's C by its definition, pair by pair."""
    points = pairs = 0.0
    for i, j in combinations(range(len(time)), 2):
        early, late = sorted((i, j), key=lambda row: (time[row], not event[row]))
        if event[early] and (time[early] < time[late] or not event[late]):
            pairs += 1
            points += 1.0 if risk[early] > risk[late] else 0.5 if risk[early] == risk[late] else 0.0
    return points / pairs


def log_rank_by_tables(time, event, high):
    """Mantel's test: a two-by-two table at each death time, observed minus expected deaths."""
    difference = variance = 0.0
    for t in np.unique(time[event]):
        n, n_high = (time >= t).sum(), (high & (time >= t)).sum()
        d, d_high = (event & (time == t)).sum(), (high & event & (time == t)).sum()
        difference += d_high - d * n_high / n
        if n > 1:
            variance += d * (n_high / n) * (1 - n_high / n) * (n - d) / (n - 1)
    return chi2.sf(difference**2 / variance, 1)


# ---- concordance ----


def test_c_index_is_that_of_scikit_survival(golden):
    ours = c_index(golden["test_t"], golden["test_e"], golden["test_r"])
    assert ours == pytest.approx(golden["c_harrell"][0], abs=1e-15)


@pytest.mark.parametrize("n", [2, 3, 17, 130])
@pytest.mark.parametrize("ties_in_risk", [True, False], ids=["tied-risks", "distinct-risks"])
def test_c_index_is_that_of_counting_pairs(n, ties_in_risk):
    for seed in range(5):
        time, event, risk = cohort(n, seed, ties_in_risk=ties_in_risk)
        event[time.argmin()], time[time.argmax()] = True, 50.0  # at least one comparable pair
        assert c_index(time, event, risk) == pytest.approx(c_index_by_pairs(time, event, risk), abs=1e-14)


@pytest.mark.parametrize(
    ("risk", "expected"),
    [([3, 2, 1], 1.0), ([1, 2, 3], 0.0), ([5, 5, 5], 0.5)],
    ids=["right", "wrong", "flat"],
)
def test_higher_risk_should_die_earlier(risk, expected):
    assert c_index([1.0, 2.0, 3.0], np.ones(3, dtype=bool), risk) == expected


@pytest.mark.parametrize(
    ("time", "event"),
    [
        ([1, 2, 3], [False, False, False]),
        ([1, 2, 3], [False, False, True]),
        ([2, 2], [True, True]),
        ([4], [True]),
    ],
    ids=["nobody-died", "only-the-last-died", "deaths-at-one-time", "one-patient"],
)
def test_without_a_comparable_pair_c_index_is_nan(time, event):
    assert math.isnan(c_index(time, event, np.arange(len(time))))


def test_float32_risks_rank_as_they_are():
    time, event, risk = cohort(61, seed=4, ties_in_risk=False)
    risk = risk.astype(np.float32)
    assert c_index(time, event, risk) == pytest.approx(c_index_by_pairs(time, event, risk), abs=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("column", ["time_months", "risk"])
def test_a_value_that_is_no_number_is_refused(bad, column):
    columns = {
        "time_months": np.array([1.0, 2.0]),
        "event": np.ones(2, dtype=bool),
        "risk": np.array([2.0, 1.0]),
    }
    columns[column][1] = bad
    with pytest.raises(NonFiniteError, match=f"{column}: 1 of 2"):
        c_index(**columns)


@pytest.mark.parametrize(
    ("event", "risk"),
    [
        (np.ones(2, dtype=bool), np.ones(3)),
        (np.ones(3, dtype=bool), np.ones(2)),
        (np.ones(3), np.ones(3)),
        (np.ones(3, dtype=bool), np.ones((3, 1))),
    ],
    ids=["fewer-events", "fewer-risks", "float-event", "column-of-risks"],
)
def test_columns_that_do_not_fit_are_refused(event, risk):
    with pytest.raises(ShapeError, match="give"):
        c_index([1.0, 2.0, 3.0], event, risk)


# ---- one row per patient ----


def test_patients_come_in_order_of_appearance_with_the_mean_risk_of_their_slides():
    patients = patient_level(
        ["P9", "P1", "P9", "P5", "P9"],
        [7.0, 3.0, 7.0, 11.0, 7.0],
        np.array([True, False, True, True, True]),
        [0.25, -1.0, 0.5, 2.0, 1.5],
    )
    assert patients.patient_id.tolist() == ["P9", "P1", "P5"]
    assert patients.time_months.tolist() == [7.0, 3.0, 11.0]
    assert patients.event.tolist() == [True, False, True]
    assert patients.risk.tolist() == [0.75, -1.0, 2.0]


def test_one_slide_per_patient_changes_nothing():
    time, event, risk = cohort(43, seed=6)
    ids = [f"TCGA-{i}" for i in range(43)]
    patients = patient_level(ids, time, event, risk)
    assert patients.patient_id.tolist() == ids
    for ours, given in ((patients.time_months, time), (patients.event, event), (patients.risk, risk)):
        np.testing.assert_array_equal(ours, given)


@pytest.mark.parametrize(
    ("time", "event"),
    [([7.0, 3.0, 8.0], [True, False, True]), ([7.0, 3.0, 7.0], [True, False, False])],
    ids=["time", "event"],
)
def test_slides_that_disagree_about_their_patient_are_named(time, event):
    with pytest.raises(ConfigError, match="patient P9: slides disagree"):
        patient_level(["P9", "P1", "P9"], time, event, [0.0, 0.0, 0.0])


def test_patients_that_do_not_fit_the_rows_are_refused():
    with pytest.raises(ShapeError, match="one patient per row"):
        patient_level(["P9"], [1.0, 2.0], [True, True], [0.0, 0.0])


# ---- log-rank ----


def test_log_rank_is_that_of_the_golden_cohort(golden):
    split = log_rank_median_split(golden["test_t"], golden["test_e"], golden["test_r"])
    assert split.p_value == pytest.approx(float(golden["logrank_p"]), rel=1e-12)
    assert split.n_high == golden["median_high_count"]
    assert split.n_high + split.n_low == golden["test_t"].size


@pytest.mark.parametrize("n", [5, 38, 201])
def test_log_rank_is_that_of_two_by_two_tables(n):
    for seed in range(5):
        time, event, risk = cohort(n, seed)
        event[:2] = True
        split = log_rank_median_split(time, event, risk)
        high = risk >= np.median(risk)
        assert (split.threshold, split.n_high, split.n_low) == (np.median(risk), high.sum(), (~high).sum())
        assert split.p_value == pytest.approx(log_rank_by_tables(time, event, high), rel=1e-9)


def test_four_deaths_apart_give_the_p_value_a_pencil_gives():
    # high risk dies at 1 and 2, low at 3 and 4: O - E = 2 - (1/2 + 1/3), V = 1/4 + 2/9
    split = log_rank_median_split([1.0, 2.0, 3.0, 4.0], np.ones(4, dtype=bool), [4.0, 3.0, 2.0, 1.0])
    assert split.p_value == pytest.approx(chi2.sf((7 / 6) ** 2 / (17 / 36), 1))


@pytest.mark.parametrize(
    ("event", "risk"),
    [([True, True, False], [0.5, 0.5, 0.5]), ([False, False, False], [1.0, 2.0, 3.0])],
    ids=["all-risks-equal", "nobody-died"],
)
def test_a_split_that_compares_nothing_has_no_p_value(event, risk):
    assert math.isnan(log_rank_median_split([1.0, 2.0, 3.0], event, risk).p_value)


def test_a_single_patient_is_the_high_group():
    split = log_rank_median_split([5.0], [True], [-2.0])
    assert (split.n_high, split.n_low, split.threshold) == (1, 0, -2.0)
    assert math.isnan(split.p_value)


# ---- Kaplan-Meier ----


def test_kaplan_meier_of_five_patients_is_worked_by_hand():
    curve = kaplan_meier([2.0, 1.0, 2.0, 5.0, 3.0], np.array([True, True, False, True, False]))
    assert curve.times.tolist() == [0, 1, 2, 3, 5]
    assert curve.survival.tolist() == pytest.approx([1, 0.8, 0.6, 0.6, 0])
    assert curve.at_risk.tolist() == [5, 5, 4, 2, 1]


def test_kaplan_meier_is_that_of_the_golden_cohort(golden):
    curve = kaplan_meier(golden["test_t"], golden["test_e"])
    np.testing.assert_array_equal(curve.times, golden["km_t"])
    np.testing.assert_allclose(curve.survival, golden["km_s"], rtol=1e-12)


def test_confidence_limits_follow_the_log_log_greenwood_formula():
    time, event, _ = cohort(83, seed=2)
    curve = kaplan_meier(time, event)
    n = curve.at_risk
    d = np.array([(event & (time == t)).sum() for t in curve.times])
    inside = (curve.survival > 0) & (curve.survival < 1)
    greenwood = np.cumsum(d[inside] / (n[inside] * (n[inside] - d[inside])))
    log_s = np.log(curve.survival[inside])
    width = norm.ppf(0.975) * np.sqrt(greenwood) / log_s
    np.testing.assert_allclose(curve.lower[inside], np.exp(log_s * np.exp(-width)), rtol=1e-6)
    np.testing.assert_allclose(curve.upper[inside], np.exp(log_s * np.exp(width)), rtol=1e-6)


@pytest.mark.parametrize(
    ("time", "event", "survival"),
    [
        ([4.0], [True], [1, 0]),
        ([4.0], [False], [1, 1]),
        ([1.0, 2.0], [False, False], [1, 1, 1]),
        ([0.0, 0.0, 1.0], [True, False, True], [2 / 3, 0]),
    ],
    ids=["one-death", "one-censored", "nobody-died", "death-in-month-0"],
)
def test_tiny_groups_have_a_curve(time, event, survival):
    curve = kaplan_meier(time, event)
    assert curve.survival.tolist() == pytest.approx(survival)
    assert np.isfinite([curve.lower, curve.upper]).all()
    assert (curve.lower <= curve.survival).all()
    assert (curve.survival <= curve.upper).all()


def test_a_curve_of_nobody_is_refused():
    with pytest.raises(ShapeError, match="no rows"):
        kaplan_meier([], np.zeros(0, dtype=bool))


def test_a_follow_up_counts_as_at_risk_until_it_ends():
    at = np.array([[0.0, 2.0], [2.5, 9.0]])
    assert numbers_at_risk([2.0, 1.0, 2.0, 5.0, 3.0], at).tolist() == [[5, 4], [2, 0]]
    assert numbers_at_risk([2.0, 1.0], []).tolist() == []


# ---- over folds ----


def test_folds_are_summed_up_by_mean_and_sample_deviation():
    folds = [0.61, 0.57, 0.702, 0.655, 0.598]
    summary = summarise(folds)
    assert summary["mean"] == pytest.approx(statistics.mean(folds))
    assert summary["std"] == pytest.approx(statistics.stdev(folds))
    assert (summary["folds"], summary["n_undefined"]) == (folds, 0)


def test_undefined_folds_are_listed_and_counted_and_change_nothing_else():
    summary = summarise([0.6, math.nan, np.float32(0.75)])
    assert summary["mean"] == pytest.approx(0.675)
    assert summary["std"] == pytest.approx(0.15 / math.sqrt(2))
    assert summary["n_undefined"] == 1
    assert len(summary["folds"]) == 3
    assert all(type(value) is float for value in summary["folds"])


@pytest.mark.parametrize(
    ("folds", "mean"), [([0.6], 0.6), ([0.6, math.nan], 0.6), ([math.nan], math.nan), ([], math.nan)], ids=str
)
def test_too_few_folds_have_no_deviation(folds, mean):
    summary = summarise(folds)
    assert summary["mean"] == pytest.approx(mean, nan_ok=True)
    assert math.isnan(summary["std"])
