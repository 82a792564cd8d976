"""The risk without a map's top patches and without random ones, with risks whose answers are known."""

import numpy as np
import pytest
import torch

from cftrain.errors import ConfigError, NonFiniteError, ShapeError
from cftrain.heatmap.deletion import Deletion, deletions
from cftrain.models import BagBatch


def bag(values, **others):
    """One slide whose 20x patches have one feature each; 10x patches besides."""
    features = {20: torch.tensor(values, dtype=torch.float64).unsqueeze(1), 10: torch.ones(2, 1)}
    return BagBatch.pack(["slide"], [features])


def deletion(risk, batch, scale, scores, **others):
    """The check of one map; None where there is none."""
    return deletions(risk, batch, scale, {"map": scores}, **others).get("map")


def total(batch):
    return float(batch.features[20].sum())


class Seen:
    """A risk that remembers the 20x patches of every batch it is asked about."""

    def __init__(self):
        self.bags = []

    def __call__(self, batch):
        assert batch.lengths[20] == (len(batch.features[20]),)
        assert batch.lengths[10] == (2,)
        self.bags.append(batch.features[20][:, 0].tolist())
        return total(batch)


def test_the_top_patches_are_left_out_and_the_others_keep_their_order():
    values = [5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0, 0.0]
    seen = Seen()
    found = deletion(seen, bag(values), 20, np.array(values), share=0.3, draws=4)
    assert [5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 0.0] in seen.bags
    assert (found.n_dropped, found.n_patches) == (3, 10)
    assert found.risk == 45
    assert found.without_top == 45 - 9 - 8 - 7
    assert found.moved_by_top == -24
    for left in seen.bags:
        places = [values.index(value) for value in left]
        assert places == sorted(places)


def test_random_choices_are_as_many_patches_and_their_moves_are_averaged_as_distances():
    values = [1.0, -1.0] * 20
    found = deletion(total, bag(values), 20, np.zeros(40), share=0.025, draws=50, seed=3)
    moves = np.array(found.without_random) - found.risk
    assert set(moves) == {1.0, -1.0}  # one patch each: ups and downs, always by 1
    assert found.moved_by_random == 1.0
    assert found.more_than_random == 0  # one patch with the highest score moves it by 1 as well


def test_a_map_of_what_the_risk_uses_moves_it_more_than_every_random_choice_and_its_opposite_less():
    values = np.linspace(0, 1, 200) ** 8
    best = deletion(total, bag(values.tolist()), 20, values, draws=20)
    assert best.n_dropped == 10
    assert best.moved_by_top == pytest.approx(-values[-10:].sum())
    assert best.more_than_random == 1
    assert abs(best.moved_by_top) > 2 * best.moved_by_random
    worst = deletion(total, bag(values.tolist()), 20, -values, draws=20)
    assert worst.more_than_random == 0
    assert worst.without_random == best.without_random


def test_moves_are_compared_whatever_their_direction():
    found = Deletion(1, 10, risk=2.0, without_top=0.5, without_random=(3.0, 1.0, 4.0, 2.0))
    assert found.moved_by_top == -1.5
    assert found.moved_by_random == (1 + 1 + 2 + 0) / 4
    assert found.more_than_random == 3 / 4


def test_of_equal_scores_the_first_patches_are_left_out():
    """Of 100 patches, every fourth shares the highest score; 10 of those 25 go."""
    values = np.arange(100.0)
    found = deletion(total, bag(values.tolist()), 20, (values % 4 == 3).astype(float), share=0.1)
    assert found.moved_by_top == -sum(3 + 4 * i for i in range(10))


@pytest.mark.parametrize(
    ("n", "share", "expected"),
    [(2, 0.05, 1), (19, 0.05, 1), (50, 0.05, 2), (100, 0.05, 5), (2, 0.99, 1), (3, 0.99, 2), (10, 0.99, 9)],
)
def test_the_share_is_rounded_at_least_one_patch_and_never_all(n, share, expected):
    found = deletion(total, bag([1.0] * n), 20, np.arange(n, dtype=float), share=share, draws=2)
    assert found.n_dropped == expected
    assert found.without_random == (n - expected,) * 2


def test_random_choices_depend_on_the_seed_alone():
    values = np.random.default_rng(0).normal(size=60)
    runs = {seed: deletion(total, bag(values.tolist()), 20, values, seed=seed).without_random for seed in (0, 1)}
    again = deletion(total, bag(values.tolist()), 20, values**2, seed=0)
    assert again.without_random == runs[0]
    assert runs[0] != runs[1]
    assert len(set(runs[0])) == 10
    fewer = deletion(total, bag(values.tolist()), 20, values, draws=4)
    assert fewer.without_random == runs[0][:4]


def test_a_bag_of_one_patch_has_nothing_to_leave_out():
    def never(_):
        raise AssertionError("asked")

    assert deletion(never, bag([1.0]), 20, np.ones(1)) is None
    assert deletion(never, bag([1.0, 2.0, 3.0]), 20, np.ones(3), rows=np.array([1])) is None


def test_maps_of_one_scale_meet_the_same_random_choices_which_are_asked_for_once():
    values = np.arange(20.0) ** 2
    seen = Seen()
    found = deletions(seen, bag(values.tolist()), 20, {"up": values, "down": -values}, draws=3)
    assert list(found) == ["up", "down"]
    assert found["up"].without_random == found["down"].without_random
    assert (found["up"].without_top, found["down"].without_top) == (total(bag(values.tolist())) - 361, 2470)
    assert len(seen.bags) == 1 + 3 + 2


def test_only_the_rows_given_are_left_out():
    values = [2.0**i for i in range(10)]
    seen = Seen()
    scores = np.full(10, -np.inf)
    scores[4:8] = [1, 4, 3, 2]
    found = deletion(seen, bag(values), 20, scores, share=0.5, draws=30, rows=np.arange(4, 8))
    assert (found.n_dropped, found.n_patches) == (2, 4)
    assert found.without_top == sum(values) - values[5] - values[6]
    outside = values[:4] + values[8:]
    assert all(set(outside) <= set(left) for left in seen.bags)
    assert {value for left in seen.bags for value in set(values) - set(left)} == set(values[4:8])


REFUSED = {
    "no share": ({"share": 0.0}, ConfigError, "above 0 and below 1, got 0.0"),
    "all": ({"share": 1.0}, ConfigError, "above 0 and below 1, got 1.0"),
    "no draws": ({"draws": 0}, ConfigError, "at least 1 draw, got 0"),
    "rows that are not there": ({"rows": np.array([1, 3])}, ShapeError, "slide: rows 1 to 3 of 3 patches at 20x"),
    "rows before the first": ({"rows": np.array([-1, 1])}, ShapeError, "slide: rows -1 to 1 of 3 patches at 20x"),
    "too few scores": ({"scores": np.ones(2)}, ShapeError, r"slide: scores at 20x must be \[3\], got \[2\]"),
    "no such scale": ({"scale": 40}, ShapeError, r"slide: no patches at 40x to leave out, the batch has \[10, 20\]"),
    "a score that is none": ({"scores": np.array([1, np.nan, 2])}, NonFiniteError, "slide: a score at 20x is NaN"),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_left_out_is_refused(changed, error, message):
    with pytest.raises(error, match=message):
        deletion(total, bag([1.0, 2.0, 3.0]), **{"scale": 20, "scores": np.ones(3), **changed})


def test_several_bags_are_refused():
    batch = BagBatch.pack(["a", "b"], [{20: torch.ones(3, 1)}, {20: torch.ones(2, 1)}])
    with pytest.raises(ShapeError, match="one bag at a time, got 2 bags"):
        deletion(total, batch, 20, np.ones(5))
