"""DeepGraphSurv against its formulas written out on dense tables, in NumPy, and their gradients."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from cftrain.errors import ConfigError, MissingExtraError
from cftrain.footprint import training_footprint
from cftrain.models import BagBatch, build
from cftrain.zoo.extras import nearest, similar

D, K = 12, 3
SMALL = {"hidden_dim": 6, "k": K}
CONVOLUTIONS = [{"conv": "gin"}, {"conv": "cheb"}, {"conv": "cheb", "cheb_order": 1}, {"conv": "cheb", "cheb_order": 4}]
NAMES = ["gin", "cheb", "cheb of one term", "cheb of four"]


def lists_of(n, k=K, seed=1):
    """Up to k others of each patch, some places empty."""
    rng = np.random.default_rng(seed)
    lists = np.full((n, k), -1)
    for i in range(n):
        others = rng.permutation([j for j in range(n) if j != i])[:k]
        lists[i, : len(others)] = np.where(rng.random(len(others)) < 0.2, -1, others)
    return torch.from_numpy(lists)


def slide(n, extra=similar, seed=1):
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {20: x}, {extra(20, K): lists_of(n, seed=seed)}


def pack(*slides):
    bags, extras = zip(*slides, strict=True)
    return BagBatch.pack([f"slide-{i}" for i in range(len(bags))], bags, extras)


def small(**options):
    torch.manual_seed(11)
    model = build("deepgraphsurv", D, **{**SMALL, **options}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gives_to(lists):
    """Table [N, N]: 1 where the patch of the column lists that of the row."""
    table = np.zeros((len(lists), len(lists)))
    for source, targets in enumerate(lists.tolist()):
        for target in targets:
            if target >= 0:
                table[target, source] = 1
    return table


def scaled_laplacian(lists):
    """2 L / 2 - 1 of the symmetric normalised Laplacian L of all pairs of which one lists the other."""
    table = np.maximum(gives_to(lists), gives_to(lists).T)
    degree = table.sum(axis=1)
    half = np.diag([1 / np.sqrt(d) if d else 0.0 for d in degree])
    laplacian = np.eye(len(table)) - half @ table @ half
    return laplacian - np.eye(len(table))


def plain(state, x, lists, conv):
    """Logits [1, K] and weights [N] of one slide, on tables, differentiable in the state and x."""

    def linear(rows, name):
        out = rows @ state[f"{name}.weight"].T
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out

    def gin(h, name):
        summed = h + torch.from_numpy(gives_to(lists)) @ h
        return linear(torch.relu(linear(summed, f"{name}.up")), f"{name}.down")

    def cheb(h, name):
        scaled = torch.from_numpy(scaled_laplacian(lists))
        terms = [h, scaled @ h]
        out, at = state[f"{name}.bias"], 0
        while f"{name}.terms.{at}.weight" in state:
            if at == len(terms):
                terms.append(2 * scaled @ terms[-1] - terms[-2])
            out = out + linear(terms[at], f"{name}.terms.{at}")
            at += 1
        return out

    h = x
    for at in range(3):
        h = torch.relu({"gin": gin, "cheb": cheb}[conv](h, f"convolutions.{at}"))
    content, gate = linear(h, "head.attention.content"), linear(h, "head.attention.gate")
    weights = linear(torch.tanh(content) * torch.sigmoid(gate), "head.attention.score")[:, 0].softmax(dim=0)
    z = (weights[:, None] * h).sum(dim=0, keepdim=True)
    return linear(torch.relu(linear(z, "head.projection")), "head.classifier"), weights


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=NAMES)
def test_logits_maps_and_gradients_equal_the_formulas_on_dense_tables(options, n):
    model, (bag, extras) = small(**options), slide(n)
    state = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    x = bag[20].clone().requires_grad_()
    logits, weights = plain(state, x, extras[similar(20, K)], options["conv"])
    batch = pack(({20: bag[20].requires_grad_()}, extras))
    assert_close(model.logits(batch), logits, rtol=0, atol=1e-12)
    found = model.patch_maps(batch)["attention"]
    assert_close(found.scores[0], weights.detach(), rtol=0, atol=1e-12)
    assert found.elsewhere == (0.0,)
    direction = torch.tensor([[1.0, -2.0, 3.0, 0.5]], dtype=torch.float64)
    (logits * direction).sum().backward()
    (model.logits(batch) * direction).sum().backward()
    assert_close(bag[20].grad, x.grad, rtol=0, atol=1e-10)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(gradients, {name: value.grad for name, value in state.items()}, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", CONVOLUTIONS[:2], ids=NAMES[:2])
def test_three_unequal_slides_packed_equal_the_three_alone_with_gradients_and_maps(options):
    model, slides = small(**options), [slide(4), slide(1), slide(70)]
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)

    def gradients(outputs):
        model.zero_grad()
        sum((output.survival * weights).sum() for output in outputs).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    together, alone = model(pack(*slides)), [model(pack(each)) for each in slides]
    assert_close(together.logits, torch.cat([output.logits for output in alone]), rtol=0, atol=1e-12)
    assert_close(gradients([together]), gradients(alone), rtol=0, atol=1e-10)
    maps = model.patch_maps(pack(*slides))["attention"]
    for i, each in enumerate(slides):
        assert_close(maps.scores[i], model.patch_maps(pack(each))["attention"].scores[0], rtol=0, atol=1e-12)


def test_the_graph_is_in_features_or_in_space():
    assert build("deepgraphsurv", D).options.extras() == (similar(20, 8),)
    assert small(scale=10).options.extras() == (similar(10, K),)
    model = small(graph="space")
    assert model.options.extras() == (nearest(20, K),)
    other = small()
    found = model.logits(pack(slide(9, nearest)))
    assert torch.equal(found, other.logits(pack(slide(9))))
    with pytest.raises(MissingExtraError, match="slide-0: deepgraphsurv needs 3 nearest patches at 20x"):
        model(pack(slide(9)))
    with pytest.raises(MissingExtraError, match="slide-0: deepgraphsurv needs 3 similar patches at 20x"):
        other(pack(slide(9, nearest)))


def test_a_polynomial_of_more_terms_sees_farther():
    """Three convolutions of K terms see 3 (K - 1) steps along a line."""
    n = 12
    lists = torch.tensor([[i + 1] for i in range(n - 1)] + [[-1]])
    x = slide(n)[0][20]
    changed = x.clone()
    changed[0] += 1
    for order, steps in ((1, 0), (2, 3), (3, 6)):
        model, seen = small(conv="cheb", cheb_order=order, k=1, hidden_dim=16), []
        model.convolutions[-1].register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        for rows in (x, changed):
            model.logits(pack(({20: rows}, {similar(20, 1): lists})))
        moved = (seen[0] - seen[1]).abs().amax(dim=1) > 0
        assert moved.tolist() == [i <= steps for i in range(n)]


def test_default_sizes_are_those_of_deep_graph_conv():
    """Three networks of two layers 256 wide, two gates and their score, a layer and the logits."""
    with torch.device("meta"):
        model = build("deepgraphsurv", 1024)
    square = 256 * 256 + 256
    expected = 1024 * 256 + 256 + 5 * square + 2 * square + 257 + square + 4 * 257
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_dropout_acts_in_training_only():
    batch = pack(slide(30))
    model, without = small(dropout=0.5), small(dropout=0.0)
    assert torch.equal(model.logits(batch), without.logits(batch))
    assert torch.equal(without.train().logits(batch), without.eval().logits(batch))
    assert not torch.equal(model.train().logits(batch), without.logits(batch))


def test_dropout_acts_in_both_gates_and_before_the_logits():
    model, shapes = small(dropout=0.5).train(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    model.logits(pack(slide(30), slide(4)))
    assert shapes == [(34, 6), (34, 6), (2, 6)]


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="graph must be features or space, got 'latent'"):
        build("deepgraphsurv", D, graph="latent")
    with pytest.raises(ConfigError, match="conv must be gin or cheb, got 'gcn'"):
        build("deepgraphsurv", D, conv="gcn")
    with pytest.raises(ConfigError, match="cheb_order must be at least 1, got 0"):
        build("deepgraphsurv", D, cheb_order=0)


@pytest.mark.parametrize("options", CONVOLUTIONS[:2], ids=NAMES[:2])
def test_bfloat16_autocast_stays_close_and_answers_in_float32(options):
    model = small(**options).float()
    batch = pack(slide(19), slide(5)).to(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    assert output.survival.dtype == torch.float32
    assert_close(output.logits, model(batch).logits, rtol=0.05, atol=0.1)
    output.risk.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("options", CONVOLUTIONS[:2], ids=NAMES[:2])
def test_it_learns_what_only_the_graph_tells(options):
    """Ones and minus ones in equal numbers: in half of the slides equals list equals, in the others opposites."""
    generator = torch.Generator().manual_seed(0)

    def task(alike):
        sign = torch.ones(20).repeat_interleave(2) * torch.tensor([1.0, -1.0]).repeat(20)
        x = sign[:, None] + 0.1 * torch.randn(40, D, generator=generator)
        return {20: x}, {similar(20, 1): ((torch.arange(40) + (2 if alike else 1)) % 40)[:, None]}

    torch.manual_seed(0)
    model = build("deepgraphsurv", D, hidden_dim=8, k=1, dropout=0.0, n_bins=1, **options).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    event = torch.tensor([[1.0], [0.0]] * 4)
    losses = []
    for _ in range(40):
        loss = functional.binary_cross_entropy_with_logits(
            model.logits(pack(*[task(alike) for alike in (True, False) * 4])), event
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.2 < 0.5 < losses[0]


@pytest.mark.parametrize("options", CONVOLUTIONS[:2], ids=NAMES[:2])
def test_the_largest_slide_fits_into_4_gib(options):
    """Counted on fake tensors; features are half a GiB of it."""
    assert training_footprint("deepgraphsurv", options, 1024, {20: 137_990}, device_type="cpu").total < 4 * 2**30
