"""The hazard likelihood against the authors' numbers, probability theory, and cases worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cftrain.errors import ConfigError, ShapeError
from cftrain.survival.losses import nll_survival

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "golden" / "losses.npz"
CLAMP = 1e-7  # of the reference; below it h and S are cut off there, and kept here


def batch(B, K, seed, dtype=torch.float64, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, K, generator=g, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, K, (B,), generator=g), torch.rand(B, generator=g) < 0.5


def logit(hazards):
    return torch.log(hazards) - torch.log1p(-hazards)


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here")
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(np.atleast_1d(arrays[name])) for name in arrays.files}


def beyond_the_clamp(hazards, label):
    """Rows in which the reference clamps nothing that its loss uses."""
    survived = torch.nn.functional.pad(torch.cumprod(1 - hazards, dim=1), (1, 0), value=1.0)
    used = [t.gather(1, y[:, None]) for t, y in ((survived, label), (survived, label + 1), (hazards, label))]
    open_interval = ((hazards > 0) & (hazards < 1)).all(dim=1)
    return open_interval & (torch.cat(used, dim=1) > CLAMP).all(dim=1)


def golden_rows(golden, alpha):
    rows = beyond_the_clamp(golden["hazards"], golden["label"]) & (golden["alpha"] == alpha)
    assert rows.sum() > 50
    return rows


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.2, 0.4, 1.0])
def test_loss_and_gradient_are_those_of_the_authors(golden, alpha):
    rows = golden_rows(golden, alpha)
    h, y, c = (golden[name][rows] for name in ("hazards", "label", "censorship"))
    x = logit(h).requires_grad_()
    loss = nll_survival(x, y, c == 0, alpha=alpha, reduction="none")
    loss.sum().backward()
    assert_close(loss, golden["nll64"][rows], rtol=1e-8, atol=1e-8)
    by_hazard = golden["nll64_grad_hazards"][rows]
    assert_close(x.grad, by_hazard * h * (1 - h), rtol=1e-6, atol=1e-8)


def test_float32_loss_is_that_of_the_authors_in_float32(golden):
    rows = golden_rows(golden, 0.2)
    x, y, c = logit(golden["hazards"][rows]).float(), golden["label"][rows], golden["censorship"][rows]
    loss = nll_survival(x, y, c == 0, alpha=0.2, reduction="none")
    assert loss.dtype == torch.float32
    assert_close(loss, golden["nll64"][rows].float(), rtol=1e-5, atol=1e-6)


def test_a_batch_costs_the_mean_that_the_authors_find(golden):
    x = logit(golden["batch_hazards"])
    loss = nll_survival(x, golden["batch_label"], golden["batch_c"] == 0, alpha=0.2)
    assert_close(loss, golden["batch_nll_a02"][0], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("y", [0, 1, 2, 3])
@pytest.mark.parametrize("died", [True, False], ids=["died", "censored"])
def test_at_even_hazards_each_bin_lived_through_costs_log_2(y, died):
    loss = nll_survival(torch.zeros(1, 4), torch.tensor([y]), torch.tensor([died]))
    assert loss.item() == pytest.approx((y + 1) * math.log(2), rel=1e-6)


def test_a_death_and_a_censoring_cost_what_a_pencil_says():
    x = logit(torch.tensor([[0.2, 0.5, 0.1], [0.2, 0.5, 0.1]], dtype=torch.float64))
    loss = nll_survival(x, torch.tensor([1, 1]), torch.tensor([True, False]), alpha=0.25, reduction="none")
    assert loss.tolist() == pytest.approx([-math.log(0.8 * 0.5), -0.75 * math.log(0.8 * 0.5)])
    loss = nll_survival(x, torch.tensor([2, 0]), torch.tensor([True, False]), alpha=0.25, reduction="none")
    assert loss.tolist() == pytest.approx([-math.log(0.8 * 0.5 * 0.1), -0.75 * math.log(0.8)])


@pytest.mark.parametrize(("B", "K"), [(1, 1), (7, 4), (33, 5)])
def test_likelihoods_of_all_outcomes_add_up_to_1(B, K):
    logits, _, _ = batch(B, K, seed=B)
    outcomes = [(y, True) for y in range(K)] + [(K - 1, False)]
    total = sum(
        nll_survival(logits, torch.full((B,), y), torch.full((B,), died), reduction="none").neg().exp()
        for y, died in outcomes
    )
    assert_close(total, torch.ones(B, dtype=torch.float64), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("B", "K"), [(1, 4), (7, 4), (3, 1), (32, 5)])
def test_gradient_is_that_of_finite_differences(B, K):
    logits, y, event = batch(B, K, seed=42, scale=1.0)
    assert torch.autograd.gradcheck(lambda x: nll_survival(x, y, event, alpha=0.4), (logits.requires_grad_(),))


@pytest.mark.parametrize("size", [50.0, -50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("died", [True, False], ids=["died", "censored"])
def test_extreme_logits_keep_loss_and_gradient_finite(size, dtype, died):
    y = torch.arange(4)
    x = torch.full((4, 4), size, dtype=dtype, requires_grad=True)
    loss = nll_survival(x, y, torch.full((4,), died), reduction="none")
    loss.sum().backward()
    hopeless, harmless = 50.0 * (y + (0 if died else 1)), torch.full((4,), 50.0 if died else 0.0)
    assert_close(loss, (hopeless if size > 0 else harmless).float(), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(x.grad).all()


def test_a_hopeless_logit_still_gets_its_full_gradient():
    x = torch.tensor([[-50.0]], requires_grad=True)
    nll_survival(x, torch.tensor([0]), torch.tensor([True])).backward()
    assert x.grad.item() == pytest.approx(-1.0)


def test_bins_after_the_last_follow_up_get_no_gradient():
    logits, y, event = batch(19, 6, seed=5)
    x = logits.requires_grad_()
    nll_survival(x, y, event).backward()
    later = torch.arange(6) > y[:, None]
    assert (x.grad[later] == 0).all()
    assert (x.grad[~later] != 0).all()


def test_alpha_1_leaves_censored_slides_without_cost_or_gradient():
    logits, y, _ = batch(5, 4, seed=1)
    x = logits.requires_grad_()
    loss = nll_survival(x, y, torch.zeros(5, dtype=torch.bool), alpha=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert (x.grad == 0).all()


def test_reductions_agree_with_each_other():
    logits, y, event = batch(13, 4, seed=8)
    each = nll_survival(logits, y, event, alpha=0.2, reduction="none")
    assert each.shape == (13,)
    assert_close(nll_survival(logits, y, event, alpha=0.2, reduction="sum"), each.sum())
    assert_close(nll_survival(logits, y, event, alpha=0.2), each.sum() / 13)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_loss_is_computed_in_float32_unless_given_float64(given, computed):
    logits, y, event = batch(11, 4, seed=2, dtype=given)
    loss = nll_survival(logits, y, event)
    assert loss.dtype == computed
    assert_close(loss, nll_survival(logits.to(computed), y, event), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.zeros(4)}, "logits"),
        ({"logits": torch.zeros(0, 4)}, "at least one slide"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "give floats"),
        ({"time_bin": torch.zeros(2, dtype=torch.int64)}, "time_bin is torch.int64 \\(2,\\)"),
        ({"time_bin": torch.zeros(3, 1, dtype=torch.int64)}, "time_bin is torch.int64 \\(3, 1\\)"),
        ({"time_bin": torch.zeros(3)}, "time_bin is torch.float32"),
        ({"event": torch.zeros(3)}, "event is torch.float32"),
        ({"event": torch.zeros(4, dtype=torch.bool)}, "event is torch.bool \\(4,\\)"),
        ({"time_bin": torch.tensor([0, 4, 1])}, "spans 0…4: logits of 4 bins need 0…3"),
        ({"time_bin": torch.tensor([0, -1, 1])}, "spans -1…1"),
    ],
    ids=[
        "flat-logits",
        "no-slides",
        "int-logits",
        "fewer-bins",
        "column-of-bins",
        "float-bins",
        "float-event",
        "more-events",
        "bin-too-late",
        "bin-below-0",
    ],
)
def test_inputs_that_do_not_fit_are_named(change, said):
    fitting = {
        "logits": torch.zeros(3, 4),
        "time_bin": torch.tensor([0, 3, 1]),
        "event": torch.tensor([True, False, True]),
    }
    assert nll_survival(**fitting).isfinite()
    with pytest.raises(ShapeError, match=said):
        nll_survival(**(fitting | change))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"alpha": -0.1}, "alpha is -0.1"), ({"alpha": 1.5}, "alpha is 1.5"), ({"reduction": "avg"}, "'avg'")],
    ids=["alpha-below-0", "alpha-above-1", "reduction"],
)
def test_options_without_a_meaning_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        nll_survival(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([True]), **options)
