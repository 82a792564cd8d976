"""CS-MIL against its formulas written out patch by patch, and a case worked by hand."""

import math

import pytest
import torch
from pyramids import FIRST, SECOND, THIRD, far_from_zero, packed, pyramid
from torch.testing import assert_close

from cftrain import zoo
from cftrain.errors import ConfigError, MissingExtraError
from cftrain.footprint import training_footprint
from cftrain.models import BagBatch, build
from cftrain.survival.losses import nll_survival
from cftrain.zoo.extras import parents

D = 6
SMALL = {"embed_dim": 5, "hidden_dim": 4}


def affine(layer, x):
    return (layer.weight * x).sum(dim=1) + layer.bias


def embedded(model, x):
    """One patch, [E], and the score of its scale."""
    (embed, _), (first, _, second) = model.embedding, model.scale_attention
    e = affine(embed, x).clamp(min=0)
    return e, affine(second, affine(first, e).clamp(min=0))[0]


def by_formula(model, bags, extras, *, scale_softmax):
    """Logits [K] and weights [N] of one slide, one instance after the other; no dropout."""
    finest = max(bags)
    fused = []
    for n, patch in enumerate(bags[finest]):
        rows = {scale: int(extras[parents(finest, scale)][n]) for scale in bags if scale != finest}
        seen = [embedded(model, patch), *(embedded(model, bags[s][row]) for s, row in rows.items() if row >= 0)]
        weights = [score for _, score in seen]
        if scale_softmax:
            weights = [score.exp() / sum(other.exp() for other in weights) for score in weights]
        fused.append(sum(weight * e for weight, (e, _) in zip(weights, seen, strict=True)))
    first, _, second = model.attention
    raised = [affine(second, torch.tanh(affine(first, h)))[0].exp() for h in fused]
    a = [each / sum(raised) for each in raised]
    z = sum(weight * h for weight, h in zip(a, fused, strict=True))
    first, _, _, second = model.head
    return affine(second, affine(first, z).clamp(min=0)), torch.stack(a)


SCALES = {"5,10,20": (3, 7, 19), "10,20": (7, 19), "5,20": (3, 19), "5,10": (7, 19)}


@pytest.mark.parametrize("scale_softmax", [False, True])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("missing", [0.0, 0.3, 1.0])
def test_logits_map_and_gradients_equal_the_formulas_patch_by_patch(scales, missing, scale_softmax):
    model = far_from_zero(build("csmil", D, scales=scales, scale_softmax=scale_softmax, **SMALL))
    read = tuple(int(each) for each in scales.split(","))
    slides = [
        pyramid(size, D, seed=i, scales=read, missing=missing)
        for i, size in enumerate((SCALES[scales], (1,) * len(read), (4,) * len(read)))
    ]
    rows = [{scale: own.requires_grad_() for scale, own in bags.items()} for bags, _ in slides]
    inputs = [*model.parameters(), *(own for bags in rows for own in bags.values())]
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    batch = packed(*slides)
    found = model.logits(batch)
    each = [by_formula(model, bags, extras, scale_softmax=scale_softmax) for bags, extras in slides]
    expected = torch.stack([logits for logits, _ in each])
    assert_close(found, expected, rtol=0, atol=1e-12)
    gradients, written_out = (
        torch.autograd.grad((logits * weights).sum(), inputs, materialize_grads=True) for logits in (found, expected)
    )
    for one, other in zip(gradients, written_out, strict=True):
        assert_close(one, other, rtol=0, atol=1e-10 * float(other.norm()) + 1e-13)

    logits, maps = model.logits_and_maps(batch)
    assert_close(logits, expected.detach(), rtol=0, atol=1e-12)
    assert list(maps) == ["attention"]
    assert (maps["attention"].scale, maps["attention"].elsewhere) == (read[-1], (0, 0, 0))
    for scores, (_, a) in zip(maps["attention"].scores, each, strict=True):
        assert_close(scores, a.detach(), rtol=0, atol=1e-12)


def by_hand(**options):
    """D = E = H = 1: a patch is its feature, its score twice that, the attention inside tanh(h)."""
    model = build("csmil", 1, scales="10,20", embed_dim=1, hidden_dim=1, n_bins=2, **options).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        model.scale_attention[2].weight.fill_(2.0)
        model.head[3].weight.copy_(torch.tensor([[1.0], [-3.0]]))
        model.head[3].bias.copy_(torch.tensor([0.25, 0.0]))
    return model


@pytest.mark.parametrize("scale_softmax", [False, True])
def test_a_slide_worked_by_hand(scale_softmax):
    """Features 1 and 0.5 at 20x; the first lies in a 10x patch of 0.25, the second in none. ReLU cuts -1 to 0."""
    fused = [2 * 1 + 0.5 * 0.25, 1 * 0.5]
    if scale_softmax:
        weight = math.exp(2) / (math.exp(2) + math.exp(0.5))
        fused = [weight * 1 + (1 - weight) * 0.25, 0.5]
    raised = [math.exp(math.tanh(h)) for h in fused]
    a = [each / sum(raised) for each in raised]
    z = a[0] * fused[0] + a[1] * fused[1]
    bag = {20: torch.tensor([[1.0], [0.5]]).double(), 10: torch.tensor([[-1.0], [0.25]]).double()}
    batch = BagBatch.pack(["slide"], [bag], [{parents(20, 10): torch.tensor([1, -1])}])
    model = by_hand(scale_softmax=scale_softmax)
    assert model(batch).logits[0].tolist() == pytest.approx([z + 0.25, -3 * z], abs=1e-12)
    assert model.patch_maps(batch)["attention"].scores[0].tolist() == pytest.approx(a, abs=1e-12)
    batch.extras[parents(20, 10)][0] = 0
    h = (math.exp(2) / (math.exp(2) + 1)) if scale_softmax else 2.0
    assert torch.isclose(model._scored(batch)[0][0][0, 0], torch.tensor(h).double())


@pytest.mark.parametrize("scale_softmax", [False, True])
def test_three_unequal_bags_in_a_batch_give_the_logits_and_gradients_of_the_three_alone(scale_softmax):
    model = far_from_zero(build("csmil", D, scale_softmax=scale_softmax, **SMALL))
    slides = [pyramid(sizes, D, seed=i) for i, sizes in enumerate((FIRST, SECOND, THIRD))]
    bins, event = torch.tensor([0, 2, 3]), torch.tensor([True, False, True])

    def gradients(*batches):
        model.zero_grad()
        for batch, rows in batches:
            nll_survival(model.logits(batch), bins[rows], event[rows], reduction="sum").backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    alone = [(packed(slide), slice(i, i + 1)) for i, slide in enumerate(slides)]
    expected = torch.cat([model.logits(batch) for batch, _ in alone])
    assert_close(model.logits(packed(*slides)), expected, rtol=0, atol=1e-12)
    assert_close(gradients((packed(*slides), slice(None))), gradients(*alone), rtol=0, atol=1e-11)


def test_dropout_is_that_of_the_layer_before_the_logits():
    model = far_from_zero(build("csmil", D, embed_dim=5, hidden_dim=400, dropout=0.5))
    batch = packed(pyramid(FIRST, D))
    seen = []
    model.head[2].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    torch.manual_seed(0)
    model.train()(batch)
    ((before, after),) = seen
    kept = after[before > 0] / before[before > 0]
    assert sorted(set(kept.tolist())) == pytest.approx([0, 2])
    assert (kept == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    assert [type(module).__name__ for module in model.modules()].count("Dropout") == 1


def test_the_defaults_are_those_of_the_released_code():
    model = build("csmil", 2048)
    assert model.scales == zoo.MODELS["csmil"].scales == (5, 10, 20)
    assert model.options.extras() == (parents(20, 10), parents(20, 5))
    assert {name: list(value.shape) for name, value in model.named_parameters() if name.endswith("weight")} == {
        "embedding.0.weight": [64, 2048],
        "scale_attention.0.weight": [32, 64],
        "scale_attention.2.weight": [1, 32],
        "attention.0.weight": [32, 64],
        "attention.2.weight": [1, 32],
        "head.0.weight": [32, 64],
        "head.3.weight": [4, 32],
    }
    assert (model.head[2].p, model.softmax_over_scales) == (0.5, False)


BAD_OPTIONS = {
    "one scale": ({"scales": "20"}, "scales must be 5,10,20 or .*, got '20'"),
    "no width": ({"embed_dim": 0}, "embed_dim must be at least 1"),
    "no hidden width": ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
    "certain dropout": ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    "a number for a choice": ({"scale_softmax": 1}, "scale_softmax must be bool"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_an_option_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build("csmil", D, **options)


def test_a_batch_without_parents_is_refused_by_name():
    bags, _ = pyramid((3, 7, 19), D)
    with pytest.raises(MissingExtraError, match="slide-0: csmil needs 10x parents of 20x patches"):
        build("csmil", D).double()(BagBatch.pack(["slide-0"], [bags]))


@pytest.mark.parametrize("scale_softmax", [False, True])
def test_a_few_steps_learn_what_only_patches_with_their_parents_tell(scale_softmax):
    """Death where marked 20x patches lie in the marked 10x one; every slide has as many marks of either kind."""
    torch.manual_seed(0)
    slides, event = [], []
    for i in range(4):
        inside = i % 2 == 0
        bags = {20: torch.zeros(12, 2), 10: torch.zeros(3, 2), 5: torch.zeros(1, 2)}
        bags[20][:4, 0], bags[10][0 if inside else 1, 1] = 1.0, 1.0
        slides.append((bags, {parents(20, 10): torch.arange(12) // 4, parents(20, 5): torch.zeros(12).long()}))
        event.append(inside)
    batch, event = packed(*slides), torch.tensor(event)
    model = build("csmil", 2, embed_dim=16, hidden_dim=16, dropout=0.0, scale_softmax=scale_softmax)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        nll_survival(model.logits(batch), torch.where(event, 0, 3), event).backward()
        optimizer.step()
    risk = model(batch).risk.detach()
    assert risk[event].min() > risk[~event].max() + 0.5


@pytest.mark.parametrize("scale_softmax", [False, True])
def test_memory_of_the_largest_slide_is_what_a_pencil_says(scale_softmax):
    """Kept of a 20x patch: 64 embedded and 64 fused, 32 in either attention; with a softmax two ancestors' 64 too."""
    patches = {5: 8_625, 10: 34_498, 20: 137_990}
    found = training_footprint("csmil", {"scale_softmax": scale_softmax}, 1024, patches, device_type="cpu")
    kept = 4 * patches[20] * (64 + 64 + 32 + 32 + (2 * 64 if scale_softmax else 0))
    assert kept <= found.saved <= 1.5 * kept
    assert found.transient <= 2 * kept
