"""SCMIL against its formulas, written out patch by patch; its clusters, its mixture against exact numbers."""

import dataclasses
import math
import warnings

import mpmath
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch.testing import assert_close

from cftrain.checkpoints import load_model, save_weights
from cftrain.errors import ConfigError, MissingExtraError
from cftrain.footprint import training_footprint
from cftrain.models import BagBatch, build, made_up_slide, slide_clusters
from cftrain.models.slide_clusters import kmeans, nearest_centres, standardised
from cftrain.models.survival_mixture import SurvivalMixture, inverse_softplus
from cftrain.survival.losses import nll_survival
from cftrain.zoo.extras import coords

D = 12
OPTIONS = {"filter_dim": 5, "cluster_size": 6, "n_heads": 3, "attention_dim": 7}
MDN = {"head": "mdn", "mdn_dim": 6, "n_components": 9}
COORDS = coords(20)


class Fold:
    """What the mixture reads of a training fold."""

    def __init__(self, edges=(7.5, 20.25, 100.5), time_months=(3.0, 150.5, 60.0)):
        self.edges, self.time_months = edges, np.array(time_months)


def far_from_zero(model):
    """In float64, every parameter moved so that none can hide."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def small(**options):
    torch.manual_seed(11)
    model = far_from_zero(build("scmil", D, **{**OPTIONS, **options}))
    with torch.no_grad():
        model.filter[2].bias.sub_(1.2)  # about half of the patches are kept
    model.fit(Fold())
    return model


def draw(*sizes):
    """Slides of some kinds of patches, in no order, on places of a grid."""
    generator = torch.Generator().manual_seed(5)
    kinds = 2 * torch.randn(5, D, generator=generator, dtype=torch.float64)
    slides = []
    for n in sizes:
        noise = torch.randn(n, D, generator=generator, dtype=torch.float64)
        x = kinds[torch.randint(5, (n,), generator=generator)] + noise
        places = 256 * torch.randint(60, (n, 2), generator=generator).int()
        slides.append(({20: x}, {COORDS: places}))
    return slides


def pack(slides):
    return BagBatch.pack(
        [f"slide-{i}" for i in range(len(slides))], [bag for bag, _ in slides], [extras for _, extras in slides]
    )


# ---- the formulas, written out


def plain_kmeans(points, n, iterations):
    """Distances one by one; the start is the one thing taken over: it is a draw."""
    centres = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:n].numpy()].copy()
    labels = None
    for iteration in range(iterations):
        distances = np.array([[((point - centre) ** 2).sum() for centre in centres] for point in points])
        found = distances.argmin(axis=1)
        if labels is not None and (found == labels).all():
            break
        labels = found
        if iteration < iterations - 1:
            for cluster in range(n):
                if (labels == cluster).any():
                    centres[cluster] = points[labels == cluster].mean(axis=0)
    return labels


def plain_clusters(x, places, options):
    """Lists of rows that attend to each other."""
    n = len(x) // options.cluster_size
    if n < 2:
        return [list(range(len(x)))] if len(x) else []
    f, c = x.detach().numpy(), places.numpy().astype(np.float64)
    weight = options.coordinate_weight
    f, c = (1 - weight) * (f - f.mean()) / f.std(ddof=1), weight * (c - c.mean()) / c.std(ddof=1)
    labels = plain_kmeans(np.hstack([f, c]), n, options.kmeans_iterations)
    found = []
    for cluster in range(n):
        rows = [row for row in range(len(x)) if labels[row] == cluster]
        if len(rows) < 2 * options.cluster_size:
            found += [rows] if rows else []
        else:
            found += [run.tolist() for run in np.array_split(rows, len(rows) // options.cluster_size)]
    return found


def plain_attention(model, rows):
    """All heads of one cluster from full tables: [M, D] to [M, D]."""
    weight, bias = model.context.query_key_value.weight, model.context.query_key_value.bias
    q, k, v = (rows @ weight[part].T + bias[part] for part in (slice(D), slice(D, 2 * D), slice(2 * D, None)))
    heads, width = [], D // model.context.n_heads
    for head in range(model.context.n_heads):
        own = slice(head * width, (head + 1) * width)
        heads.append(((q[:, own] @ k[:, own].T) / math.sqrt(width)).softmax(dim=1) @ v[:, own])
    return torch.cat(heads, dim=1) @ model.context.out.weight.T + model.context.out.bias


def plain_slide(model, slide):
    """y [N, D], the pooling's weights [N], p [N] and the clusters of one slide."""
    (bag, extras), first, last = slide, model.filter[0], model.filter[2]
    f = bag[20]
    hidden = f @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    p = 1 / (1 + torch.exp(-(hidden @ last.weight[0] + last.bias)))
    x = torch.stack([p_n * f_n for p_n, f_n in zip(p, f, strict=True)])
    kept = [n for n in range(len(f)) if p[n] > 0.5]
    clusters = [[kept[row] for row in rows] for rows in plain_clusters(x[kept], extras[COORDS][kept], model.options)]
    y = list(x)
    for rows in clusters:
        for row, added in zip(rows, plain_attention(model, x[rows]), strict=True):
            y[row] = x[row] + added
    y, gates = torch.stack(y), model.attention
    gated = torch.tanh(y @ gates.content.weight.T + gates.content.bias) * torch.sigmoid(
        y @ gates.gate.weight.T + gates.gate.bias
    )
    weight = torch.exp(gated @ gates.score.weight[0] + gates.score.bias)
    return y, weight / weight.sum(), p, clusters


def plain_logits(model, slides):
    pooled = []
    for slide in slides:
        y, a, _, _ = plain_slide(model, slide)
        pooled.append(sum(a_n * y_n for a_n, y_n in zip(a, y, strict=True)))
    return torch.stack(pooled) @ model.head.weight.T + model.head.bias


def gradients(model, logits):
    model.zero_grad()
    (logits * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("weight", [0.2, 0.7, 0.0])
def test_logits_and_gradients_equal_the_formulas_written_out(weight):
    model, slides = small(coordinate_weight=weight), draw(90, 1, 25)
    _, _, p, clusters = plain_slide(model, slides[0])
    assert 24 < (p > 0.5).sum() < 90  # some are kept, in several clusters, and some are not
    assert len(clusters) > 3
    expected = plain_logits(model, slides)
    found = model.logits(pack(slides))
    assert_close(found, expected, rtol=0, atol=1e-10)
    assert_close(gradients(model, found), gradients(model, expected), rtol=0, atol=1e-9)


def test_maps_are_the_weights_of_the_pooling_and_the_shares_of_the_filter():
    model, slides = small(), draw(90, 1, 25)
    logits, maps = model.logits_and_maps(pack(slides))
    assert_close(logits, plain_logits(model, slides).detach(), rtol=0, atol=1e-10)
    assert list(maps) == ["attention", "filter"]
    for i, slide in enumerate(slides):
        _, a, p, _ = plain_slide(model, slide)
        assert_close(maps["attention"].scores[i], a.detach(), rtol=0, atol=1e-12)
        assert_close(maps["filter"].scores[i], (p / p.sum()).detach(), rtol=0, atol=1e-12)
    assert maps["attention"].elsewhere == maps["filter"].elsewhere == (0.0, 0.0, 0.0)


def by_hand(bias):
    """Two features, one head; the filter opens by `bias` alone, values are the patches, the pooling is a mean."""
    model = build("scmil", 2, filter_dim=1, n_heads=1, attention_dim=1, n_bins=2).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.filter[2].bias.fill_(bias)
        model.context.query_key_value.weight[4:] = torch.eye(2)  # queries and keys are 0: each sees all alike
        model.context.out.weight.copy_(torch.eye(2))
        model.head.weight.copy_(torch.eye(2))
    return model


def test_a_slide_worked_by_hand():
    """p = 0.75 keeps both patches: each adds their mean, 0.75 · (2, 3), to itself. p = 0.25 adds nothing to any."""
    batch = made_up_slide({20: 2}, 2, [COORDS])
    batch.features[20].copy_(torch.tensor([[1.0, 6.0], [3.0, 0.0]]))
    assert by_hand(math.log(3)).logits(batch)[0].tolist() == pytest.approx([2 * 0.75 * 2, 2 * 0.75 * 3])
    assert by_hand(-math.log(3)).logits(batch)[0].tolist() == pytest.approx([0.25 * 2, 0.25 * 3])
    assert by_hand(0.0).logits(batch)[0].tolist() == pytest.approx([0.5 * 2, 0.5 * 3])  # p > 0.5, not p = 0.5


def test_a_batch_without_a_kept_patch_skips_attention_and_its_weights_get_gradients_of_zero():
    model, slides = small(), draw(30, 1)
    with torch.no_grad():
        model.filter[2].bias.fill_(-50)
        model.filter[2].weight.mul_(0.1)
    found = model.logits(pack(slides))
    assert_close(found, plain_logits(model, slides), rtol=0, atol=1e-12)
    of_weights = gradients(model, found)
    assert set(of_weights) == {name for name, _ in model.named_parameters()}
    assert all((each == 0).all() for name, each in of_weights.items() if name.startswith("context"))


@pytest.mark.parametrize("options", [{}, MDN, {"coordinate_weight": 0.0}], ids=["hazards", "mdn", "no coordinates"])
def test_three_unequal_slides_packed_equal_the_three_alone_with_gradients_and_maps(options):
    model, slides = small(**options), draw(70, 1, 33)
    alone = [pack([slide]) for slide in slides]
    together, apart = model.logits(pack(slides)), torch.cat([model.logits(batch) for batch in alone])
    assert_close(together, apart, rtol=0, atol=1e-10)
    assert_close(gradients(model, together), gradients(model, apart), rtol=0, atol=1e-10)
    for name, found in model.patch_maps(pack(slides)).items():
        for scores, batch in zip(found.scores, alone, strict=True):
            assert_close(scores, model.patch_maps(batch)[name].scores[0], rtol=0, atol=1e-12)


# ---- clusters


def rows_of(n, width=4, seed=3):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("moves", [1, 2, 4, 100])
def test_clusters_are_those_of_scikit_learn_from_the_same_start(moves):
    """Its iterations count moves of the centres, and rows are assigned once more behind the last."""
    points = rows_of(400)
    start = points[torch.randperm(400, generator=torch.Generator().manual_seed(1))[:6]].numpy()
    expected = KMeans(6, init=start, n_init=1, max_iter=moves, tol=0, algorithm="lloyd")
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        expected.fit(points.numpy())
    assert kmeans(points, 6, iterations=moves + 1).tolist() == expected.labels_.tolist()


def test_equally_near_centres_give_a_row_to_the_first():
    centres = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    points = torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    assert nearest_centres(points, centres).tolist() == [0, 0, 1]


def test_a_centre_without_rows_stays_and_leaves_no_cluster():
    """Of 12 equal rows and 12 others drawn as centres, several are equal: the first of them takes all such rows."""
    points = torch.cat([torch.zeros(30, 2), 5 + rows_of(6, 2).float()])
    labels = kmeans(points, 12, iterations=5)
    assert len(set(labels[:30].tolist())) == 1
    assert set(labels[:30].tolist()).isdisjoint(labels[30:].tolist())
    found = slide_clusters.slide_clusters(points, None, weight=0.0, size=3, iterations=5)
    assert sum(found.sizes) == 36
    assert min(found.sizes) > 0
    assert sorted(found.order.tolist()) == list(range(36))


def test_identical_rows_are_one_cluster_cut_into_runs_as_stored():
    found = slide_clusters.slide_clusters(torch.ones(26, 3), None, weight=0.0, size=8, iterations=5)
    assert found.order.tolist() == list(range(26))
    assert found.sizes == (9, 9, 8)


def test_runs_are_near_equal_and_below_twice_the_size():
    assert slide_clusters._cut(127, 64) == (127,)
    assert slide_clusters._cut(128, 64) == (64, 64)
    assert slide_clusters._cut(191, 64) == (96, 95)
    assert slide_clusters._cut(200, 64) == (67, 67, 66)
    assert slide_clusters._cut(5, 64) == (5,)


def test_fewer_rows_than_two_clusters_need_are_one_cluster_as_stored():
    found = slide_clusters.slide_clusters(rows_of(127), None, weight=0.0, size=64, iterations=5)
    assert (found.order.tolist(), found.sizes) == (list(range(127)), (127,))


def test_features_and_coordinates_are_standardised_over_all_their_entries():
    """Features 0, 2, 4, 6: mean 3, std √(20/3). Coordinates 0, 0, 0, 8: mean 2, std 4."""
    found = standardised(torch.tensor([[0.0, 2.0], [4.0, 6.0]]), torch.tensor([[0, 0], [0, 8]]).int(), 0.25)
    s = 0.75 / math.sqrt(20 / 3)
    expected = [[-3 * s, -1 * s, -0.125, -0.125], [1 * s, 3 * s, -0.125, 0.375]]
    assert_close(found, torch.tensor(expected))
    even = standardised(torch.ones(3, 2), torch.full((3, 2), 512), 0.2)
    assert even.isfinite().all()


def test_clusters_hold_neighbours_where_only_the_place_differs():
    """Equal features, two distant groups of places, stored in turns."""
    places = torch.tensor([[0, 0], [90_000, 90_000]]).repeat(8, 1) + torch.arange(16).unsqueeze(1)
    found = slide_clusters.slide_clusters(torch.ones(16, 4), places, weight=0.2, size=8, iterations=5)
    assert {tuple(sorted(own.tolist())) for own in found.order.split(found.sizes)} == {
        tuple(range(0, 16, 2)),
        tuple(range(1, 16, 2)),
    }


def test_clusters_depend_on_no_other_slide_and_on_no_state_of_the_random_generators():
    model, slides = small(), draw(70, 40)
    batch, first = pack(slides), pack(slides[:1])

    def found(of):
        score = model.filter(of.features[20])
        return model._clusters(score.sigmoid() * of.features[20], score, of)

    torch.manual_seed(1)
    own, state = found(first), torch.get_rng_state()
    torch.manual_seed(2)
    both = found(batch)
    n = len(own.order)
    assert torch.equal(both.order[:n], own.order)
    assert both.sizes[: len(own.sizes)] == own.sizes
    torch.set_rng_state(state)
    found(batch)
    assert torch.equal(torch.get_rng_state(), state)


def test_distances_are_held_in_blocks(monkeypatch):
    points = rows_of(500)
    expected = kmeans(points, 9, 5)
    monkeypatch.setattr(slide_clusters, "_BLOCK_ELEMENTS", 9 * 16)
    blocks = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kw: blocks.append(args[1].shape[0]) or addmm(*args, **kw))
    assert torch.equal(kmeans(points, 9, 5), expected)
    assert max(blocks) == 16


# ---- options


CHANGES = {
    "cluster_size": 11,
    "kmeans_iterations": 1,
    "coordinate_weight": 0.9,
    "n_heads": 2,
}


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_that_leaves_the_weights_as_they_are_changes_the_answer(option):
    model, other, batch = small(), small(**{option: CHANGES[option]}), pack(draw(90))
    other.load_state_dict(model.state_dict())
    assert (model.logits(batch) - other.logits(batch)).abs().max() > 1e-6
    assert_close(other.logits(batch), plain_logits(other, draw(90)), rtol=0, atol=1e-10)


def test_options_set_the_widths():
    shapes = {name: tuple(p.shape) for name, p in build("scmil", D, **OPTIONS, **MDN, n_bins=3).named_parameters()}
    assert shapes["filter.0.weight"] == (5, D)
    assert shapes["attention.content.weight"] == (7, D)
    assert (shapes["head.weights.0.weight"], shapes["head.weights.3.weight"]) == ((6, D), (6, 6))
    assert (shapes["head.weights.6.weight"], shapes["head.mu.weight"]) == ((9, 6), (9, 9))
    assert shapes["head.sigma.weight"] == (9, 1)


def test_it_has_as_many_parameters_as_a_pencil_says():
    with torch.device("meta"):
        model = build("scmil", 1024)
    filtered, context = 1024 * 256 + 256 + 256 + 1, 4 * (1024 * 1024 + 1024)
    pooled, head = 2 * (1024 * 256 + 256) + 256 + 1, 1024 * 4 + 4
    assert sum(parameter.numel() for parameter in model.parameters()) == filtered + context + pooled + head


def test_without_a_weight_of_coordinates_none_are_needed():
    model = small(coordinate_weight=0.0)
    assert model.options.extras() == ()
    assert small().options.extras() == (COORDS,)
    assert build("scmil", D, **OPTIONS, scale=10).options.extras() == (coords(10),)
    bags = [bag for bag, _ in draw(40)]
    assert model.logits(BagBatch.pack(["slide"], bags)).shape == (1, 4)
    with pytest.raises(MissingExtraError, match="slide: scmil needs coordinates at 20x, which the batch lacks"):
        small().logits(BagBatch.pack(["slide"], bags))


@pytest.mark.parametrize("options", [{}, MDN], ids=["hazards", "mdn"])
def test_dropout_acts_in_training_only(options):
    model, without, batch = small(dropout=0.5, **options), small(dropout=0.0, **options), pack(draw(60))
    without.load_state_dict(model.state_dict())
    assert torch.equal(model.logits(batch), without.logits(batch))
    assert torch.equal(without.train().logits(batch), without.eval().logits(batch))
    assert not torch.equal(model.train().logits(batch), model.eval().logits(batch))


REFUSED = {
    "a width that the heads do not divide": ({"n_heads": 8}, "12 features and n_heads=8; set n_heads to 6"),
    "a head nobody wrote": ({"head": "cox"}, "head must be hazards or mdn, got 'cox'"),
    "no weight for features": ({"coordinate_weight": 1.0}, "coordinate_weight must be at least 0 and below 1"),
    "no patch in a cluster": ({"cluster_size": 0}, "cluster_size must be at least 1"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build("scmil", D, **{**OPTIONS, **options})


# ---- the mixture


def exact_logits(head, z, ends):
    """The formulas in 60 digits, component by component."""
    with torch.no_grad():
        w = head.weights(z)[0].softmax(dim=0).tolist()
        mu = head.mu(head.mu_register).clamp(-200, 200).tolist()
        raw = (head.sigma.weight[:, 0] + head.sigma.bias).tolist()
    with mpmath.workdps(60):
        sigma = [min(max(mpmath.log(1 + mpmath.e**r), mpmath.mpf("0.01")), 100) for r in raw]

        def died(t):
            y = mpmath.log(mpmath.e ** mpmath.mpf(t) - 1 + mpmath.mpf("1e-6"))
            return sum(mpmath.mpf(a) * mpmath.ncdf((y - m) / s) for a, m, s in zip(w, mu, sigma, strict=True))

        found, before = [], mpmath.mpf(0)
        for t in ends:
            now = died(t)
            found.append(float(mpmath.log((now - before + 1e-6) / (1 - now + 1e-6))))
            before = now
    return found


@pytest.mark.parametrize("spread", [1.0, 300.0], ids=["as it starts", "beyond all limits"])
def test_hazards_are_those_of_the_mixture_between_the_edges_in_60_digits(spread):
    """Wide spreads: some components beyond 200 months either way, of widths below 0.01 and above 100."""
    torch.manual_seed(4)
    head = SurvivalMixture(D, 8, 10, 4, dropout=0.25).double().eval()
    with torch.no_grad():
        head.sigma.weight.mul_(spread)
        head.mu.bias.copy_(spread * rows_of(1, 10)[0])
    fold = Fold()
    head.fit(fold)
    z = rows_of(1, D)
    assert head(z)[0].tolist() == pytest.approx(exact_logits(head, z, (*fold.edges, 150.5)), abs=1e-9)


def test_a_component_is_a_hundredth_wide_at_least():
    """The edge is one of its widths before its middle, so 15.87 % die by then; the others all in the last bin."""
    head = SurvivalMixture(D, 8, 1, 2, dropout=0.0).double()
    at = math.log(math.exp(7.5) - 1)
    with torch.no_grad():
        head.sigma.bias.fill_(-40.0)
        head.mu.bias.fill_(at + 0.01)
    head.fit(Fold((7.5,), (90.0,)))
    hazards = head(rows_of(1, D)).sigmoid()[0].tolist()
    assert hazards == pytest.approx([0.158655, 1.0], abs=1e-5)


def test_months_are_as_exact_under_autocast():
    head = SurvivalMixture(D, 8, 10, 4, dropout=0.0)
    with torch.no_grad():
        head.mu.bias.fill_(0.3)
    head.fit(Fold())
    with torch.autocast("cpu", torch.bfloat16):
        died, alive = head._of_components()
        logits = head(rows_of(2, D).float())
    assert logits.dtype == torch.float32
    assert_close((died, alive), head._of_components(), rtol=0, atol=0)


def test_survival_at_the_edges_is_that_of_the_mixture():
    """From hazards of bins back to 1 - F, to the millionths that are added."""
    model, batch = small(**MDN), pack(draw(40))
    survival = model(batch).survival[0].tolist()
    with torch.no_grad():
        z = torch.cat([bag.score.softmax(dim=0).T @ bag.y for bag in model._encoded(batch)])
        w = model.head.weights(z)[0].softmax(dim=0)
        mu = model.head.mu(model.head.mu_register).clamp(-200, 200)
        sigma = torch.nn.functional.softplus(model.head.sigma.weight[:, 0] + model.head.sigma.bias)
        for found, t in zip(survival, (7.5, 20.25, 100.5, 150.5), strict=True):
            y = math.log(math.exp(t) - 1)
            alive = (w * (1 - torch.special.ndtr((y - mu) / sigma))).sum()
            assert found == pytest.approx(float(alive), abs=2e-5)


def test_the_inverse_of_softplus_is_exact_from_0_to_beyond_what_float32_can_raise_e_to():
    for t in (0.0, 1e-7, 0.01, 1.0, 30.0, 89.0, 400.0, 1e4):
        with mpmath.workdps(60 + int(t)):
            expected = float(mpmath.log(mpmath.e ** mpmath.mpf(t) - 1 + mpmath.mpf("1e-6")))
        assert inverse_softplus(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9)
    assert inverse_softplus(torch.tensor(300.0)).item() == 300


def test_the_mixture_stays_finite_with_its_gradients_far_from_all_components():
    """Components a hundredth wide, at months that are far from every edge."""
    torch.manual_seed(4)
    head = SurvivalMixture(D, 8, 3, 4, dropout=0.0)
    with torch.no_grad():
        head.mu.weight.zero_()
        head.mu.bias.copy_(torch.tensor([-150.0, 60.0, 190.0]))
        head.sigma.bias.fill_(-40)
    head.fit(Fold())
    logits = head(rows_of(2, D).float())
    loss = nll_survival(logits, torch.tensor([1, 3]), torch.tensor([True, False]))
    loss.backward()
    assert logits.isfinite().all()
    assert logits.abs().max() < 14
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_gradients_of_the_mixture_are_those_of_differences():
    torch.manual_seed(4)
    head = SurvivalMixture(3, 4, 5, 4, dropout=0.0).double()
    with torch.no_grad():
        head.sigma.bias.fill_(20.0)
        head.mu.bias.fill_(-3.0)  # none at the clamp's corner
    head.fit(Fold())
    names, values = zip(*head.named_parameters(), strict=True)
    z = rows_of(2, 3)
    assert torch.autograd.gradcheck(
        lambda *given: torch.func.functional_call(head, dict(zip(names, given, strict=True)), (z,)), values
    )


@pytest.mark.parametrize(
    ("edges", "months", "ends"),
    [((7.0, 20.0), (3.0, 90.0), (7.0, 20.0, 90.0)), ((7.0, 20.0), (3.0, 20.0), (7.0, 20.0, 40.0))],
    ids=["the longest follow-up", "nobody was followed into it"],
)
def test_the_last_bin_ends_at_the_longest_follow_up_of_the_training_fold(edges, months, ends):
    model = build("scmil", D, **OPTIONS, **MDN, n_bins=3)
    assert model.head.months.isnan().all()
    assert model.logits(pack(draw(5)).to(dtype=torch.float32)).isnan().all()
    model.fit(Fold(edges, months))
    assert tuple(model.head.months.tolist()) == ends


def test_a_fold_of_another_number_of_bins_is_refused():
    with pytest.raises(ConfigError, match="scmil: n_bins=4, the fold has 2 bins; set n_bins to that"):
        build("scmil", D, **OPTIONS, **MDN).fit(Fold((7.0,)))
    build("scmil", D, **OPTIONS).fit(Fold((7.0,)))  # hazards have no months


def test_the_months_are_kept_with_the_weights(tmp_path):
    model = build("scmil", D, **OPTIONS, **MDN).eval()
    model.fit(Fold())
    batch = pack(draw(40)).to(dtype=torch.float32)
    save_weights(model, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path / "model.safetensors").logits(batch), model.logits(batch))


def test_registers_of_the_mixture_start_as_the_authors():
    head = build("scmil", D, head="mdn", n_heads=4).head
    assert_close(head.mu_register.detach(), torch.linspace(0, 200, 100))
    assert head.mu_register.requires_grad
    assert_close(head.mu(head.mu_register).detach(), torch.linspace(0, 200, 100))


# ---- training


@pytest.mark.parametrize("options", [{}, MDN], ids=["hazards", "mdn"])
def test_it_learns_which_slides_have_patches_of_a_bad_kind(options):
    torch.manual_seed(3)
    slides, generator = draw(*[40] * 12), torch.Generator().manual_seed(8)
    bad = torch.arange(12) % 2 == 0
    for (bag, _), is_bad in zip(slides, bad, strict=True):
        bag[20] = bag[20].float()
        if is_bad:
            bag[20][torch.randperm(40, generator=generator)[:10]] += 4
    batch, bins = pack(slides), torch.where(bad, 0, 3)
    model = build("scmil", D, **{**OPTIONS, **options, "cluster_size": 64}).train()
    model.fit(Fold())
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(40):
        loss = nll_survival(model.logits(batch), bins, bad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    risk = model.eval()(batch).risk
    assert risk[bad].min() > risk[~bad].max()


@pytest.mark.parametrize("options", [{}, MDN], ids=["hazards", "mdn"])
def test_bfloat16_autocast_stays_close_and_answers_in_float32(options):
    torch.manual_seed(2)
    model = build("scmil", D, **{**OPTIONS, **options}).eval()
    model.fit(Fold())
    with torch.no_grad():
        model.filter[2].bias.fill_(3.0)  # none is near the threshold
    batch = pack(draw(9, 5)).to(dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    assert output.survival.dtype == torch.float32
    assert_close(output.logits, model(batch).logits, rtol=0, atol=0.1)
    output.risk.sum().backward()


@pytest.mark.parametrize("options", [{}, MDN, {"dropout": 0.0}], ids=["hazards", "mdn", "no dropout"])
def test_memory_is_counted_as_if_all_patches_were_kept(options):
    options, n, kept = {**OPTIONS, **options}, 600, {}
    model = build("scmil", D, **options).train()
    with torch.no_grad():
        model.filter[2].bias.fill_(30.0)
    batch = made_up_slide({20: n}, D, model.options.extras())

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.logits(batch)
    for other in [*model.parameters(), *model.buffers(), batch.features[20], logits]:
        kept.pop(other.untyped_storage()._cdata, None)
    real = sum(storage.nbytes() for storage in kept.values())
    found = training_footprint("scmil", options, D, {20: n}, device_type="cpu")
    assert found.saved == pytest.approx(real, rel=0.02)
    with torch.no_grad():
        model.filter[2].bias.fill_(-30.0)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.logits(batch)
    assert sum(storage.nbytes() for storage in kept.values()) < found.saved


def test_options_build_its_like():
    model = small(**MDN)
    again = build("scmil", D, **dataclasses.asdict(model.options))
    again.double().load_state_dict(model.state_dict())
    batch = pack(draw(30))
    assert torch.equal(again.eval().logits(batch), model.logits(batch))
