"""DSMIL against outputs of the released code, a case worked by hand, and what trains in a real step."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.testing import assert_close

from cftrain import zoo
from cftrain.checkpoints import load_model
from cftrain.cli import main
from cftrain.config import DataConfig, TrainConfig, load_config
from cftrain.data import load_data
from cftrain.errors import ConfigError, NonFiniteError, WeightsError
from cftrain.experiment import cross_validate
from cftrain.feed import Feed
from cftrain.footprint import training_footprint
from cftrain.loop import Task, train_step
from cftrain.models import BagBatch, build
from cftrain.models.released import place, released_model
from cftrain.order import Visit, pack_seed, packed
from cftrain.ranks import ALONE, Ranks
from cftrain.survival import fit_bins
from cftrain.survival.losses import ce_survival, cox_loss, nll_survival

SMALL_RUN = (
    "model.name=dsmil",
    "model.attention_dim=4",
    "train.epochs=2",
    "train.accumulate=4",
    "train.select_from=1",
)
CASES = ("odd", "square", "tiny", "two", "five")


@pytest.fixture(scope="module")
def golden():
    """What the released code answered, and its weights in our model."""

    def load(shared):
        with np.load(shared / "golden" / "DSMIL.npz") as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "cfg"}
        state = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}
        return arrays, released_model(state).double()

    return load


def golden_batch(arrays, case, dtype=torch.float64):
    return BagBatch.pack([case], [{20: arrays[f"in/{case}/x20"][0].to(dtype)}])


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_the_released_ones_to_1e9_in_float64(shared, golden, case):
    arrays, model = golden(shared)
    output = model(golden_batch(arrays, case))
    for field, value in output._asdict().items():
        assert_close(value.detach(), arrays[f"out64/{case}/{field}"], rtol=0, atol=1e-9, msg=field)


@pytest.mark.parametrize("case", CASES)
def test_outputs_in_float32_stay_within_1e5_of_the_released_float64_ones(shared, golden, case):
    arrays, model = golden(shared)
    output = model.float()(golden_batch(arrays, case, torch.float32))
    for field in ("logits", "hazards", "risk"):
        expected = arrays[f"out64/{case}/{field}"]
        assert_close(getattr(output, field).detach().double(), expected, rtol=0, atol=1e-5, msg=field)


@pytest.mark.parametrize("case", CASES)
def test_attention_and_critical_logits_equal_the_released_ones_to_1e9(shared, golden, case):
    arrays, model = golden(shared)
    batch = golden_batch(arrays, case)
    expected = arrays[f"out64/{case}/attn/pool"]
    (scores,) = model.patch_maps(batch)["attention"].scores
    assert_close(scores, expected.mean(dim=0), rtol=0, atol=1e-9)
    (bag,) = model._bags(batch)
    assert_close(bag.likeness.softmax(dim=1).detach(), expected, rtol=0, atol=1e-9)
    largest = arrays[f"out64/{case}/attn/inst_logits"].amax(dim=0)
    assert_close(bag.critical.detach(), largest, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_released_ones_to_1e9_and_none_reaches_what_picks_the_critical_patch(shared, golden, case):
    arrays, model = golden(shared)
    batch = golden_batch(arrays, case)
    rows = batch.features[20].requires_grad_()
    ((weight, logits),) = model.training_logits(batch)
    event = arrays[f"in/{case}/c"] == 0
    loss = nll_survival(logits, arrays[f"in/{case}/label"], event, alpha=0.2)
    assert weight == 1
    assert_close(loss.detach(), arrays[f"out64/{case}/loss_nll"], rtol=1e-9, atol=0)
    loss.backward()
    norms = {key.split("/", 2)[2]: value for key, value in arrays.items() if key.startswith(f"gradnorm64/{case}/")}
    assert len(norms) == len(list(model.parameters()))
    for key, norm in norms.items():
        gradient = model.get_parameter(place(key, "dsmil").name).grad
        if norm.isnan():
            assert key.startswith("i_classifier.")
            assert gradient is None
            continue
        expected = arrays.get(f"grad64/{case}/{key}")
        assert_close(gradient.norm(), norm, rtol=1e-9, atol=1e-13, msg=key)
        if expected is not None:
            assert_close(gradient.reshape(expected.shape), expected, rtol=0, atol=1e-9 * float(norm) + 1e-13, msg=key)
    expected = arrays[f"gradin64/{case}/x20"]
    found = rows.grad.unsqueeze(0)
    if expected.shape != found.shape:  # big bags are stored as mean and mean magnitude over D
        found = torch.stack([found.mean(dim=2), found.abs().mean(dim=2)])
    assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.norm()))


def by_hand(n_bins=2, **options):
    """D = 2, one query q = tanh(ReLU(first feature)), likeness q q'; instance logits are the features themselves."""
    model = build("dsmil", 2, attention_dim=1, n_bins=n_bins, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.instance.weight.copy_(torch.eye(2)[:n_bins])
        model.query[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        model.query[2].weight.fill_(1.0)
        model.head.weight.copy_(torch.arange(1.0, 1 + n_bins * 2 * n_bins).reshape(n_bins, -1))
        model.head.bias.copy_(torch.tensor([0.5, -0.5])[:n_bins])
    return model


def test_a_slide_worked_by_hand():
    """Critical: patch 0 of bin 0 (feature 0 is 1), patch 1 of bin 1 (feature 1 is 3), whose query is tanh(0) = 0."""
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.5, 2.0]], dtype=torch.float64)
    q = [math.tanh(1.0), 0.0, math.tanh(0.5)]
    raised = [math.exp(each * q[0]) for each in q]
    a0 = [each / sum(raised) for each in raised]
    z0 = [a0[0] + 0.5 * a0[2], 3 * a0[1] + 2 * a0[2]]
    z1 = [1.5 / 3, 5 / 3]
    z = z0 + z1  # bin 1 weights all patches alike
    logits = [
        0.5 + sum(h * each for h, each in zip((1, 2, 3, 4), z, strict=True)),
        -0.5 + sum(h * each for h, each in zip((5, 6, 7, 8), z, strict=True)),
    ]
    model = by_hand()
    batch = BagBatch.pack(["slide"], [{20: x}])
    assert model(batch).logits[0].tolist() == pytest.approx(logits, abs=1e-12)
    (bag, instance) = model.training_logits(batch)
    assert (bag[0], instance[0]) == (0.5, 0.5)
    assert bag[1][0].tolist() == pytest.approx(logits, abs=1e-12)
    assert instance[1].tolist() == [[1.0, 3.0]]
    (scores,) = model.patch_maps(batch)["attention"].scores
    assert scores.tolist() == pytest.approx([(each + 1 / 3) / 2 for each in a0], abs=1e-12)
    faithful = by_hand(variant="faithful")
    ((weight, only),) = faithful.training_logits(batch)
    assert weight == 1
    assert only[0].tolist() == pytest.approx(logits, abs=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_of_patches_with_equal_logits_the_first_is_critical_and_gets_the_gradient(order):
    """Bin 1 looks at feature 1, which the first two patches share; their queries differ."""
    rows = torch.tensor([[0.9, 2.0], [0.4, 2.0], [0.1, 1.0]], dtype=torch.float64)[list(order)]
    model = by_hand()
    x = rows.clone().requires_grad_()
    batch = BagBatch.pack(["slide"], [{20: x}])
    (_, _), (_, critical) = model.training_logits(batch)
    critical[0, 1].backward()
    assert x.grad.tolist() == [[0, 1], [0, 0], [0, 0]]
    (bag,) = model._bags(batch)
    expected = [math.tanh(float(first)) * math.tanh(float(rows[0, 0])) for first in rows[:, 0]]
    assert bag.likeness[1].tolist() == pytest.approx(expected, abs=1e-12)


def test_three_unequal_bags_in_a_batch_give_the_logits_and_gradients_of_the_three_alone():
    torch.manual_seed(3)
    model = build("dsmil", 6, attention_dim=5).double()
    bags = [{20: torch.randn(n, 6, dtype=torch.float64)} for n in (1, 40, 7)]
    bins, event = torch.tensor([0, 2, 3]), torch.tensor([True, False, True])

    def gradients(*batches):
        model.zero_grad()
        for batch, rows in batches:
            for weight, logits in model.training_logits(batch):
                (weight * nll_survival(logits, bins[rows], event[rows], reduction="sum")).backward(retain_graph=True)
        return [parameter.grad.clone() for parameter in model.parameters()]

    together = BagBatch.pack(["a", "b", "c"], bags)
    alone = [(BagBatch.pack([str(i)], [bag]), slice(i, i + 1)) for i, bag in enumerate(bags)]
    for at in range(2):
        expected = torch.cat([model.training_logits(batch)[at][1] for batch, _ in alone])
        assert_close(model.training_logits(together)[at][1], expected, rtol=0, atol=1e-12)
    assert_close(gradients((together, slice(None))), gradients(*alone), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def data(demo_store):
    return load_data(demo_store.path, DataConfig(cohort="DEMO"), {"dsmil": (20,)}, seed=0)


@pytest.fixture(scope="module")
def bins(data):
    labels = data.cohort.slides
    return fit_bins([slide.time_months for slide in labels], np.array([slide.event for slide in labels]), 4)


@pytest.fixture
def bags(data):
    feed = Feed(data, (20,), DataConfig(cohort="DEMO"), torch.device("cpu"))
    with feed.window([visits(data)]) as window:
        yield partial(window.batch, scales=(20,))


def visits(data, n=None):
    return [Visit(example, place) for place, example in enumerate(data.examples)][:n]


def task(chosen, batch_patches):
    packs = packed(chosen, batch_patches)
    return Task(packs, tuple(range(len(packs))), tuple(pack_seed(7, 0, 0, 0, pack) for pack in range(len(packs))))


def small(loss="nll", **options):
    torch.manual_seed(1)
    return build("dsmil", 8, attention_dim=6, n_bins=1 if loss == "cox" else 4, **options).double()


def after_step(model, chosen, batch_patches, bags, bins, config, ranks=ALONE, make=torch.optim.SGD):
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.01)
    return train_step(model, optimizer, task(chosen, batch_patches), bags, bins, config, ranks)


def expected_loss(parts, chosen, bins, config):
    """Half of each stream's mean loss, from the losses themselves."""
    months = torch.tensor([visit.example.time_months for visit in chosen], dtype=torch.float64)
    event = torch.tensor([visit.example.event for visit in chosen])
    if config.loss == "cox":
        return sum(0.5 * cox_loss(logits[:, 0], months, event, reduction="mean") for logits in parts)
    loss = nll_survival if config.loss == "nll" else ce_survival
    time_bin = torch.from_numpy(bins.assign(months.numpy()))
    return sum(0.5 * loss(logits, time_bin, event, alpha=config.alpha) for logits in parts)


@pytest.mark.parametrize("batch_patches", [1, 10**6], ids=["one by one", "all together"])
@pytest.mark.parametrize("loss", ["nll", "ce", "cox"])
def test_a_step_goes_down_half_the_loss_of_either_stream(data, bags, bins, loss, batch_patches):
    chosen, config = visits(data, 9), TrainConfig(loss=loss, alpha=0.3)
    net, by_formula = small(loss), small(loss)
    found = after_step(net, chosen, batch_patches, bags, bins, config)
    batch = bags(chosen)
    critical = torch.stack(
        [by_formula.instance(x).amax(dim=0) for x in batch.features[20].double().split(batch.lengths[20])]
    )
    value = expected_loss((by_formula(batch).logits, critical), chosen, bins, config)
    value.backward()
    torch.optim.SGD(by_formula.parameters(), lr=0.1, weight_decay=0.01).step()
    assert found == pytest.approx(9 * float(value.detach()), rel=1e-6)
    assert_close(net.state_dict(), by_formula.state_dict(), rtol=0, atol=1e-7)  # gradients pass through float32
    assert (net.instance.weight - small(loss).instance.weight).abs().min() > 1e-6


@pytest.mark.parametrize("batch_patches", [1, 10**6], ids=["one by one", "all together"])
def test_the_faithful_variant_never_trains_nor_decays_what_picks_the_critical_patch(data, bags, bins, batch_patches):
    chosen, config = visits(data, 9), TrainConfig()
    net = small(variant="faithful")
    drawn = {name: weight.clone() for name, weight in net.state_dict().items()}
    after_step(net, chosen, batch_patches, bags, bins, config, make=torch.optim.Adam)
    moved = {name for name, weight in net.state_dict().items() if not torch.equal(weight, drawn[name])}
    assert moved == {name for name in drawn if not name.startswith("instance.")}


class _WithAnIdleProcess(Ranks):
    """As the second of two processes would see it, were this one's numbers all there are."""

    def gather(self, value):
        return [(), value]


def test_a_cox_step_learns_the_weights_of_the_streams_from_a_process_that_saw_some(data, bags, bins):
    chosen, config = visits(data, 9), TrainConfig(loss="cox")
    alone, beside = small("cox"), small("cox")
    after_step(alone, chosen, 10**6, bags, bins, config)
    after_step(beside, chosen, 10**6, bags, bins, config, ranks=_WithAnIdleProcess())
    assert_close(beside.state_dict(), alone.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_two_processes_of_which_one_has_no_slide_give_the_weights_of_one(demo_store, tmp_path, loss):
    settings = [*SMALL_RUN, "model.variant=fixed", "train.batch_patches=100000", f"train.loss={loss}"]
    words = [word for each in settings for word in ("--set", each)]
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m", "cftrain"]
        run = ["run", "--store", str(demo_store.path), "--out", str(tmp_path / str(world)), "--device", "cpu"]
        call = [sys.executable, *launch, *run, "--cohort", "DEMO", *words]
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    for path in sorted((tmp_path / "1").glob("fold_*/last_epoch.safetensors")):
        assert_close(load_file(tmp_path / "2" / path.relative_to(tmp_path / "1")), load_file(path), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_a_slide_that_is_not_finite_in_the_instance_stream_alone_is_named(data, bags, bins, loss):
    chosen = visits(data, 6)
    odd = chosen[2].example.name
    net = small(loss)
    plain = net.training_logits

    def training_logits(batch):
        (one, bag), (other, critical) = plain(batch)
        row = torch.tensor([[each == odd] for each in batch.slide_ids])
        return (one, bag), (other, torch.where(row, critical * torch.inf, critical))

    net.training_logits = training_logits
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    with pytest.raises(NonFiniteError, match=f"NaN or Inf on slides {odd};"):
        after_step(net, chosen, 10**6, bags, bins, TrainConfig(loss=loss))
    assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["fixed", "faithful"])
def test_a_run_trains_and_its_weights_can_be_read_back(demo_store, tmp_path, variant):
    settings = [*SMALL_RUN, f"model.variant={variant}", "train.batch_patches=100"]
    config = load_config(flags={"data.cohort": "DEMO"}, settings=settings)
    done = cross_validate(config, demo_store.path, tmp_path / "run", device="cpu")
    assert len(done.summary["folds"]) == 5
    assert all(np.isfinite(fold["c_index"]) for fold in done.summary["folds"])
    assert load_model(tmp_path / "run" / "fold_0" / "last_epoch.safetensors").options.variant == variant


def test_released_weights_become_a_model_with_the_same_answers(shared, golden, tmp_path):
    arrays, model = golden(shared)
    state = {key.removeprefix("sd/"): value.float() for key, value in arrays.items() if key.startswith("sd/")}
    torch.save(state, tmp_path / "best.pt")
    done = CliRunner().invoke(main, ["import-weights", str(tmp_path / "best.pt"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["model"], told["feature_dim"]) == ("dsmil", 96)
    assert told["options"] == {"n_bins": 4, "scale": 20, "attention_dim": 128, "variant": "faithful"}
    again = load_model(tmp_path / "best.safetensors").double()
    batch = golden_batch(arrays, "odd")
    assert torch.equal(again(batch).logits, model(batch).logits)
    either = build("dsmil", 96).double()
    either.load_state_dict(again.state_dict())
    assert torch.equal(either(batch).logits, model(batch).logits)


def test_released_weights_with_values_of_their_own_are_refused_by_name(shared, golden):
    """The authors' option `passing_v`, which the survival code does not take."""
    arrays, _ = golden(shared)
    state = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}
    with pytest.raises(WeightsError, match=r"dsmil do not have the same tensors: b_classifier\.v\.1\.weight"):
        released_model(state | {"b_classifier.v.1.weight": torch.zeros(96, 96)})


def test_a_variant_nobody_wrote_is_refused():
    with pytest.raises(ConfigError, match="dsmil: variant must be fixed or faithful, got 'text'"):
        build("dsmil", 8, variant="text")


def test_the_scale_is_an_option():
    assert build("dsmil", 8, scale=10).scales == (10,)
    assert zoo.MODELS["dsmil"].scales == (20,)


def test_memory_grows_with_the_patches_and_no_table_of_pairs_is_made():
    """Largest slide of TCGA, N = 137,990: per patch 2 hidden rows of 128, K weights and likenesses, a byte for ReLU."""
    n, A, K = 137_990, 128, 4
    found = training_footprint("dsmil", {}, 1024, {20: n}, device_type="cpu")
    assert found.features == 4 * n * 1024
    assert 4 * n * 2 * A <= found.saved <= 4 * n * (2 * A + 4 * K)
    assert found.transient <= 4 * n * (1024 + 4 * A)
