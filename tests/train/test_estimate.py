"""A measured time is positive, grows with the work, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

from cftrain.errors import MissingScaleError
from cftrain.estimate import seconds_per_patch
from cftrain.models import build

CPU = torch.device("cpu")


def seconds(model, patches):
    used = sum(patches[scale] for scale in model.scales)
    return used * seconds_per_patch(model, patches, CPU, budget_seconds=0.3)


@pytest.mark.parametrize(("name", "options"), [("abmil", {}), ("crossfusion", {"embed_dim": 32}), ("dsmil", {})])
def test_a_slide_of_many_patches_takes_longer_than_one_of_few(name, options):
    model = build(name, 64, **options)
    few, many = ({5: n // 4, 10: n, 20: 4 * n} for n in (16, 1000))
    assert 1e-6 < seconds(model, few) < seconds(model, many) < 60


def test_only_the_scales_that_the_model_reads_count():
    """Were the 5x patches counted, each would take a ten-thousandth of it."""
    model = build("abmil", 64)
    alone, beside = ({20: 4000}, {5: 40_000_000, 20: 4000})
    both = [seconds_per_patch(model, patches, CPU, budget_seconds=0.3) for patches in (alone, beside)]
    assert 0.05 < both[0] / both[1] < 20


def test_one_repeat_is_made_whatever_the_budget():
    assert seconds_per_patch(build("abmil", 8), {20: 5}, CPU, budget_seconds=0.0) > 0


@pytest.mark.parametrize("training", [True, False])
def test_weights_gradients_mode_and_generators_stay(training):
    model = build("crossfusion", 12, embed_dim=8, n_heads=2).train(training)
    weights = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    state = torch.get_rng_state()
    seconds_per_patch(model, {5: 3, 10: 7, 20: 11}, CPU, budget_seconds=0.05)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert all(torch.equal(p, w) and (p.grad == 3.0).all() for p, w in zip(model.parameters(), weights, strict=True))


def test_a_missing_scale_is_named_and_leaves_the_model_as_it_was():
    model = build("crossfusion", 12, embed_dim=8, n_heads=2).eval()
    with pytest.raises(MissingScaleError, match="10x"):
        seconds_per_patch(model, {5: 3, 20: 4}, CPU)
    assert not model.training
