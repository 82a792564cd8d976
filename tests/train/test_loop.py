"""Steps and predictions: packing, what is left over, the losses, what is not finite, and the schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from cftrain.config import DataConfig, TrainConfig
from cftrain.data import load_data
from cftrain.errors import NonFiniteError
from cftrain.feed import Feed
from cftrain.loop import Task, learning_rate, predict, train_step
from cftrain.models import build
from cftrain.order import Visit, pack_seed, packed
from cftrain.ranks import ALONE
from cftrain.survival import fit_bins
from cftrain.survival.losses import cox_loss, nll_survival

SCALES = (5, 10, 20)


@pytest.fixture(scope="module")
def data(demo_store):
    return load_data(demo_store.path, DataConfig(cohort="DEMO"), {"crossfusion": SCALES}, seed=0)


@pytest.fixture(scope="module")
def bins(data):
    labels = data.cohort.slides
    return fit_bins([slide.time_months for slide in labels], np.array([slide.event for slide in labels]), 4)


@pytest.fixture
def bags(data):
    """The bags of any visits of the cohort, straight from the store."""
    feed = Feed(data, SCALES, DataConfig(cohort="DEMO"), torch.device("cpu"))
    with feed.window([visits(data.examples)]) as window:
        yield partial(window.batch, scales=SCALES)


def visits(examples):
    return [Visit(example, place) for place, example in enumerate(examples)]


def task(chosen, batch_patches=8192, own=None):
    packs = packed(chosen, batch_patches)
    seeds = tuple(pack_seed(7, 0, 0, 0, pack) for pack in range(len(packs)))
    return Task(packs, tuple(range(len(packs))) if own is None else own, seeds)


def model(seed=0, n_bins=4, **options):
    torch.manual_seed(seed)
    chosen = {"embed_dim": 8, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0, **options}
    return build("crossfusion", 8, **chosen, n_bins=n_bins).double()


def after_step(net, todo, bags, bins, config=TrainConfig(), ranks=ALONE):  # noqa: B008 - frozen
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = train_step(net, optimizer, todo, bags, bins, config, ranks)
    return loss, flat(net)


def flat(net):
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


@pytest.mark.parametrize("loss", ["nll", "ce", "cox"])
@pytest.mark.parametrize("batch_patches", [1, 200, 10**6], ids=["one by one", "some together", "all together"])
def test_packing_slides_changes_neither_loss_nor_weights(data, bags, bins, batch_patches, loss):
    chosen, config = visits(data.examples)[:10], TrainConfig(loss=loss)
    n_bins = 1 if loss == "cox" else 4
    found, weights = after_step(model(n_bins=n_bins), task(chosen, batch_patches), bags, bins, config)
    other, expected = after_step(model(n_bins=n_bins), task(chosen, 1), bags, bins, config)
    assert found == pytest.approx(other, rel=1e-6)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-7)  # gradients pass through float32
    assert not torch.equal(weights, flat(model(n_bins=n_bins)))


def test_a_step_goes_down_the_mean_loss_of_its_slides(data, bags, bins):
    chosen = visits(data.examples)[:7]
    found, weights = after_step(model(), task(chosen, 150), bags, bins, TrainConfig(alpha=0.3))
    net = model()
    months = np.array([visit.example.time_months for visit in chosen])
    event = torch.tensor([visit.example.event for visit in chosen])
    loss = nll_survival(net(bags(chosen)).logits, torch.from_numpy(bins.assign(months)), event, alpha=0.3)
    loss.backward()
    loss = loss.detach()
    by_hand = torch.cat([(weight - 0.1 * weight.grad).detach().flatten() for weight in net.parameters()])
    assert found == pytest.approx(7 * float(loss), rel=1e-6)
    torch.testing.assert_close(weights, by_hand, rtol=0, atol=1e-7)


def test_a_cox_step_compares_all_slides_of_the_step_though_they_pass_one_by_one(data, bags, bins):
    chosen = visits(data.examples)[:9]
    net = model(n_bins=1)
    months = torch.tensor([visit.example.time_months for visit in chosen], dtype=torch.float64)
    event = torch.tensor([visit.example.event for visit in chosen])
    cox_loss(net(bags(chosen)).logits[:, 0], months, event, reduction="mean").backward()
    by_hand = torch.cat([(weight - 0.1 * weight.grad).detach().flatten() for weight in net.parameters()])
    _, weights = after_step(model(n_bins=1), task(chosen, 1), bags, bins, TrainConfig(loss="cox"))
    torch.testing.assert_close(weights, by_hand, rtol=1e-6, atol=1e-7)  # the likelihood is taken in float32


def test_dropout_masks_follow_the_seed_of_the_pass_whatever_ran_before(data, bags, bins):
    chosen = visits(data.examples)[:6]
    options = {"dropout": 0.5, "attention_dropout": 0.5}
    first = after_step(model(**options), task(chosen, 150), bags, bins)
    torch.manual_seed(99)
    torch.rand(1000)
    assert torch.equal(after_step(model(**options), task(chosen, 150), bags, bins)[1], first[1])
    other = replace(task(chosen, 150), seeds=tuple(seed + 1 for seed in task(chosen, 150).seeds))
    assert not torch.equal(after_step(model(**options), other, bags, bins)[1], first[1])


def test_predictions_are_deterministic_and_keep_the_order_of_the_visits(data, bags):
    chosen = visits(data.examples)
    net = model(dropout=0.5, attention_dropout=0.5)
    first = predict(net, task(chosen), bags, 4, ALONE)
    again = predict(net, task(chosen[::-1], 500), bags, 4, ALONE)
    torch.testing.assert_close(first, again.flip(0), rtol=0, atol=1e-12)
    alone = net.eval()(bags(chosen[3:4])).logits
    torch.testing.assert_close(first[3:4], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_a_slide_whose_features_are_not_finite_is_named_and_the_weights_are_left_alone(data, bags, bins, loss):
    chosen = visits(data.examples)[:6]
    poisoned = chosen[4].example.name

    def with_nan(pack):
        batch = bags(pack)
        if poisoned not in batch.slide_ids:
            return batch
        start = sum(batch.lengths[20][: batch.slide_ids.index(poisoned)])
        rows = batch.features[20].clone()
        rows[start] = math.nan
        return replace(batch, features={**batch.features, 20: rows})

    net = model(n_bins=1 if loss == "cox" else 4)
    before = flat(net)
    with pytest.raises(NonFiniteError, match=f"NaN or Inf on slides {poisoned};"):
        after_step(net, task(chosen), with_nan, bins, TrainConfig(loss=loss))
    assert torch.equal(flat(net), before)
    with pytest.raises(NonFiniteError, match=f"slide {poisoned}: the model predicts NaN"):
        predict(net, task(chosen, 1), with_nan, net.options.n_bins, ALONE)


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(data, bags, bins):
    """sqrt has an infinite slope at 0: the value is fine, what goes back is not."""
    chosen = visits(data.examples)[:5]
    odd = chosen[2].example.name
    net = model()
    net.odd_weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    plain = net.logits

    def logits(batch):
        found = plain(batch)
        row = torch.tensor([[float(name == odd)] for name in batch.slide_ids], dtype=torch.float64)
        return found + row * net.odd_weight.abs().sqrt() * (1 if odd in batch.slide_ids else 0)

    net.logits = logits
    before = flat(net)
    with pytest.raises(NonFiniteError, match=f"gradient is NaN or Inf on slides .*{odd}"):
        after_step(net, task(chosen, 1), bags, bins)
    assert torch.equal(flat(net), before)


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
