"""ProtoSurv against its formulas written out patch by patch, cases worked by hand, and what training may look at."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cftrain import zoo
from cftrain.errors import ConfigError, MissingExtraError
from cftrain.footprint import blueprint, training_footprint
from cftrain.models import BagBatch, build, made_up_slide, protosurv, prototype_attention
from cftrain.models.graph_sums import edges, softmax_sums
from cftrain.models.prototype_attention import PrototypeAttention, in_pieces
from cftrain.survival.losses import nll_survival
from cftrain.zoo.extras import nearest

D = 6
SMALL = {
    "k": 3,
    "n_classes": 3,
    "n_prototypes": 2,
    "embed_dim": 8,
    "n_heads": 2,
    "mlp_dim": 5,
    "graph_dim": 4,
}
NEAREST = nearest(20, 3)
TABLE = [[1, 2, -1], [2, 0, -1], [1, 0, -1], [2, 1, 5], [5, 2, 0], [2, 4, 1], [5, 2, 1]]
"""Seven patches; nobody lists 3 and 6, and 0, 1, 2 list two others."""


class Fold:
    """A fold that answers with given centres and notes what it was asked."""

    def __init__(self, centres):
        self.centres, self.asked = centres, []

    def prototypes(self, scale, n):
        self.asked.append((scale, n))
        return self.centres


def centres(n=3, width=D, seed=8):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def small(seed=3, **options):
    """In float64, fitted, every parameter moved so that none can hide."""
    torch.manual_seed(seed)
    options = {**SMALL, **options}
    model = build("protosurv", D, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.fit(Fold(centres(options["n_classes"])))
    return model


def slide(n=7, seed=5):
    """Features and a table of neighbours, of which some are none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    if n == 7:
        return x, torch.tensor(TABLE)
    rows = [[j for j in torch.randperm(n, generator=generator).tolist() if j != i][:3] for i in range(n)]
    rows = [each[: i % 4] for i, each in enumerate(rows)]
    return x, torch.tensor([each + [-1] * (3 - len(each)) for each in rows])


def pack(*slides):
    return BagBatch.pack(
        [f"slide-{i}" for i in range(len(slides))],
        [{20: x} for x, _ in slides],
        [{NEAREST: table} for _, table in slides],
    )


# The formulas, one patch, head or prototype at a time; `w` holds the weights by name.


def linear(x, w, name):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(x, w=None, name=""):
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return y if w is None else y * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gen(h, w, name, table):
    """Each node by itself: who lists it, and the softmax over those, channel by channel."""
    rows = []
    for i in range(len(h)):
        senders = [j for j, named in enumerate(table.tolist()) if i in named]
        heard = torch.zeros_like(h[i])
        if senders:
            messages = torch.stack([h[j].clamp(min=0) + 1e-7 for j in senders])
            raised = (w[f"{name}.t"] * messages).exp()
            heard = (raised / raised.sum(dim=0) * messages).sum(dim=0)
        rows.append(h[i] + heard)
    hidden = norm(linear(torch.stack(rows), w, f"{name}.up"), w, f"{name}.norm").clamp(min=0)
    return linear(hidden, w, f"{name}.down")


def nodes(x, w, table, layers=3):
    found = [gelu(norm(linear(x, w, "nodes.projection"), w, "nodes.projection_norm"))]
    found.append(gen(found[0], w, "nodes.convolutions.0", table))
    for i in range(1, layers):
        changed = norm(gen(found[-1], w, f"nodes.convolutions.{i}", table), w, f"nodes.norms.{i - 1}")
        found.append(found[-1] + gelu(changed))
    wide = gelu(norm(linear(torch.cat(found, dim=1), w, "nodes.wide"), w, "nodes.wide_norm"))
    return linear(wide, w, "nodes.out")


def cross_attention(p, rows, w, name, heads):
    """Prototypes after the layer, and what the rows receive, mean over prototypes and heads."""
    q, k, v = linear(p, w, f"{name}.query"), linear(rows, w, f"{name}.key"), linear(rows, w, f"{name}.value")
    width = q.shape[1] // heads
    out, received = [], []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        raised = (norm(q[:, own]) @ norm(k[:, own]).T / math.sqrt(width)).exp()
        share = raised / raised.sum(dim=1, keepdim=True)
        out.append(share @ v[:, own])
        received.append(share.mean(dim=0))
    p = p + norm(linear(torch.cat(out, dim=1), w, f"{name}.out"), w, f"{name}.attention_norm")
    mlp = linear(gelu(norm(linear(p, w, f"{name}.mlp.0"), w, f"{name}.mlp.1")), w, f"{name}.mlp.3")
    return p + norm(mlp, w, f"{name}.mlp_norm"), torch.stack(received).mean(dim=0)


def by_formula(model, x, table):
    """Logits [K] of one slide, and what each patch receives in the last layer [N]."""
    o, w = model.options, {**dict(model.named_parameters()), **dict(model.named_buffers())}
    of_class = [[] for _ in range(o.n_classes)]
    for i, row in enumerate(x.detach()):
        distances = [float((row - centre).square().sum()) for centre in w["class_centres"]]
        of_class[distances.index(min(distances))].append(i)
    prototypes = []
    for c, members in enumerate(of_class):
        mean = sum(x[i] for i in members) / len(members) if members else w["class_centres"][c]
        mu = gelu(norm(linear(mean, w, "class_projection.0"), w, "class_projection.1"))
        p = torch.stack([mu + w["logsigma"][c, 0].exp() * w["directions"][c, k] for k in range(o.n_prototypes)])
        for layer in range(o.class_layers):
            p, _ = cross_attention(p, x, w, f"class_layers.{c}.{layer}", o.n_heads)
        prototypes.append(p)
    p, keys = torch.cat(prototypes), nodes(x, w, table, o.graph_layers)
    for layer in range(o.fusion_layers):
        p, received = cross_attention(p, keys, w, f"fusion_layers.{layer}", o.n_heads)
    return linear(norm(p.mean(dim=0)), w, "head"), received


VARIANTS = {
    "small": {},
    "one head, one layer of each kind": {"n_heads": 1, "class_layers": 1, "fusion_layers": 1, "graph_layers": 1},
    "one class": {"n_classes": 1},
    "more classes than patches": {"n_classes": 9, "n_prototypes": 1},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("n", [7, 1, 20])
def test_logits_gradients_and_map_equal_the_formulas_written_out(n, options):
    model = small(**options)
    x, table = slide(n)
    x.requires_grad_()
    along = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    expected, received = by_formula(model, x, table)
    found, maps = model.logits(pack((x, table))), model.patch_maps(pack((x.detach(), table)))["attention"]
    assert_close(found[0], expected, rtol=0, atol=1e-11)
    assert_close(maps.scores[0], received.detach(), rtol=0, atol=1e-11)
    assert maps.elsewhere == (0.0,)
    names, parameters = zip(*model.named_parameters(), strict=True)
    inputs = [x, *parameters]
    one, other = (
        torch.autograd.grad((logits * along).sum(), inputs, allow_unused=True, materialize_grads=True)
        for logits in (found[0], expected)
    )
    for name, a, b in zip(("features", *names), one, other, strict=True):
        assert_close(a, b, rtol=0, atol=1e-10, msg=name)


def test_of_the_formulas_small_slide_a_class_is_missing_and_some_patches_hear_from_nobody():
    """So that the comparison above is of these too."""
    x, table = slide()
    nearest_centre = torch.cdist(x, centres(9).double()).argmin(dim=1)
    assert len(nearest_centre.unique()) < 9
    assert not {3, 6} & set(table.flatten().tolist())


def test_a_patch_has_the_class_of_the_nearest_centre_and_a_class_that_a_slide_lacks_starts_at_its_centre():
    model = build("protosurv", 2, **{**SMALL, "n_classes": 4}).double()
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [9.0, 9.0]])
    model.fit(Fold(places))
    x = torch.tensor([[1.0, 1.0], [9.0, -1.0], [11.0, 3.0], [0.0, 2.0], [0.0, 6.0]], dtype=torch.float64)
    classes = model._classes(x)
    assert classes.tolist() == [0, 1, 1, 0, 2]
    assert model._means(x, classes).tolist() == [[0.5, 1.5], [10.0, 1.0], [0.0, 6.0], [9.0, 9.0]]


def test_classes_are_told_in_the_precision_of_the_centres_under_autocast():
    """In bfloat16 both patches would be 256, as near to either centre."""
    model = build("protosurv", 1, **{**SMALL, "n_classes": 2})
    model.fit(Fold(torch.tensor([[255.6], [256.6]])))
    with torch.autocast("cpu", torch.bfloat16):
        assert model._classes(torch.tensor([[256.0], [256.25]])).tolist() == [0, 1]


def test_fitting_asks_the_fold_for_as_many_centres_of_its_scale_and_keeps_them_with_the_weights(tmp_path):
    torch.manual_seed(0)
    model = build("protosurv", D, **SMALL, scale=10)
    fold = Fold(centres())
    model.fit(fold)
    assert fold.asked == [(10, 3)]
    assert torch.equal(model.class_centres, centres())
    assert "class_centres" not in dict(model.named_parameters())
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = build("protosurv", D, **SMALL, scale=10)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    x, table = slide()
    batch = BagBatch.pack(["slide"], [{10: x.float()}], [{nearest(10, 3): table}])
    assert torch.equal(other.eval().logits(batch), model.eval().logits(batch))
    assert other.logits(batch).isfinite().all()


def test_a_model_that_was_not_fitted_answers_nothing_and_still_counts_its_memory():
    model = build("protosurv", D, **SMALL)
    x, table = slide()
    assert model.logits(pack((x, table))).isnan().all()
    assert blueprint("protosurv", SMALL, D).class_centres.shape == (3, D)
    assert training_footprint("protosurv", SMALL, D, {20: 50}, device_type="cpu").saved > 0


def test_a_batch_without_neighbours_is_refused_by_name():
    with pytest.raises(MissingExtraError, match="slide-0: protosurv needs 3 nearest patches at 20x"):
        small().logits(BagBatch.pack(["slide-0"], [{20: slide()[0]}]))


def test_four_unequal_slides_in_a_batch_give_the_logits_gradients_and_maps_of_the_four_alone():
    model = small()
    slides = [slide(n, seed=n) for n in (1, 40, 7, 2)]
    along = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)

    def gradients(*batches):
        model.zero_grad()
        for batch in batches:
            (model.logits(batch) * along).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    together, alone = pack(*slides), [pack(each) for each in slides]
    assert_close(model.logits(together), torch.cat([model.logits(batch) for batch in alone]), rtol=0, atol=1e-12)
    assert_close(gradients(together), gradients(*alone), rtol=0, atol=1e-10)
    for scores, batch in zip(model.patch_maps(together)["attention"].scores, alone, strict=True):
        assert_close(scores, model.patch_maps(batch)["attention"].scores[0], rtol=0, atol=1e-12)


def plainly(function, *inputs, **_):
    return function(*inputs)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training, with dropout"])
def test_pieces_made_again_in_the_backward_change_nothing(monkeypatch, training):
    """Against one piece that is kept; in training against as many, for each draws its own dropout."""
    model = small(dropout=0.3, node_dropout=0.5, graph_dropout=0.3).train(training)
    x, table = slide(20)
    x.requires_grad_()

    def found():
        torch.manual_seed(6)
        logits = model.logits(pack((x, table)))
        parts = torch.autograd.grad(logits.square().sum(), [x, *model.parameters()])
        return logits.detach(), *parts

    monkeypatch.setattr(prototype_attention, "ROWS", 6)
    pieces = found()
    for module in (prototype_attention, protosurv):
        monkeypatch.setattr(module, "checkpoint", plainly)
    if not training:
        monkeypatch.setattr(prototype_attention, "ROWS", 1000)
    assert_close(pieces, found(), rtol=0, atol=1e-11)


def test_messages_are_weighted_by_their_softmax_channel_by_channel():
    """Rows 0 and 1 tell row 2, row 2 tells row 0, and nobody tells row 1."""
    x = torch.tensor([[1.0, -1.0], [3.0, 0.0], [5.0, 7.0]], dtype=torch.float64)
    targets = edges(torch.tensor([[2, -1], [-1, 2], [0, -1]]))
    found = softmax_sums(x, targets, torch.tensor([0.5], dtype=torch.float64))
    of_two = (math.exp(0.5) + 3 * math.exp(1.5)) / (math.exp(0.5) + math.exp(1.5))
    expected = torch.tensor([[5.0, 7.0], [0.0, 0.0], [of_two, 0.0]], dtype=torch.float64)
    assert_close(found, expected + torch.tensor([[1e-7], [0.0], [1e-7]]), rtol=0, atol=1e-12)


def test_gradients_of_the_messages_are_those_of_finite_differences_and_large_ones_stay_finite():
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    t = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    targets = edges(torch.tensor(TABLE))
    assert torch.autograd.gradcheck(lambda x, t: softmax_sums(x, targets, t), (x, t))
    assert softmax_sums(1e4 * x.detach(), targets, t.detach()).isfinite().all()


class LargestResult(TorchDispatchMode):
    """The largest number of elements that any operation answers with."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        several = out if isinstance(out, (tuple, list)) else (out,)
        self.elements = max([self.elements, *(each.numel() for each in several if isinstance(each, torch.Tensor))])
        return out


def test_no_key_or_value_of_every_patch_is_made_forwards_or_backwards():
    layer = PrototypeAttention(64, 4, 16, n_heads=2, dropout=0.0)
    rows = torch.randn(50_000, 4, requires_grad=True)
    with LargestResult() as largest:
        layer(torch.randn(1, 3, 64), [rows]).sum().backward()
    assert largest.elements == max(50_000 * 2 * 3, prototype_attention.ROWS * 64)
    assert rows.grad.isfinite().all()


def test_pieces_are_joined_along_the_dimension_of_the_rows():
    rows = torch.arange(40_000.0).unsqueeze(1)
    assert torch.equal(in_pieces(lambda part: part.T * 2, rows, dim=1), 2 * rows.T)
    assert torch.equal(in_pieces(lambda part: part * 2, rows), 2 * rows)


@pytest.mark.parametrize("rate", ["dropout", "node_dropout", "graph_dropout"])
def test_each_dropout_acts_in_training_only(rate):
    rates = {"dropout": 0.0, "node_dropout": 0.0, "graph_dropout": 0.0}
    batch = pack(slide(40))
    still, drops = small(**rates), small(**{**rates, rate: 0.5})
    assert torch.equal(still.train().logits(batch), still.eval().logits(batch))
    assert torch.equal(drops.eval().logits(batch), still.logits(batch))
    assert not torch.equal(drops.train().logits(batch), still.logits(batch))


CHANGES = {
    "n_classes": (4, "directions", (4, 2, 8)),
    "n_prototypes": (5, "directions", (3, 5, 8)),
    "embed_dim": (12, "directions", (3, 2, 12)),
    "mlp_dim": (7, "fusion_layers.0.mlp.0.weight", (7, 8)),
    "class_layers": (3, "class_layers.2.2.key.weight", (8, D)),
    "fusion_layers": (5, "fusion_layers.4.key.weight", (8, 8)),
    "graph_dim": (3, "nodes.projection.weight", (3, D)),
    "graph_layers": (5, "nodes.wide.weight", (8, 6 * 4)),
    "n_bins": (6, "head.weight", (6, 8)),
}


@pytest.mark.parametrize("option", CHANGES)
def test_a_width_or_number_is_what_its_option_says(option):
    value, name, shape = CHANGES[option]
    state = small(**{option: value}).state_dict()
    assert tuple(state[name].shape) == shape
    assert name not in small().state_dict() or tuple(small().state_dict()[name].shape) != shape


def test_the_graph_it_reads_is_of_its_scale_and_number_of_neighbours():
    assert zoo.model_options("protosurv", {}).extras() == (nearest(20, 4),)
    assert zoo.model_options("protosurv", {"scale": 10, "k": 6}).extras() == (nearest(10, 6),)
    assert build("protosurv", D, **SMALL, scale=10).scales == (10,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_classes": 0}, "n_classes must be at least 1, got 0"),
        ({"fusion_layers": 0}, "fusion_layers must be at least 1, got 0"),
        ({"node_dropout": 1.0}, r"node_dropout must be at least 0 and below 1, got 1\.0"),
        ({"embed_dim": 32}, "protosurv: embed_dim must be a multiple of n_heads, got embed_dim=32, n_heads=3"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build("protosurv", D, **options)


def test_the_default_model_has_the_published_widths():
    """Counted from them: features 1024, prototypes 768, MLP 512, graph 128, 5 classes of 8, 2 and 4 layers."""

    def attention(rows):
        projections = 2 * (768 * 768 + 768) + 2 * (rows * 768 + 768)
        return projections + 768 * 512 + 512 + 2 * 512 + 512 * 768 + 768 + 2 * 2 * 768

    convolution = 128 * 256 + 2 * 256 + 256 * 128 + 1
    classes = 1024 * 768 + 3 * 768 + 5 * 768 + 5 * 8 * 768 + 5 * 2 * attention(1024)
    of_nodes = 1024 * 128 + 3 * 128 + 3 * convolution + 2 * 2 * 128 + 512 * 768 + 3 * 768 + 768 * 768 + 768
    expected = classes + of_nodes + 4 * attention(768) + 768 * 4 + 4
    model = blueprint("protosurv", {}, 1024)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert {layer.n_heads for layer in model.modules() if isinstance(layer, PrototypeAttention)} == {3}
    assert tuple(model.class_centres.shape) == (5, 1024)


def test_prototypes_start_as_the_authors_do():
    """Xavier's bound for [C, 1, E] counts E inputs and C E outputs."""
    torch.manual_seed(0)
    model = build("protosurv", D)
    bound = math.sqrt(6 / (768 + 5 * 768))
    assert float(model.logsigma.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(model.directions.detach().std()) == pytest.approx(1, abs=0.02)
    assert [each.t.item() for each in model.nodes.convolutions] == [1.0, 1.0, 1.0]


def test_bfloat16_autocast_stays_close():
    model = build("protosurv", D, **SMALL)
    model.fit(Fold(centres()))
    x, table = slide(40)
    batch = pack((x.half(), table))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.eval().logits(batch)
    assert_close(logits.float(), model.logits(batch), rtol=0, atol=0.05)
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_it_learns_which_slides_have_a_rare_kind_of_patch():
    torch.manual_seed(2)
    model = build("protosurv", D, **{**SMALL, "embed_dim": 16, "graph_dim": 8, "n_bins": 2})
    kinds = 3 * centres()
    model.fit(Fold(kinds))
    rare = torch.tensor([i % 2 for i in range(8)])
    slides = []
    for i, has in enumerate(rare.tolist()):
        x, table = slide(20, seed=i)
        of_kind = torch.tensor([0, 1] * 10)
        of_kind[:4] = 2 if has else 0
        slides.append((kinds[of_kind] + 0.3 * x.float(), table))
    batch, event = pack(*slides), torch.ones(8, dtype=torch.bool)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        loss = nll_survival(model.logits(batch), rare, event)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    risk = model.eval()(batch).risk
    assert risk[rare == 0].min() > risk[rare == 1].max()


def test_a_made_up_slide_of_every_default_runs_forwards_and_backwards():
    model = build("protosurv", 32)
    model.fit(Fold(centres(5, 32)))
    batch = made_up_slide({20: 12}, 32, model.options.extras())
    model.logits(batch).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
