"""Patch-GCN against outputs of the released code, and its gradients against the formulas on dense tables."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional
from torch.testing import assert_close

from cftrain.checkpoints import load_model
from cftrain.cli import main
from cftrain.errors import ConfigError, MissingExtraError, WeightsError
from cftrain.footprint import training_footprint
from cftrain.models import BagBatch, build
from cftrain.models.released import place, released_model
from cftrain.survival.losses import nll_survival
from cftrain.zoo.extras import nearest

D = 12
CASES = ("odd", "small")
SMALL = {"hidden_dim": 6, "k": 3}


@pytest.fixture
def golden(shared):
    arrays = np.load(shared / "golden" / "PatchGCN.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "cfg"}


def released_state(golden):
    return {key[3:]: value for key, value in golden.items() if key.startswith("sd/")}


def as_lists(edge_index, n):
    """Edges (patch, neighbour) in any order to a list of neighbours for each patch."""
    lists = [[] for _ in range(n)]
    for patch, neighbour in edge_index.T.tolist():
        lists[patch].append(neighbour)
    k = max(map(len, lists))
    return torch.tensor([own + [-1] * (k - len(own)) for own in lists])


def golden_batch(golden, case, dtype=torch.float64):
    x = golden[f"in/{case}/x"].to(dtype)
    return BagBatch.pack([case], [{20: x}], [{nearest(20, 8): as_lists(golden[f"in/{case}/edge_index"], len(x))}])


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_weights_equal_the_released_ones_to_1e9_in_float64(golden, case):
    model = released_model(released_state(golden)).double()
    batch = golden_batch(golden, case)
    output = model(batch)
    for field in ("hazards", "survival"):
        assert_close(getattr(output, field).detach(), golden[f"out64/{case}/{field}"], rtol=0, atol=1e-9)
    found = model.patch_maps(batch)["attention"]
    assert_close(found.scores[0], golden[f"out64/{case}/attn"][0], rtol=0, atol=1e-9)
    assert found.elsewhere == (0.0,)


@pytest.mark.parametrize("case", CASES)
def test_outputs_in_float32_stay_within_1e5_of_the_released_float64_ones(golden, case):
    output = released_model(released_state(golden))(golden_batch(golden, case, torch.float32))
    for field in ("hazards", "survival"):
        assert_close(getattr(output, field).detach().double(), golden[f"out64/{case}/{field}"], rtol=0, atol=1e-5)


def plain(state, x, sources):
    """The released network on tables: sources[i, j] where patch j gives to i; no dropout."""

    def linear(rows, name):
        return functional.linear(rows, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(rows, name):
        return functional.layer_norm(rows, rows.shape[1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def gen(h, name):
        m = (torch.relu(h) + 1e-7).expand(len(h), -1, -1)
        raised = state[f"{name}.aggr_module.t"] * m
        weights = raised.masked_fill(~sources[:, :, None], -torch.inf).softmax(dim=1)
        taken = torch.where(sources.any(dim=1)[:, None], (weights.nan_to_num() * m).sum(dim=1), 0.0)
        return linear(torch.relu(norm(linear(h + taken, f"{name}.mlp.0"), f"{name}.mlp.1")), f"{name}.mlp.4")

    h = torch.relu(linear(x, "fc.0"))
    of_layers = [h, gen(h, "layers.0.conv")]
    at = 1
    while f"layers.{at}.norm.weight" in state:
        h = of_layers[-1]
        of_layers.append(h + torch.relu(norm(gen(h, f"layers.{at}.conv"), f"layers.{at}.norm")))
        at += 1
    h = torch.relu(linear(torch.cat(of_layers, dim=1), "path_phi.0"))
    head = "path_attention_head.attention"
    gated = torch.tanh(linear(h, f"{head}_a.0")) * torch.sigmoid(linear(h, f"{head}_b.0"))
    z = linear(gated, f"{head}_c").softmax(dim=0).T @ h
    return linear(torch.relu(linear(z, "path_rho.0")), "classifier")


def table(edge_index, n):
    sources = torch.zeros(n, n, dtype=torch.bool)
    sources[edge_index[1], edge_index[0]] = True
    return sources


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_the_formulas_on_dense_tables_to_1e9(golden, case):
    """The tables are first held to the released outputs, from which no gradients were kept."""
    state = {key: value.double().requires_grad_() for key, value in released_state(golden).items()}
    x = golden[f"in/{case}/x"].double().requires_grad_()
    logits = plain(state, x, table(golden[f"in/{case}/edge_index"], len(x)))
    assert_close(logits.detach().sigmoid(), golden[f"out64/{case}/hazards"], rtol=0, atol=1e-9)
    bin_, event = torch.tensor([2]), torch.tensor([True])
    nll_survival(logits, bin_, event).backward()
    model, batch = released_model(released_state(golden)).double(), golden_batch(golden, case)
    rows = batch.features[20].requires_grad_()
    nll_survival(model.logits(batch), bin_, event).backward()
    assert_close(rows.grad, x.grad, rtol=0, atol=1e-9 * float(x.grad.norm()))
    never_read = {"layers.0.norm.weight", "layers.0.norm.bias"}
    assert {key for key, value in state.items() if value.grad is None} == never_read
    named = dict(model.named_parameters())
    assert len(named) == len(state) - len(never_read)
    for key in state.keys() - never_read:
        expected = state[key].grad
        atol = 1e-9 * float(expected.norm()) + 1e-15
        assert_close(named[place(key, "patch-gcn").name].grad, expected, rtol=0, atol=atol, msg=key)


def of_torch_geometric_1(state):
    """Its names, and biases in the layers of GEN."""
    state = {key.replace(".aggr_module.t", ".t"): value for key, value in state.items()}
    generator = torch.Generator().manual_seed(8)
    for key in [key for key in state if key.endswith((".mlp.0.weight", ".mlp.4.weight"))]:
        state[key.replace("weight", "bias")] = torch.randn(len(state[key]), generator=generator)
    return state


def test_weights_of_torch_geometric_1_have_biases_in_the_graph_layers(golden):
    state = of_torch_geometric_1(released_state(golden))
    model = released_model(state).double()
    assert model.options.mlp_bias
    x = golden["in/small/x"].double()
    by_name = {key.replace(".conv.t", ".conv.aggr_module.t"): value.double() for key, value in state.items()}
    expected = plain(by_name, x, table(golden["in/small/edge_index"], len(x)))
    with torch.no_grad():
        assert_close(model.logits(golden_batch(golden, "small")), expected, rtol=0, atol=1e-9)


def test_released_weights_are_imported_with_the_same_answers(golden, tmp_path):
    torch.save(released_state(golden), tmp_path / "patch_gcn.pt")
    done = CliRunner().invoke(main, ["import-weights", str(tmp_path / "patch_gcn.pt"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["model"], told["feature_dim"]) == ("patch-gcn", 1024)
    model = load_model(tmp_path / "patch_gcn.safetensors").double()
    with torch.no_grad():
        output = model(golden_batch(golden, "odd"))
    assert_close(output.hazards, golden["out64/odd/hazards"], rtol=0, atol=1e-9)


def test_released_weights_that_lack_a_tensor_are_refused_by_name(golden):
    state = released_state(golden)
    del state["layers.2.norm.bias"]
    with pytest.raises(WeightsError, match=r"do not have the same tensors: layers\.2\.norm\.bias"):
        released_model(state)


def test_the_default_model_has_the_released_tensors(golden):
    released = {key: value for key, value in released_state(golden).items() if not key.startswith("layers.0.norm.")}
    sizes = {place(key, "patch-gcn").name: value.shape for key, value in released.items()}
    assert {name: value.shape for name, value in build("patch-gcn", 1024).state_dict().items()} == sizes


def lists_of(n, k, seed=1):
    """Up to k others of each patch, some places empty."""
    rng = np.random.default_rng(seed)
    lists = np.full((n, k), -1)
    for i in range(n):
        others = rng.permutation([j for j in range(n) if j != i])[:k]
        lists[i, : len(others)] = np.where(rng.random(len(others)) < 0.2, -1, others)
    return torch.from_numpy(lists)


def slide(n, k=3, seed=1):
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {20: x}, {nearest(20, k): lists_of(n, k, seed)}


def pack(*slides):
    bags, extras = zip(*slides, strict=True)
    return BagBatch.pack([f"slide-{i}" for i in range(len(bags))], bags, extras)


def small(**options):
    torch.manual_seed(11)
    model = build("patch-gcn", D, **{**SMALL, **options}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_three_unequal_slides_packed_equal_the_three_alone_with_gradients_and_maps():
    model, slides = small(), [slide(4), slide(1), slide(70)]
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
        (own,) = model.patch_maps(pack(each))["attention"].scores
        assert_close(maps.scores[i], own, rtol=0, atol=1e-12)
        assert float(own.sum()) == pytest.approx(1, abs=1e-12)


def test_slides_of_a_patient_are_one_bag_of_unconnected_graphs():
    first, second = slide(9), slide(5, seed=2)
    joined = {20: torch.cat([first[0][20], second[0][20]])}
    shifted = torch.where(second[1][nearest(20, 3)] < 0, -1, second[1][nearest(20, 3)] + 9)
    lists = {nearest(20, 3): torch.cat([first[1][nearest(20, 3)], shifted])}
    model = small()
    found = model.logits(pack(first, second).grouped(["patient"], [2]))
    assert_close(found, model.logits(pack((joined, lists))), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_layers", [2, 3, 4])
def test_a_patch_sees_as_many_steps_as_there_are_graph_layers(n_layers):
    """On a line where each patch lists the next one; combined rows are caught before the pooling."""
    lists = torch.tensor([[1], [2], [3], [4], [5], [-1]])
    model, seen = small(n_layers=n_layers, k=1), []
    model.combination.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    x = slide(6)[0][20]
    changed = x.clone()
    changed[0] += 1
    for rows in (x, changed):
        model.logits(pack(({20: rows}, {nearest(20, 1): lists})))
    moved = (seen[0] - seen[1]).abs().amax(dim=1) > 0
    assert moved.tolist() == [i < n_layers for i in range(6)]


def test_options_change_what_they_say():
    batch = pack(slide(30))
    model = small()
    assert model.options.extras() == (nearest(20, 3),)
    assert small(scale=10, k=5).options.extras() == (nearest(10, 5),)
    assert (model.head.classifier.in_features, small(n_layers=3).head.classifier.in_features) == (24, 18)
    assert len(small(mlp_bias=True).state_dict()) == len(model.state_dict()) + 6
    for rates in ({"dropout": 0.5, "layer_dropout": 0.0}, {"dropout": 0.0, "layer_dropout": 0.5}):
        dropping = small(**rates)
        assert torch.equal(dropping.logits(batch), model.logits(batch))
        assert not torch.equal(dropping.train().logits(batch), model.logits(batch))
    without = small(dropout=0.0, layer_dropout=0.0).train()
    assert torch.equal(without.logits(batch), model.logits(batch))


def test_dropout_acts_where_the_released_code_has_it():
    """Behind the projection, two residual layers, the combination, in both gates, and before the logits."""
    model, seen = small(dropout=0.5, layer_dropout=0.25).train(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda own, inputs, output: seen.append((own.p, tuple(output.shape))))
    model.logits(pack(slide(30), slide(4)))
    narrow, wide = (34, 6), (34, 24)
    assert seen == [(0.5, narrow), (0.25, narrow), (0.25, narrow), *[(0.5, wide)] * 3, (0.5, (2, 24))]


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="n_layers counts the projection and must be at least 2, got n_layers=1"):
        build("patch-gcn", D, n_layers=1)
    with pytest.raises(ConfigError, match="k must be at least 1, got 0"):
        build("patch-gcn", D, k=0)
    with pytest.raises(ConfigError, match="layer_dropout must be at least 0 and below 1"):
        build("patch-gcn", D, layer_dropout=1.0)


def test_a_batch_without_the_graph_is_refused_by_name():
    with pytest.raises(MissingExtraError, match="slide-0: patch-gcn needs 3 nearest patches at 20x"):
        small()(BagBatch.pack(["slide-0"], [slide(4)[0]]))


def test_bfloat16_autocast_stays_close_and_answers_in_float32():
    model = small().float()
    batch = pack(slide(19), slide(5)).to(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    assert output.survival.dtype == torch.float32
    assert_close(output.logits, model(batch).logits, rtol=0, atol=0.1)
    output.risk.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_it_learns_what_only_the_graph_tells():
    """Ones and minus ones in equal numbers: in half of the slides equals list equals, in the others opposites."""
    generator = torch.Generator().manual_seed(0)

    def task(alike):
        sign = torch.ones(20).repeat_interleave(2) * torch.tensor([1.0, -1.0]).repeat(20)
        x = sign[:, None] + 0.1 * torch.randn(40, D, generator=generator)
        return {20: x}, {nearest(20, 1): ((torch.arange(40) + (2 if alike else 1)) % 40)[:, None]}

    torch.manual_seed(0)
    model = build("patch-gcn", D, hidden_dim=8, k=1, dropout=0.0, layer_dropout=0.0, n_bins=1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    event = torch.tensor([[1.0], [0.0]] * 4)
    losses = []
    for _ in range(40):
        batch = pack(*[task(alike) for alike in (True, False) * 4])
        loss = functional.binary_cross_entropy_with_logits(model.logits(batch), event)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[:5]) == pytest.approx(np.log(2), abs=0.1)
    assert np.mean(losses[-5:]) < 0.2


def test_the_largest_slide_fits_into_8_gib():
    """Counted on fake tensors; features are half a GiB of it."""
    found = training_footprint("patch-gcn", {}, 1024, {20: 137_990}, device_type="cpu")
    assert found.features > 137_990 * (1024 * 4 + 8 * 8) - 1
    assert found.total < 8 * 2**30
