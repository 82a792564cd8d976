"""Coordinates, graphs and parents in a batch: rows are counted within a slide before packing, in the batch after."""

import pytest
import torch

from cftrain.errors import MissingExtraError, MissingScaleError, ShapeError
from cftrain.models import BagBatch, build, made_up_slide
from cftrain.zoo.extras import coords, nearest, parents

NEAREST, COORDS, PARENTS = nearest(20, 2), coords(20), parents(20, 10)


def slide(n10, n20, neighbours, parent):
    """Bags of features that tell their rows apart, and extras."""
    bags = {10: torch.arange(n10)[:, None] + torch.zeros(n10, 3), 20: torch.arange(n20)[:, None] + torch.zeros(n20, 3)}
    return bags, {
        NEAREST: torch.tensor(neighbours, dtype=torch.int32),
        PARENTS: torch.tensor(parent, dtype=torch.int32),
        COORDS: torch.arange(2 * n20, dtype=torch.int32).view(n20, 2),
    }


FIRST = slide(2, 3, [[1, 2], [0, 2], [1, -1]], [0, 1, -1])
SECOND = slide(1, 2, [[1, -1], [0, -1]], [0, 0])


def packed():
    (one, its), (other, its_own) = FIRST, SECOND
    return BagBatch.pack(["a", "b"], [one, other], [its, its_own])


def test_rows_of_the_second_slide_follow_those_of_the_first():
    batch = packed()
    assert batch.extras[NEAREST].tolist() == [[1, 2], [0, 2], [1, -1], [4, -1], [3, -1]]
    assert batch.extras[PARENTS].tolist() == [0, 1, -1, 2, 2]
    assert batch.extras[COORDS].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]


def test_slides_of_a_patient_become_one_bag_in_which_nothing_moves():
    batch = packed().grouped(["patient"], [2])
    assert batch.slide_ids == ("patient",)
    assert batch.lengths == {10: (3,), 20: (5,)}
    assert batch.extras[PARENTS].tolist() == [0, 1, -1, 2, 2]


def test_slides_cannot_be_grouped_into_more_than_there_are():
    with pytest.raises(ShapeError, match="2 slides cannot become 1 bags of \\[3\\] slides"):
        packed().grouped(["patient"], [3])


def test_a_patch_that_is_left_out_is_nobodys_neighbour_any_more():
    batch = packed().keeping(20, torch.tensor([True, False, True, True, True]))
    assert batch.lengths == {10: (2, 1), 20: (2, 2)}
    assert batch.features[20][:, 0].tolist() == [0, 2, 0, 1]
    assert batch.extras[NEAREST].tolist() == [[-1, 1], [-1, -1], [3, -1], [2, -1]]
    assert batch.extras[PARENTS].tolist() == [0, -1, 2, 2]
    assert batch.extras[COORDS].tolist() == [[0, 1], [4, 5], [0, 1], [2, 3]]


def test_a_coarse_patch_that_is_left_out_is_nobodys_parent_any_more():
    batch = packed().keeping(10, torch.tensor([False, True, True]))
    assert batch.extras[PARENTS].tolist() == [-1, 0, -1, 1, 1]
    assert batch.extras[NEAREST].tolist() == packed().extras[NEAREST].tolist()


def test_a_slide_of_which_nothing_is_left_is_refused():
    with pytest.raises(MissingScaleError, match="b: no patch at 20x"):
        packed().keeping(20, torch.tensor([True, True, True, False, False]))


def test_an_extra_that_one_slide_lacks_is_named():
    (one, its), (other, own) = FIRST, SECOND
    own = {extra: rows for extra, rows in own.items() if extra != PARENTS}
    with pytest.raises(MissingExtraError, match="b: no 10x parents of 20x patches, which other slides"):
        BagBatch.pack(["a", "b"], [one, other], [its, own])


def test_rows_that_are_not_one_for_each_patch_are_refused():
    bags, extras = FIRST
    with pytest.raises(ShapeError, match="a: coordinates at 20x must have 3 rows, got \\[2, 2\\]"):
        BagBatch.pack(["a"], [bags], [{**extras, COORDS: torch.zeros(2, 2)}])
    with pytest.raises(ShapeError, match="a: 5x parents of 20x patches, but no features at 5x"):
        BagBatch.pack(["a"], [bags], [{parents(20, 5): torch.zeros(3)}])


def test_a_model_names_what_a_batch_lacks():
    model = build("abmil", 3)
    assert model.extra(packed(), NEAREST).shape == (5, 2)
    with pytest.raises(MissingExtraError, match="a: abmil needs coordinates at 10x, which the batch lacks"):
        model.extra(packed(), coords(10))


def test_moving_to_another_precision_leaves_rows_as_they_are():
    batch = packed().to(dtype=torch.float64)
    assert batch.features[20].dtype == torch.float64
    assert batch.extras[NEAREST].dtype == torch.int64
    assert batch.extras[COORDS].dtype == torch.int32


def test_a_made_up_slide_has_rows_within_its_bags():
    batch = made_up_slide({10: 5, 20: 3}, 4, [nearest(20, 8), parents(20, 10), coords(10)])
    assert batch.extras[nearest(20, 8)].tolist() == [[1, 2] + [-1] * 6, [2, 0] + [-1] * 6, [0, 1] + [-1] * 6]
    assert batch.extras[parents(20, 10)].tolist() == [0, 1, 3]
    assert batch.extras[coords(10)].tolist() == [[0, 0], [512, 0], [0, 512], [512, 512], [0, 1024]]
