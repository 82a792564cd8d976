"""What every survival model promises: bags do not see each other, awkward bags work, misuse is named."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from bags_with_extras import extras_of, pack_with_extras
from made_up_fold import fitted
from torch.testing import assert_close

from cftrain import zoo
from cftrain.errors import ConfigError, MissingScaleError, ShapeError, TrainError, UnknownModelError
from cftrain.models import BagBatch, SurvivalOutput, available, build
from cftrain.models.layers import square_grids, square_pad

D = 24
SMALL = {
    "mean-cox": {},
    "abmil": {"hidden_dim": 16, "attention_dim": 8},
    "crossfusion": {"embed_dim": 32, "n_heads": 4},
    "crossfusion-concat": {"embed_dim": 32, "n_heads": 4},
    "crossfusion-single": {"embed_dim": 32, "n_heads": 4},
    "transmil": {"embed_dim": 32, "n_heads": 4, "n_landmarks": 8},
    "crossfusion, as the paper's text": {"embed_dim": 32, "n_heads": 4, "variant": "text"},
    "crossfusion, two layers": {"embed_dim": 32, "n_heads": 4, "n_layers": 2},
    "crossfusion, features of its width": {"embed_dim": D, "n_heads": 4},
    "csmil": {"embed_dim": 16, "hidden_dim": 32},
    "csmil, as the paper's text": {"embed_dim": 16, "hidden_dim": 8, "scale_softmax": True},
    "dsmil": {"attention_dim": 16},
    "deepgraphsurv": {"hidden_dim": 16},
    "deepgraphsurv, spectral": {"hidden_dim": 16, "conv": "cheb", "graph": "space"},
    "mustmil": {"embed_dim": 8, "attention_dim": 8},
    "mustmil, two scales": {"embed_dim": 8, "attention_dim": 8, "scales": "5,10"},
    "patch-gcn": {"hidden_dim": 8},
    "protosurv": {"n_prototypes": 2, "embed_dim": 16, "n_heads": 2, "mlp_dim": 8, "graph_dim": 8},
    "scmil": {"filter_dim": 8, "cluster_size": 4, "n_heads": 4, "attention_dim": 8},
    "zoommil": {"hidden_dim": 16, "attention_dim": 8},
    "zoommil, few places": {"hidden_dim": 16, "attention_dim": 8, "n_zoomed": 2, "n_children": 3},
}
LOSSES = {"mustmil": 4}
"""The sum of the weights of a model's losses, where it is not 1: of 4 losses, as in the released code."""
EXTRAS = extras_of([(name.split(",")[0], options) for name, options in SMALL.items()])


@pytest.fixture(params=SMALL)
def model(request):
    """A small model in float64 whose every parameter is far from 0, so that none can hide."""
    torch.manual_seed(11)
    model = fitted(build(request.param.split(",")[0], D, **SMALL[request.param])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_bags(*sizes, dtype=torch.float64):
    """Bags of (n5, n10, n20) patches each."""
    generator = torch.Generator().manual_seed(5)
    return [
        {scale: torch.randn(n, D, generator=generator).to(dtype) for scale, n in zip((5, 10, 20), size, strict=True)}
        for size in sizes
    ]


def pack(bags):
    return pack_with_extras(bags, EXTRAS)


def gradients(model, batches):
    """Of all that training looks at; none of a model that is only fitted."""
    if not list(model.parameters()):
        return {}
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    model.zero_grad()
    for batch in batches:
        of_parts = [w * SurvivalOutput.from_logits(logits).survival for w, logits in model.training_logits(batch)]
        (sum(of_parts) * weights).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}  # a hard choice passes none


def test_packing_unequal_bags_changes_neither_outputs_nor_gradients(model):
    bags = make_bags((2, 7, 19), (1, 1, 1), (6, 16, 70))
    packed, single = pack(bags), [pack([bag]) for bag in bags]
    together, alone = model(packed), [model(batch) for batch in single]
    for field in SurvivalOutput._fields:
        expected = torch.cat([getattr(output, field) for output in alone])
        assert_close(getattr(together, field), expected, rtol=0, atol=1e-10)
    assert_close(gradients(model, [packed]), gradients(model, single), rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", zoo.VARIANTS)
def test_packing_32_slides_gives_the_gradients_of_32_steps_of_one_slide_added_up(variant):
    """In float32: to 1e-5 of each gradient's norm."""
    torch.manual_seed(4)
    model = build("crossfusion", D, embed_dim=32, n_heads=4, variant=variant).eval()
    sizes = torch.randint(1, 40, (32, 3), generator=torch.Generator().manual_seed(9)).tolist()
    bags = make_bags(*sizes, dtype=torch.float32)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    model.zero_grad()
    (model(pack(bags)).survival * weights).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for bag in bags:
        (model(pack([bag])).survival * weights).sum().backward()
    largest = max(gradient.norm() for gradient in packed.values())
    for name, parameter in model.named_parameters():
        # gradients of a key's bias are rounding, far below the largest gradient
        assert (packed[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-7 * largest, name


SIZES = {
    "one patch a scale": (1, 1, 1),
    "one 10x patch among many": (5, 1, 40),
    "a perfect square": (4, 16, 64),
    "one less than a square": (4, 15, 60),
    "one more than a square": (4, 17, 68),
    "more coarse than fine": (30, 10, 2),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_awkward_bags_give_probabilities_that_fall_with_time_and_finite_gradients(model, size):
    batch = pack(make_bags(size))
    output = model(batch)
    assert [list(value.shape) for value in output] == [[1, 4], [1, 4], [1, 4], [1]]
    assert ((output.hazards > 0) & (output.hazards < 1)).all()
    assert (output.survival.diff(dim=1) <= 0).all()
    assert (output.survival[:, 0] <= 1).all()
    assert_close(output.risk, -output.survival.sum(dim=1))
    assert all(gradient.isfinite().all() for gradient in gradients(model, [batch]).values())


@pytest.mark.parametrize("name", available())
def test_the_first_that_training_looks_at_are_the_logits_and_weights_add_up_to_what_is_known(name):
    model = fitted(build(name, D, **SMALL[name])).eval()
    batch = pack(make_bags((2, 7, 19), (3, 4, 5), dtype=torch.float32))
    parts = model.training_logits(batch)
    assert sum(weight for weight, _ in parts) == LOSSES.get(name, 1)
    assert {logits.shape for _, logits in parts} == {(2, 4)}
    assert torch.equal(parts[0][1], model.logits(batch))


@pytest.mark.parametrize(
    "name", [name for name in available() if name not in ("dsmil", "mean-cox", "mustmil")]
)  # no dropout
def test_evaluation_is_deterministic_and_training_drops(name):
    model = fitted(build(name, D, **SMALL[name], **({"dropout": 0.25} if name == "abmil" else {})))
    batch = pack(make_bags((4, 12, 40), dtype=torch.float32))
    evaluated = [model.eval()(batch).logits for _ in range(2)]
    trained = [model.train()(batch).logits for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not torch.equal(*trained)


def test_attention_dropout_alone_acts_in_training_only():
    model = build("crossfusion", D, embed_dim=32, dropout=0.0, attention_dropout=0.2)
    batch = pack(make_bags((4, 12, 40), dtype=torch.float32))
    assert not torch.equal(model.train()(batch).logits, model(batch).logits)
    assert torch.equal(model.eval()(batch).logits, model(batch).logits)


def test_channel_dropout_drops_whole_channels_of_one_bag():
    processor = build("crossfusion", D, embed_dim=400, dropout=0.3).train().conv_processor
    torch.manual_seed(0)
    first, second = processor._channel_scale(torch.ones(4 + 9, 400), (2, 3))
    for scale in (first, second):
        assert sorted(set(scale.tolist())) == pytest.approx([0, 1 / 0.7])
        assert (scale == 0).float().mean().item() == pytest.approx(0.3, abs=0.1)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", available())
def test_float16_features_are_computed_in_the_precision_of_the_parameters(name):
    model = fitted(build(name, D, **SMALL[name])).eval()
    batch = pack(make_bags((2, 7, 19), (3, 4, 5), dtype=torch.float16))
    assert torch.equal(model(batch).logits, model(batch.to(dtype=torch.float32)).logits)
    assert model(batch).risk.dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    [
        "abmil",
        "crossfusion",
        "crossfusion, features of its width",
        "csmil",
        "csmil, as the paper's text",
        "deepgraphsurv",
        "dsmil",
        "mustmil",
        "patch-gcn",
        "protosurv",
        "scmil",
        "transmil",
        "zoommil",
    ],
)
def test_bfloat16_autocast_stays_close_and_answers_in_float32(name):
    torch.manual_seed(2)
    model = fitted(build(name.split(",")[0], D, **SMALL[name])).train(False)
    batch = pack(make_bags((2, 7, 19), (3, 4, 5), dtype=torch.float16))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    assert output.survival.dtype == torch.float32
    assert_close(output.logits, model(batch).logits, rtol=0, atol=0.03)
    output.risk.sum().backward()


PADDED = {1: 1, 2: 4, 4: 4, 5: 9, 9: 9, 10: 16, 34_498: 186 * 186}


@pytest.mark.parametrize("n", PADDED, ids=lambda n: f"{n} rows")
def test_a_bag_is_padded_to_the_next_square_with_its_first_rows(n):
    x = torch.arange(n, dtype=torch.float64).unsqueeze(1)
    padded = square_pad(x, (n,))
    assert len(padded) == PADDED[n] == square_grids((n,))[0] ** 2
    assert torch.equal(padded[:n], x)
    assert torch.equal(padded[n:], x[: PADDED[n] - n])


def test_survival_is_the_running_product_of_one_minus_hazard_and_finite_at_extremes():
    logits = torch.tensor([[-1.0, 0.5, 2.0], [90.0, -90.0, 0.0]], dtype=torch.float64, requires_grad=True)
    output = SurvivalOutput.from_logits(logits)
    assert_close(output.hazards, 1 / (1 + (-logits).exp()))
    assert_close(output.survival, (1 - output.hazards).cumprod(dim=1))
    output.risk.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_answered_in_float32(dtype):
    assert {value.dtype for value in SurvivalOutput.from_logits(torch.zeros(2, 4, dtype=dtype))} == {torch.float32}


@pytest.mark.parametrize(("name", "expected"), [("abmil", 789_765), ("dsmil", 168_200), ("transmil", 2_673_172)])
def test_default_models_have_as_many_parameters_as_the_released_ones(name, expected):
    with torch.device("meta"):
        model = build(name, 1024)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_crossfusion_starts_as_released():
    torch.manual_seed(0)
    E = 256
    state = build("crossfusion", 64, embed_dim=E).state_dict()
    expected_std = {
        "fine_projection.0.weight": 0.02,
        "coarse_cross_attention.scale_embedding": 0.02,
        "source_transformer.pre.0.attention.key_value.weight": 0.02,
        "source_transformer.ppeg.conv7.weight": math.sqrt(2 / (E * 49)),
        "final_transformer.ppeg.conv3.weight": math.sqrt(2 / (E * 9)),
        "conv_processor.conv5.weight": math.sqrt(2 / (E / 2 * 25)),
        "final_transformer.class_token": 1e-6,
        "head.bias": 0,
        "conv_processor.conv1.bias": 0,
        "conv_processor.mix_bias": 0,
    }
    for name, std in expected_std.items():
        assert state[name].pow(2).mean().sqrt().item() == pytest.approx(std, rel=0.2), name
    assert (state["conv_processor.norm.weight"] == 1).all()


def test_a_slide_without_patches_at_a_scale_is_refused_by_name():
    bags = make_bags((2, 3, 4), (2, 0, 4))
    with pytest.raises(MissingScaleError, match="slide-1: no patch at 10x"):
        BagBatch.pack(["slide-0", "slide-1"], bags)


def test_a_slide_lacking_a_scale_of_the_batch_is_refused_by_name():
    bags = make_bags((2, 3, 4), (2, 3, 4))
    del bags[0][5]
    with pytest.raises(MissingScaleError, match="slide-0: no features at 5x"):
        pack(bags)


def test_a_model_names_the_slide_and_the_scale_it_misses():
    batch = BagBatch.pack(["slide-0"], [{20: torch.zeros(3, D)}])
    with pytest.raises(MissingScaleError, match="slide-0: crossfusion needs 5x, the batch has 20x"):
        build("crossfusion", D, embed_dim=32)(batch)
    assert build("abmil", D)(batch).risk.shape == (1,)


def test_a_model_names_the_slide_whose_features_have_another_width():
    with pytest.raises(ShapeError, match=f"slide-0: {D} features a patch at 20x, abmil was built for 8"):
        build("abmil", 8)(pack(make_bags((2, 3, 4))))


def test_bags_of_other_shapes_are_refused_by_name():
    bags = [{20: torch.zeros(3, 8)}, {20: torch.zeros(3, 9)}]
    with pytest.raises(ShapeError, match=r"slide-1: features at 20x must be \[N, 8\], got \[3, 9\]"):
        pack(bags)
    with pytest.raises(ShapeError, match="0 slides"):
        BagBatch.pack([], [])
    with pytest.raises(ShapeError, match=r"must be \[4, D\], got \[3, 8\]"):
        BagBatch(("a",), {20: torch.zeros(3, 8)}, {20: (4,)})
    with pytest.raises(ShapeError, match="2 lengths at 20x for 1 slides"):
        BagBatch(("a",), {20: torch.zeros(3, 8)}, {20: (1, 2)})
    with pytest.raises(ShapeError, match=r"features at scales \[20\], lengths at \[10\]"):
        BagBatch(("a",), {20: torch.zeros(3, 8)}, {10: (3,)})


def test_a_batch_moves_to_another_dtype_and_knows_its_length():
    batch = pack(make_bags((2, 3, 4), (1, 1, 1)))
    moved = batch.to("cpu", torch.float16, non_blocking=True)
    assert len(batch) == 2
    assert {rows.dtype for rows in moved.features.values()} == {torch.float16}
    assert (moved.slide_ids, moved.lengths) == (batch.slide_ids, batch.lengths)


def test_an_unknown_model_is_refused_with_near_names_and_all():
    with pytest.raises(
        UnknownModelError, match=r"'crosfusion'. Did you mean crossfusion or .*\? Models: abmil, crossfusion, "
    ):
        build("crosfusion", D)


def test_an_unknown_option_is_refused_with_near_names_and_all():
    with pytest.raises(
        ConfigError,
        match=r"'droput'. Did you mean dropout or attention_dropout\? Options: attention_dropout, dr",
    ):
        build("crossfusion", D, droput=0.1)


BAD_OPTIONS = {
    "a word for a number": ({"n_heads": "4"}, "n_heads must be int, got '4'"),
    "a fraction for a count": ({"n_layers": 1.5}, "n_layers must be int"),
    "a bool for a number": ({"dropout": True}, "dropout must be float"),
    "no layers": ({"n_layers": 0}, "n_layers must be at least 1"),
    "certain dropout": ({"dropout": 1}, "dropout must be at least 0 and below 1, got 1.0"),
    "heads that do not divide the width": ({"embed_dim": 30}, "multiple of n_heads"),
    "an odd width": ({"embed_dim": 33, "n_heads": 3}, "and of 2"),
    "a variant nobody wrote": ({"variant": "fast"}, "variant must be released or text, got 'fast'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_an_option_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build("crossfusion", D, **options)


def test_models_without_features_are_refused():
    with pytest.raises(ConfigError, match="feature_dim must be at least 1, got 0"):
        build("abmil", 0)


@pytest.mark.parametrize("name", available())
def test_a_built_model_reads_the_scales_its_entry_names(name):
    info = zoo.model_info(name)
    model = build(name, D, **SMALL[name])
    assert (model.name, model.scales, model.feature_dim) == (info.name, info.scales, D)
    assert info.summary
    assert info.reference


def test_abmil_reads_the_scale_it_is_told():
    assert build("abmil", D, scale=10).scales == (10,)


def test_config_errors_can_be_caught_as_train_errors_and_as_value_errors():
    assert issubclass(UnknownModelError, ConfigError)
    assert issubclass(ConfigError, TrainError)
    assert issubclass(ConfigError, ValueError)


def test_the_table_of_models_is_read_without_torch():
    code = "import sys, cftrain.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CHOSEN_SCALES = [
    (name, options)
    for name, info in zoo.MODELS.items()
    for options in ({}, {"scale": 10}, {"scales": "5,10"}, {"scales": "10,20"})
    if options.keys() <= {field.name for field in dataclasses.fields(info.options)}
]


@pytest.mark.parametrize(("name", "options"), CHOSEN_SCALES)
def test_the_scales_of_options_are_those_that_the_built_model_reads(name, options):
    built = build(name, 16, **options)
    assert zoo.scales_of(zoo.MODELS[name], built.options) == built.scales
