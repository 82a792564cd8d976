"""Calibration against lifelines, scikit-survival's Cox model, simulated truth, and cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from lifelines import KaplanMeierFitter
from scipy.stats import chi2, kstest
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.survival.calibration import calibration_curve, cut_at, d_calibration


def simulated(seed, n, *, leaving=50.0):
    """Exponential deaths whose rates are known, and follow-up until somebody leaves or 90 months."""
    rng = np.random.default_rng(seed)
    rate = np.exp(0.8 * rng.normal(size=n)) / 40
    death, gone = rng.exponential(1 / rate), np.minimum(rng.exponential(leaving, n), 90.0)
    return np.minimum(death, gone), death <= gone, rate


# ---- D-calibration ----


def test_d_calibration_of_four_patients_is_worked_by_hand():
    # two deaths, at 0.95 and 0.05; censored at 0.25: 0.1, 0.1 and 0.05 of 0.25; censored at 0: the lowest bin
    found = d_calibration([0.95, 0.05, 0.25, 0.0], np.array([True, True, False, False]))
    assert found.counts.tolist() == pytest.approx([1 + 0.4 + 1, 0.4, 0.2, 0, 0, 0, 0, 0, 0, 1])
    statistic = (2.0**2 + 0.0**2 + 0.2**2 + 6 * 0.4**2 + 0.6**2) / 0.4
    assert found.statistic == pytest.approx(statistic)
    assert found.p_value == pytest.approx(chi2.sf(statistic, 9))


def test_bins_of_another_number_have_their_own_degrees_of_freedom():
    found = d_calibration([0.1, 0.2, 0.8, 1.0], np.array([True, True, True, False]), bins=4)
    # the one censored at 1 is a quarter in each
    assert found.counts.tolist() == pytest.approx([2.25, 0.25, 0.25, 1.25])
    assert found.p_value == pytest.approx(chi2.sf((1.25**2 + 0.75**2 + 0.75**2 + 0.25**2) / 1, 3))


def test_a_probability_at_the_edge_of_two_bins_belongs_to_the_upper_one_and_1_to_the_last():
    found = d_calibration([0.0, 0.5, 1.0], np.ones(3, dtype=bool))
    assert np.flatnonzero(found.counts).tolist() == [0, 5, 9]


def test_everybody_is_counted_once():
    rng = np.random.default_rng(0)
    for n in (1, 7, 300):
        found = d_calibration(rng.random(n), rng.random(n) < 0.4)
        assert found.counts.sum() == pytest.approx(n)
        assert (found.counts >= 0).all()


def test_p_values_of_true_curves_are_uniform_when_nobody_is_censored():
    p_values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        rate = rng.uniform(0.01, 0.2, 400)
        time = rng.exponential(1 / rate)
        p_values.append(d_calibration(np.exp(-rate * time), np.ones(400, dtype=bool)).p_value)
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_true_curves_pass_and_wrong_ones_do_not_also_with_censoring_and_a_horizon():
    time, event, rate = simulated(4, 4000)
    cut, died = cut_at(time, event, 30.0)
    assert 0.3 < died.mean() < 0.6
    true = d_calibration(np.exp(-rate * cut), died)
    np.testing.assert_allclose(true.counts, 400, atol=80)  # 4 standard deviations
    assert true.p_value > 0.05
    for factor in (0.6, 1.6):
        assert d_calibration(np.exp(-factor * rate * cut), died).p_value < 1e-6


def test_nobody_is_not_calibrated():
    found = d_calibration([], np.zeros(0, dtype=bool))
    assert math.isnan(found.p_value)
    assert found.counts.tolist() == [0.0] * 10


def test_follow_up_beyond_the_horizon_is_censored_there():
    times, died = cut_at([3.0, 5.0, 5.1, 9.0], np.array([True, True, True, False]), 5.0)
    assert times.tolist() == [3, 5, 5, 5]
    assert died.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("survival", "event", "error"),
    [
        ([0.5, 1.2], np.ones(2, dtype=bool), ConfigError),
        ([0.5, math.nan], np.ones(2, dtype=bool), ConfigError),
        ([0.5], np.ones(2, dtype=bool), ShapeError),
        ([0.5], np.ones(1), ShapeError),
    ],
    ids=["above-1", "nan", "fewer", "float-event"],
)
def test_what_is_no_probability_is_refused(survival, event, error):
    with pytest.raises(error):
        d_calibration(survival, event)


def test_one_bin_tests_nothing():
    with pytest.raises(ConfigError, match="at least 2"):
        d_calibration([0.5], np.ones(1, dtype=bool), bins=1)


# ---- calibration at a horizon ----


def test_points_are_kaplan_meier_estimates_of_the_fifths_of_predicted_risk():
    time, event, rate = simulated(1, 201)  # 40 of 200 steps are a fifth: the cuts are predictions
    predicted = 1 - np.exp(-rate * 24)
    found = calibration_curve(time, event, predicted, 24.0)
    group = pd.qcut(predicted, 5, labels=False)
    assert sum(point.n for point in found.points) == 201
    for number, point in enumerate(found.points):
        own = group == number
        fitted = KaplanMeierFitter().fit(time[own], event[own])
        lower, upper = fitted.confidence_interval_[:24.0].iloc[-1]
        assert point.n == own.sum()
        assert point.predicted == pytest.approx(predicted[own].mean())
        assert point.observed == pytest.approx(1 - fitted.predict(24.0))
        assert (point.lower, point.upper) == pytest.approx((1 - upper, 1 - lower))
        assert point.lower < point.observed < point.upper


def test_equal_predictions_stay_in_one_group():
    time, event, _ = simulated(2, 100)
    predicted = np.repeat([0.2, 0.6], 50)
    found = calibration_curve(time, event, predicted, 24.0)
    assert [(point.n, point.predicted) for point in found.points] == [
        (50, pytest.approx(0.2)),
        (50, pytest.approx(0.6)),
    ]


def test_a_group_that_nobody_follows_so_long_has_no_observed_value_and_that_is_said():
    time = np.array([1.0, 2.0, 3.0, 30.0, 5.0, 40.0])
    event = np.array([True, False, False, True, True, False])
    found = calibration_curve(time, event, [0.1, 0.1, 0.1, 0.9, 0.9, 0.9], 24.0, groups=2)
    assert math.isnan(found.points[0].observed)
    assert found.points[1].observed == pytest.approx(1 / 3)
    assert "nobody is followed for 24 months" in found.notes[0]


def test_limits_do_not_exist_where_nobody_or_everybody_died():
    time = np.array([30.0, 31.0, 40.0, 1.0, 2.0, 3.0])
    event = np.array([False, False, True, True, True, True])
    low, high = calibration_curve(time, event, [0.1, 0.1, 0.1, 0.9, 0.9, 0.9], 24.0, groups=2).points
    assert (low.observed, high.observed) == (0.0, 1.0)
    assert np.isnan([low.lower, low.upper, high.lower, high.upper]).all()


def test_true_probabilities_have_next_to_no_calibration_error():
    time, event, rate = simulated(7, 4000)
    found = calibration_curve(time, event, 1 - np.exp(-rate * 24), 24.0)
    assert found.ici < 0.015
    assert found.notes == ()
    assert max(abs(point.predicted - point.observed) for point in found.points) < 0.05


@pytest.mark.parametrize("shift", [0.15, -0.1])
def test_a_planted_shift_is_found(shift):
    rng = np.random.default_rng(8)
    true = rng.uniform(0.25, 0.75, 4000)
    death = rng.exponential(-24 / np.log1p(-true))
    gone = rng.exponential(60, 4000)
    time, event = np.minimum(death, gone), death <= gone
    found = calibration_curve(time, event, true + shift, 24.0)
    for error in (found.ici, found.e50, found.e90):
        assert error == pytest.approx(abs(shift), abs=0.03)
    assert all((point.observed - point.predicted) * shift < 0 for point in found.points)


def test_quantiles_of_the_error_are_of_the_smooth_that_scikit_survival_fits():
    time, event, rate = simulated(3, 250)
    predicted = 1 - np.exp(-1.5 * rate * 24)
    found = calibration_curve(time, event, predicted, 24.0)
    x = np.log(-np.log(1 - predicted))
    a, b, c = np.quantile(x, [0.1, 0.5, 0.9])
    # Harrell's restricted cubic spline, written out for three knots
    bend = [
        (max(v - a, 0) ** 3 - max(v - b, 0) ** 3 * (c - a) / (c - b) + max(v - c, 0) ** 3 * (b - a) / (c - b))
        / (c - a) ** 2
        for v in x
    ]
    columns = np.column_stack([x, bend])
    cut, died = np.minimum(time, 24.0), event & (time <= 24.0)
    cox = CoxPHSurvivalAnalysis(ties="efron", tol=1e-12).fit(columns, Surv.from_arrays(died, cut))
    observed = np.array([1 - curve(24.0) for curve in cox.predict_survival_function(columns)])
    away = np.abs(observed - predicted)
    assert found.ici == pytest.approx(away.mean(), abs=1e-4)
    assert found.e50 == pytest.approx(np.median(away), abs=1e-4)
    assert found.e90 == pytest.approx(np.quantile(away, 0.9), abs=1e-4)


@pytest.mark.parametrize(
    ("case", "why"),
    [("few-deaths", "fewer than 10"), ("constant", "hardly vary"), ("short", "nobody is followed for 95 months")],
)
def test_where_no_smooth_can_be_fitted_its_errors_are_nan_and_that_is_said(case, why):
    time, event, rate = simulated(5, 120)
    if case == "few-deaths":
        event = event & (np.cumsum(event) < 10)
    predicted = np.full(120, 0.4) if case == "constant" else 1 - np.exp(-rate * 24)
    found = calibration_curve(time, event, predicted, 95.0 if case == "short" else 24.0)
    assert np.isnan([found.ici, found.e50, found.e90]).all()
    assert any("ICI" in note and why in note for note in found.notes)
    assert found.points


def test_a_smooth_that_does_not_converge_is_nan_and_that_is_said():
    # everybody above one prediction dies first, everybody below stays: the coefficient runs off
    predicted = np.concatenate([np.linspace(0.05, 0.4, 60), np.linspace(0.6, 0.95, 60)])
    time = np.concatenate([np.linspace(50, 60, 60), np.linspace(20, 1, 60)])
    found = calibration_curve(time, predicted > 0.5, predicted, 24.0)
    assert math.isnan(found.ici)
    assert "converge" in found.notes[-1]


def test_probabilities_of_0_and_1_can_be_smoothed():
    time, event, rate = simulated(6, 400)
    predicted = 1 - np.exp(-rate * 24)
    predicted[:3], predicted[3:5] = 0.0, 1.0
    found = calibration_curve(time, event, predicted, 24.0)
    assert math.isfinite(found.ici) or found.notes


@pytest.mark.parametrize(
    ("time", "predicted", "error"),
    [
        ([1.0, math.nan], [0.1, 0.2], NonFiniteError),
        ([1.0, 2.0], [0.1, 1.2], ConfigError),
        ([1.0, 2.0], [0.1], ShapeError),
    ],
    ids=["nan-time", "no-probability", "fewer"],
)
def test_a_curve_of_unusable_columns_is_refused(time, predicted, error):
    with pytest.raises(error):
        calibration_curve(time, np.ones(2, dtype=bool), predicted, 5.0)


def test_predictions_that_vary_little_are_smoothed_too():
    rng = np.random.default_rng(9)
    predicted = rng.uniform(0.50, 0.505, 2000)
    death, gone = rng.exponential(-24 / np.log(0.4), 2000), rng.exponential(60, 2000)
    found = calibration_curve(np.minimum(death, gone), death <= gone, predicted, 24.0)
    assert found.ici == pytest.approx(0.1, abs=0.03)


def test_a_death_at_the_horizon_has_happened_by_then():
    found = calibration_curve([24.0, 30.0, 40.0], np.array([True, False, False]), [0.3, 0.3, 0.3], 24.0)
    assert found.points[0].observed == pytest.approx(1 / 3)
