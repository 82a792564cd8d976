"""Time bins against pandas.qcut, the edges the CrossFusion paper's tables give, and cases worked by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.survival.bins import TimeBins, fit_bins

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def follow_up(n, seed, *, whole_months=False):
    rng = np.random.default_rng(seed)
    months = rng.exponential(30.0, n)
    return np.round(months) if whole_months else months, rng.random(n) < 0.6


def slides_of(cohort):
    path = DATA / "clinical" / f"tcga_{cohort}_min.csv"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    months = np.array([float(row["survival_months"]) for row in rows])
    return months, np.array([float(row["censorship"]) == 0 for row in rows])


@pytest.mark.parametrize(
    ("cohort", "edges"),
    [("luad", (12.32, 23.36, 35.51)), ("coad", (5.0, 13.0, 29.25))],
    ids=["luad", "coad-whole-months"],
)
def test_edges_of_a_tcga_cohort_are_those_of_the_paper(cohort, edges):
    assert fit_bins(*slides_of(cohort)).edges == pytest.approx(edges, abs=5e-3)


@pytest.mark.parametrize("cohort", ["luad", "coad"])
def test_slides_of_a_tcga_cohort_fall_where_pandas_cut_puts_them(cohort):
    months, event = slides_of(cohort)
    _, edges = pd.qcut(months[event], 4, retbins=True)
    edges[0], edges[-1] = months.min() - 1e-6, months.max() + 1e-6
    expected = pd.cut(months, edges, right=False, labels=False, include_lowest=True)
    np.testing.assert_array_equal(fit_bins(months, event).assign(months), expected)


def test_golden_edges_and_labels_are_met():
    path = DATA / "golden" / "metrics.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    golden = np.load(path)
    bins = fit_bins(golden["train_t"], golden["train_e"])
    assert bins.edges == tuple(golden["bins"][1:-1])
    np.testing.assert_array_equal(bins.assign(golden["train_t"]), golden["labels"])


@pytest.mark.parametrize("n_bins", [2, 3, 4, 7])
@pytest.mark.parametrize("whole_months", [False, True], ids=["exact-times", "whole-months"])
@pytest.mark.parametrize("n", [53, 211])
def test_edges_are_those_of_pandas_qcut(n, n_bins, whole_months):
    months, event = follow_up(n, seed=n, whole_months=whole_months)
    _, edges = pd.qcut(months[event], n_bins, retbins=True)
    assert fit_bins(months, event, n_bins).edges == pytest.approx(tuple(edges[1:-1]), rel=1e-12)


def test_censored_times_do_not_move_the_edges():
    months, event = follow_up(97, seed=3)
    assert fit_bins(months, event) == fit_bins(np.where(event, months, 5000.0), event)


def test_a_time_on_an_edge_opens_the_next_bin():
    bins = TimeBins((6.0, 12.5))
    assert bins.n_bins == 3
    np.testing.assert_array_equal(bins.assign([0.0, 5.999, 6.0, 12.499, 12.5, 1e9]), [0, 0, 1, 1, 2, 2])


def test_bins_keep_the_shape_and_are_int64():
    assigned = TimeBins((6.0,)).assign(np.array([[1, 7, 6]], dtype=np.int16))
    assert (assigned.shape, assigned.dtype) == ((1, 3), np.int64)


def test_one_bin_holds_every_time():
    bins = fit_bins([3.0, 8.0], np.array([True, False]), n_bins=1)
    assert bins == TimeBins(())
    np.testing.assert_array_equal(bins.assign([0.0, 400.0]), [0, 0])


def test_coinciding_edges_name_the_edges_the_events_and_a_count_that_works():
    months = np.array([1.0, 2, 2, 2, 2, 2, 3, 4, 9])
    with pytest.raises(ConfigError, match=r"of 8 events have edges 1/2/2/2.25/4 .* bins\.count=2 works"):
        fit_bins(months, months < 9)
    assert fit_bins(months, months < 9, n_bins=2).edges == (2.0,)


@pytest.mark.parametrize("n_events", [1, 5], ids=["one-event", "five-events-in-one-month"])
def test_events_at_a_single_time_cannot_be_cut_at_all(n_events):
    with pytest.raises(ConfigError, match=f"of {n_events} events .* use a cohort or fold with more events"):
        fit_bins([7.0] * n_events + [30.0], np.arange(n_events + 1) < n_events)


def test_no_event_at_all_is_refused():
    with pytest.raises(ConfigError, match="no event among 3 rows"):
        fit_bins([1.0, 2.0, 3.0], np.zeros(3, dtype=bool))


@pytest.mark.parametrize("n_bins", [0, -1])
def test_fewer_than_one_bin_is_refused(n_bins):
    with pytest.raises(ConfigError, match=f"bins.count is {n_bins}"):
        fit_bins([1.0, 2.0], np.ones(2, dtype=bool), n_bins)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_time_that_is_no_number_is_refused(bad):
    with pytest.raises(NonFiniteError, match="time_months: 1 of 3"):
        fit_bins([1.0, bad, 3.0], np.ones(3, dtype=bool))
    with pytest.raises(NonFiniteError, match="time_months: 1 of 2"):
        TimeBins((6.0,)).assign([1.0, bad])


def test_a_time_before_0_is_refused():
    with pytest.raises(ConfigError, match="the least is -3"):
        TimeBins((6.0,)).assign([1.0, -3.0])


@pytest.mark.parametrize(
    "event", [np.ones(2, dtype=bool), np.ones(3, dtype=np.int64)], ids=["other-length", "ints-are-not-flags"]
)
def test_an_event_column_that_does_not_fit_is_refused(event):
    with pytest.raises(ShapeError, match="one bool"):
        fit_bins([1.0, 2.0, 3.0], event)


@pytest.mark.parametrize(
    "edges",
    [(5.0, 5.0), (9.0, 5.0), (0.0, 5.0), (5.0, np.nan), (5.0, np.inf)],
    ids=["equal", "falling", "at-0", "nan", "inf"],
)
def test_edges_that_make_no_intervals_are_refused(edges):
    with pytest.raises(ConfigError, match="bin edges"):
        TimeBins(edges)
