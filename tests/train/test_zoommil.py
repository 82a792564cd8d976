"""ZoomMIL against the released code's outputs, its formulas written out patch by patch, and cases worked by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.testing import assert_close

from cftrain.checkpoints import load_model
from cftrain.cli import main
from cftrain.errors import ConfigError, MissingExtraError
from cftrain.footprint import training_footprint
from cftrain.models import BagBatch, build, made_up_slide, zoommil
from cftrain.models.released import place, released_model
from cftrain.survival.losses import nll_survival
from cftrain.zoo.extras import parents

D, S = 10, 7
SMALL = {"hidden_dim": 8, "attention_dim": 5, "dropout": 0.0, "n_zoomed": 3, "n_samples": 20, "sigma": 0.05}
WEIGHTS = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
FULL = 12
"""Patches at 5x of the full pyramid."""


def small(**options):
    """In float64, every parameter moved so that none can hide."""
    torch.manual_seed(11)
    model = build("zoommil", D, **SMALL | {"n_children": S} | options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def slide(of_mid, of_high, n_low, seed=5):
    """Features and parents of a slide: the row of the coarser scale for each patch, -1 for none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {5: n_low, 10: len(of_mid), 20: len(of_high)}
    x = {scale: torch.randn(n, D, generator=generator, dtype=torch.float64) for scale, n in sizes.items()}
    return x, {parents(10, 5): torch.tensor(of_mid), parents(20, 10): torch.tensor(of_high)}


def full_slide(n_low=FULL):
    return slide([i // 4 for i in range(4 * n_low)], [i // 4 for i in range(16 * n_low)], n_low)


def torn_slide(n_low=6, seed=5):
    """Patches with no child to 7 children in no order, and patches without a parent."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(-1, n_low, (3 * n_low,), generator=generator)
    few[few == n_low - 1] = -1  # the last has none
    many = torch.randint(-1, 3 * n_low, (8 * n_low,), generator=generator)
    return slide(few.tolist(), many.tolist(), n_low, seed)


def pack(*slides):
    bags, extras = zip(*slides, strict=True)
    return BagBatch.pack([f"slide-{i}" for i in range(len(slides))], bags, extras)


def gradients(model, *batches):
    """Of all parameters, in the mode that the model is in; None where nothing comes."""
    model.zero_grad()
    for batch in batches:
        (model(batch).survival * WEIGHTS).sum().backward()
    return {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}


@pytest.fixture(scope="module")
def golden():
    def load(shared):
        with np.load(shared / "golden" / "ZoomMIL.npz") as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "cfg"}
        state = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}
        return arrays, state, released_model(state).double()

    return load


def golden_batch(arrays, case, dtype=torch.float64):
    x = {scale: arrays[f"in/{case}/x{scale}"][0].to(dtype) for scale in (5, 10, 20)}
    extras = {parents(10, 5): torch.arange(len(x[10])) // 4, parents(20, 10): torch.arange(len(x[20])) // 4}
    return BagBatch.pack([case], [x], [extras])


@pytest.mark.parametrize("case", ["odd", "few"])
def test_outputs_equal_the_released_ones_to_1e9_in_float64_and_to_1e5_in_float32(shared, golden, case):
    arrays, _, model = golden(shared)
    double, single = model(golden_batch(arrays, case)), model.float()(golden_batch(arrays, case, torch.float32))
    for field in ("logits", "hazards", "survival"):
        expected = arrays[f"out64/{case}/{field}"]
        assert_close(getattr(double, field).detach(), expected, rtol=0, atol=1e-9)
        assert_close(getattr(single, field).detach().double(), expected, rtol=0, atol=1e-5)


def gated(h, weight, name):
    content, gate = (h @ weight[f"{name}.attention_{part}.0.weight"].T + weight[f"{name}.attention_{part}.0.bias"]
                     for part in "ab")  # fmt: skip
    score = (content.tanh() * gate.sigmoid()) @ weight[f"{name}.attention_c.weight"][0]
    return (score + weight[f"{name}.attention_c.bias"]).softmax(dim=0)


def released_choice(z, k, noise, variant):
    """Rows of the choice [k, N]: hard, or by noise [S, N] with the gradient that `variant` names: z times a table."""
    k = min(k, len(z))
    if noise is None:
        return torch.eye(len(z), dtype=z.dtype)[z.topk(k).indices.sort().values]
    at = (z.detach() + SMALL["sigma"] * noise).topk(k, dim=1).indices.sort(dim=1).values
    indicators = torch.nn.functional.one_hot(at, len(z)).to(z.dtype)  # [S, k, N]
    if variant == "faithful":
        slope = torch.einsum("skn,sn->kn", indicators, noise) / len(noise)
        moved = slope * z
    else:
        slope = torch.einsum("skn,sm->knm", indicators - indicators.mean(dim=0), noise) / (len(noise) - 1)
        moved = slope @ z
    return indicators.mean(dim=0) + (moved - moved.detach()) / SMALL["sigma"]


def released_logits(weight, x, k, noises=(None, None), variant="faithful"):
    """The released model on a full pyramid: Kronecker products with the identity, then products."""
    choose = released_choice
    x5, x10, x20 = x[5], x[10], x[20]
    h1 = (x5 @ weight["fc_low_mag.0.weight"].T + weight["fc_low_mag.0.bias"]).relu()
    first = choose(gated(h1, weight, "aux_ga_low_mag"), k, noises[0], variant)
    h2 = torch.kron(first, torch.eye(4, dtype=first.dtype)) @ x10
    h2 = (h2 @ weight["fc_mid_mag.0.weight"].T + weight["fc_mid_mag.0.bias"]).relu()
    second = choose(gated(h2, weight, "aux_ga_mid_mag"), k, noises[1], variant)
    under_first = torch.kron(first, torch.eye(16, dtype=first.dtype)) @ x20
    h3 = torch.kron(second, torch.eye(4, dtype=first.dtype)) @ under_first
    h3 = (h3 @ weight["fc_high_mag.0.weight"].T + weight["fc_high_mag.0.bias"]).relu()
    M = sum(gated(h, weight, f"ga_{name}_mag") @ h for h, name in ((h1, "low"), (h2, "mid"), (h3, "high")))
    return M @ weight["classify_head.weight"].T + weight["classify_head.bias"]


def both_gradients(model, x, expected_of):
    """Logits and gradients, by released names and of features: ours, and those of the formulas."""
    names = {"fc_{}_mag.0": "{}.projection", "ga_{}_mag": "{}.attention", "aux_ga_{}_mag": "{}.zoom"}
    released = {"classify_head.weight": "head.weight", "classify_head.bias": "head.bias"}
    for scale in ("low", "mid", "high"):
        for theirs, ours in names.items():
            for key in dict(model.named_parameters()):
                if key.startswith(ours.format(scale) + "."):
                    tail = key.removeprefix(ours.format(scale))
                    for old, new in (("content", "attention_a.0"), ("gate", "attention_b.0"), ("score", "attention_c")):
                        tail = tail.replace(old, new)
                    released[theirs.format(scale) + tail] = key
    assert {place(theirs, "zoommil").name for theirs in released} == set(released.values())
    assert len(released) == len(list(model.parameters()))
    weight = {key: model.get_parameter(name).detach().clone().requires_grad_() for key, name in released.items()}
    ours_x, theirs_x = ({scale: rows.clone().requires_grad_() for scale, rows in x.items()} for _ in range(2))
    logits = model(pack((ours_x, full_slide()[1]))).logits[0]
    expected = expected_of(weight, theirs_x)
    (logits * WEIGHTS).sum().backward()
    (expected * WEIGHTS).sum().backward()
    assert_close(logits.detach(), expected.detach(), rtol=0, atol=1e-10)
    for key, name in released.items():
        found, want = model.get_parameter(name).grad, weight[key].grad
        assert (found is None) == (want is None), key
        if want is not None:
            assert_close(found, want, rtol=1e-9, atol=1e-10, msg=key)
    for scale in x:
        assert_close(ours_x[scale].grad, theirs_x[scale].grad, rtol=1e-9, atol=1e-10)
    return {name: model.get_parameter(name).grad for name in released.values()}


@pytest.mark.parametrize("n_children", [4, 9])
def test_on_full_pyramids_logits_and_gradients_are_those_of_the_released_formulas(n_children):
    model = small(n_children=n_children)
    found = both_gradients(model, full_slide()[0], lambda weight, x: released_logits(weight, x, 3))
    assert {name for name, gradient in found.items() if gradient is None} == {
        name
        for name in found
        if ".zoom." in name  # a hard choice passes no gradient
    }


@pytest.mark.parametrize("variant", ["faithful", "fixed"])
def test_in_training_too_with_the_noise_that_both_draw_and_the_choice_learns(variant):
    model = small(variant=variant, n_children=4).train()
    torch.manual_seed(7)
    noises = [torch.randn(20, n, dtype=torch.float64) for n in (FULL, 3 * 4)]
    torch.manual_seed(7)
    found = both_gradients(
        model, full_slide()[0], lambda weight, x: released_logits(weight, x, 3, noises, variant)
    )  # fmt: skip
    for name in ("low.zoom.score.weight", "mid.zoom.score.weight", "low.zoom.gate.weight", "mid.zoom.content.bias"):
        assert found[name].abs().max() > 1e-4, name


def soft(scores, mass):
    total = sum(m * s.exp() for s, m in zip(scores, mass, strict=True) if m > 0)
    return [m * s.exp() / total if m > 0 else 0.0 * s for s, m in zip(scores, mass, strict=True)]


def seen(level, places, x):
    """One scale, place by place; a place is {patch: share of its presence}. Weights, choice scores, M."""
    mass = [sum(place.values()) for place in places]
    empty = torch.zeros(x.shape[1], dtype=x.dtype)
    rows = [sum(share * x[f] for f, share in place.items()) / m if m else empty
            for place, m in zip(places, mass, strict=True)]  # fmt: skip
    h = [(level.projection.weight @ row + level.projection.bias).relu() for row in rows]

    def scores(attention):
        for each in h:
            content = (attention.content.weight @ each + attention.content.bias).tanh()
            gate = (attention.gate.weight @ each + attention.gate.bias).sigmoid()
            yield attention.score.weight[0] @ (content * gate) + attention.score.bias[0]

    weights = soft(list(scores(level.attention)), mass)
    zoom = soft(list(scores(level.zoom)), mass) if level.zoom else None
    return weights, zoom, sum(a * each for a, each in zip(weights, h, strict=True)), mass


def choose(zoom, mass, k, noise, sigma):
    """Of each draw the places chosen, ascending; one draw without noise where `noise` is None."""
    draws = [[0.0] * len(zoom)] if noise is None else noise.tolist()
    for draw in draws:
        there = [i for i, m in enumerate(mass) if m > 0]
        best = sorted(there, key=lambda i, draw=draw: -float(zoom[i].detach()) - sigma * draw[i])[:k]
        yield sorted(best)


def below(draws, places, parent, k, n_children):
    """The places of the finer scale: what each chosen place's patches have for children, shared among its places."""
    children = {}
    for f, p in enumerate(parent.tolist()):
        children.setdefault(p, []).append(f)
    found = [{} for _ in range(k * n_children)]
    for chosen in draws:
        for i, at in enumerate(chosen):
            mass = sum(places[at].values())
            for patch, share in places[at].items():
                for rank, f in enumerate(children.get(patch, [])):
                    held = found[i * n_children + rank % n_children]
                    held[f] = held.get(f, 0) + share / mass / len(draws)
    return found


def by_loops(model, x, extras, noises=(None, None)):
    """Logits of one slide, and of each scale what its patches receive."""
    options = model.options
    k, n_children, sigma = options.n_zoomed, options.n_children, options.sigma
    places, M, maps = [{i: 1.0} for i in range(len(x[5]))], 0, {}
    steps = ((5, model.low, (10, 5)), (10, model.mid, (20, 10)), (20, model.high, None))
    for (scale, level, finer), noise in zip(steps, (*noises, None), strict=True):
        weights, zoom, mean, mass = seen(level, places, x[scale])
        M, received = M + mean, [0.0] * len(x[scale])
        for held, a, m in zip(places, weights, mass, strict=True):
            for f, share in held.items():
                received[f] += float(a.detach()) * share / m
        maps[f"attention-{scale}x"] = received
        if finer:
            draws = list(choose(zoom, mass, k, noise, sigma))
            places = below(draws, places, extras[parents(*finer)], k, n_children)
    return model.head.weight @ M + model.head.bias, maps


ORPHANS = slide([-1] * 5, [0, 0, 1, 2], 4)
CHILDLESS = slide([0, 1, 1, 2], [-1, -1, -1], 3)
SLIDES = {
    "full": full_slide(4),
    "children missing, more than four, and without parents": torn_slide(),
    "one patch a scale": slide([0], [0], 1),
    "nothing to zoom into": ORPHANS,
    "nothing at the last scale": CHILDLESS,
}


@pytest.mark.parametrize("n_children", [2, 3, 9])
@pytest.mark.parametrize("which", SLIDES.values(), ids=SLIDES.keys())
def test_logits_and_maps_are_those_of_the_formulas_patch_by_patch(which, n_children):
    x, extras = which
    model = small(n_children=n_children)
    logits, maps = model.logits_and_maps(pack(which))
    expected, received = by_loops(model, x, extras)
    assert_close(logits[0], expected.detach(), rtol=0, atol=1e-10)
    for name, scores in received.items():
        assert maps[name].scores[0].tolist() == pytest.approx(scores, abs=1e-12), name
        assert maps[name].elsewhere[0] + sum(scores) == pytest.approx(1, abs=1e-12)
    assert list(maps) == list(received)


@pytest.mark.parametrize("n_children", [2, 9])
@pytest.mark.parametrize("which", SLIDES.values(), ids=SLIDES.keys())
def test_in_training_they_are_those_of_the_formulas_draw_by_draw(which, n_children):
    x, extras = which
    model = small(n_children=n_children).train()
    torch.manual_seed(7)
    noises = [torch.randn(20, n, dtype=torch.float64) for n in (len(x[5]), 3 * n_children)]
    torch.manual_seed(7)
    found = model(pack(which)).logits[0]
    assert_close(found, by_loops(model, x, extras, noises)[0], rtol=0, atol=1e-10)
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def smooth_choice(scores, k, **_):
    """Rows that add up to 1 and have derivatives everywhere, in place of the choice by noise."""
    sharper = torch.arange(1, k + 1, dtype=scores.dtype).unsqueeze(1)
    return (20 * sharper * scores).softmax(dim=1)


def test_what_follows_a_choice_has_exact_derivatives_where_children_are_missing_and_share_places(monkeypatch):
    """By finite differences: which patches a place holds, and whether it is there at all, move with the choice."""
    monkeypatch.setattr(zoommil, "perturbed_topk", smooth_choice)
    x, extras = torn_slide(4)
    model = small(n_children=2, attention_dim=2).train()

    def logits(of_low, of_mid):
        return model(pack((x | {5: of_low, 10: of_mid}, extras))).logits

    inputs = [x[scale].clone().requires_grad_() for scale in (5, 10)]
    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)


def test_what_cannot_be_zoomed_into_adds_nothing():
    """M is that of 5x alone, by the released formulas, and maps say that the rest is elsewhere."""
    model = small()
    logits, maps = model.logits_and_maps(pack(ORPHANS))
    h = (ORPHANS[0][5] @ model.low.projection.weight.T + model.low.projection.bias).relu()
    assert_close(logits[0], (model.head(model.low.attention(h)[:, 0].softmax(dim=0) @ h)).detach())
    assert [each.elsewhere for each in maps.values()] == [(0.0,), (1.0,), (1.0,)]
    _, maps = model.logits_and_maps(pack(CHILDLESS))
    assert [each.elsewhere for each in maps.values()] == [(0.0,), (0.0,), (1.0,)]
    assert maps["attention-20x"].scores[0].tolist() == [0, 0, 0]


def test_three_children_in_two_places_worked_by_hand():
    """One patch at 5x; children 2, 6 and 4 of D = 1. The first and the third share a place: mean 3, counted twice."""
    model = build("zoommil", 1, hidden_dim=1, attention_dim=1, dropout=0.0, n_children=2, n_bins=1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for level in (model.low, model.mid, model.high):
            level.projection.weight.fill_(1)
        model.head.weight.fill_(1)
    x = {5: torch.tensor([[0.0]]), 10: torch.tensor([[2.0], [6.0], [4.0]]), 20: torch.tensor([[9.0]])}
    extras = {parents(10, 5): torch.zeros(3).long(), parents(20, 10): torch.tensor([-1])}
    logits, maps = model.logits_and_maps(pack((x, extras)))
    assert logits.item() == pytest.approx((2 * 3 + 6) / 3)
    assert maps["attention-10x"].scores[0].tolist() == pytest.approx([1 / 3] * 3)
    with torch.no_grad():  # attention now prefers 6: exp(tanh(6) / 2) against twice exp(tanh(3) / 2)
        model.mid.attention.content.weight.fill_(1)
        model.mid.attention.score.weight.fill_(1)
    shared, own = 2 * np.exp(np.tanh(3) / 2), np.exp(np.tanh(6) / 2)
    logits, maps = model.logits_and_maps(pack((x, extras)))
    assert logits.item() == pytest.approx((3 * shared + 6 * own) / (shared + own))
    expected = np.array([shared / 2, own, shared / 2]) / (shared + own)
    assert maps["attention-10x"].scores[0].tolist() == pytest.approx(expected.tolist())


def test_a_batch_of_unequal_slides_gives_the_logits_gradients_and_maps_of_each_alone():
    model = small(n_children=2)
    slides = [torn_slide(4, seed=1), full_slide(1), torn_slide(9, seed=2), ORPHANS, torn_slide(5, seed=3)]
    together, alone = pack(*slides), [pack(each) for each in slides]
    assert_close(model(together).logits, torch.cat([model(batch).logits for batch in alone]), rtol=0, atol=1e-10)
    assert_close(gradients(model, together), gradients(model, *alone), rtol=0, atol=1e-10)
    found, expected = model.patch_maps(together), [model.patch_maps(batch) for batch in alone]
    for name, each in found.items():
        for scores, other in zip(each.scores, expected, strict=True):
            assert_close(scores, other[name].scores[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("at", ["low", "mid"])
def test_the_choice_learns_towards_the_patch_that_lowers_the_loss(at):
    """Two patches at 5x, or two children of one: what lies under the second has the feature that the head wants."""
    torch.manual_seed(2)
    model = build("zoommil", 2, hidden_dim=4, attention_dim=4, dropout=0.0, n_zoomed=1, sigma=0.2, n_bins=1)
    deep = torch.tensor([[0.0, 0.0]] * 4 + [[0.0, 5.0]] * 4)
    if at == "low":
        x = {5: torch.tensor([[1.0, 0], [0, 1.0]]), 10: torch.zeros(8, 2), 20: deep}
        of_mid, of_high = torch.arange(8) // 4, torch.arange(8)
    else:
        x = {5: torch.zeros(1, 2), 10: torch.tensor([[1.0, 0], [0, 1.0]]), 20: deep}
        of_mid, of_high = torch.zeros(2).long(), torch.arange(8) // 4
    batch = pack((x, {parents(10, 5): of_mid, parents(20, 10): of_high}))
    level = getattr(model, at)

    def preferred():
        h = level.projection(x[5 if at == "low" else 10]).relu()
        first, second = level.zoom(h)[:, 0].tolist()
        return second - first

    with torch.no_grad():
        model.high.projection.weight.copy_(torch.tensor([[0.0, 1.0]] * 4))
        model.head.weight.fill_(1)
    before = preferred()
    optimizer = torch.optim.SGD(level.zoom.parameters(), lr=0.5)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        (-model(batch).logits.sum()).backward()
        optimizer.step()
    assert preferred() > before + 0.5


def test_it_learns_what_only_the_finest_scale_shows():
    """Slides whose 20x patches under one of six 5x patches carry a mark, against slides without."""
    torch.manual_seed(0)
    model = build("zoommil", D, hidden_dim=16, attention_dim=8, n_zoomed=4, n_bins=2, dropout=0.0)
    slides = [full_slide(6) for _ in range(8)]
    for i, (x, _) in enumerate(slides):
        x.update({scale: torch.randn(rows.shape) for scale, rows in x.items()})
        if i % 2:
            x[5][3], x[20][48:64, 0] = x[5][3] + 1, 4.0
    batch = pack(*slides)
    time_bin, event = torch.tensor([0, 1] * 4), torch.ones(8, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nll_survival(model.train()(batch).logits, time_bin, event)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3
    risk = model.eval()(batch).risk
    assert risk[0::2].min() > risk[1::2].max()


OPTIONS = {
    "hidden_dim": 9,
    "attention_dim": 6,
    "dropout": 0.5,
    "n_zoomed": 2,
    "sigma": 0.5,
    "n_samples": 19,
    "n_children": 2,
}


@pytest.mark.parametrize(("option", "value"), OPTIONS.items())
def test_every_option_changes_what_training_sees(option, value):
    def trained(**options):
        model = build("zoommil", D, **SMALL | options).double().train()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).cos().view_as(parameter))
        return model(pack(torn_slide())).logits

    assert torch.equal(trained(), trained())
    assert not torch.equal(trained(), trained(**{option: value}))


def test_the_variant_changes_gradients_in_training_and_nothing_in_evaluation():
    fixed, faithful = small(), small(variant="faithful")
    batch = pack(torn_slide())
    assert torch.equal(fixed(batch).logits, faithful(batch).logits)
    found = []
    for model in (fixed, faithful):
        torch.manual_seed(3)
        found.append(gradients(model.train(), batch))
    torch.manual_seed(3)
    logits = fixed(batch).logits
    torch.manual_seed(3)
    assert torch.equal(logits, faithful(batch).logits)
    assert (found[0]["low.zoom.score.weight"] - found[1]["low.zoom.score.weight"]).abs().max() > 1e-3
    assert_close(found[0]["head.weight"], found[1]["head.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0}, "sigma must be above 0, got 0"),
        ({"sigma": float("nan")}, "sigma must be above 0, got nan"),
        ({"n_samples": 1}, "n_samples must be at least 2, got 1"),
        ({"n_children": 0}, "n_children must be at least 1"),
        ({"n_zoomed": 0}, "n_zoomed must be at least 1"),
        ({"variant": "quick"}, "variant must be fixed or faithful, got 'quick'"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build("zoommil", D, **options)


def test_a_batch_without_parents_is_refused_by_name():
    x, extras = full_slide(2)
    del extras[parents(20, 10)]
    with pytest.raises(MissingExtraError, match="slide-0: zoommil needs 10x parents of 20x patches"):
        small()(pack((x, extras)))


def test_default_models_have_as_many_parameters_as_the_released_one():
    """Three projections, five gated attentions, a head."""
    gates = 2 * (512 * 256 + 256) + 256 + 1
    with torch.device("meta"):
        model = build("zoommil", 1024)
    assert sum(each.numel() for each in model.parameters()) == 3 * (1024 + 1) * 512 + 5 * gates + (512 + 1) * 4


def test_bfloat16_autocast_stays_close_and_trains():
    model = small(n_children=9).float()
    x, extras = torn_slide()
    batch = pack(({scale: rows.half() for scale, rows in x.items()}, extras))
    expected = model(batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(batch).logits.float(), expected, rtol=0, atol=0.1)
        model.train()(batch).risk.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("patches", [{5: 3, 10: 16, 20: 41}, {5: 70, 10: 205, 20: 611}], ids=["small", "larger"])
def test_what_is_counted_as_saved_is_what_autograd_keeps_of_a_real_step(patches):
    options = {**SMALL, "dropout": 0.25}
    model = build("zoommil", D, **options).train()
    batch, kept = made_up_slide(patches, D, model.options.extras()), {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(batch).logits
    for other in (*model.parameters(), *batch.features.values(), *batch.extras.values(), logits):
        kept.pop(other.untyped_storage()._cdata, None)
    found = training_footprint("zoommil", options, D, patches, device_type="cpu")
    assert found.saved == pytest.approx(sum(each.nbytes() for each in kept.values()), rel=0.02, abs=1024)


def test_released_weights_become_a_model_with_the_same_answers(shared, golden, tmp_path):
    arrays, state, model = golden(shared)
    torch.save({key: value.float() for key, value in state.items()}, tmp_path / "zoom.pt")
    done = CliRunner().invoke(main, ["import-weights", str(tmp_path / "zoom.pt"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["model"], told["feature_dim"]) == ("zoommil", 96)
    assert {key: told["options"][key] for key in ("hidden_dim", "attention_dim", "n_bins", "n_zoomed", "variant")} == {
        "hidden_dim": 64, "attention_dim": 32, "n_bins": 4, "n_zoomed": 12, "variant": "faithful",
    }  # fmt: skip
    again = load_model(tmp_path / "zoom.safetensors").double()
    batch = golden_batch(arrays, "odd")
    assert_close(again(batch).logits, model(batch).logits, rtol=0, atol=1e-12)
    assert len(load_file(tmp_path / "zoom.safetensors")) == len(state)
