"""Training and evaluating: steps, packing, schedule, data order."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from cfstore import CohortSlide
from cftrain.config import DataConfig, TrainConfig
from cftrain.data import load_data
from cftrain.errors import NonFiniteError
from cftrain.feed import Feed
from cftrain.loop import evaluate, learning_rate, train_epoch
from cftrain.models import build
from cftrain.order import packed
from cftrain.survival import fit_bins

SCALES = (5, 10, 20)


@pytest.fixture(scope="module")
def data(demo_store):
    return load_data(demo_store.path, DataConfig(cohort="DEMO"), "crossfusion", SCALES, seed=0)


@pytest.fixture
def feed(data):
    return Feed(data, SCALES, DataConfig(cohort="DEMO"), torch.device("cpu"))


@pytest.fixture
def bins(data):
    slides = data.cohort.slides
    return fit_bins([slide.time_months for slide in slides], np.array([slide.event for slide in slides]), 4)


def model(seed=0, **options):
    torch.manual_seed(seed)
    chosen = {"embed_dim": 8, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0, **options}
    return build("crossfusion", 8, **chosen).double()


def weights_after(model, feed, slides, bins, config):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = train_epoch(model, optimizer, feed, slides, bins, config)
    return loss, torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("batch_patches", [1, 200, 10**6], ids=["one by one", "some together", "all together"])
def test_packing_slides_changes_neither_loss_nor_weights(data, feed, bins, batch_patches):
    slides = data.folds[0].train[:10]
    config = TrainConfig(accumulate=4, batch_patches=batch_patches)
    loss, weights = weights_after(model(), feed, slides, bins, config)
    alone_loss, alone = weights_after(model(), feed, slides, bins, replace(config, batch_patches=1))
    assert loss == pytest.approx(alone_loss, abs=1e-6)  # the loss itself is computed in float32 or better
    torch.testing.assert_close(weights, alone, rtol=0, atol=1e-8)


def test_the_slides_left_over_after_the_last_full_group_make_a_step_of_their_own(data, feed, bins):
    """Ten slides in groups of four: the result equals three explicit steps of 4, 4 and 2 slides."""
    slides = data.folds[0].train[:10]
    _, weights = weights_after(model(), feed, slides, bins, TrainConfig(accumulate=4))
    by_hand = model()
    for group in (slides[:4], slides[4:8], slides[8:]):
        _, last = weights_after(by_hand, feed, group, bins, TrainConfig(accumulate=len(group)))
    torch.testing.assert_close(weights, last, rtol=0, atol=1e-8)


def test_evaluation_is_deterministic_and_keeps_the_order_of_the_slides(data, feed, bins):
    slides = data.cohort.slides
    net = model(dropout=0.5, attention_dropout=0.5)
    first = evaluate(net, feed, slides, bins, 8192)
    again = evaluate(net, feed, tuple(reversed(slides)), bins, 500)
    np.testing.assert_allclose(first.risk, again.risk[::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(first.risk, -first.survival.sum(1), rtol=0, atol=1e-12)


def test_features_reach_the_model_as_the_store_holds_them(data, feed):
    group = data.cohort.slides[:3]
    ((batch, slides),) = feed.batches([group])
    assert [slide.slide_id for slide in slides] == list(batch.slide_ids)
    for scale in SCALES:
        stored = [data.store.slide(slide.slide_id).bags[scale].features for slide in group]
        np.testing.assert_array_equal(batch.features[scale].numpy(), np.concatenate(stored))


def test_a_diverged_loss_names_its_slides(data, feed, bins):
    net = model()
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match=data.folds[0].train[0].slide_id):
        weights_after(net, feed, data.folds[0].train[:2], bins, TrainConfig())
    with pytest.raises(NonFiniteError, match=data.folds[0].val[0].slide_id):
        evaluate(net, feed, data.folds[0].val, bins, 8192)


def test_the_default_schedule_falls_once_from_the_rate_to_a_tenth_of_it():
    config = TrainConfig(epochs=20, learning_rate=1e-3)
    rates = [learning_rate(config, epoch) for epoch in range(21)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[20] == pytest.approx(1e-4)
    assert all(a > b for a, b in pairwise(rates))


def test_the_papers_schedule_equals_pytorchs_cosine_annealing():
    config = TrainConfig(epochs=100, learning_rate=1e-4, cosine_epochs=10, final_learning_rate=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.0)
    for epoch in range(45):
        assert learning_rate(config, epoch) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        ([3, 3, 3], 6, [[3, 3], [3]]),
        ([9, 1, 1], 6, [[9], [1, 1]]),
        ([1, 9, 1], 6, [[1], [9], [1]]),
        ([2], 1, [[2]]),
        ([], 5, []),
    ],
)
def test_slides_are_packed_in_order_up_to_the_limit_and_large_ones_stand_alone(sizes, limit, groups):
    slides = [CohortSlide(f"s{i}", f"p{i}", 1.0, True, {20: size}) for i, size in enumerate(sizes)]
    found = packed(slides, limit)
    assert [[sum(slide.n_patches.values()) for slide in group] for group in found] == groups
    assert [slide for group in found for slide in group] == slides


def test_waiting_and_work_are_counted(data, feed, bins):
    evaluate(model(), feed, data.cohort.slides, bins, 8192)
    assert feed.work.n_slides == len(data.cohort.slides)
    assert feed.work.n_patches == sum(sum(slide.n_patches.values()) for slide in data.cohort.slides)
    assert feed.work.bytes_read == feed.work.n_patches * 8 * 2  # D=8, float16
    assert feed.work.wait_seconds > 0
