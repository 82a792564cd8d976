"""Survival between bin edges against NumPy's interpolation, closed forms, and cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.survival.curves import survival_at, survival_at_own_time

EDGES = (10.0, 20.0, 40.0)


def predictions(n, seed=3):
    """Survival after each of 4 bins, never rising."""
    return np.cumprod(np.random.default_rng(seed).uniform(0.3, 1.0, (n, 4)), axis=1)


def test_a_curve_is_worked_by_hand():
    found = survival_at([[0.81, 0.36, 0.09, 0.05]], EDGES, [0, 5, 10, 15, 20, 30, 40])
    # half-way between two edges lies the geometric mean of survival there
    assert found[0].tolist() == pytest.approx([1, 0.9, 0.81, 0.54, 0.36, 0.18, 0.09])


@pytest.mark.parametrize("edges", [(7.0,), (3.0, 11.0, 12.0), tuple(np.linspace(1, 60, 30))], ids=len)
def test_a_constant_hazard_is_recovered_whatever_the_bins(edges):
    hazard = np.array([0.001, 0.02, 0.4])[:, None]
    at_edges = np.exp(-hazard * np.array([*edges, 99.0]))
    times = np.linspace(0, edges[-1], 57)
    np.testing.assert_allclose(survival_at(at_edges, edges, times), np.exp(-hazard * times), rtol=1e-12)


def test_log_survival_is_linear_between_edges():
    survival, times = predictions(20), np.random.default_rng(1).uniform(0, 40, 33)
    expected = [np.exp(np.interp(times, [0, *EDGES], [0, *np.log(row[:3])])) for row in survival]
    np.testing.assert_allclose(survival_at(survival, EDGES, times), expected, rtol=1e-12)


def test_edges_and_zero_are_met_exactly():
    survival = predictions(50)
    found = survival_at(survival, EDGES, [0.0, *EDGES])
    np.testing.assert_array_equal(found[:, 0], 1.0)
    np.testing.assert_array_equal(found[:, 1:], survival[:, :3])


def test_beyond_the_last_edge_nothing_is_known():
    found = survival_at(predictions(3), EDGES, [40.0, np.nextafter(40.0, 50.0), 400.0])
    assert np.isfinite(found[:, 0]).all()
    assert np.isnan(found[:, 1:]).all()


def test_a_survival_of_zero_is_reached_at_the_start_of_its_bin_and_stays():
    found = survival_at([[0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], EDGES, [0, 5, 10, 10.5, 20, 30, 40])
    assert found[0].tolist() == pytest.approx([1, math.sqrt(0.5), 0.5, 0, 0, 0, 0])
    assert found[1].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_curves_never_rise_and_stay_between_0_and_1():
    found = survival_at(predictions(100), EDGES, np.linspace(0, 40, 201))
    assert (np.diff(found, axis=1) <= 0).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_a_single_bin_is_known_at_0_only():
    assert survival_at([[0.3]], (), [0.0, 1.0])[0].tolist() == pytest.approx([1.0, math.nan], nan_ok=True)


def test_each_patient_may_have_a_time_of_their_own():
    survival, times = predictions(30), np.random.default_rng(2).uniform(0, 50, 30)
    np.testing.assert_array_equal(
        survival_at_own_time(survival, EDGES, times), np.diag(survival_at(survival, EDGES, times))
    )
    assert np.isnan(survival_at_own_time(survival, EDGES, times)).sum() == (times > 40).sum() > 0


def test_no_patients_have_no_curves():
    assert survival_at(np.zeros((0, 4)), EDGES, [1.0, 2.0]).shape == (0, 2)


def test_the_rounding_of_float32_is_no_rise():
    survival_at([[1.0 + 5e-8, 0.4, 0.4 + 3e-8, 0.1]], EDGES, [1.0, 30.0])


@pytest.mark.parametrize(
    ("survival", "edges", "times", "error", "message"),
    [
        ([[0.5, 0.4]], EDGES, [1.0], ShapeError, "one column per bin, 4 here"),
        ([0.5, 0.4, 0.3, 0.2], EDGES, [1.0], ShapeError, "one column per bin"),
        ([[0.5, 0.6, 0.3, 0.2]], EDGES, [1.0], ConfigError, "rise from bin to bin"),
        ([[1.5, 0.6, 0.3, 0.2]], EDGES, [1.0], ConfigError, "leave 0…1"),
        ([[0.5, 0.4, 0.3, -0.2]], EDGES, [1.0], ConfigError, "leave 0…1"),
        ([[0.5, math.nan, 0.3, 0.2]], EDGES, [1.0], NonFiniteError, "1 of 1 rows"),
        ([[0.5, 0.4]], (0.0,), [1.0], ConfigError, "months above 0"),
        ([[0.5, 0.4, 0.3]], (5.0, 5.0), [1.0], ConfigError, "larger than the last"),
        ([[0.5, 0.4]], (5.0,), [-1.0], ConfigError, "before 0"),
        ([[0.5, 0.4]], (5.0,), [math.nan], NonFiniteError, "no numbers"),
        ([[0.5, 0.4]], (5.0,), [[1.0]], ShapeError, "list of months"),
    ],
)
def test_what_is_no_curve_is_refused(survival, edges, times, error, message):
    with pytest.raises(error, match=message):
        survival_at(survival, edges, times)


def test_own_times_must_be_one_per_patient():
    with pytest.raises(ShapeError, match="one time per patient"):
        survival_at_own_time(predictions(3), EDGES, [1.0, 2.0])
