"""Batches from the store: the same whatever the readers, the caches, the device's copies and the place to go on."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

import cfstore
from cftrain.arrivals import Arrivals
from cftrain.cache import NO_CACHE, CachePlan
from cftrain.config import DataConfig
from cftrain.data import load_data
from cftrain.feed import Feed, cohort_bytes
from cftrain.order import Schedule, Visit, cohort_places, steps_of

SCALES = (5, 10, 20)
CONFIG = DataConfig(cohort="DEMO")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float16", "int8"])
def data(request, demo_store, tmp_path_factory):
    """A cohort in a store of floats, and of int8."""
    if request.param == "float16":
        return load_data(demo_store.path, CONFIG, {"crossfusion": SCALES}, seed=0)
    base = tmp_path_factory.mktemp("int8")
    source = demo_store.sql("SELECT source FROM bags LIMIT 1").to_pylist()[0]["source"]
    shutil.copytree(source.split("/h5/")[0] + "/h5", base / "h5")
    store = cfstore.open(base / "store", create=True)
    store.ingest(base / "h5", cfstore.IngestOptions(encoder="toy", dtype="int8"))
    return load_data(store.path, CONFIG, {"crossfusion": SCALES}, seed=0)


def feed_of(data, config=CONFIG, cache=NO_CACHE):
    return Feed(data, SCALES, config, CPU, cache)


def steps_for(data, folds=(0,), number=1, weights=None, shared=True):
    """The steps of some folds in one pass, merged as a group does."""
    places = cohort_places(data.examples, 7, number) if shared else None
    of_folds = [
        steps_of(Schedule(data.folds[fold], 7, 5, accumulate=4, batch_patches=150, weights=weights), number, places)
        for fold in folds
    ]
    return sorted(chain.from_iterable(of_folds), key=lambda step: step.ready)


def contents(feed, steps):
    """What came, pack by pack: names and copies of the numbers, so that no memory of the reader stays in use."""
    found = []
    with feed.window([step.visits for step in steps]) as window:
        for step in steps:
            for pack in step.packs:
                batch = window.batch(pack, SCALES)
                found.append((batch.slide_ids, {s: batch.features[s].clone() for s in SCALES}, batch.lengths))
            window.done(step.visits)
    return found


def assert_same(found, expected):
    assert [names for names, _, _ in found] == [names for names, _, _ in expected]
    for (_, one, n), (_, other, m) in zip(found, expected, strict=True):
        assert n == m
        for scale in SCALES:
            assert one[scale].dtype == other[scale].dtype
            assert torch.equal(one[scale], other[scale])


def every(data):
    """Each slide alone, in the order of the cohort."""
    return steps_of(Schedule(replace(data.folds[0], train=data.examples, val=()), 7, 9, 1, 1), 0, None)


def heavy(data):
    """Weights that draw a few slides many times."""
    return np.where(np.arange(len(data.folds[0].train)) < 3, 50.0, 1.0)


def nbytes_of(data, slide_id):
    return data.store.reader("toy", SCALES, [slide_id]).read(slide_id).nbytes


@pytest.mark.parametrize("shared", [True, False], ids=["one order", "draws of their own"])
def test_batches_hold_what_the_store_holds(data, shared):
    steps = steps_for(data, weights=heavy(data), shared=shared)
    packs = [pack for step in steps for pack in step.packs]
    for (names, features, _), pack in zip(contents(feed_of(data), steps), packs, strict=True):
        assert names == tuple(visit.example.name for visit in pack)
        for scale in SCALES:
            stored = [data.store.slide(name).bags[scale].features for name in names]
            np.testing.assert_array_equal(features[scale].numpy(), np.concatenate(stored))


@pytest.mark.parametrize(("readers", "ahead"), [(1, 1), (2, 16), (5, 3)])
@pytest.mark.parametrize("step", [1, 3])
def test_a_pass_cut_anywhere_goes_on_exactly_whatever_the_readers(data, readers, ahead, step):
    config = replace(CONFIG, readers=readers, ahead=ahead, ahead_mib=1)
    steps = steps_for(data, folds=(0, 1, 2))
    whole, rest = contents(feed_of(data), steps), contents(feed_of(data, config), steps[step:])
    assert_same(rest, whole[len(whole) - len(rest) :])


def test_one_pass_reads_the_cohort_once_for_all_folds_their_training_and_their_validation(data):
    feed = feed_of(data)
    steps = steps_for(data, folds=range(5))
    contents(feed, steps)
    assert sum(step.size for step in steps) == 5 * len(data.examples)
    assert feed.bytes_read == sum(nbytes_of(data, example.name) for example in data.examples)


def test_an_example_drawn_many_times_is_read_once_a_pass(data):
    feed = feed_of(data)
    steps = steps_for(data, weights=heavy(data), number=0)
    drawn = [visit.example.name for step in steps for visit in step.visits]
    contents(feed, steps)
    assert len(set(drawn)) < len(drawn)
    assert feed.bytes_read == sum(nbytes_of(data, name) for name in set(drawn))


def test_what_no_later_step_needs_is_let_go(data):
    feed = feed_of(data)
    steps = steps_for(data, folds=range(5))
    with feed.window([step.visits for step in steps]) as window:
        for number, step in enumerate(steps):
            for pack in step.packs:
                window.batch(pack, SCALES)
            window.done(step.visits)
            needed = {visit.place for later in steps[number + 1 :] for visit in later.visits}
            assert set(window._held) <= needed
    sizes = [feed._reader.buffer_bytes(example.name) for example in data.examples]
    assert max(sizes) <= feed.held_bytes([step.visits for step in steps]) < sum(sizes)


def test_the_bags_of_a_patient_lie_one_after_the_other(demo_store):
    config = replace(CONFIG, unit="patient")
    data = load_data(demo_store.path, config, {"crossfusion": SCALES}, seed=0)
    several = [example for example in data.examples if len(example.slide_ids) > 1]
    assert several
    steps = [[Visit(example, place)] for place, example in enumerate(several)]
    with feed_of(data, config).window(steps) as window:
        for (visit,) in steps:
            batch = window.batch([visit], SCALES)
            stored = [demo_store.slide(slide_id).bags[10].features for slide_id in visit.example.slide_ids]
            np.testing.assert_array_equal(batch.features[10].numpy(), np.concatenate(stored))
            assert batch.lengths[10] == (visit.example.n_patches[10],)


@pytest.mark.parametrize("weighted", [False, True], ids=["each slide once", "slides many times"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ram", [0.0, 0.3])
def test_caches_change_no_batch_and_save_exactly_the_reads_of_what_they_hold(data, weighted, share, ram):
    total = cohort_bytes(data)
    cached = feed_of(data, cache=CachePlan(int(total * share), int(total * ram)))
    weights = heavy(data) if weighted else None
    for number in range(3):
        steps = steps_for(data, number=number, weights=weights, shared=not weighted)
        assert_same(contents(cached, steps), contents(feed_of(data), steps))
        gc.collect()
    contents(cached, every(data))
    contents(cached, every(data))
    before = cached.bytes_read
    contents(cached, every(data))
    read = cached.bytes_read - before
    if share == 1.0:
        assert read == 0
    elif share + ram == 0.0:
        assert read == sum(nbytes_of(data, example.name) for example in data.examples)
    else:
        largest = max(cached._reader.buffer_bytes(example.name) for example in data.examples)
        assert 0 < read <= total * (1 - share - ram) + 2 * largest  # what is left of each cache is less than a slide


def test_a_pass_left_in_the_middle_gives_its_room_in_the_cache_back(data):
    steps = every(data)
    feed = feed_of(data, cache=CachePlan(gpu_bytes=cohort_bytes(data)))
    for _ in range(3):
        with feed.window([step.visits for step in steps]) as window:
            window.batch(steps[0].packs[0], SCALES)
    contents(feed, steps)
    before = feed.bytes_read
    assert_same(contents(feed, steps), contents(feed_of(data), steps))
    assert feed.bytes_read == before


def test_kept_slides_do_not_hold_memory_of_the_reader(data):
    """The ring is as small as it can be: slides kept as views of it would be overwritten by the next ones."""
    feed = feed_of(data, replace(CONFIG, ahead_mib=1), CachePlan(gpu_bytes=cohort_bytes(data) // 2))
    for _ in range(3):
        assert_same(contents(feed, every(data)), contents(feed_of(data), every(data)))


def test_the_size_of_a_cohort_is_that_of_its_decoded_bags(data):
    stored = data.store.sql("SELECT sum(bytes) AS n FROM bags").to_pylist()[0]["n"]
    assert stored <= cohort_bytes(data) < 3 * stored + (1 << 20)


# -- copies ahead of the computation: what a GPU run does, here without one --------------------------


def numbers(n, seen):
    for i in range(n):
        seen.append(i)
        yield i


def test_a_thread_that_copies_ahead_keeps_the_order_and_stays_a_few_ahead():
    seen = []
    arriving = Arrivals(numbers(50, seen), CPU, threaded=True)
    taken = []
    for item in arriving:
        assert len(seen) <= item + 7  # four queued, one in hand, one waiting to be queued
        taken.append(item)
    assert taken == list(range(50))
    arriving.close()


def test_what_fails_in_the_copying_thread_is_raised_where_it_is_taken():
    def failing():
        yield 1
        raise OSError("the disk is gone")

    arriving = Arrivals(failing(), CPU, threaded=True)
    assert next(arriving) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(arriving)
    arriving.close()


def test_a_copying_thread_ends_when_nobody_takes_any_more():
    arriving = Arrivals(numbers(10_000, []), CPU, threaded=True)
    next(arriving)
    arriving.close()
    assert not arriving._thread.is_alive()
