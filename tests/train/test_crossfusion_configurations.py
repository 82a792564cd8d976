"""CrossFusion and its ablations in other configurations against the same model in plain PyTorch.

The plain model takes the released code's state dicts as they are and shares no code with ours; that it computes what
the released code does is shown here on the golden files too.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_crossfusion import PlainCrossFusion
from torch.testing import assert_close

from cftrain.models import BagBatch, build
from cftrain.models.released import place, released_model

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "golden"
KINDS = ("CrossFusion", "CrossFusionConcat", "CrossFusionSingle")
SIZES = {
    "one layer": {"layers": 1, "backbone_dim": 24},
    "two layers": {"layers": 2, "backbone_dim": 24},
    "features of the model's width": {"layers": 1, "backbone_dim": 32},
    "two layers, features of the model's width, other bins": {"layers": 2, "backbone_dim": 32, "n_classes": 6},
    "two heads": {"layers": 1, "backbone_dim": 24, "heads": 2},
}
BAGS = {"odd": (3, 7, 19), "one patch": (1, 1, 1), "squares": (4, 9, 16), "a tile and one": (2, 17, 65)}


def randomised(kind, sizes):
    """A plain model in float64 whose every parameter is far from 0."""
    torch.manual_seed(13)
    plain = PlainCrossFusion(kind, embed_dim=32, **sizes).double().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return plain


def make_bags(sizes, width):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in sizes]


@pytest.mark.parametrize("bags", BAGS.values(), ids=BAGS.keys())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_every_configuration_equals_the_plain_model_gradients_included(kind, sizes, bags):
    plain = randomised(kind, sizes)
    ours = released_model(plain.state_dict(), n_heads=sizes.get("heads", 4)).double()
    ours.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    from_plain = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    load(ours, from_plain)
    x = make_bags(bags, sizes["backbone_dim"])
    theirs = plain(*x)
    logits = ours(BagBatch.pack(["slide"], [dict(zip((5, 10, 20), x, strict=True))])).logits[0]
    assert_close(logits, theirs, rtol=0, atol=1e-9)
    weight = torch.arange(1.0, len(theirs) + 1, dtype=torch.float64)
    (logits * weight).sum().backward()
    (theirs * weight).sum().backward()
    for key, parameter in plain.named_parameters():
        name, half = place(key, "crossfusion")
        gradient = ours.get_parameter(name).grad
        gradient = gradient if half is None else gradient.chunk(2)[half]
        expected = parameter.grad
        assert (gradient.reshape(expected.shape) - expected).norm() <= max(1e-9 * expected.norm(), 1e-12), key


def load(ours, released):
    """The float64 values themselves: `released_model` builds in float32."""
    with torch.no_grad():
        for key, value in released.items():
            name, half = place(key, "crossfusion")
            target = ours.get_parameter(name)
            target = target if half is None else target.chunk(2)[half]
            target.copy_(value.reshape(target.shape))


@pytest.mark.parametrize("file", ["CrossFusion", "CrossFusionConcat"])
@pytest.mark.parametrize("case", ["odd", "tiny", "five"])
def test_the_plain_model_computes_what_the_released_code_does(file, case):
    if not GOLDEN.is_dir():
        pytest.skip("no ../shared/data/golden beside the repository")
    golden = np.load(GOLDEN / f"{file}.npz")
    config = json.loads(str(golden["cfg"]))
    sizes = {name: config[name] for name in ("embed_dim", "heads", "layers", "backbone_dim")}
    plain = PlainCrossFusion(file, **sizes).double().eval()
    plain.load_state_dict({key[3:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("sd/")})
    logits = plain(*(torch.from_numpy(golden[f"in/{case}/x{scale}"][0]).double() for scale in (5, 10, 20)))
    assert_close(logits, torch.from_numpy(golden[f"out64/{case}/logits"][0]), rtol=0, atol=1e-12)


PARAMETERS = {"CrossFusion": 22_963_720, "CrossFusionConcat": 23_575_044, "CrossFusionSingle": 9_206_276}


@pytest.mark.parametrize(("kind", "expected"), PARAMETERS.items(), ids=PARAMETERS.keys())
def test_models_have_as_many_parameters_as_the_released_ones(kind, expected):
    """Counted on the released classes at E=512, four heads, one layer, D=1,024."""
    with torch.device("meta"):
        models = PlainCrossFusion(kind), build(NAMES[kind], 1024)
    assert [sum(parameter.numel() for parameter in model.parameters()) for model in models] == [expected, expected]


NAMES = {
    "CrossFusion": "crossfusion",
    "CrossFusionConcat": "crossfusion-concat",
    "CrossFusionSingle": "crossfusion-single",
}


def test_the_text_variant_is_a_block_whose_residual_is_its_input():
    """Both residuals written out by hand, for one block of one head and one bag."""
    torch.manual_seed(3)
    model = build("crossfusion", 24, embed_dim=16, n_heads=1, variant="text").double().eval()
    block = model.source_transformer.pre[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(9, 16, dtype=torch.float64)
    a = block.attention
    normed = block.attention_norm(x)
    q, (k, v) = a.query(normed), a.key_value(normed).chunk(2, dim=1)
    y = x + a.out(torch.softmax(q @ k.T / 4, dim=1) @ v)
    z = block.feed_forward_norm(y)
    expected = y + block.feed_forward.down(torch.nn.functional.gelu(block.feed_forward.up(z)))
    assert_close(block(x, (9,)), expected, rtol=0, atol=1e-12)


def test_the_variants_differ_and_share_their_weights():
    bags = BagBatch.pack(["slide"], [dict(zip((5, 10, 20), make_bags((3, 7, 19), 24), strict=True))])
    released = build("crossfusion", 24, embed_dim=32).double().eval()
    text = build("crossfusion", 24, embed_dim=32, variant="text").double().eval()
    text.load_state_dict(released.state_dict())
    assert dataclasses.asdict(text.options)["variant"] == "text"
    assert (released(bags).logits - text(bags).logits).abs().max() > 1e-3
