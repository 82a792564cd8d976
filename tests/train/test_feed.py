"""Batches from the store: the same whatever the readers, the caches and the place where an epoch goes on."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import cfstore
from cftrain.cache import NO_CACHE, CachePlan
from cftrain.config import DataConfig, TrainConfig
from cftrain.data import load_data
from cftrain.feed import Feed, cohort_bytes
from cftrain.loop import train_epoch
from cftrain.models import build
from cftrain.order import LoaderState, epoch_slides, training_batches
from cftrain.survival import fit_bins

SCALES = (5, 10, 20)
CONFIG = DataConfig(cohort="DEMO")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float16", "int8"])
def data(request, demo_store, tmp_path_factory):
    """A cohort in a store of floats, and of int8."""
    if request.param == "float16":
        return load_data(demo_store.path, CONFIG, "crossfusion", SCALES, seed=0)
    base = tmp_path_factory.mktemp("int8")
    source = demo_store.sql("SELECT source FROM bags LIMIT 1").to_pylist()[0]["source"]
    shutil.copytree(source.split("/h5/")[0] + "/h5", base / "h5")
    store = cfstore.open(base / "store", create=True)
    store.ingest(base / "h5", cfstore.IngestOptions(encoder="toy", dtype="int8"))
    return load_data(store.path, CONFIG, "crossfusion", SCALES, seed=0)


def feed_of(data, config=CONFIG, cache=NO_CACHE):
    return Feed(data, SCALES, config, CPU, cache)


def contents(batches):
    """What came: names and copies of the numbers, so that no memory of the reader stays in use."""
    return [
        (batch.slide_ids, {scale: batch.features[scale].clone() for scale in SCALES}, batch.lengths)
        for batch, _ in batches
    ]


def assert_same(found, expected):
    assert [names for names, _, _ in found] == [names for names, _, _ in expected]
    for (_, one, n), (_, other, m) in zip(found, expected, strict=True):
        assert n == m
        for scale in SCALES:
            assert one[scale].dtype == other[scale].dtype
            assert torch.equal(one[scale], other[scale])


def groups_of(data, weights=None, epoch=0, **steps):
    fold = data.folds[0]
    slides = epoch_slides(LoaderState(seed=7, epoch=epoch), fold, weights)
    return [batch.slides for batch in training_batches(slides, 4, 150, **steps)]


def heavy(data):
    """Weights that draw a few slides many times."""
    return np.where(np.arange(len(data.folds[0].train)) < 3, 50.0, 1.0)


def test_batches_hold_what_the_store_holds(data):
    for batch, group in feed_of(data).batches(groups_of(data)):
        for scale in SCALES:
            stored = [data.store.slide(slide.slide_id).bags[scale].features for slide in group]
            np.testing.assert_array_equal(batch.features[scale].numpy(), np.concatenate(stored))


@pytest.mark.parametrize(("readers", "ahead"), [(1, 1), (2, 16), (5, 3)])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_epoch_cut_anywhere_goes_on_exactly_whatever_the_readers(data, readers, ahead, step):
    config = replace(CONFIG, readers=readers, ahead=ahead, ahead_mib=1)
    weights = heavy(data)
    whole = contents(feed_of(data).batches(groups_of(data, weights)))
    rest = groups_of(data, weights, first_step=step)
    assert_same(contents(feed_of(data, config).batches(rest)), whole[len(whole) - len(rest) :])


def test_training_that_goes_on_at_a_step_ends_with_the_weights_of_an_uninterrupted_epoch(data):
    slides = epoch_slides(LoaderState(7, 0), data.folds[0])
    labels = data.cohort.slides
    bins = fit_bins([s.time_months for s in labels], np.array([s.event for s in labels]), 4)
    config = TrainConfig(accumulate=4, batch_patches=150)

    def trained(*parts):
        torch.manual_seed(0)
        model = build("crossfusion", 8, embed_dim=8, n_heads=2, dropout=0.0, attention_dropout=0.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for number, (visited, first_step) in enumerate(parts):
            feed = feed_of(data, replace(CONFIG, readers=1 + 2 * number))
            train_epoch(model, optimizer, feed, visited, bins, config, first_step=first_step)
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    assert torch.equal(trained((slides, 0)), trained((slides[:8], 0), (slides, 2)))


@pytest.mark.parametrize("weighted", [False, True], ids=["each slide once", "slides many times"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ram", [0.0, 0.3])
def test_caches_change_no_batch_and_save_exactly_the_reads_of_what_they_hold(data, weighted, share, ram):
    total = cohort_bytes(data)
    cached = feed_of(data, cache=CachePlan(int(total * share), int(total * ram)))
    weights = heavy(data) if weighted else None
    for epoch in range(3):
        groups = groups_of(data, weights, epoch)
        assert_same(contents(cached.batches(groups)), contents(feed_of(data).batches(groups)))
        gc.collect()
    every = [[slide] for slide in data.cohort.slides]
    contents(cached.batches(every))
    contents(cached.batches(every))
    before = cached.work
    contents(cached.batches(every))
    read = cached.work.since(before).bytes_read
    if share == 1.0:
        assert read == 0
    elif share + ram == 0.0:
        assert read == sum(data.store.reader("toy", SCALES, [s[0].slide_id]).read(s[0].slide_id).nbytes for s in every)
    else:
        largest = max(data.store.reader("toy", SCALES, [s[0].slide_id]).buffer_bytes(s[0].slide_id) for s in every)
        assert 0 < read <= total * (1 - share - ram) + 2 * largest  # what is left of each cache is less than a slide


def test_a_slide_drawn_twice_is_read_once_where_the_device_keeps_it(data):
    slide = data.cohort.slides[0]
    feed = feed_of(data, cache=CachePlan(gpu_bytes=cohort_bytes(data)))
    found = contents(feed.batches([[slide, slide], [slide]]))
    nbytes = data.store.reader("toy", SCALES, [slide.slide_id]).read(slide.slide_id).nbytes
    assert feed.work.bytes_read == nbytes
    assert feed.work.n_slides == 3
    assert torch.equal(found[1][1][20], found[0][1][20][: found[1][2][20][0]])


def test_an_epoch_left_in_the_middle_gives_its_room_in_the_cache_back(data):
    every = [[slide] for slide in data.cohort.slides]
    feed = feed_of(data, cache=CachePlan(gpu_bytes=cohort_bytes(data)))
    for _ in range(3):
        batches = feed.batches(every)
        next(batches)
        batches.close()
    contents(feed.batches(every))
    before = feed.work
    assert_same(contents(feed.batches(every)), contents(feed_of(data).batches(every)))
    assert feed.work.since(before).bytes_read == 0


def test_two_streams_at_once_do_not_disturb_each_other(data):
    every = [[slide] for slide in data.cohort.slides]
    feed = feed_of(data, cache=CachePlan(gpu_bytes=cohort_bytes(data)))
    one, other = feed.batches(every), feed.batches(every[::-1])
    pairs = [(contents([a])[0], contents([b])[0]) for a, b in zip(one, other, strict=True)]
    expected = contents(feed_of(data).batches(every))
    assert_same([a for a, _ in pairs], expected)
    assert_same([b for _, b in pairs], expected[::-1])


def test_kept_slides_do_not_hold_memory_of_the_reader(data):
    """The ring is as small as it can be: slides kept as views of it would be overwritten by the next ones."""
    feed = feed_of(data, replace(CONFIG, ahead_mib=1), CachePlan(gpu_bytes=cohort_bytes(data) // 2))
    every = [[slide] for slide in data.cohort.slides]
    for _ in range(3):
        assert_same(contents(feed.batches(every)), contents(feed_of(data).batches(every)))


def test_the_size_of_a_cohort_is_that_of_its_decoded_bags(data):
    stored = data.store.sql("SELECT sum(bytes) AS n FROM bags").to_pylist()[0]["n"]
    assert stored <= cohort_bytes(data) < 3 * stored + (1 << 20)
