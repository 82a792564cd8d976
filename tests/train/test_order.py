"""What each pass visits and when: functions of seed and epoch; the same examples as a fold has, in steps and packs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest

from cftrain.examples import Example
from cftrain.folds import FoldExamples
from cftrain.order import Schedule, ShardOrder, Visit, cohort_places, pack_seed, packed, shared_out, steps_of

COHORT = tuple(Example(f"s{i:02}", f"p{i}", (f"s{i:02}",), 1.0 + i, i % 2 == 0, {20: 3 + i % 5}) for i in range(30))
SHARDS = tuple(tuple(example.name for example in COHORT[i::4]) for i in range(4))
WEIGHTS = np.linspace(1, 9, 24)
EPOCHS = 3


def fold(number):
    val = COHORT[6 * number : 6 * number + 6]
    return FoldExamples(number, tuple(each for each in COHORT if each not in val), val)


def schedule(number=2, seed=7, **changes):
    return replace(Schedule(fold(number), seed, EPOCHS, accumulate=5, batch_patches=9), **changes)


def names(visits):
    return [visit.example.name for visit in visits]


def trained(steps):
    return [visit for step in steps if step.train for visit in step.visits]


def validated(steps):
    return [visit for step in steps if not step.train for visit in step.visits]


@pytest.mark.parametrize("shared", [True, False], ids=["one order for all folds", "an order of its own"])
def test_every_training_example_comes_once_an_epoch_and_every_validation_example_in_the_pass_after(shared):
    for number in range(EPOCHS + 1):
        places = cohort_places(COHORT, 7, number) if shared else None
        steps = steps_of(schedule(), number, places)
        expected = fold(2).train if number < EPOCHS else ()
        assert sorted(names(trained(steps))) == [example.name for example in expected]
        assert sorted(names(validated(steps))) == [example.name for example in (fold(2).val if number else ())]


def test_a_pass_is_ordered_by_when_steps_become_ready_and_a_step_needs_nothing_later():
    steps = steps_of(schedule(), 1, cohort_places(COHORT, 7, 1))
    assert [step.ready for step in steps] == sorted(step.ready for step in steps)
    assert [step.number for step in steps] == list(range(len(steps)))
    for step in steps:
        assert step.ready == max(visit.place for visit in step.visits)


def test_one_pass_over_the_cohort_brings_every_fold_its_examples_in_the_same_order():
    places = cohort_places(COHORT, 7, 1)
    whole = sorted(places, key=places.get)
    for number in range(5):
        steps = steps_of(schedule(number), 1, places)
        own = {example.name for example in fold(number).train}
        assert names(trained(steps)) == [name for name in whole if name in own]


def test_an_order_depends_on_seed_and_pass_alone():
    first = cohort_places(COHORT, 7, 1)
    assert cohort_places(COHORT, 7, 1) == first
    assert cohort_places(COHORT, 7, 2) != first
    assert cohort_places(COHORT, 8, 1) != first


def test_weighted_draws_follow_their_weights_and_come_side_by_side():
    weights = np.where(np.arange(24) < 3, 50.0, 1.0)
    counts = Counter()
    for number in range(EPOCHS):
        visits = trained(steps_of(schedule(weights=weights), number, cohort_places(COHORT, 7, number)))
        assert len(visits) == 24
        runs = [place for place, _ in groupby(visits, key=lambda visit: visit.place)]
        assert len(runs) == len(set(runs))  # all visits of an example one after the other: one reading
        counts.update(names(visits))
    often = {example.name for example in fold(2).train[:3]}
    assert sum(counts[name] for name in often) > 0.75 * sum(counts.values())


def test_draws_of_their_own_are_each_a_visit_of_its_own_and_another_fold_or_seed_draws_others():
    def drawn(number=2, seed=7):
        return trained(steps_of(schedule(number, seed, weights=WEIGHTS), 0, None))

    visits = drawn()
    assert len({visit.place for visit in visits}) == 24
    assert len(set(names(visits))) < 24  # with replacement
    assert names(drawn(seed=8)) != names(visits)
    assert names(drawn(number=1)) != names(visits)


@pytest.mark.parametrize("sequential", [False, True], ids=["permuted", "in file order"])
def test_shard_order_visits_shard_after_shard(sequential):
    orders = []
    for number in range(12):
        places = cohort_places(COHORT, 7, number, ShardOrder(SHARDS, sequential))
        whole = sorted(places, key=places.get)
        assert sorted(whole) == [example.name for example in COHORT]
        found = [
            (shard, tuple(held))
            for shard, held in groupby(whole, key=lambda name: next(i for i, s in enumerate(SHARDS) if name in s))
        ]
        assert len(found) == len(SHARDS)  # each shard once
        assert all((held == SHARDS[shard]) == sequential for shard, held in found)
        orders.append(found)
    assert len({tuple(shard for shard, _ in order) for order in orders}) > 4


def test_steps_hold_so_many_visits_and_what_is_left_over_makes_a_step_of_its_own():
    steps = steps_of(schedule(), 0, cohort_places(COHORT, 7, 0))
    assert [step.size for step in steps] == [5, 5, 5, 5, 4]


def test_packs_hold_at_most_so_many_patches_but_a_larger_example_goes_alone():
    sizes = [3, 3, 4, 20, 1, 1, 9]
    visits = [Visit(replace(COHORT[0], n_patches={20: n}), place) for place, n in enumerate(sizes)]
    assert [[visit.example.n_patches[20] for visit in pack] for pack in packed(visits, 9)] == [
        [3, 3],
        [4],
        [20],
        [1, 1],
        [9],
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_packs_are_shared_out_so_that_no_process_has_much_more_than_its_part(world):
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(9, 0.8, 32)).astype(int)
    packs = [(Visit(replace(COHORT[0], n_patches={20: int(n)}), place),) for place, n in enumerate(sizes)]
    shares = shared_out(packs, world)
    assert sorted(index for share in shares for index in share) == list(range(32))
    heaviest = max(sum(sizes[index] for index in share) for share in shares)
    assert heaviest <= max(1.1 * sizes.sum() / world, sizes.max())


def test_every_forward_pass_has_a_seed_of_its_own():
    keys = [(s, f, e, n, p) for s in (0, 7) for f in range(3) for e in range(3) for n in range(3) for p in range(3)]
    seeds = [pack_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
