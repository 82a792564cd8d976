"""The losses against the authors' numbers, lifelines, probability theory, and cases worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from torch.testing import assert_close

from cftrain.errors import ConfigError, ShapeError
from cftrain.survival.losses import ce_survival, cox_loss, nll_survival

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


@pytest.mark.parametrize("loss", [nll_survival, ce_survival])
def test_reductions_agree_with_each_other(loss):
    logits, y, event = batch(13, 4, seed=8)
    each = loss(logits, y, event, alpha=0.2, reduction="none")
    assert each.shape == (13,)
    assert_close(loss(logits, y, event, alpha=0.2, reduction="sum"), each.sum())
    assert_close(loss(logits, y, event, alpha=0.2), each.sum() / 13)


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
@pytest.mark.parametrize("loss", [nll_survival, ce_survival, lambda x, y, event: cox_loss(x[:, 0], y.double(), event)])
def test_loss_is_computed_in_float32_unless_given_float64(loss, given, computed):
    logits, y, event = batch(11, 4, seed=2, dtype=given)
    found = loss(logits, y, event)
    assert found.dtype == computed
    assert_close(found, loss(logits.to(computed), y, event), rtol=0.0, atol=0.0)


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
@pytest.mark.parametrize("loss", [nll_survival, ce_survival])
def test_inputs_that_do_not_fit_are_named(loss, change, said):
    fitting = {
        "logits": torch.zeros(3, 4),
        "time_bin": torch.tensor([0, 3, 1]),
        "event": torch.tensor([True, False, True]),
    }
    assert loss(**fitting).isfinite()
    with pytest.raises(ShapeError, match=said):
        loss(**(fitting | change))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"alpha": -0.1}, "alpha is -0.1"), ({"alpha": 1.5}, "alpha is 1.5"), ({"reduction": "avg"}, "'avg'")],
    ids=["alpha-below-0", "alpha-above-1", "reduction"],
)
@pytest.mark.parametrize("loss", [nll_survival, ce_survival])
def test_options_without_a_meaning_are_refused(loss, options, said):
    with pytest.raises(ConfigError, match=said):
        loss(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([True]), **options)


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.2, 0.4, 1.0])
def test_cross_entropy_is_that_of_the_authors(golden, alpha):
    """But for the 1e-7 that they add to the chance of living up to the last bin, put in here."""
    rows = golden_rows(golden, alpha)
    h, y, c = (golden[name][rows] for name in ("hazards", "label", "censorship"))
    lived = torch.cumprod(torch.nn.functional.pad(1 - h, (1, 0), value=1.0), dim=1).gather(1, y[:, None]).squeeze(1)
    added = torch.where(c == 0, -alpha * torch.log1p(CLAMP / lived), 0.0)
    loss = ce_survival(logit(h), y, c == 0, alpha=alpha, reduction="none")
    assert_close(loss + added, golden["ce64"][rows], rtol=1e-8, atol=1e-8)


def test_cross_entropy_is_finite_where_that_of_the_authors_is_not(golden):
    """Their float32 loss is inf or NaN where survival rounds to 1; expected is theirs in float64, without roundings."""
    lost = ~golden["ce32"].isfinite()
    assert lost.sum() == 40
    h, y, c, alpha = (golden[name][lost] for name in ("hazards", "label", "censorship", "alpha"))
    found = [
        ce_survival(x[None], bin_[None], died[None], alpha=float(a)).double()
        for x, bin_, died, a in zip(logit(h).float(), y, c == 0, alpha, strict=True)
    ]
    log_lived = torch.nn.functional.pad(torch.log1p(-h).cumsum(dim=1), (1, 0))
    log_before, log_after = (log_lived.gather(1, bin_[:, None]).squeeze(1) for bin_ in (y, y + 1))
    in_bin = log_before + h.log().gather(1, y[:, None]).squeeze(1)
    dead = (1 - alpha) * -torch.log(-torch.expm1(log_after)) - alpha * in_bin
    assert_close(torch.stack(found), torch.where(c == 0, dead, (1 - alpha) * -log_after), rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_a_death_and_a_censoring_is_what_a_pencil_says():
    x = logit(torch.tensor([[0.2, 0.5, 0.1], [0.2, 0.5, 0.1]], dtype=torch.float64))
    y, event = torch.tensor([1, 1]), torch.tensor([True, False])
    loss = ce_survival(x, y, event, reduction="none")
    assert loss.tolist() == pytest.approx([-math.log(1 - 0.8 * 0.5), -math.log(0.8 * 0.5)])
    loss = ce_survival(x, y, event, alpha=0.25, reduction="none")
    assert loss[0].item() == pytest.approx(-0.75 * math.log(0.6) - 0.25 * math.log(0.8 * 0.5))
    assert loss[1].item() == pytest.approx(-0.75 * math.log(0.4))


@pytest.mark.parametrize("y", [0, 3])
def test_dead_and_alive_are_the_only_two_outcomes_of_the_cross_entropy(y):
    logits, _, _ = batch(17, 4, seed=6)
    bins = torch.full((17,), y)
    dead, alive = (
        ce_survival(logits, bins, torch.full((17,), died), reduction="none").neg().exp() for died in (True, False)
    )
    assert_close(dead + alive, torch.ones(17, dtype=torch.float64), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("B", "K"), [(1, 1), (7, 4), (32, 5)])
def test_gradient_of_the_cross_entropy_is_that_of_finite_differences(B, K):
    logits, y, event = batch(B, K, seed=43, scale=1.0)
    assert torch.autograd.gradcheck(lambda x: ce_survival(x, y, event, alpha=0.4), (logits.requires_grad_(),))


@pytest.mark.parametrize("size", [50.0, -50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("died", [True, False], ids=["died", "censored"])
def test_extreme_logits_keep_cross_entropy_and_gradient_finite(size, dtype, alpha, died):
    y = torch.arange(4)
    x = torch.full((4, 4), size, dtype=dtype, requires_grad=True)
    loss = ce_survival(x, y, torch.full((4,), died), alpha=alpha, reduction="none")
    loss.sum().backward()
    if size < 0:  # y + 1 bins, each a chance of exp(-50) to die
        expected = (1 - alpha) * (50 - torch.log(y + 1.0)) + alpha * 50 if died else torch.zeros(4)
    else:  # dead in the first bin for certain
        expected = alpha * 50.0 * y if died else (1 - alpha) * 50.0 * (y + 1)
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(x.grad).all()


def test_a_death_that_was_never_expected_gets_its_full_gradient():
    x = torch.tensor([[-50.0, -50.0]], requires_grad=True)
    ce_survival(x, torch.tensor([1]), torch.tensor([True])).backward()
    assert x.grad.tolist() == [pytest.approx([-0.5, -0.5], rel=1e-5)]


def step(B, seed, months=30, dtype=torch.float64):
    """Log hazards, whole months (so ties) and events of one step."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(1, months, (B,), generator=g).double(), torch.rand(B, generator=g) < 0.6


def partial_likelihood(x, time, event, ties):
    """The textbook, death by death."""
    total = 0.0
    for t in set(time[event].tolist()):
        risk = sum(math.exp(v) for v, s in zip(x, time, strict=True) if s >= t)
        dead = [float(v) for v, s, e in zip(x, time, event, strict=True) if s == t and e]
        tied = sum(math.exp(v) for v in dead)
        for i, v in enumerate(dead):
            total += v - math.log(risk - (i / len(dead) * tied if ties == "efron" else 0.0))
    return -total


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize(("B", "months"), [(1, 3), (2, 2), (9, 3), (32, 12), (60, 10_000)])
def test_cox_loss_is_the_partial_likelihood_of_the_textbook(B, months, ties):
    x, time, event = step(B, seed=B, months=months)
    event[0] = True
    expected = partial_likelihood(x, time, event, ties)
    assert cox_loss(x, time, event, ties=ties, reduction="sum").item() == pytest.approx(expected, rel=1e-12)
    assert cox_loss(x, time, event, ties=ties).item() == pytest.approx(expected / int(event.sum()), rel=1e-12)


def test_ties_are_broken_as_by_hand():
    """Hazards 2 and 3 die at month 1, 5 lives on: at risk 10 and 10, or 10 and 10 - 5/2."""
    x, time = torch.tensor([2.0, 3.0, 5.0]).double().log(), torch.tensor([1.0, 1.0, 2.0])
    event = torch.tensor([True, True, False])
    found = [cox_loss(x, time, event, ties=ties, reduction="sum").item() for ties in ("breslow", "efron")]
    assert found == pytest.approx([math.log(10 * 10 / 6), math.log(10 * 7.5 / 6)])


def test_a_slide_censored_at_the_time_of_a_death_is_still_at_risk():
    loss = cox_loss(torch.zeros(3), torch.tensor([4.0, 4.0, 1.0]), torch.tensor([True, False, True]), reduction="sum")
    assert loss.item() == pytest.approx(math.log(2) + math.log(3))


@pytest.mark.parametrize("months", [8, 10_000], ids=["many-ties", "hardly-any"])
def test_cox_loss_is_that_of_lifelines_and_lowest_where_lifelines_says(months):
    x, time, event = step(80, seed=11, months=months)
    table = pd.DataFrame({"x": x.numpy(), "time": time.numpy(), "event": event.numpy()})
    fitted = CoxPHFitter().fit(table, "time", "event", fit_options={"precision": 1e-10})
    beta = torch.tensor(float(fitted.params_["x"]), dtype=torch.float64, requires_grad=True)
    loss = cox_loss(beta * x, time, event, reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(-fitted.log_likelihood_, rel=1e-9)
    assert abs(beta.grad.item()) < 1e-5
    # and away from the optimum: at 0, which lifelines reports as the test against no effect
    without = cox_loss(0 * x, time, event, reduction="sum").item()
    assert 2 * (without - loss.item()) == pytest.approx(fitted.log_likelihood_ratio_test().test_statistic, rel=1e-6)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_gradient_is_that_of_finite_differences(ties):
    x, time, event = step(14, seed=3, months=5)
    assert torch.autograd.gradcheck(lambda x: cox_loss(x, time, event, ties=ties), (x.requires_grad_(),))


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_loss_knows_no_order_of_slides_and_no_baseline(ties):
    x, time, event = step(40, seed=4, months=6)
    loss = cox_loss(x, time, event, ties=ties)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert_close(cox_loss(x[order], time[order], event[order], ties=ties), loss, rtol=1e-13, atol=0.0)
    assert_close(cox_loss(x + 17.0, time, event, ties=ties), loss, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_log_hazards_keep_cox_loss_and_gradient_finite(dtype, ties):
    x = torch.tensor([50.0, -50.0, 50.0, -50.0, 50.0, -50.0], dtype=dtype, requires_grad=True)
    time, event = torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0, 3.0]), torch.ones(6, dtype=torch.bool)
    loss = cox_loss(x, time, event, ties=ties, reduction="sum")
    loss.backward()
    expected = partial_likelihood(x.detach().double(), time, event, ties)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_without_a_death_costs_nothing_and_moves_nothing(reduction):
    x, time, event = step(6, seed=2)
    x.requires_grad_()
    loss = cox_loss(x, time, torch.zeros_like(event), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert (x.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"log_hazard": torch.zeros(3, 1)}, "log_hazard is torch.float32 \\(3, 1\\)"),
        ({"log_hazard": torch.zeros(0)}, "at least one slide"),
        ({"log_hazard": torch.zeros(3, dtype=torch.int64)}, "give floats"),
        ({"time_months": torch.ones(2)}, "time_months is torch.float32 \\(2,\\)"),
        ({"time_months": torch.ones(3, dtype=torch.int64)}, "needs torch.float32 or torch.float64"),
        ({"time_months": torch.tensor([1.0, math.nan, 2.0])}, "time_months is nan in row 1"),
        ({"event": torch.ones(3)}, "event is torch.float32"),
    ],
)
def test_what_is_no_cox_step_is_named(change, said):
    fitting = {"log_hazard": torch.zeros(3), "time_months": torch.ones(3), "event": torch.ones(3, dtype=torch.bool)}
    assert cox_loss(**fitting).isfinite()
    with pytest.raises(ShapeError, match=said):
        cox_loss(**(fitting | change))


@pytest.mark.parametrize(
    ("options", "said"), [({"ties": "exact"}, "ties is 'exact'"), ({"reduction": "none"}, "reduction is 'none'")]
)
def test_cox_options_without_a_meaning_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        cox_loss(torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.bool), **options)
