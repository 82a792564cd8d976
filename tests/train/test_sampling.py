"""Class weights and epoch orders: counted by hand, and held to the frequencies that the weights promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from cftrain.errors import ConfigError, ShapeError
from cftrain.survival.sampling import class_weights, draw, pass_order


def test_a_slide_weighs_n_over_the_size_of_its_class():
    time_bin = np.array([0, 0, 0, 3, 3, 1, 1])
    event = np.array([True, True, False, False, True, True, True])
    np.testing.assert_allclose(class_weights(time_bin, event), [3.5, 3.5, 7, 7, 7, 3.5, 3.5])


@pytest.mark.parametrize("n", [1, 23, 101])
def test_every_class_present_has_the_same_total_weight(n):
    rng = np.random.default_rng(n)
    time_bin, event = rng.integers(0, 4, n), rng.random(n) < 0.3
    weights = class_weights(time_bin, event)
    for k, died in set(zip(time_bin.tolist(), event.tolist(), strict=True)):
        assert weights[(time_bin == k) & (event == died)].sum() == pytest.approx(n)


@pytest.mark.parametrize("died", [True, False], ids=["all-died", "all-censored"])
def test_absent_classes_do_no_harm(died):
    np.testing.assert_allclose(class_weights([2, 2, 0], np.full(3, died)), [1.5, 1.5, 3.0])


@pytest.mark.parametrize(
    ("time_bin", "event"),
    [
        ([0, 1], np.ones(3, dtype=bool)),
        ([0, 1], [1, 0]),
        ([0.0, 1.0], [True, False]),
        ([0, -1], [True, False]),
        ([[0, 1]], [[True, False]]),
    ],
    ids=["other-length", "int-event", "float-bins", "bin-below-0", "two-dimensions"],
)
def test_columns_that_do_not_fit_have_no_weights(time_bin, event):
    with pytest.raises(ShapeError, match="one bin"):
        class_weights(time_bin, event)


@pytest.mark.parametrize("n", [1, 2, 37, 1041])
def test_without_weights_every_row_comes_once(n):
    order = draw(n, seed=7, epoch=3, fold=1)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("weighted", [False, True], ids=["permutation", "weighted"])
def test_an_order_depends_on_its_arguments_alone(weighted):
    weights = np.arange(1.0, 54.0) if weighted else None
    first = draw(53, weights=weights, seed=7, epoch=4, fold=2)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    for epoch in range(3):
        draw(53, weights=weights, seed=7, epoch=epoch, fold=2)
    np.testing.assert_array_equal(draw(53, weights=weights, seed=7, epoch=4, fold=2), first)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("weighted", [False, True], ids=["permutation", "weighted"])
def test_seed_fold_and_epoch_each_give_another_order(weighted):
    weights = np.ones(53) if weighted else None
    names = [(s, f, e) for s in range(3) for f in range(3) for e in range(3)]
    orders = {tuple(draw(53, weights=weights, seed=s, fold=f, epoch=e).tolist()) for s, f, e in names}
    assert len(orders) == len(names)


def test_rows_are_drawn_as_often_as_their_weights_say():
    weights = np.array([1.0, 4.0, 0.0, 2.5, 0.5, 9.0, 3.0])
    n_epochs = 3000
    draws = np.concatenate([draw(7, weights=weights, seed=1, epoch=e, fold=0) for e in range(n_epochs)])
    counts = np.bincount(draws, minlength=7)
    assert counts[2] == 0
    drawn = weights > 0
    expected = weights[drawn] / weights.sum() * 7 * n_epochs
    assert chisquare(counts[drawn], expected).pvalue > 1e-3


def test_class_weights_balance_a_lopsided_cohort():
    time_bin, event = np.repeat([0, 1, 3], [90, 8, 3]), np.repeat([False, True, True], [90, 8, 3])
    weights = class_weights(time_bin, event)
    draws = np.concatenate([draw(101, weights=weights, seed=5, epoch=e, fold=4) for e in range(200)])
    shares = np.bincount(time_bin[draws], minlength=4) / draws.size
    np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.015)


def test_every_row_comes_first_equally_often_in_permutations():
    first = [draw(5, seed=0, epoch=e, fold=0)[0] for e in range(2000)]
    assert chisquare(np.bincount(first, minlength=5)).pvalue > 1e-3


@pytest.mark.parametrize("n", [0, -1])
def test_an_epoch_of_nothing_is_refused(n):
    with pytest.raises(ConfigError, match=f"{n} rows"):
        draw(n, seed=0, epoch=0, fold=0)


@pytest.mark.parametrize("name", ["seed", "epoch", "fold"])
def test_an_order_below_0_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} -1"):
        draw(3, **({"seed": 0, "epoch": 0, "fold": 0} | {name: -1}))


def test_weights_of_another_length_are_refused():
    with pytest.raises(ShapeError, match="one for each of the 3 rows"):
        draw(3, weights=[1.0, 2.0], seed=0, epoch=0, fold=0)


@pytest.mark.parametrize(
    "weights",
    [[1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, np.nan, 1.0], [1.0, np.inf, 1.0]],
    ids=["negative", "all-0", "nan", "inf"],
)
def test_weights_that_cannot_be_drawn_from_are_refused(weights):
    with pytest.raises(ConfigError, match="weights run from"):
        draw(3, weights=weights, seed=0, epoch=0, fold=0)


@pytest.mark.parametrize("name", ["shard", "within"])
def test_places_of_another_length_are_refused(name):
    with pytest.raises(ShapeError, match="one for each of the 3 rows"):
        pass_order(3, seed=0, epoch=0, **({"shard": [0, 0, 1]} | {name: [0, 1]}))


def test_every_shard_comes_first_equally_often_and_every_row_first_within_its_shard():
    shard = np.array([0, 1, 0, 2, 1, 0])
    orders = [pass_order(6, seed=0, epoch=e, shard=shard) for e in range(3000)]
    assert chisquare(np.bincount([shard[order[0]] for order in orders])).pvalue > 1e-3
    first = [next(row for row in order if shard[row] == 0) for order in orders]
    assert chisquare(np.bincount(first)[[0, 2, 5]]).pvalue > 1e-3
