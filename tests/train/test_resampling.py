"""Bootstrap of the concordance against lifelines on rows copied one by one, cases worked by hand, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lifelines.utils import concordance_index

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.survival.resampling import (
    bootstrap_c_index,
    bootstrap_weights,
    mean_of_defined,
    paired_test,
    percentile_interval,
    weighted_c_index,
)


def cohort(n, seed, *, months=30):
    """Follow-up in whole months with ties, deaths, risks with ties that say something of the time."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=n)
    time = np.minimum(np.floor(rng.exponential(12 * np.exp(-hidden))), months)
    return time, rng.random(n) < 0.6, (hidden + rng.normal(size=n)).round(1)


def lifelines_c(time, event, risk):
    """The C-index that lifelines gives rows; NaN where it refuses."""
    try:
        return concordance_index(time, -risk, event)
    except ZeroDivisionError:
        return math.nan


def copied(rows, drawn):
    """Each row as often as it was drawn."""
    return np.repeat(rows, drawn.astype(int))


# ---- weights ----


def test_each_resample_draws_as_many_rows_as_there_are():
    weights = bootstrap_weights(7, 50, seed=1)
    assert weights.shape == (50, 7)
    assert weights.dtype == np.float64
    assert (weights.sum(axis=1) == 7).all()
    assert (weights == weights.round()).all()


def test_rows_are_drawn_evenly_and_not_all_of_them():
    weights = bootstrap_weights(20, 4000, seed=2)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.08)  # five standard errors of a mean of 4000
    assert (weights == 0).mean() == pytest.approx((1 - 1 / 20) ** 20, abs=0.01)


def test_a_seed_gives_the_same_resamples_and_another_others():
    np.testing.assert_array_equal(bootstrap_weights(9, 5, seed=3), bootstrap_weights(9, 5, seed=3))
    assert (bootstrap_weights(9, 5, seed=3) != bootstrap_weights(9, 5, seed=4)).any()


@pytest.mark.parametrize(("n", "replicates"), [(0, 5), (5, 0)])
def test_no_rows_or_no_resamples_are_refused(n, replicates):
    with pytest.raises(ConfigError, match="at least one"):
        bootstrap_weights(n, replicates, seed=0)


# ---- C-index of resamples ----


@pytest.mark.parametrize("n", [2, 5, 40, 173])
def test_the_c_index_of_each_resample_is_that_of_lifelines_on_copied_rows(n):
    time, event, risk = cohort(n, seed=n)
    ours = bootstrap_c_index(time, event, risk, replicates=60, seed=11)
    theirs = [
        lifelines_c(copied(time, drawn), copied(event, drawn), copied(risk, drawn))
        for drawn in bootstrap_weights(n, 60, seed=11)
    ]
    np.testing.assert_array_equal(ours, theirs)


def test_three_patients_have_the_resamples_that_a_pencil_gives():
    # deaths at 1 and 2, censored at 2; risks 2, 3, 1. Pairs: (1,2) lost, (1,3) won, (2,3) won as the death comes first
    drawn = bootstrap_weights(3, 200, seed=5)
    found = bootstrap_c_index([1.0, 2.0, 2.0], np.array([True, True, False]), [2.0, 3.0, 1.0], replicates=200, seed=5)
    for (a, b, c), value in zip(drawn, found, strict=True):
        pairs = a * b + a * c + b * c
        if pairs:
            assert value == (a * c + b * c) / pairs
        else:  # one patient three times
            assert math.isnan(value)
    assert np.isnan(found).any()
    assert {0.0, 1.0, 2 / 3} <= set(found.tolist())


def test_weights_of_one_count_the_patients_as_they_are():
    time, event, risk = cohort(50, seed=9)
    found = weighted_c_index(time, event, [risk, -time], np.ones((1, 50)))
    assert found.tolist() == [[lifelines_c(time, event, risk)], [lifelines_c(time, event, -time)]]
    with pytest.raises(ShapeError, match="patients"):
        weighted_c_index(time, event, [risk], np.ones((1, 49)))


def test_a_cohort_without_a_death_defines_nothing():
    assert np.isnan(bootstrap_c_index([1.0, 2.0], np.zeros(2, dtype=bool), [1.0, 2.0], replicates=5)).all()


def test_what_is_not_defined_does_not_enter_a_mean():
    found = mean_of_defined(np.array([[0.5, math.nan, math.nan], [0.75, 0.25, math.nan]]))
    np.testing.assert_array_equal(found, [0.625, 0.25, math.nan])


# ---- intervals ----


def test_the_interval_cuts_the_same_share_off_both_ends():
    lower, upper = percentile_interval([*range(101), math.nan], level=0.9)
    assert (lower, upper) == (pytest.approx(5), pytest.approx(95))


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.nan]])
def test_fewer_than_two_values_have_no_interval(values):
    assert all(math.isnan(end) for end in percentile_interval(values))


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_that_is_no_share_is_refused(level):
    with pytest.raises(ConfigError, match="level"):
        percentile_interval([1.0, 2.0], level)


def simulated(n, seed):
    """Deaths of a known hazard, a third of them censored, a risk that knows the hazard in part."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=n)
    death, censoring = rng.exponential(np.exp(-hidden)), rng.exponential(2.0, size=n)
    return np.minimum(death, censoring), death <= censoring, hidden + rng.normal(size=n)


def test_the_interval_covers_the_true_concordance_about_as_often_as_it_says():
    truth = lifelines_c(*simulated(20000, seed=99))
    covered = 0
    for seed in range(300):
        time, event, risk = simulated(80, seed)
        lower, upper = percentile_interval(bootstrap_c_index(time, event, risk, replicates=200, seed=seed))
        covered += lower <= truth <= upper
    assert 0.90 <= covered / 300 <= 0.98  # nominal 0.95; four standard errors are 0.05


# ---- two risks ----


def compared(time, event, risk, other, replicates):
    """The test of the first risk minus the second, on the same resamples of all patients."""
    weights = np.concatenate([np.ones((1, len(time))), bootstrap_weights(len(time), replicates, seed=0)])
    found = weighted_c_index(time, event, [risk, other], weights)
    less = found[0] - found[1]
    return paired_test(float(less[0]), less[1:])


def test_identical_risks_have_p_one():
    time, event, risk = cohort(60, seed=1)
    test = compared(time, event, risk, risk, replicates=200)
    assert (test.difference, test.lower, test.upper, test.p_value) == (0, 0, 0, 1)


def test_the_difference_is_that_of_lifelines():
    time, event, risk = cohort(120, seed=2)
    other = np.random.default_rng(0).normal(size=120)
    test = compared(time, event, risk, other, replicates=50)
    assert test.difference == lifelines_c(time, event, risk) - lifelines_c(time, event, other)
    assert test.lower < test.difference < test.upper


def test_a_clearly_better_risk_has_a_small_p_whichever_comes_first():
    time, event, _ = cohort(200, seed=4)
    good, noise = -time, np.random.default_rng(1).normal(size=200)
    test = compared(time, event, good, noise, replicates=999)
    swapped = compared(time, event, noise, good, replicates=999)
    assert test.p_value == swapped.p_value == 2 / 1000
    assert test.lower > 0.2
    assert (swapped.difference, swapped.lower) == (-test.difference, pytest.approx(-test.upper))


def test_two_equally_good_risks_rarely_differ():
    small = 0
    for seed in range(200):
        rng = np.random.default_rng([seed, 1])
        time, event, _ = simulated(60, seed)
        small += compared(time, event, rng.normal(size=60), rng.normal(size=60), replicates=200).p_value < 0.05
    assert small / 200 <= 0.11  # nominal 0.05; four standard errors are 0.06


def test_the_p_value_is_counted_as_written_down():
    test = paired_test(0.1, [-0.1, 0.0, 0.1, 0.2, 0.3, math.nan])
    assert test.p_value == pytest.approx(2 * (2 + 1) / (5 + 1))
    assert test.n_resamples == 5
    assert paired_test(0.1, np.linspace(0.1, 0.3, 99)).p_value == pytest.approx(0.02)


def test_undefined_differences_have_no_p_value():
    test = compared([1.0, 2.0], np.zeros(2, dtype=bool), [1.0, 2.0], [2.0, 1.0], replicates=20)
    assert test.n_resamples == 0
    assert all(math.isnan(value) for value in (test.difference, test.lower, test.upper, test.p_value))


# ---- refusals ----


def test_columns_that_do_not_fit_are_refused():
    time, event, risk = cohort(5, seed=0)
    with pytest.raises(ShapeError, match="give"):
        bootstrap_c_index(time, event, risk[:4])
    with pytest.raises(ShapeError, match="give bool"):
        bootstrap_c_index(time, event.astype(float), risk)
    with pytest.raises(ShapeError, match="risks, patients"):
        weighted_c_index(time, event, risk, np.ones((1, 5)))
    with pytest.raises(ShapeError, match="no rows"):
        bootstrap_c_index([], np.zeros(0, dtype=bool), [])


def test_a_risk_that_is_no_number_is_refused():
    time, event, risk = cohort(5, seed=0)
    risk[2] = math.nan
    with pytest.raises(NonFiniteError, match="risk: 1 of 5"):
        bootstrap_c_index(time, event, risk)
