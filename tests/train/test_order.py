"""Which slides come when: pure functions of seed, epoch, fold and step."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

from cfstore import CohortSlide
from cftrain.folds import FoldSlides
from cftrain.order import LoaderState, ShardOrder, epoch_slides, training_batches

SLIDES = tuple(CohortSlide(f"s{i:02}", f"p{i}", 1.0 + i, i % 2 == 0, {20: 3 + i % 5}) for i in range(30))
FOLD = FoldSlides(2, SLIDES[:24], SLIDES[24:])
SHARDS = tuple(tuple(slide.slide_id for slide in SLIDES[i::4]) for i in range(4))
WEIGHTS = np.linspace(1, 9, 24)


def shard_of(slide):
    return next(i for i, shard in enumerate(SHARDS) if slide.slide_id in shard)


def ids(slides):
    return [slide.slide_id for slide in slides]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
@pytest.mark.parametrize("sequential", [False, True], ids=["permuted", "in file order"])
def test_arranging_by_shard_draws_the_same_slides(weights, sequential):
    state = LoaderState(seed=7, epoch=3)
    plain = epoch_slides(state, FOLD, weights)
    arranged = epoch_slides(state, FOLD, weights, ShardOrder(SHARDS, sequential))
    assert sorted(ids(arranged)) == sorted(ids(plain))
    runs = [shard for shard, _ in groupby(map(shard_of, arranged))]
    assert len(runs) == len(set(runs))  # each shard once


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_a_sequential_order_goes_through_each_shard_from_its_beginning(weights):
    arranged = epoch_slides(LoaderState(7, 0), FOLD, weights, ShardOrder(SHARDS, sequential=True))
    for shard, slides in groupby(arranged, key=shard_of):
        places = [SHARDS[shard].index(slide.slide_id) for slide in slides]
        assert places == sorted(places)


def test_shards_and_the_slides_within_come_in_another_order_every_epoch():
    epochs = [epoch_slides(LoaderState(7, epoch), FOLD, None, ShardOrder(SHARDS)) for epoch in range(12)]
    assert len({tuple(dict.fromkeys(map(shard_of, slides))) for slides in epochs}) > 4
    assert len({tuple(s.slide_id for s in slides if shard_of(s) == 0) for slides in epochs}) > 4


@pytest.mark.parametrize("order", [None, ShardOrder(SHARDS), ShardOrder(SHARDS, sequential=True)])
def test_an_epoch_depends_on_seed_epoch_and_fold_alone(order):
    def visited(seed=7, epoch=1, fold=FOLD):
        return tuple(ids(epoch_slides(LoaderState(seed, epoch), fold, None, order)))

    first = visited()
    others = {visited(seed=8), visited(epoch=2), visited(fold=FoldSlides(3, FOLD.train, FOLD.val))}
    assert visited() == first
    assert first not in others


def test_the_step_of_a_state_does_not_change_its_epoch():
    assert epoch_slides(LoaderState(7, 1, step=4), FOLD) == epoch_slides(LoaderState(7, 1), FOLD)


def test_validation_slides_come_in_file_order():
    ordered = ShardOrder(SHARDS).in_file_order(FOLD.val)
    assert ids(ordered) == [slide_id for shard in SHARDS for slide_id in shard if slide_id in ids(FOLD.val)]


@pytest.mark.parametrize("step", [0, 1, 3, 5, 6])
def test_an_epoch_goes_on_at_a_step_as_if_it_had_not_stopped(step):
    slides = epoch_slides(LoaderState(7, 0), FOLD)
    whole = training_batches(slides, 5, 9)
    ended = [i for i, batch in enumerate(whole) if batch.last]
    begin = 0 if step == 0 else (ended[step - 1] + 1 if step <= len(ended) else len(whole))
    assert training_batches(slides, 5, 9, first_step=step) == whole[begin:]
