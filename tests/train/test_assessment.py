"""A whole assessment against scikit-survival and lifelines called directly, and folds that lack something."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from lifelines.utils import concordance_index
from sksurv.metrics import concordance_index_ipcw, cumulative_dynamic_auc, integrated_brier_score
from sksurv.util import Surv

from cftrain.assessment import FoldOutcome, assess
from cftrain.errors import ConfigError, ShapeError
from cftrain.survival.metrics import PatientLevel

REPLICATES = 200


def cohort(rng, n, leaving):
    """Follow-up to at most 150 months, deaths, and the true rate of dying per month."""
    rate = np.exp(0.7 * rng.normal(size=n)) / 40
    death, gone = rng.exponential(1 / rate), np.minimum(rng.exponential(leaving, n), 150.0)
    return np.minimum(death, gone) + 0.03, death <= gone, rate


def fold(number, *, leaving=60.0, n=100, seed=5, probabilities=True):
    """A fold whose predictions are the truth, in four bins; test patients do not outlive the training ones."""
    rng = np.random.default_rng([seed, number])
    train_time, train_event, _ = cohort(rng, 400, leaving)
    time, event, rate = cohort(rng, n, leaving)
    edges = tuple(np.quantile(train_time[train_event], [0.25, 0.5, 0.75]).tolist())
    survival = np.exp(-rate[:, None] * np.array([*edges, 300.0]))
    names = np.array([f"F{number}P{i}" for i in range(n)])
    patients = PatientLevel(names, time, event, -survival.sum(axis=1))
    return FoldOutcome(number, train_time, train_event, patients, survival if probabilities else None, edges)


def changed(outcome, **values):
    """The fold with other patients' columns."""
    who = outcome.patients
    columns = {"time_months": who.time_months, "event": who.event, "risk": who.risk} | values
    patients = PatientLevel(who.patient_id, **columns)
    return FoldOutcome(outcome.fold, outcome.train_time, outcome.train_event, patients, outcome.survival, outcome.edges)


@pytest.fixture(scope="module")
def folds():
    return [fold(number) for number in range(5)]


@pytest.fixture(scope="module")
def assessed(folds):
    return assess(folds, replicates=REPLICATES, seed=3)


def surv(time, event):
    return Surv.from_arrays(event, time)


def numbers(value):
    """Every number of nested lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, float) else []


# ---- whole ----


def test_the_result_has_the_keys_that_reports_read(assessed):
    assert set(assessed) == {
        *("unit", "replicates", "seed", "folds", "c_index", "uno_c", "auc", "auc_mean", "ibs", "calibration", "notes")
    }
    assert (assessed["unit"], assessed["replicates"], assessed["seed"]) == ("patient", REPLICATES, 3)
    one = assessed["folds"][0]
    assert set(one) == {
        *("fold", "n_patients", "n_events", "c_index", "uno_c", "auc", "auc_mean", "ibs", "notes"),
    }
    assert set(one["c_index"]) == {"value", "lower", "upper"}
    assert set(one["uno_c"]) == {"value", "lower", "upper", "tau"}
    assert set(one["ibs"]) == {"value", "kaplan_meier", "from_months", "to_months"}
    over_folds = {"mean", "std", "folds", "n_undefined"}
    assert set(assessed["c_index"]) == set(assessed["uno_c"]) == over_folds | {"lower", "upper"}
    assert set(assessed["auc_mean"]) == over_folds
    assert set(assessed["ibs"]) == over_folds | {"kaplan_meier"}
    assert {"time_months", "mean", "std", "folds"} <= set(assessed["auc"][0])
    calibration = assessed["calibration"]
    assert set(calibration) == {*("horizon_months", "points", "ici", "e50", "e90", "d_calibration", "notes")}
    assert set(calibration["points"][0]) == {"predicted", "observed", "lower", "upper", "n"}
    assert set(calibration["d_calibration"]) == {"statistic", "p_value", "counts"}


def test_the_result_is_plain_python(assessed):
    def plain(value):
        if isinstance(value, dict):
            return all(type(key) is str and plain(own) for key, own in value.items())
        if isinstance(value, list):
            return all(plain(own) for own in value)
        return type(value) in (str, int, float, type(None))

    assert plain(assessed)
    json.dumps(assessed, allow_nan=False)  # these folds define every number


def test_metrics_of_a_fold_are_those_of_scikit_survival_and_lifelines(folds, assessed):
    for outcome, entry in zip(folds, assessed["folds"], strict=True):
        who = outcome.patients
        train, test = surv(outcome.train_time, outcome.train_event), surv(who.time_months, who.event)
        assert (entry["fold"], entry["n_patients"], entry["n_events"]) == (outcome.fold, 100, who.event.sum())
        assert entry["c_index"]["value"] == concordance_index(who.time_months, -who.risk, who.event)
        tau = np.quantile(outcome.train_time[outcome.train_event], 0.8)
        assert entry["uno_c"]["tau"] == pytest.approx(tau)
        uno = concordance_index_ipcw(train, test, who.risk, tau=tau)[0]
        assert entry["uno_c"]["value"] == pytest.approx(uno, abs=1e-10)
        months = [one["time_months"] for one in entry["auc"]]
        values, mean = cumulative_dynamic_auc(train, test, who.risk, months)
        assert [one["value"] for one in entry["auc"]] == pytest.approx(values.tolist(), abs=1e-10)
        assert entry["auc_mean"] == pytest.approx(mean, abs=1e-10)


def test_the_brier_score_is_integrated_over_the_predicted_curve(folds, assessed):
    for outcome, entry in zip(folds, assessed["folds"], strict=True):
        who, knots = outcome.patients, np.array([0, *outcome.edges])
        train, test = surv(outcome.train_time, outcome.train_event), surv(who.time_months, who.event)
        months = np.linspace(who.time_months.min(), outcome.edges[-1], 100)
        logs = np.log(np.column_stack([np.ones(100), outcome.survival[:, :3]]))
        survival = np.exp([np.interp(months, knots, row) for row in logs])
        curve = KaplanMeierFitter().fit(outcome.train_time, outcome.train_event).survival_function_at_times(months)
        assert entry["ibs"]["value"] == pytest.approx(integrated_brier_score(train, test, survival, months), abs=1e-10)
        reference = integrated_brier_score(train, test, np.tile(curve, (100, 1)), months)
        assert entry["ibs"]["kaplan_meier"] == pytest.approx(reference, abs=1e-10)
        assert (entry["ibs"]["from_months"], entry["ibs"]["to_months"]) == (months[0], months[-1])
    assert assessed["ibs"]["mean"] < assessed["ibs"]["kaplan_meier"]  # the truth is better than nothing


def test_means_are_over_folds(assessed):
    entries = assessed["folds"]
    for name in ("c_index", "uno_c", "ibs"):
        values = [entry[name]["value"] for entry in entries]
        assert assessed[name]["folds"] == values
        assert assessed[name]["mean"] == pytest.approx(np.mean(values))
        assert assessed[name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert assessed["auc_mean"]["mean"] == pytest.approx(np.mean([entry["auc_mean"] for entry in entries]))
    assert assessed["ibs"]["kaplan_meier"] == pytest.approx(np.mean([e["ibs"]["kaplan_meier"] for e in entries]))
    for row, over in enumerate(assessed["auc"]):
        assert over["mean"] == pytest.approx(np.mean([entry["auc"][row]["value"] for entry in entries]))
        assert {entry["auc"][row]["time_months"] for entry in entries} == {over["time_months"]}


@pytest.mark.parametrize("metric", ["c_index", "uno_c"])
def test_intervals_are_those_of_patients_drawn_again_within_their_fold(folds, metric):
    """Against lifelines and scikit-survival on copied rows, with draws of our own: equal but for their noise."""
    found = assess(folds, replicates=1000, seed=1)
    rng, values = np.random.default_rng(99), []
    for outcome in folds:
        who, own = outcome.patients, []
        train = surv(outcome.train_time, outcome.train_event)
        tau = np.quantile(outcome.train_time[outcome.train_event], 0.8)
        for _ in range(100):
            rows = rng.integers(0, 100, 100)
            time, event, risk = who.time_months[rows], who.event[rows], who.risk[rows]
            if metric == "c_index":
                own.append(concordance_index(time, -risk, event))
            else:
                own.append(concordance_index_ipcw(train, surv(time, event), risk, tau=tau)[0])
        values.append(own)
    of_mean = np.quantile(np.mean(values, axis=0), [0.025, 0.975])
    assert (found[metric]["lower"], found[metric]["upper"]) == pytest.approx(of_mean, abs=0.02)
    of_first = np.quantile(values[0], [0.025, 0.975])
    first = found["folds"][0][metric]
    assert (first["lower"], first["upper"]) == pytest.approx(of_first, abs=0.04)
    assert first["upper"] - first["lower"] > 1.5 * (found[metric]["upper"] - found[metric]["lower"])


def test_calibration_pools_the_patients_of_all_folds(folds, assessed):
    calibration = assessed["calibration"]
    horizon = calibration["horizon_months"]
    shortest = min(outcome.edges[-1] for outcome in folds)
    assert horizon == max(month for month in (12, 24, 36, 60) if month <= shortest)
    predicted = np.concatenate(
        [
            1 - np.exp([np.interp(horizon, [0, *outcome.edges], [0, *np.log(row[:3])]) for row in outcome.survival])
            for outcome in folds
        ]
    )
    time = np.concatenate([outcome.patients.time_months for outcome in folds])
    event = np.concatenate([outcome.patients.event for outcome in folds])
    parts = np.array_split(np.argsort(predicted), 5)
    for point, rows in zip(calibration["points"], parts, strict=True):
        assert point["n"] == 100
        assert point["predicted"] == pytest.approx(predicted[rows].mean())
        assert point["observed"] == pytest.approx(1 - KaplanMeierFitter().fit(time[rows], event[rows]).predict(horizon))
    assert calibration["ici"] < 0.05
    assert sum(calibration["d_calibration"]["counts"]) == pytest.approx(500)
    assert calibration["d_calibration"]["p_value"] > 0.05


def test_d_calibration_looks_at_each_curve_up_to_its_own_last_edge(folds, assessed):
    counts = np.zeros(10)
    for outcome in folds:
        who, knots = outcome.patients, [0, *outcome.edges]
        for time, event, row in zip(who.time_months, who.event, outcome.survival, strict=True):
            reached = math.exp(np.interp(time, knots, [0, *np.log(row[:3])]))  # from the last edge on as at that edge
            if event and time <= outcome.edges[-1]:
                counts[int(reached * 10)] += 1
            else:
                lower = np.arange(10) / 10
                counts += np.clip(reached - lower, 0, 0.1) / reached
    assert assessed["calibration"]["d_calibration"]["counts"] == pytest.approx(counts.tolist())


def test_wrong_probabilities_fail_calibration_and_rank_as_well(folds, assessed):
    wrong = assess(
        [FoldOutcome(o.fold, o.train_time, o.train_event, o.patients, o.survival**2.5, o.edges) for o in folds],
        replicates=2,
    )
    assert wrong["c_index"]["mean"] == assessed["c_index"]["mean"]
    assert wrong["calibration"]["d_calibration"]["p_value"] < 1e-4
    assert wrong["calibration"]["ici"] > 0.15
    assert wrong["ibs"]["mean"] > assessed["ibs"]["mean"] + 0.02


# ---- folds that lack something ----


def test_a_fold_without_deaths_defines_no_concordance_and_the_others_go_on(folds, assessed):
    silent = changed(folds[2], event=np.zeros(100, dtype=bool))
    found = assess([*folds[:2], silent, *folds[3:]], replicates=REPLICATES, seed=3)
    entry = found["folds"][2]
    assert entry["n_events"] == 0
    assert np.isnan([entry["auc_mean"], *entry["c_index"].values(), *[one["value"] for one in entry["auc"]]]).all()
    assert math.isnan(entry["uno_c"]["value"])
    assert math.isfinite(entry["ibs"]["value"])  # the living have a Brier score
    assert entry["notes"][0].startswith("nobody has died")
    assert (found["c_index"]["n_undefined"], found["uno_c"]["n_undefined"], found["auc_mean"]["n_undefined"]) == (
        1,
        1,
        1,
    )
    others = [one["c_index"]["value"] for one in assessed["folds"]]
    del others[2]
    assert found["c_index"]["mean"] == pytest.approx(np.mean(others))
    assert found["c_index"]["lower"] < found["c_index"]["mean"] < found["c_index"]["upper"]
    assert [found["folds"][row] for row in (0, 1, 3, 4)] == [assessed["folds"][row] for row in (0, 1, 3, 4)]


def test_a_month_that_one_fold_does_not_reach_is_undefined_there_only(folds):
    short = fold(7, leaving=15.0)
    short = changed(short, time_months=np.minimum(short.patients.time_months, 30.0), event=short.patients.event.copy())
    found = assess([*folds, short], replicates=2)
    assert [one["time_months"] for one in found["auc"]] == [12, 24, 36, 60]
    entry = found["folds"][5]
    assert [math.isnan(one["value"]) for one in entry["auc"]] == [False, False, True, True]
    assert any("36 months left out: no patient is followed for longer" in note for note in entry["notes"])
    assert [one["n_undefined"] for one in found["auc"]] == [0, 0, 1, 1]
    assert found["notes"] == []


def test_months_that_half_of_the_folds_or_fewer_reach_are_left_out_and_that_is_said(folds):
    cut = [
        changed(outcome, time_months=np.minimum(outcome.patients.time_months, 50.0)) if outcome.fold < 3 else outcome
        for outcome in folds
    ]
    found = assess(cut, replicates=2)
    assert [one["time_months"] for one in found["auc"]] == [12, 24, 36]
    assert found["notes"] == ["AUC at 60 months left out: 2 of 5 folds support it"]


def test_a_month_that_exactly_half_of_the_folds_reach_is_left_out(folds):
    cut = [changed(outcome, time_months=np.minimum(outcome.patients.time_months, 50.0)) for outcome in folds[:2]]
    found = assess([*cut, *folds[2:4]], replicates=2)
    assert found["notes"] == ["AUC at 60 months left out: 2 of 4 folds support it"]


def test_few_compared_patients_are_counted_and_named():
    outcome = fold(0)
    late = np.flatnonzero(outcome.patients.time_months > 36)
    time = outcome.patients.time_months.copy()
    time[late[3:]] = 36.0
    entry = assess([changed(outcome, time_months=time)], replicates=2)["folds"][0]
    at_36 = entry["auc"][2]
    assert at_36["n_alive"] == 3
    assert at_36["n_dead"] == (outcome.patients.event & (time <= 36)).sum()
    assert any(note.startswith("AUC at 36 months rests on") and "3 alive" in note for note in entry["notes"])


def test_heavily_censored_folds_are_assessed_as_far_as_they_reach():
    for seed in range(12):
        folds = [fold(number, leaving=10.0, n=70, seed=seed) for number in range(3)]
        found = assess(folds, replicates=20)
        assert np.mean(np.concatenate([outcome.patients.event for outcome in folds])) < 0.35
        for entry in found["folds"]:
            assert np.isfinite([*entry["c_index"].values(), *entry["uno_c"].values(), *entry["ibs"].values()]).all()
        assert found["calibration"] is not None
        assert all(math.isfinite(number) for one in found["auc"] for number in [one["mean"]])


def test_a_model_that_only_ranks_has_no_brier_score_and_no_calibration(folds, assessed):
    found = assess([fold(number, probabilities=False) for number in range(5)], replicates=REPLICATES, seed=3)
    assert found["calibration"] is None
    for entry in found["folds"]:
        assert np.isnan(list(entry["ibs"].values())).all()
        assert entry["notes"][-1] == "no Brier score: the model ranks and predicts no probabilities"
    assert math.isnan(found["ibs"]["mean"])
    assert math.isnan(found["ibs"]["kaplan_meier"])
    for name in ("c_index", "uno_c", "auc", "auc_mean"):
        assert found[name] == assessed[name]


def test_a_single_time_bin_has_no_curve(folds):
    flat = [FoldOutcome(o.fold, o.train_time, o.train_event, o.patients, o.survival[:, -1:], ()) for o in folds]
    found = assess(flat, replicates=2)
    assert math.isnan(found["ibs"]["mean"])
    assert math.isnan(found["calibration"]["horizon_months"])
    assert "single time bin" in found["calibration"]["notes"][0]


def test_edges_before_twelve_months_are_the_horizon_themselves(folds):
    early = [
        FoldOutcome(o.fold, o.train_time, o.train_event, o.patients, o.survival, (2.0, 4.0, 8.0 + o.fold))
        for o in folds
    ]
    assert assess(early, replicates=2)["calibration"]["horizon_months"] == 8.0


def test_folds_of_nobody_and_of_one_patient_are_assessed(folds):
    nobody = PatientLevel(np.zeros(0, dtype=str), np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0))
    one = folds[1].patients
    lone = PatientLevel(one.patient_id[:1], one.time_months[:1], np.ones(1, dtype=bool), one.risk[:1])
    found = assess(
        [
            FoldOutcome(0, folds[0].train_time, folds[0].train_event, nobody, np.zeros((0, 4)), folds[0].edges),
            FoldOutcome(1, folds[1].train_time, folds[1].train_event, lone, folds[1].survival[:1], folds[1].edges),
        ],
        replicates=10,
    )
    assert [entry["n_patients"] for entry in found["folds"]] == [0, 1]
    assert found["folds"][0]["notes"] == ["no patient was validated"]
    assert math.isnan(found["c_index"]["mean"])
    assert found["auc"] == []
    assert len(found["notes"]) == 4
    assert sum(found["calibration"]["d_calibration"]["counts"]) == pytest.approx(1)


def test_training_patients_without_deaths_support_nothing_weighted(folds):
    outcome = folds[0]
    train_event = np.zeros(outcome.train_time.size, dtype=bool)
    found = assess(
        [FoldOutcome(0, outcome.train_time, train_event, outcome.patients, outcome.survival, outcome.edges)],
        replicates=10,
    )["folds"][0]
    assert math.isfinite(found["c_index"]["value"])
    assert np.isnan([found["uno_c"]["tau"], found["uno_c"]["value"], found["ibs"]["value"]]).all()


# ---- the same again ----


def test_the_same_seed_gives_the_same_result_and_another_other_intervals(folds, assessed):
    assert assess(folds, replicates=REPLICATES, seed=3) == assessed
    other = assess(folds, replicates=REPLICATES, seed=4)
    assert other["c_index"]["lower"] != assessed["c_index"]["lower"]
    assert other["c_index"]["mean"] == assessed["c_index"]["mean"]


def test_every_fold_is_resampled_on_its_own(folds):
    """Equal draws in all folds would make the interval of their mean too wide where patients come sorted."""
    o = folds[0]
    twins = [FoldOutcome(number, o.train_time, o.train_event, o.patients, o.survival, o.edges) for number in (0, 1)]
    first, second = assess(twins, replicates=REPLICATES)["folds"]
    assert first["c_index"]["value"] == second["c_index"]["value"]
    assert first["c_index"]["lower"] != second["c_index"]["lower"]


def test_a_fold_does_not_depend_on_the_others(folds, assessed):
    alone = assess([folds[3]], replicates=REPLICATES, seed=3)
    assert alone["folds"][0] == assessed["folds"][3]
    backwards = assess(folds[::-1], replicates=REPLICATES, seed=3)
    assert backwards["c_index"]["lower"] == pytest.approx(assessed["c_index"]["lower"])


# ---- what is refused ----


def test_folds_must_be_there_and_have_numbers_of_their_own(folds):
    with pytest.raises(ConfigError, match="at least one"):
        assess([])
    with pytest.raises(ConfigError, match="each once"):
        assess([folds[0], folds[0]])


def test_survival_must_have_a_row_per_patient_and_a_column_per_bin(folds):
    o = folds[0]
    for survival in (o.survival[1:], o.survival[:, 1:]):
        with pytest.raises(ShapeError, match="fold 0: survival is"):
            assess([FoldOutcome(0, o.train_time, o.train_event, o.patients, survival, o.edges)])
