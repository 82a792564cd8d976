"""Every model's maps against attention written out in full, slide by slide, and against the released code's."""

import json
import math

import numpy as np
import pytest
import torch
from bags_with_extras import extras_of, pack_with_extras
from click.testing import CliRunner
from made_up_fold import fitted
from plain_crossfusion import CrossAttention, PlainCrossFusion
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cftrain import zoo
from cftrain.cli import main
from cftrain.errors import MissingScaleError
from cftrain.models import BagBatch, available, build
from cftrain.models.attention_maps import attention_maps
from cftrain.models.patch_maps import on_patches
from cftrain.models.released import from_released, released_model

D = 24
SMALL = {
    "mean-cox": {},
    "abmil": {"hidden_dim": 16, "attention_dim": 8, "dropout": 0.25},
    "deepgraphsurv": {"hidden_dim": 16},
    "dsmil": {"attention_dim": 8},
    "patch-gcn": {"hidden_dim": 8},
    "csmil": {"embed_dim": 16, "hidden_dim": 8},
    "mustmil": {"embed_dim": 8, "attention_dim": 8},
    "protosurv": {"n_prototypes": 2, "embed_dim": 16, "n_heads": 2, "mlp_dim": 8, "graph_dim": 8},
    "scmil": {"filter_dim": 8, "cluster_size": 4, "n_heads": 4, "attention_dim": 8},
    "transmil": {"embed_dim": 32, "n_heads": 4, "n_landmarks": 8},
    "zoommil": {"hidden_dim": 16, "attention_dim": 8},
}
CROSSFUSION = {"embed_dim": 32, "n_heads": 4}
EXTRAS = extras_of(available())
SIZES = ((3, 7, 19), (1, 1, 1), (2, 17, 65), (4, 9, 16), (5, 2, 3))
"""Patches at 5x, 10x, 20x: padded grids, grids that are full, a single patch, a pad as long as the bag."""


def far_from_zero(model):
    """In float64, every parameter moved so that none can hide."""
    torch.manual_seed(13)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def small(name, **options):
    return far_from_zero(fitted(build(name, D, **SMALL.get(name, CROSSFUSION), **options)))


def make_bags(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return [
        {scale: torch.randn(n, D, generator=generator).to(dtype) for scale, n in zip((5, 10, 20), size, strict=True)}
        for size in sizes
    ]


def pack(bags):
    return pack_with_extras(bags, EXTRAS)


@pytest.mark.parametrize("name", available())
def test_a_model_returns_the_maps_that_its_entry_lists_one_share_of_the_attention_for_every_patch(name):
    bags = make_bags(*SIZES)
    maps = small(name).patch_maps(pack(bags))
    assert list(maps) == list(zoo.MODELS[name].maps)
    for each in maps.values():
        assert [len(scores) for scores in each.scores] == [len(bag[each.scale]) for bag in bags]
        assert {(scores.dtype, scores.device.type, scores.requires_grad) for scores in each.scores} == {
            (torch.float64, "cpu", False)
        }
        totals = [float(scores.sum()) + other for scores, other in zip(each.scores, each.elsewhere, strict=True)]
        assert totals == pytest.approx([1.0] * len(bags), abs=1e-9)
        lowest = -0.05 if name == "transmil" else 0.0  # an approximation of attention
        assert all((scores >= lowest).all() for scores in each.scores)


def test_every_map_has_a_name_of_its_scale_and_a_meaning_of_one_sentence():
    assert {name: tuple(info.maps) for name, info in zoo.MODELS.items() if name.startswith(("cross", "abmil"))} == {
        "abmil": ("attention",),
        "crossfusion": ("coarse-cross", "fine-cross", "source", "fused"),
        "crossfusion-concat": ("coarse-cross", "fine-cross", "source", "fused"),
        "crossfusion-single": ("source", "fused"),
    }
    for info in zoo.MODELS.values():
        for meaning in info.maps.values():
            assert meaning.endswith(".")
            assert meaning.count(". ") == 0


def test_the_command_says_which_maps_a_model_has_and_what_they_mean():
    text = CliRunner().invoke(main, ["models", "crossfusion-single"]).output
    assert "map source: Attention that a 20x patch receives in the last block of the source Pad-Transformer" in text
    assert "map fused: Attention that a 20x patch's place receives from the class token" in text
    (row,) = json.loads(CliRunner().invoke(main, ["models", "abmil", "--json"]).output)
    assert list(row["maps"]) == ["attention"]
    assert "map " not in CliRunner().invoke(main, ["models"]).output


KINDS = {
    "CrossFusion": "crossfusion",
    "CrossFusionConcat": "crossfusion-concat",
    "CrossFusionSingle": "crossfusion-single",
}
SCALES = {"coarse-cross": 5, "fine-cross": 20, "source": 10, "fused": 10}


def dense_maps(plain, x):
    """The four maps of one slide from full attention tables, made of the weights of the plain model."""
    tables = {}

    def record(name):
        def hook(module, inputs, output):
            rows, context = inputs
            if isinstance(module, CrossAttention):
                rows, context = (each + module.scale_embeddings[0] for each in inputs)
            q, k = module.q_proj(rows).chunk(module.heads, dim=1), module.k_proj(context).chunk(module.heads, dim=1)
            of_heads = [torch.softmax(a @ b.T / math.sqrt(a.shape[1]), dim=1) for a, b in zip(q, k, strict=True)]
            tables[name] = torch.stack(of_heads).mean(dim=0)

        return hook

    for name, module in plain.named_modules():
        if hasattr(module, "q_proj"):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        plain(*x)
    last = len(plain.final_transformer.post_layers.layers) - 1
    short = plain.kind == "CrossFusion"
    found = {
        "source": tables[f"{'s' if short else 'source'}_transformer.post_layers.layers.{last}.1"].mean(dim=0),
        "fused": tables[f"final_transformer.post_layers.layers.{last}.1"][0],
    }
    if plain.kind != "CrossFusionSingle":
        found["coarse-cross"] = tables["c_cross_attn" if short else "coarse_cross_attn"].mean(dim=0)
        found["fine-cross"] = tables["f_cross_attn" if short else "fine_cross_attn"].mean(dim=0)
    return found


def copies_counted_for_their_patch(keys, n):
    """Key i of a square stands for patch i, and behind the last patch for the first ones again."""
    scores = [0.0] * n
    for i, share in enumerate(keys.tolist()):
        scores[i if i < n else i - n] += share
    return scores


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_of_crossfusion_equal_full_tables_of_attention_slide_by_slide(kind, layers):
    plain = far_from_zero(PlainCrossFusion(kind, embed_dim=32, layers=layers, backbone_dim=D))
    state = plain.state_dict()
    ours = released_model(state).double()
    ours.load_state_dict(from_released(state, ours))
    bags = make_bags(*SIZES)
    maps = ours.patch_maps(pack(bags))
    assert list(maps) == list(zoo.MODELS[KINDS[kind]].maps)
    for i, bag in enumerate(bags):
        dense = dense_maps(plain, [bag[scale] for scale in (5, 10, 20)])
        for name, found in maps.items():
            assert found.scale == (20 if kind == "CrossFusionSingle" else SCALES[name])
            token = int(name == "fused")
            expected = copies_counted_for_their_patch(dense[name][token:], len(bag[found.scale]))
            assert found.scores[i].tolist() == pytest.approx(expected, abs=1e-12)
            assert found.elsewhere[i] == pytest.approx(float(dense[name][:token].sum()), abs=1e-12)


def test_the_map_of_abmil_is_the_softmax_of_its_gated_scores():
    model = small("abmil", scale=10)
    bags = make_bags(*SIZES)
    found = model.patch_maps(pack(bags))["attention"]
    assert found.scale == 10
    for bag, scores in zip(bags, found.scores, strict=True):
        h = torch.relu(model.projection(bag[10]))
        gated = torch.tanh(model.attention.content(h)) * torch.sigmoid(model.attention.gate(h))
        weight = (gated @ model.attention.score.weight[0]).exp()
        assert_close(scores, weight / weight.sum(), rtol=0, atol=1e-12)
    assert found.elsewhere == (0.0,) * len(bags)


@pytest.fixture
def golden(shared):
    def load(file):
        arrays = np.load(shared / "golden" / f"{file}.npz")
        state = {key[3:]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("sd/")}
        model = released_model(state, n_heads=json.loads(str(arrays["cfg"])).get("heads", 4)).double()
        return arrays, model

    return load


def golden_batch(arrays, case):
    x = {scale: torch.from_numpy(arrays[f"in/{case}/x{scale}"]).double() for scale in (5, 10, 20)}
    return pack([{scale: x[scale][i] for scale in x} for i in range(len(x[5]))])


GOLDEN_MAPS = {"coarse-cross": "coarse_cross", "fine-cross": "fine_cross", "source": "source_pt_post"}


@pytest.mark.parametrize("case", ["odd", "square", "tiny", "two", "five", "batch2"])
@pytest.mark.parametrize("file", ["CrossFusion", "CrossFusionConcat"])
def test_the_maps_equal_the_released_column_means_with_the_padding_folded_back(golden, file, case):
    arrays, model = golden(file)
    maps = model.patch_maps(golden_batch(arrays, case))
    for name, released in GOLDEN_MAPS.items():
        of_slides = torch.from_numpy(arrays[f"out64/{case}/attn/{released}"]).mean(dim=1)
        for scores, elsewhere, keys in zip(maps[name].scores, maps[name].elsewhere, of_slides, strict=True):
            assert scores.tolist() == pytest.approx(copies_counted_for_their_patch(keys, len(scores)), abs=1e-9)
            assert elsewhere == 0


@pytest.mark.parametrize("case", ["odd", "square", "tiny", "two", "five"])
def test_the_weights_of_abmil_equal_those_of_the_released_amil(golden, case):
    arrays, model = golden("AMIL")
    (scores,) = model.patch_maps(golden_batch(arrays, case))["attention"].scores
    assert_close(scores, torch.from_numpy(arrays[f"out64/{case}/attn/pool"])[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", available())
def test_maps_are_those_of_evaluation_and_leave_every_layer_in_its_mode(name):
    model = small(name)
    batch = pack(make_bags(*SIZES))
    expected = model.patch_maps(batch)
    model.train()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.eval()
    modes = {module: module.training for module in model.modules()}
    found = model.patch_maps(batch)
    assert {module: module.training for module in model.modules()} == modes
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.scores, other.scores, strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_model_stays_as_it_was_where_its_maps_cannot_be_made():
    model = build("crossfusion", D, **CROSSFUSION).train()
    with pytest.raises(MissingScaleError, match="slide-0: crossfusion needs 10x"):
        model.patch_maps(BagBatch.pack(["slide-0"], [{5: torch.zeros(2, D), 20: torch.zeros(3, D)}]))
    assert all(module.training for module in model.modules())
    assert all(getattr(module, "recorder", None) is None for module in model.modules())


@pytest.mark.parametrize("name", available())
def test_maps_in_float32_add_up_and_stay_within_1e5_of_those_in_float64(name):
    model = small(name)
    batch = pack(make_bags(*SIZES, dtype=torch.float16))
    precise, rough = model.patch_maps(batch), model.float().patch_maps(batch)
    for map_name, found in rough.items():
        for scores, elsewhere, expected in zip(found.scores, found.elsewhere, precise[map_name].scores, strict=True):
            assert scores.dtype == torch.float64
            assert float(scores.sum()) + elsewhere == pytest.approx(1, abs=1e-5)
            assert_close(scores, expected, rtol=0, atol=1e-5)


class LargestResult(TorchDispatchMode):
    """The largest number of elements that any operation answers with."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [
            each for each in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(each, torch.Tensor)
        ]
        self.elements = max([self.elements, *(each.numel() for each in tensors)])
        return out


def test_maps_of_large_bags_are_made_without_a_table_of_queries_and_keys():
    model = build("crossfusion", 4, embed_dim=8, n_heads=2)
    n = {5: 625, 10: 2_500, 20: 10_000}
    batch = BagBatch.pack(["large"], [{scale: torch.randn(rows, 4) for scale, rows in n.items()}])
    with LargestResult() as largest:
        model.patch_maps(batch)
    assert 10_000 * 2 * 8 <= largest.elements < n[10] * n[10] / 8  # far below one head's smallest table


def test_all_maps_come_from_one_forward_pass():
    model = small("crossfusion")
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    model.patch_maps(pack(make_bags(*SIZES)))
    assert len(calls) == 1


def test_only_the_attentions_asked_for_are_collected():
    model, batch = small("crossfusion"), pack(make_bags(*SIZES))
    with torch.no_grad(), attention_maps(model) as every:
        model(batch)
    with torch.no_grad(), attention_maps(model, places=["source_transformer.post.0"]) as some:
        model(batch)
    assert list(some) == ["source_transformer.post.0"]
    assert len(every) == 10
    assert_close(some["source_transformer.post.0"], every["source_transformer.post.0"], rtol=0, atol=1e-12)


def test_copies_and_class_tokens_are_told_from_patches():
    """Two heads over a class token, three patches and a copy of the first."""
    received = torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.2], [0.3, 0.0, 0.1, 0.2, 0.4]])
    found = on_patches([received], 10, [3], class_tokens=1)
    assert found.scores[0].tolist() == pytest.approx([0.1 + 0.3, 0.2, 0.2], abs=1e-7)
    assert found.elsewhere == pytest.approx((0.2,), abs=1e-7)
    assert found.scale == 10
