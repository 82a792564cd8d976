"""Weighted metrics against scikit-survival, its golden numbers, and cases worked by hand."""

from __future__ import annotations

import ast
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from sksurv.metrics import brier_score as sksurv_brier_score
from sksurv.metrics import concordance_index_ipcw
from sksurv.metrics import cumulative_dynamic_auc as sksurv_auc
from sksurv.metrics import integrated_brier_score as sksurv_ibs
from sksurv.nonparametric import CensoringDistributionEstimator, kaplan_meier_estimator
from sksurv.util import Surv

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.survival.ipcw import (
    bootstrap_uno_c,
    brier_scores,
    cumulative_dynamic_auc,
    integrated_brier_score,
    reference_brier_score,
    supported_tau,
    uno_c_index,
)
from cftrain.survival.product_limit import StepFunction, censoring_survival, event_survival
from cftrain.survival.resampling import bootstrap_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def golden(shared):
    with np.load(shared / "golden" / "metrics.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def cohort(rng, n, *, censored=0.6, whole_months=False):
    """Follow-up, deaths and a risk that knows something of them."""
    z = rng.normal(size=n)
    death = rng.exponential(40 * np.exp(-0.7 * z))
    leaving = rng.exponential(40 * (1 - censored) / censored, n) * rng.uniform(0.7, 1.3)
    time = np.minimum(death, leaving) + 0.03
    return (np.ceil(time) if whole_months else time), death <= leaving, z


def two_cohorts(seed, whole_months=False):
    """Training and test patients, follow-up of the test patients within that of training; risks with ties."""
    rng = np.random.default_rng(seed)
    train_time, train_event, _ = cohort(rng, 300, whole_months=whole_months)
    time, event, risk = cohort(rng, 110, whole_months=whole_months)
    inside = time < train_time.max() - 1
    return (train_time, train_event), (time[inside], event[inside], risk[inside].round(1))


def surv(time, event):
    return Surv.from_arrays(event, time)


# ---- Kaplan-Meier, of deaths and of censorings ----


def test_a_censoring_curve_is_worked_by_hand():
    # at 2 one dies and one leaves: the dead are not at risk of leaving, so one of the two others does
    curve = censoring_survival([1.0, 2.0, 2.0, 3.0], np.array([True, False, True, False]))
    assert curve.at([0.0, 1.0, 1.9, 2.0, 2.5, 3.0, 9.0]).tolist() == [1, 1, 1, 0.5, 0.5, 0, 0]


def test_a_curve_that_did_not_end_at_0_is_unknown_beyond_its_last_time():
    curve = censoring_survival([1.0, 2.0, 3.0], np.array([False, True, True]))
    assert curve.at([3.0, 3.1]).tolist() == pytest.approx([2 / 3, math.nan], nan_ok=True)


@pytest.mark.parametrize("whole_months", [False, True], ids=["distinct-times", "tied-times"])
def test_censoring_curves_are_those_of_scikit_survival(whole_months):
    for seed in range(10):
        (time, event), (asked, _, _) = two_cohorts(seed, whole_months)
        expected = CensoringDistributionEstimator().fit(surv(time, event)).predict_proba(asked)
        np.testing.assert_allclose(censoring_survival(time, event).at(asked), expected, rtol=0, atol=1e-14)
        at, values = kaplan_meier_estimator(event, time, reverse=True)
        np.testing.assert_allclose(censoring_survival(time, event).at(at), values, rtol=0, atol=1e-14)


@pytest.mark.parametrize("whole_months", [False, True], ids=["distinct-times", "tied-times"])
def test_survival_curves_are_those_of_lifelines(whole_months):
    time, event, _ = cohort(np.random.default_rng(5), 90, whole_months=whole_months)
    fitted = KaplanMeierFitter().fit(time, event)
    asked = np.linspace(0, time.max(), 200)
    expected = fitted.survival_function_at_times(asked).to_numpy()
    np.testing.assert_allclose(event_survival(time, event).at(asked), expected, atol=1e-12)


def test_weights_are_those_of_the_golden_cohort(golden):
    weights = 1 / censoring_survival(golden["train_t"], golden["train_e"]).at(golden["test_t"])
    np.testing.assert_allclose(np.where(golden["test_e"], weights, 0.0), golden["ipcw_weights"], atol=1e-12)


# ---- how far the data reach ----


def test_tau_is_the_80_percent_quantile_of_training_deaths():
    assert supported_tau([1.0, 2.0, 3.0, 4.0, 6.0, 50.0], np.array([1, 1, 1, 1, 1, 0], dtype=bool)) == 4.4


def test_tau_stays_where_weights_exist():
    # at 3 one dies and everybody else leaves: G falls to 0 there
    assert supported_tau([1.0, 3.0, 3.0], np.array([False, True, False])) == 1.0


def test_tau_stays_below_the_longest_follow_up_of_the_test_patients():
    train = [10.0, 20.0, 30.0, 90.0], np.array([True, True, True, False])
    assert supported_tau(*train, [5.0, 7.0, 9.0, 9.0]) == 7.0
    assert supported_tau(*train, [5.0, 95.0, 99.0]) == 26.0


@pytest.mark.parametrize(
    ("train_event", "test_time"),
    [([False, False], [1.0, 2.0]), ([True, True], [4.0, 4.0]), ([True, True], [])],
    ids=["nobody-died", "one-follow-up", "nobody-to-test"],
)
def test_without_support_there_is_no_tau(train_event, test_time):
    assert math.isnan(supported_tau([3.0, 5.0], np.array(train_event), test_time))


# ---- Uno's C ----


def test_unos_c_is_worked_by_hand():
    # G is 1 until 2, then 2/3; deaths at 1 (weight 1) and 3 (weight 9/4); 3 + 1 pairs, the first wins 2 of 3
    train = [1.0, 2.0, 3.0, 4.0], np.array([True, False, True, True])
    found = uno_c_index(
        *train, [1.0, 2.0, 3.0, 4.0], np.array([1, 0, 1, 0], dtype=bool), [2.0, 3.0, 1.0, 0.0], math.inf
    )
    assert found.value == pytest.approx((2 * 1 + 1 * 9 / 4) / (3 * 1 + 1 * 9 / 4))
    assert found.notes == ()


def test_unos_c_is_that_of_the_golden_cohort(golden):
    train, test = (golden["train_t"], golden["train_e"]), (golden["test_t"], golden["test_e"], golden["test_r"])
    assert uno_c_index(*train, *test, math.inf).value == pytest.approx(golden["c_ipcw_none"][0], abs=1e-12)
    assert uno_c_index(*train, *test, float(golden["tau"])).value == pytest.approx(golden["c_ipcw_tau"][0], abs=1e-12)


@pytest.mark.parametrize("whole_months", [False, True], ids=["distinct-times", "tied-times"])
def test_unos_c_is_that_of_scikit_survival(whole_months):
    for seed in range(20):
        train, (time, event, risk) = two_cohorts(seed, whole_months)
        for tau in (None, supported_tau(*train, time), float(np.median(time))):
            expected = concordance_index_ipcw(surv(*train), surv(time, event), risk, tau=tau)[0]
            found = uno_c_index(*train, time, event, risk, math.inf if tau is None else tau)
            assert found.value == pytest.approx(expected, abs=1e-10)


def test_a_tau_that_training_follow_up_does_not_reach_is_lowered_and_that_is_said():
    train = [1.0, 2.0, 3.0, 5.0], np.array([True, False, True, False])
    time, event, risk = np.array([1.0, 2.5, 6.0, 7.0, 9.0]), np.ones(5, dtype=bool), np.array([3.0, 1.0, 2.0, 2.5, 1.0])
    with pytest.raises(ValueError, match="zero"):
        concordance_index_ipcw(surv(*train), surv(time, event), risk, tau=8.0)
    found = uno_c_index(*train, time, event, risk, 8.0)
    assert found.tau == 6.0
    assert found.value == pytest.approx(concordance_index_ipcw(surv(*train), surv(time, event), risk, tau=6.0)[0])
    assert "before 6 months" in found.notes[0]


@pytest.mark.parametrize("tau", [math.nan, 0.5, 9.0], ids=["no-tau", "before-all", "nobody-died"])
def test_without_a_pair_unos_c_is_nan_and_that_is_said(tau):
    event = np.array([tau != 9.0, False, False])
    found = uno_c_index([1.0, 8.0], np.array([True, True]), [1.0, 2.0, 3.0], event, [1.0, 2.0, 3.0], tau)
    assert math.isnan(found.value)
    assert "undefined" in found.notes[-1]


def test_resampled_unos_c_is_that_of_patients_copied():
    train, (time, event, risk) = two_cohorts(3, whole_months=True)
    tau, weights = supported_tau(*train, time), bootstrap_weights(time.size, 25, 1)
    found = bootstrap_uno_c(*train, time, event, risk, tau, weights)
    for value, weight in zip(found, weights, strict=True):
        rows = np.repeat(np.arange(time.size), weight.astype(int))
        copied = concordance_index_ipcw(surv(*train), surv(time[rows], event[rows]), risk[rows], tau=tau)[0]
        assert value == pytest.approx(copied, abs=1e-10)


def test_a_resample_without_a_pair_is_nan():
    train = [1.0, 8.0], np.array([True, True])
    found = bootstrap_uno_c(
        *train, [1.0, 2.0], np.array([True, False]), [2.0, 1.0], 5.0, np.array([[2.0, 0.0], [1.0, 1.0]])
    )
    assert found.tolist() == pytest.approx([math.nan, 1.0], nan_ok=True)


# ---- AUC over time ----


def test_auc_is_worked_by_hand():
    # at 3.5: deaths at 1 (weight 1) and 3 (weight 3/2), alive one of risk 1 and one of risk 3
    train = [1.0, 2.0, 3.0, 4.0], np.array([True, False, True, True])
    time, event = [1.0, 2.0, 3.0, 3.9, 5.0], np.array([True, False, True, True, False])
    found = cumulative_dynamic_auc(*train, time, event, [2.0, 9.0, 3.0, 1.0, 3.0], [3.5])
    assert found.values[0] == found.mean == pytest.approx((1 * 1 + 1.5 * 1.5) / ((1 + 1.5) * 2))


def test_auc_is_that_of_the_golden_cohort(golden):
    train, test = (golden["train_t"], golden["train_e"]), (golden["test_t"], golden["test_e"], golden["test_r"])
    found = cumulative_dynamic_auc(*train, *test, golden["times"])
    np.testing.assert_allclose(found.values, golden["auc"], atol=1e-12)
    assert found.mean == pytest.approx(float(golden["auc_mean"]), abs=1e-12)
    assert found.notes == ()


@pytest.mark.parametrize("whole_months", [False, True], ids=["distinct-times", "tied-times"])
def test_auc_is_that_of_scikit_survival(whole_months):
    for seed in range(20):
        train, (time, event, risk) = two_cohorts(seed, whole_months)
        times = np.unique(np.quantile(time[event], [0.1, 0.3, 0.5, 0.9]))
        for asked in (times, times[:1]):
            values, mean = sksurv_auc(surv(*train), surv(time, event), risk, asked)
            found = cumulative_dynamic_auc(*train, time, event, risk, asked)
            np.testing.assert_allclose(found.values, values, rtol=0, atol=1e-10)
            assert found.mean == pytest.approx(mean, abs=1e-10)


def test_every_time_that_is_left_out_gets_its_reason():
    train = [2.0, 6.0, 20.0, 21.0], np.array([True, True, True, False])
    time, event, risk = [4.0, 5.0, 8.0, 30.0, 40.0], np.array([False, True, True, False, False]), [0.1, 2, 1, 0, 0]
    found = cumulative_dynamic_auc(*train, time, event, risk, [1.0, 4.5, 7.0, 10.0, 25.0, 60.0])
    assert found.times.tolist() == [7.0, 10.0]
    assert np.isfinite([*found.values, found.mean]).all()
    reasons = {note.split(" months left out: ")[0]: note.split(": ")[1] for note in found.notes}
    assert reasons == {
        "AUC at 1": "every patient is followed for longer",
        "AUC at 4.5": "nobody has died by then",
        "AUC at 25": "training follow-up ends before",
        "AUC at 60": "training follow-up ends before",
    }


@pytest.mark.parametrize(("event", "times"), [([0, 0, 0], [4.5]), ([1, 1, 0], [60.0]), ([1, 1, 0], [])], ids=str)
def test_without_a_supported_time_auc_is_nan_and_that_is_said(event, times):
    found = cumulative_dynamic_auc(
        [5.0, 9.0], np.array([True, False]), [4.0, 5.0, 8.0], np.array(event, dtype=bool), [1.0, 2.0, 3.0], times
    )
    assert math.isnan(found.mean)
    assert found.values.size == 0
    assert "undefined" in found.notes[-1]


# ---- Brier score ----


def test_the_brier_score_is_worked_by_hand():
    # at 2.5: dead at 1 (weight 1), left at 2 (weight 0), two alive (weight 1 / G(2.5) = 3/2)
    train = [1.0, 2.0, 3.0, 4.0], np.array([True, False, True, True])
    found = brier_scores(
        *train, [1.0, 2.0, 3.0, 4.0], np.array([True, False, True, True]), [[0.2], [0.5], [0.6], [0.9]], [2.5]
    )
    assert found.values.tolist() == pytest.approx([(0.2**2 + 1.5 * (0.4**2 + 0.1**2)) / 4])


def test_brier_scores_are_those_of_the_golden_cohort(golden):
    data = (golden["train_t"], golden["train_e"], golden["test_t"], golden["test_e"], golden["surv"], golden["times"])
    np.testing.assert_allclose(brier_scores(*data).values, golden["brier"], atol=1e-12)
    assert integrated_brier_score(*data).value == pytest.approx(float(golden["ibs"]), abs=1e-12)


@pytest.mark.parametrize("whole_months", [False, True], ids=["distinct-times", "tied-times"])
def test_brier_scores_are_those_of_scikit_survival(whole_months):
    for seed in range(20):
        train, (time, event, risk) = two_cohorts(seed, whole_months)
        times = np.linspace(time.min(), np.sort(time)[-3], 40)
        survival = np.exp(-np.outer(np.exp(0.7 * risk) / 40, times))
        found = brier_scores(*train, time, event, survival, times)
        _, expected = sksurv_brier_score(surv(*train), surv(time, event), survival, times)
        np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-10)
        integrated = integrated_brier_score(*train, time, event, survival, times)
        assert integrated.value == pytest.approx(
            sksurv_ibs(surv(*train), surv(time, event), survival, times), abs=1e-10
        )
        assert (integrated.from_months, integrated.to_months) == (times[0], times[-1])


def test_the_reference_tells_everybody_the_training_curve():
    train, (time, event, _) = two_cohorts(1)
    times = np.linspace(time.min(), np.median(time), 25)
    curve = KaplanMeierFitter().fit(*train).survival_function_at_times(times).to_numpy()
    expected = sksurv_ibs(surv(*train), surv(time, event), np.tile(curve, (time.size, 1)), times)
    assert reference_brier_score(*train, time, event, times).value == pytest.approx(expected, abs=1e-10)


def test_times_that_predictions_do_not_reach_are_left_out_and_that_is_said():
    train, (time, event, _) = two_cohorts(1)
    survival = np.full((time.size, 4), 0.5)
    survival[:, 2:] = math.nan
    times = np.quantile(time, [0.2, 0.3, 0.5, 0.6])
    found = brier_scores(*train, time, event, survival, times)
    assert found.times.tolist() == times[:2].tolist()
    assert "predictions do not reach so far" in found.notes[0]


@pytest.mark.parametrize("times", [[4.5], [60.0, 70.0], []], ids=str)
def test_without_two_supported_times_the_integrated_score_is_nan(times):
    survival = np.full((3, len(times)), 0.5)
    found = integrated_brier_score(
        [5.0, 9.0], np.array([True, False]), [4.0, 5.0, 8.0], np.ones(3, dtype=bool), survival, times
    )
    assert np.isnan([found.value, found.from_months, found.to_months]).all()
    assert "undefined" in found.notes[-1]


# ---- folds as they come ----


def test_no_realistic_fold_raises_and_all_that_is_supported_is_finite():
    rng = np.random.default_rng(0)
    grid, n_left_out, sksurv_refuses = np.array([12.0, 24.0, 36.0, 60.0]), 0, 0
    for _ in range(200):
        n_train, n_test, censored = rng.integers(280, 500), rng.integers(70, 130), rng.uniform(0.5, 0.85)
        train_time, train_event, _ = cohort(rng, n_train, censored=censored)
        time, event, risk = cohort(rng, n_test, censored=censored)
        data = (train_time, train_event, time, event)
        tau = supported_tau(train_time, train_event, time)
        uno = uno_c_index(*data, risk, tau)
        beyond = uno_c_index(*data, risk, math.inf)
        auc = cumulative_dynamic_auc(*data, risk, grid)
        times = np.linspace(time.min(), tau, 100)
        ibs = integrated_brier_score(*data, np.exp(-np.outer(np.exp(0.7 * risk) / 40, times)), times)
        reference = reference_brier_score(*data, times)
        assert np.isfinite([uno.value, uno.tau, beyond.value, *auc.values, auc.mean, ibs.value, reference.value]).all()
        assert uno.tau == tau
        assert (ibs.from_months, ibs.to_months, ibs.notes) == (times[0], tau, ())
        assert len(auc.notes) == grid.size - auc.times.size
        n_left_out += len(auc.notes)
        try:
            sksurv_auc(surv(train_time, train_event), surv(time, event), risk, grid)
        except ValueError:
            sksurv_refuses += 1
    assert sksurv_refuses > 60  # else these folds are not the hard ones
    assert n_left_out > 60


def test_degenerate_folds_do_not_raise():
    rng = np.random.default_rng(1)
    for n_train, n_test, low, high in [(1, 1, 1, 2), (2, 3, 1, 3), (5, 2, 1, 4), (3, 6, 0, 3)]:
        for _ in range(100):
            train = rng.integers(low, high, n_train).astype(float), rng.random(n_train) < 0.5
            time, event = rng.integers(low, high, n_test).astype(float), rng.random(n_test) < 0.5
            risk, times = rng.integers(0, 3, n_test).astype(float), np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
            found = uno_c_index(*train, time, event, risk, supported_tau(*train, time))
            assert math.isnan(found.value) == bool(found.notes)
            auc = cumulative_dynamic_auc(*train, time, event, risk, times)
            assert np.isfinite(auc.values).all()
            scores = brier_scores(*train, time, event, np.full((n_test, 6), 0.5), times)
            assert np.isfinite(scores.values).all()


# ---- what is refused ----


@pytest.mark.parametrize("times", [[3.0, 2.0], [2.0, 2.0], [2.0, math.nan], [math.inf], [[1.0]]], ids=str)
def test_times_that_do_not_increase_are_refused(times):
    with pytest.raises(ConfigError, match="months that increase"):
        cumulative_dynamic_auc([1.0], np.array([True]), [1.0], np.array([True]), [0.0], times)


@pytest.mark.parametrize(
    ("time", "event", "risk", "error"),
    [
        ([1.0, 2.0], np.ones(2, dtype=bool), [1.0], ShapeError),
        ([1.0, 2.0], np.ones(2), [1.0, 2.0], ShapeError),
        ([], np.zeros(0, dtype=bool), [], ShapeError),
        ([1.0, math.nan], np.ones(2, dtype=bool), [1.0, 2.0], NonFiniteError),
        ([1.0, 2.0], np.ones(2, dtype=bool), [1.0, math.inf], NonFiniteError),
    ],
    ids=["fewer-risks", "float-event", "empty", "nan-time", "infinite-risk"],
)
def test_columns_that_cannot_be_used_are_refused(time, event, risk, error):
    with pytest.raises(error):
        uno_c_index([1.0, 9.0], np.array([True, False]), time, event, risk, 5.0)


def test_survival_must_fit_patients_and_times():
    with pytest.raises(ShapeError, match="column for each time"):
        brier_scores(
            [1.0, 9.0], np.array([True, False]), [1.0, 2.0], np.ones(2, dtype=bool), [[0.5], [0.5]], [1.0, 1.5]
        )


def test_a_step_function_keeps_each_value_until_the_next_time():
    assert StepFunction(np.array([1.0, 2.0]), np.array([0.5, 0.25])).at([0.9, 1.0, 1.9, 2.0]).tolist() == [
        1,
        0.5,
        0.5,
        0.25,
    ]


# ---- licence ----


def test_scikit_survival_is_for_tests_only():
    """It is under the GPL: an oracle, nothing that users get or that our modules import."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not any(name.startswith("scikit") for name in required)
    for folder in ("cfstore", "cftrain", "kernels/cfkernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not any(name.split(".")[0] == "sksurv" for name in names), f"{path} imports scikit-survival"
