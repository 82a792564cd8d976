"""Attribution against captum, against models small enough to work out by hand, and its own promise to add up."""

import pytest
import torch
from bags_with_extras import extras_of, pack_with_extras
from captum.attr import InputXGradient, IntegratedGradients
from made_up_fold import fitted
from torch import nn
from torch.testing import assert_close

from cftrain.errors import ConfigError, MissingScaleError, ShapeError
from cftrain.heatmap.attribution import gradient, integrated, risk_of
from cftrain.models import SurvivalModel, SurvivalOutput, available, build
from cftrain.zoo import ABMILConfig

D = 12
SMALL = {
    "mean-cox": {},
    "abmil": {"hidden_dim": 16, "attention_dim": 8},
    "deepgraphsurv": {"hidden_dim": 16},
    "dsmil": {"attention_dim": 8},
    "patch-gcn": {"hidden_dim": 8},
    "csmil": {"embed_dim": 16, "hidden_dim": 8},
    "mustmil": {"embed_dim": 8, "attention_dim": 8},
    "protosurv": {"n_prototypes": 2, "embed_dim": 16, "n_heads": 2, "mlp_dim": 8, "graph_dim": 8},
    "scmil": {"filter_dim": 8, "cluster_size": 4, "n_heads": 4, "attention_dim": 8},
    "transmil": {"embed_dim": 16, "n_heads": 2, "n_landmarks": 8},
    "zoommil": {"hidden_dim": 16, "attention_dim": 8},
}
CROSSFUSION = {"embed_dim": 16, "n_heads": 2}
EXTRAS = extras_of(available())
SIZES = {5: 3, 10: 7, 20: 19}
NLL, COX = risk_of("nll"), risk_of("cox")


@pytest.fixture(params=available())
def model(request):
    """A small model in float64 whose every parameter is far from 0; in training mode, as one may forget."""
    torch.manual_seed(3)
    model = fitted(build(request.param, D, **SMALL.get(request.param, CROSSFUSION))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


@pytest.fixture
def bag():
    """One slide; patches share a large part, as features do."""
    generator = torch.Generator().manual_seed(5)
    common = torch.rand(D, generator=generator, dtype=torch.float64)
    return {
        scale: common + 0.5 * torch.randn(n, D, generator=generator, dtype=torch.float64) for scale, n in SIZES.items()
    }


def batch_of(bag):
    return pack_with_extras([bag], EXTRAS, ["slide"])


def of_captum(model, bag, method, *, from_mean):
    """Captum's answer, [N] a scale. It stacks steps in a first dimension: they become slides of one batch."""
    scales = model.scales
    means = {scale: bag[scale].mean(dim=0, keepdim=True) for scale in scales}

    def risk(*inputs):
        slides = [
            {scale: rows + (means[scale] if from_mean else 0) for scale, rows in zip(scales, of_slide, strict=True)}
            for of_slide in zip(*inputs, strict=True)
        ]
        return model(pack_with_extras(slides, EXTRAS)).risk

    own = tuple((bag[scale] - (means[scale] if from_mean else 0)).unsqueeze(0) for scale in scales)
    baselines = tuple(means[scale].expand(len(bag[scale]), -1).unsqueeze(0) for scale in scales)
    with model.evaluating():
        found = method(risk, own, baselines)
    return {scale: scores[0].sum(dim=1) for scale, scores in zip(scales, found, strict=True)}


@pytest.mark.parametrize("steps", [4, 16])
def test_integrated_gradients_equal_those_of_captum(model, bag, steps):
    def method(risk, own, baselines):
        captum = IntegratedGradients(risk)
        return captum.attribute(own, baselines, n_steps=steps, method="riemann_middle")

    expected = of_captum(model, bag, method, from_mean=False)
    found = integrated(model, batch_of(bag), NLL, steps=steps)
    assert found.scores.keys() == expected.keys() == set(model.scales)
    for scale, scores in found.scores.items():
        assert_close(scores, expected[scale], rtol=0, atol=1e-12)


def test_the_gradient_times_the_distance_from_the_mean_equals_that_of_captum(model, bag):
    """Captum multiplies by the input, so it is given the distance, and adds the mean inside."""
    expected = of_captum(model, bag, lambda risk, own, _: quietly(InputXGradient(risk), own), from_mean=True)
    found = gradient(model, batch_of(bag), NLL)
    assert found.scores.keys() == expected.keys() == set(model.scales)
    for scale, scores in found.scores.items():
        assert_close(scores, expected[scale], rtol=0, atol=1e-12)
    assert (found.baseline_risk, found.gap) == (None, None)


def quietly(method, own):
    """InputXGradient warns that it turns gradients of its inputs on."""
    with pytest.warns(UserWarning, match="required_grads"):
        return method.attribute(tuple(each.clone() for each in own))


def test_the_scores_of_all_scales_add_up_to_the_distance_of_the_risks(model, bag):
    """To 2 % of all that is attributed; what is missing is told."""
    if model.name == "protosurv":  # where a patch changes its class, the risk jumps, which no gradient sees
        model.class_centres[1:] += 100
    with model.evaluating(), torch.no_grad():
        whole = float(model(batch_of(bag)).risk)
        mean_bag = {scale: rows.mean(dim=0).repeat(len(rows), 1) for scale, rows in bag.items()}
        baseline = float(model(batch_of(mean_bag)).risk)
    found = integrated(model, batch_of(bag), NLL, steps=64)
    assert (found.risk, found.baseline_risk) == pytest.approx((whole, baseline), abs=1e-12)
    total = sum(float(scores.sum()) for scores in found.scores.values())
    assert total + found.gap == pytest.approx(whole - baseline, abs=1e-12)
    if model.name != "scmil":  # its risk jumps where a patch passes the filter's threshold, of which no gradient tells
        assert abs(found.gap) < 0.02 * sum(float(scores.abs().sum()) for scores in found.scores.values())


def test_the_gap_of_a_smooth_model_falls_with_the_square_of_the_steps(bag):
    torch.manual_seed(3)
    model = build("crossfusion-concat", D, **CROSSFUSION).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    coarse, fine = (integrated(model, batch_of(bag), NLL, steps=steps).gap for steps in (8, 32))
    assert coarse / fine == pytest.approx(16, rel=0.1)


class Linear(SurvivalModel):
    """One logit: the mean over 20x patches of w · x, plus the 10x ones' of v · x."""

    def __init__(self, w, v):
        super().__init__("linear", (10, 20), len(w), ABMILConfig())
        self.w, self.v = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(v))
        self.dropout = nn.Dropout(0.5)

    def logits(self, batch):
        fine = self.dropout(self.rows(batch, 20)) @ self.w
        return (fine.mean() + (self.rows(batch, 10) @ self.v).sum()).reshape(1, 1)


def linear():
    bag = {
        10: torch.tensor([[1.0, 1.0], [3.0, 1.0]]),
        20: torch.tensor([[1.0, 0.0], [2.0, 2.0], [3.0, 1.0]]),
        5: torch.zeros(4, 9),  # of no interest to the model
    }
    return Linear([6.0, -3.0], [0.5, 7.0]), batch_of(bag)


@pytest.mark.parametrize("method", [gradient, integrated])
def test_of_a_linear_risk_each_patch_gets_its_part_of_the_distance_from_the_mean_bag(method):
    """Means (2, 1) at 20x and (2, 1) at 10x: w · (x - m) / 3 and v · (x - m), worked by hand."""
    model, batch = linear()
    found = method(model.train(), batch, COX)
    assert found.scores[20].tolist() == pytest.approx([(-6 + 3) / 3, (0 - 3) / 3, (6 + 0) / 3])
    assert found.scores[10].tolist() == pytest.approx([-0.5, 0.5])
    assert found.scores.keys() == {10, 20}
    assert found.risk == pytest.approx((6 * 6 - 3 * 3) / 3 + 0.5 * 4 + 7 * 2)
    assert {scores.dtype for scores in found.scores.values()} == {torch.float64}
    if method is integrated:
        assert found.baseline_risk == pytest.approx(found.risk)  # a linear risk does not tell a bag from its mean
        assert found.gap == pytest.approx(0, abs=1e-6)


class Square(Linear):
    """One logit: the sum over 20x patches of (w · x)²."""

    def logits(self, batch):
        return ((self.rows(batch, 20) @ self.w) ** 2).sum().reshape(1, 1) + 0 * self.rows(batch, 10).sum()


def test_integrated_gradients_of_a_square_are_its_own_distance_where_the_plain_gradient_doubles():
    """Mean m = 2 of x = 1, 2, 3: x² - 4 is the integral of 2x from 2; times the distance it is 2x (x - 2)."""
    model = Square([1.0], [0.0])
    batch = batch_of({10: torch.ones(2, 1), 20: torch.tensor([[1.0], [2.0], [3.0]])})
    found = integrated(model, batch, COX, steps=5)
    assert found.scores[20].tolist() == pytest.approx([1 - 4, 0, 9 - 4])
    assert (found.risk, found.baseline_risk, found.gap) == pytest.approx((14, 12, 0), abs=1e-5)
    assert gradient(model, batch, COX).scores[20].tolist() == pytest.approx([-2, 0, 6])


def test_a_slide_of_equal_patches_has_nothing_to_explain(model):
    rows = {scale: torch.full((n, D), 0.3, dtype=torch.float64) for scale, n in SIZES.items()}
    for method in (gradient, integrated):
        for scores in method(model, batch_of(rows), NLL).scores.values():
            assert scores.abs().max() < 1e-12


@pytest.mark.parametrize("method", [gradient, integrated])
def test_the_model_and_the_bag_are_left_as_they_were(model, bag, method):
    parameters = list(model.parameters())
    for parameter in parameters[:1]:
        parameter.requires_grad_(False)
    batch = batch_of(bag)
    first, second = (method(model, batch, NLL).scores for _ in range(2))
    assert all(torch.equal(first[scale], second[scale]) for scale in first)  # no dropout
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in parameters] == [at > 0 for at in range(len(parameters))]
    assert all(parameter.grad is None for parameter in parameters)
    assert all(rows.grad is None and not rows.requires_grad for rows in batch.features.values())


def test_attribution_works_where_gradients_are_off_and_from_float16_features(model, bag):
    half = batch_of({scale: rows.half() for scale, rows in bag.items()})
    exact = half.to(dtype=torch.float32)
    model.float()
    with torch.no_grad():
        found = integrated(model, half, NLL, steps=3)
    expected = integrated(model, exact, NLL, steps=3)
    assert all(torch.equal(found.scores[scale], expected.scores[scale]) for scale in model.scales)
    assert max(scores.abs().max() for scores in found.scores.values()) > 0


def test_the_risk_is_that_of_the_predictions():
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    hazards = 1 / (1 + (-logits).exp())
    assert_close(NLL(logits), -(1 - hazards).cumprod(dim=1).sum(dim=1))
    assert torch.equal(risk_of("ce")(logits), SurvivalOutput.from_logits(logits).risk)
    assert torch.equal(COX(logits), torch.tensor([0.3], dtype=torch.float64))


def test_blocks_of_rows_change_nothing():
    """More rows than are multiplied at once."""
    model = Linear([2.0], [0.0])
    rows = torch.arange(10_000, dtype=torch.float32).unsqueeze(1) / 1000
    found = gradient(model, batch_of({10: torch.ones(1, 1), 20: rows}), COX)
    assert_close(found.scores[20], 2 * (rows[:, 0].double() - 4.9995) / 10_000, rtol=0, atol=1e-8)


def test_what_cannot_be_attributed_is_refused(model, bag):
    with pytest.raises(ConfigError, match="at least 1 step, got 0"):
        integrated(model, batch_of(bag), NLL, steps=0)
    two = pack_with_extras([bag, bag], EXTRAS, ["one", "other"])
    for method in (gradient, integrated):
        with pytest.raises(ShapeError, match="one bag at a time, got 2: one, other"):
            method(model, two, NLL)
        with pytest.raises(MissingScaleError, match=f"slide: {model.name} needs"):
            method(model, batch_of({40: bag[20]}), NLL)
        with pytest.raises(ShapeError, match="slide: 3 features a patch"):
            method(model, batch_of({scale: rows[:, :3] for scale, rows in bag.items()}), NLL)
