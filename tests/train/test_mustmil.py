"""MuSTMIL against outputs of the released code, its formulas on rows written out in full, and a case worked by hand."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pyramids import FIRST, SECOND, THIRD, far_from_zero, packed, pyramid
from torch.testing import assert_close

from cftrain import zoo
from cftrain.checkpoints import load_model
from cftrain.cli import main
from cftrain.errors import ConfigError, MissingExtraError, WeightsError
from cftrain.footprint import training_footprint
from cftrain.models import BagBatch, build
from cftrain.models.released import released_model
from cftrain.survival.losses import nll_survival
from cftrain.zoo.extras import parents

D = 6
SMALL = {"embed_dim": 5, "attention_dim": 4}
CASES = ("odd", "tiny")


@pytest.fixture(scope="module")
def golden():
    """What the released code answered, and its weights."""

    def load(shared):
        with np.load(shared / "golden" / "MuSTMIL.npz") as file:
            arrays = {key: torch.from_numpy(file[key]).double() for key in file.files if key != "cfg"}
        return arrays, {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}

    return load


def golden_batch(arrays, case, dtype=torch.float64):
    """Row by row a 10x patch and its own 5x parent."""
    bag = {10: arrays[f"in/{case}/xa"].to(dtype), 5: arrays[f"in/{case}/xb"].to(dtype)}
    return BagBatch.pack([case], [bag], [{parents(10, 5): torch.arange(len(bag[10]))}])


def affine(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attended(state, name, head, e):
    """Weights [K, N] and logits [K] of one attention, from rows that are all there."""
    a = affine(state, f"{name}.2", torch.tanh(affine(state, f"{name}.0", e))).T.softmax(dim=1)
    return a, affine(state, head, (a @ e).flatten())


def by_rows(state, *embedded):
    """The released formulas on embedded rows, the finest scale first: (weights, logits) of the joint, then of each."""
    joint = attended(state, "attention_general", "classifier", torch.cat(embedded, dim=1))
    own = [attended(state, f"attentions.{s}", f"embeddings_fc.{s}.0", e) for s, e in enumerate(embedded)]
    return [joint, *own]


def released_names(model):
    """The model's own parameters, by the authors' names."""
    renamed = {}
    for name, value in model.named_parameters():
        name = name.replace("joint_attention", "attention_general").replace("hidden", "0").replace("score", "2")
        if name.startswith("own_heads"):
            _, s, kind = name.split(".")
            name = f"embeddings_fc.{s}.0.{kind}"
        renamed[name.replace("head.", "classifier.") if name.startswith("head") else name] = value
    return renamed


def by_formula(model, bags, extras):
    """`by_rows` of one slide, each row made by looking its ancestors up, one after the other."""
    state, finest = released_names(model), max(bags)
    embedded = [affine(state, "embeddings.0", bags[finest])]
    for s, coarse in enumerate(sorted(set(bags) - {finest}, reverse=True), start=1):
        e = affine(state, f"embeddings.{s}", bags[coarse])
        found = extras[parents(finest, coarse)].tolist()
        embedded.append(torch.stack([e.sum(dim=0) / len(e) if row < 0 else e[row] for row in found]))
    return by_rows(state, *embedded)


@pytest.mark.parametrize("case", CASES)
def test_probabilities_equal_the_released_ones_to_1e9_in_float64(shared, golden, case):
    arrays, state = golden(shared)
    model = released_model(state).double()
    assert model.scales == (5, 10)
    batch = golden_batch(arrays, case)
    assert_close(model(batch).hazards.detach(), arrays[f"out64/{case}/out"], rtol=0, atol=1e-9)
    (one, joint), *own = model.training_logits(batch)
    assert_close(joint.sigmoid().detach(), arrays[f"out64/{case}/out"], rtol=0, atol=1e-9)
    for s, (weight, logits) in enumerate(own):
        assert_close(logits.sigmoid().detach(), arrays[f"out64/{case}/scale{s}"], rtol=0, atol=1e-9)
        assert weight == one == 1
    assert len(own) == 2


@pytest.mark.parametrize("case", CASES)
def test_probabilities_in_float32_stay_within_1e5_of_the_released_float64_ones(shared, golden, case):
    arrays, state = golden(shared)
    model = released_model(state).float()
    hazards = model(golden_batch(arrays, case, torch.float32)).hazards
    assert_close(hazards.detach().double(), arrays[f"out64/{case}/out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_maps_equal_the_released_attention_to_1e9(shared, golden, case):
    arrays, state = golden(shared)
    maps = released_model(state).double().patch_maps(golden_batch(arrays, case))
    assert list(maps) == ["joint", "own-5x", "own-10x"]
    for name, scale, key in (("joint", 10, "attn"), ("own-10x", 10, "attn0"), ("own-5x", 5, "attn1")):
        (scores,) = maps[name].scores
        assert maps[name].scale == scale
        assert_close(scores, arrays[f"out64/{case}/{key}"].mean(dim=0), rtol=0, atol=1e-9)
        assert maps[name].elsewhere == (0,)


@pytest.mark.parametrize("case", CASES)
def test_the_formulas_of_this_test_give_the_released_outputs(shared, golden, case):
    """So that gradients, which the released file lacks, can be compared with those of the formulas."""
    arrays, state = golden(shared)
    x = [arrays[f"in/{case}/{name}"] for name in ("xa", "xb")]
    found = by_rows(state, *(affine(state, f"embeddings.{s}", rows) for s, rows in enumerate(x)))
    for (a, logits), out, attn in zip(found, ("out", "scale0", "scale1"), ("attn", "attn0", "attn1"), strict=True):
        assert_close(logits.sigmoid(), arrays[f"out64/{case}/{out}"][0], rtol=0, atol=1e-14)
        assert_close(a, arrays[f"out64/{case}/{attn}"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_gradients_with_the_released_weights_equal_those_of_the_formulas_to_1e9(shared, golden, case):
    arrays, state = golden(shared)
    model = released_model(state).double()
    batch = golden_batch(arrays, case)
    check_gradients(model, batch, [(batch.features, {parents(10, 5): torch.arange(len(batch.features[10]))})])


def check_gradients(model, batch, slides):
    """Of all that training looks at, with respect to weights and features, against the formulas on rows."""
    bins, event = torch.arange(len(slides)) % 4, torch.arange(len(slides)) % 2 == 0
    features = {scale: rows.clone().requires_grad_() for scale, rows in batch.features.items()}
    inputs = [*model.parameters(), *features.values()]
    own = BagBatch(batch.slide_ids, features, batch.lengths, batch.extras)
    loss = sum(w * nll_survival(logits, bins, event, reduction="sum") for w, logits in model.training_logits(own))
    found = torch.autograd.grad(loss, inputs)

    parts = {scale: torch.split(rows, list(batch.lengths[scale])) for scale, rows in features.items()}
    each = [
        by_formula(model, {scale: of_slides[i] for scale, of_slides in parts.items()}, extras)
        for i, (_, extras) in enumerate(slides)
    ]
    logits = [torch.stack([slide[part][1] for slide in each]) for part in range(1 + len(model.scales))]
    written_out = sum(nll_survival(own, bins, event, reduction="sum") for own in logits)
    assert_close(loss, written_out, rtol=1e-11, atol=0)
    for one, other in zip(found, torch.autograd.grad(written_out, inputs), strict=True):
        assert_close(one, other, rtol=0, atol=1e-9 * float(other.norm()) + 1e-13)


SCALES = {"5,10,20": (3, 7, 19), "10,20": (7, 19), "5,20": (3, 19), "5,10": (7, 19)}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("missing", [0.0, 0.3, 1.0])
def test_logits_maps_and_gradients_equal_the_formulas_on_rows_with_shared_and_missing_parents(scales, missing):
    model = far_from_zero(build("mustmil", D, scales=scales, **SMALL))
    read = tuple(int(each) for each in scales.split(","))
    slides = [
        pyramid(SCALES[scales], D, seed=1, scales=read, missing=missing),
        pyramid((1,) * len(read), D, seed=2, scales=read, missing=missing),
        pyramid((4,) * len(read), D, seed=3, scales=read, missing=missing),
    ]
    batch = packed(*slides)
    assert_close(model(batch).logits, model.training_logits(batch)[0][1], rtol=0, atol=0)
    check_gradients(model, batch, slides)
    logits, maps = model.logits_and_maps(batch)
    assert_close(logits, model(batch).logits.detach(), rtol=0, atol=1e-12)
    assert list(maps) == ["joint", *(f"own-{scale}x" for scale in read)]
    for i, (bags, extras) in enumerate(slides):
        (joint, _), *own = by_formula(model, bags, extras)
        assert_close(maps["joint"].scores[i], joint.mean(dim=0).detach(), rtol=0, atol=1e-12)
        for scale, (weights, _) in zip(sorted(bags, reverse=True), own, strict=True):
            share = weights.mean(dim=0).detach()
            expected, elsewhere = share.tolist(), 0.0
            if scale != read[-1]:
                rows = extras[parents(read[-1], scale)].tolist()
                expected = [
                    sum(float(w) for w, row in zip(share, rows, strict=True) if row == at)
                    for at in range(len(bags[scale]))
                ]
                elsewhere = sum(float(w) for w, row in zip(share, rows, strict=True) if row < 0)
            found = maps[f"own-{scale}x"]
            assert found.scale == scale
            assert found.scores[i].tolist() == pytest.approx(expected, abs=1e-12)
            assert found.elsewhere[i] == pytest.approx(elsewhere, abs=1e-12)


def by_hand(n_bins=1):
    """D = L = A = 1: embeddings are the features, attention inside is tanh(fine + 2 coarse)."""
    model = build("mustmil", 1, scales="10,20", embed_dim=1, attention_dim=1, n_bins=n_bins).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for weight in (*(each.weight for each in model.embeddings), *(each.weight for each in model.own_heads)):
            weight.fill_(1.0)
        for attention in (*model.attentions, model.joint_attention):
            attention.hidden.weight.copy_(torch.tensor([[1.0, 2.0]])[:, : attention.hidden.in_features])
            attention.score.weight.fill_(3.0)
        model.head.weight.copy_(torch.tensor([[10.0, 1.0]]))
        model.head.bias.fill_(0.5)
    return model


def test_a_slide_worked_by_hand():
    """Three 20x patches; two lie in the first 10x patch, one in none: the mean, 0.5, stands for its parent."""
    fine, coarse, rows = [0.0, 1.0, -0.5], [0.25, 0.75], [0, 0, -1]
    paired = [0.25, 0.25, 0.5]

    def softmax(inside):
        raised = [math.exp(3 * math.tanh(each)) for each in inside]
        return [each / sum(raised) for each in raised]

    def mean(weights, values):
        return sum(w * each for w, each in zip(weights, values, strict=True))

    a = softmax([x + 2 * y for x, y in zip(fine, paired, strict=True)])
    a20, a10 = softmax(fine), softmax(paired)
    bag = {20: torch.tensor(fine).double()[:, None], 10: torch.tensor(coarse).double()[:, None]}
    batch = BagBatch.pack(["slide"], [bag], [{parents(20, 10): torch.tensor(rows)}])
    model = by_hand()
    logits = [each.item() for _, each in model.training_logits(batch)]
    assert logits == pytest.approx(
        [0.5 + 10 * mean(a, fine) + mean(a, paired), mean(a20, fine), mean(a10, paired)], abs=1e-12
    )
    maps = model.patch_maps(batch)
    assert maps["joint"].scores[0].tolist() == pytest.approx(a, abs=1e-12)
    assert maps["own-20x"].scores[0].tolist() == pytest.approx(a20, abs=1e-12)
    assert maps["own-10x"].scores[0].tolist() == pytest.approx([a10[0] + a10[1], 0.0], abs=1e-12)
    assert maps["own-10x"].elsewhere == pytest.approx((a10[2],), abs=1e-12)


def test_three_unequal_bags_in_a_batch_give_the_logits_and_gradients_of_the_three_alone():
    model = far_from_zero(build("mustmil", D, **SMALL))
    slides = [pyramid(sizes, D, seed=i) for i, sizes in enumerate((FIRST, SECOND, THIRD))]
    bins, event = torch.tensor([0, 2, 3]), torch.tensor([True, False, True])

    def gradients(*batches):
        model.zero_grad()
        for batch, rows in batches:
            for weight, logits in model.training_logits(batch):
                (weight * nll_survival(logits, bins[rows], event[rows], reduction="sum")).backward(retain_graph=True)
        return [parameter.grad.clone() for parameter in model.parameters()]

    together = packed(*slides)
    alone = [(packed(slide), slice(i, i + 1)) for i, slide in enumerate(slides)]
    for at in range(4):
        expected = torch.cat([model.training_logits(batch)[at][1] for batch, _ in alone])
        assert_close(model.training_logits(together)[at][1], expected, rtol=0, atol=1e-12)
    assert_close(gradients((together, slice(None))), gradients(*alone), rtol=0, atol=1e-11)


def test_a_coarse_patch_without_children_changes_nothing_where_no_parent_is_missing():
    """And where one is, it does: by the mean that stands for the parent."""
    model = far_from_zero(build("mustmil", D, scales="10,20", **SMALL))
    for missing, changes in ((0.0, False), (0.5, True)):
        bags, extras = pyramid((7, 19), D, scales=(10, 20), missing=missing)
        other = {**bags, 10: bags[10].clone()}
        other[10][-1] += 5
        one, two = (model(packed((each, extras))).logits for each in (bags, other))
        assert torch.equal(one, two) != changes


def test_the_default_reads_three_scales_and_the_ancestors_of_20x_patches():
    model = build("mustmil", D)
    assert model.scales == zoo.MODELS["mustmil"].scales == (5, 10, 20)
    assert model.options.extras() == (parents(20, 10), parents(20, 5))
    assert build("mustmil", D, scales="5,10").options.extras() == (parents(10, 5),)
    assert [list(each.weight.shape) for each in (*model.embeddings, model.head)] == [[128, D]] * 3 + [[4, 4 * 3 * 128]]
    assert model.joint_attention.hidden.weight.shape == (64, 3 * 128)


@pytest.mark.parametrize("scales", ["20", "20,10", "10,20,40", "5,10,20,", ""])
def test_scales_that_make_no_pyramid_are_refused(scales):
    with pytest.raises(ConfigError, match=f"scales must be 5,10,20 or 10,20 or .*, got '{scales}'"):
        build("mustmil", D, scales=scales)


def test_widths_of_nothing_are_refused():
    for option in ("embed_dim", "attention_dim", "n_bins"):
        with pytest.raises(ConfigError, match=f"{option} must be at least 1, got 0"):
            build("mustmil", D, **{option: 0})


def test_a_batch_without_parents_is_refused_by_name():
    bags, extras = pyramid((3, 7, 19), D)
    del extras[parents(20, 5)]
    with pytest.raises(MissingExtraError, match="slide-0: mustmil needs 5x parents of 20x patches"):
        build("mustmil", D).double()(packed((bags, extras)))


def test_all_scales_start_alike_as_in_the_released_code():
    torch.manual_seed(4)
    model = build("mustmil", D)
    for parts in (model.embeddings, model.attentions, model.own_heads):
        first, *others = (each.state_dict() for each in parts)
        for other in others:
            assert_close(other, first, rtol=0, atol=0)
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(list(model.parameters()))


def test_a_few_steps_learn_what_only_patches_with_their_parents_tell():
    """Death where a marked 20x patch lies in a marked 10x one; every slide has as many marks of either kind."""
    torch.manual_seed(0)
    slides, event = [], []
    for i in range(4):
        inside = i % 2 == 0
        bags = {20: torch.zeros(12, 2), 10: torch.zeros(3, 2), 5: torch.zeros(1, 2)}
        bags[20][0], bags[10][0 if inside else 1] = 1.0, 1.0
        slides.append((bags, {parents(20, 10): torch.arange(12) // 4, parents(20, 5): torch.zeros(12).long()}))
        event.append(inside)
    batch, time_bin = packed(*slides), torch.where(torch.tensor(event), 0, 3)
    model = build("mustmil", 2, embed_dim=8, attention_dim=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        parts = model.training_logits(batch)
        loss = sum(w * nll_survival(logits, time_bin, torch.tensor(event)) for w, logits in parts)
        loss.backward()
        optimizer.step()
    risk = model(batch).risk.detach()
    assert risk[torch.tensor(event)].min() > risk[~torch.tensor(event)].max() + 0.5
    own = parts[1][1].detach()  # 20x alone cannot tell
    assert (own[0] - own[1]).abs().max() < 1e-5


def test_released_weights_become_a_model_with_the_same_answers_without_their_frozen_network(shared, golden, tmp_path):
    arrays, state = golden(shared)
    frozen = {"conv_layers.0.weight": torch.zeros(64, 3, 7, 7), "conv_layers.1.num_batches_tracked": torch.tensor(1)}
    torch.save({key: value.float() for key, value in state.items()} | frozen, tmp_path / "best.pt")
    done = CliRunner().invoke(main, ["import-weights", str(tmp_path / "best.pt"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["model"], told["feature_dim"]) == ("mustmil", 96)
    assert told["options"] == {"n_bins": 4, "scales": "5,10", "embed_dim": 128, "attention_dim": 64}
    again = load_model(tmp_path / "best.safetensors").double()
    assert_close(again(golden_batch(arrays, "odd")).hazards.detach(), arrays["out64/odd/out"], rtol=0, atol=1e-9)


def test_released_weights_with_a_tensor_that_is_not_known_are_refused(shared, golden):
    _, state = golden(shared)
    with pytest.raises(WeightsError, match=r"mustmil do not have the same tensors: fc\.weight"):
        released_model(state | {"fc.weight": torch.zeros(2)})


def test_memory_of_the_largest_slide_is_what_a_pencil_says():
    """Kept of a 20x patch: 128 embedded, 64 inside either attention, a few scores; no rows of three embeddings."""
    patches = {5: 8_625, 10: 34_498, 20: 137_990}
    found = training_footprint("mustmil", {}, 1024, patches, device_type="cpu")
    assert found.features == 4 * 1024 * sum(patches.values()) + 2 * 8 * patches[20]
    kept = 4 * patches[20] * (128 + 2 * 64)
    assert kept <= found.saved <= 1.6 * kept
    assert found.transient <= 2 * kept
