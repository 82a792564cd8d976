"""Counted bytes against those of real steps: what autograd keeps, what Adam holds, how high a process rises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfkernels import using
from cftrain.errors import ConfigError, MissingScaleError, UnknownModelError
from cftrain.footprint import RESERVE, training_footprint
from cftrain.models import BagBatch, build, made_up_slide
from cftrain.models.abmil import ABMIL
from cftrain.survival.losses import nll_survival

DIM = 24
MODELS = [
    ("abmil", {"hidden_dim": 16, "attention_dim": 8}),
    ("abmil", {"hidden_dim": 16, "attention_dim": 8, "dropout": 0.25, "scale": 5}),
    ("crossfusion", {"embed_dim": 16}),
    ("crossfusion", {"embed_dim": 16, "dropout": 0.0, "attention_dropout": 0.0, "n_layers": 2, "variant": "text"}),
    ("crossfusion", {"embed_dim": DIM}),
    ("crossfusion-concat", {"embed_dim": 16}),
    ("crossfusion-single", {"embed_dim": 16}),
    ("csmil", {"embed_dim": 16}),
    ("csmil", {"embed_dim": 16, "scale_softmax": True, "scales": "10,20"}),
    ("dsmil", {"attention_dim": 16}),
    ("mustmil", {"embed_dim": 16}),
    ("transmil", {"embed_dim": 16, "n_landmarks": 8}),
    ("deepgraphsurv", {"hidden_dim": 16}),
    ("deepgraphsurv", {"hidden_dim": 16, "conv": "cheb", "graph": "space"}),
    ("patch-gcn", {"hidden_dim": 16}),
    # few queries: what is made again holds them, unseen by hooks on what autograd saves
    (
        "protosurv",
        {"n_classes": 2, "n_prototypes": 1, "embed_dim": 8, "n_heads": 2, "class_layers": 1, "fusion_layers": 1},
    ),
    ("zoommil", {"hidden_dim": 16, "attention_dim": 8}),
]
LARGEST = {5: 8624, 10: 34498, 20: 137990}
TRITON = ("attention", "dropout_add", "gelu_dropout", "grouped_window_conv", "layer_norm", "mix_layer_norms", "ppeg")


def real_bags(model, patches, dtype=torch.float32):
    return {scale: torch.randn(patches[scale], model.feature_dim, dtype=dtype) for scale in model.scales}


def real_batch(model, patches):
    """Bags, and what else the model reads."""
    extras = made_up_slide({scale: patches[scale] for scale in model.scales}, 1, model.options.extras()).extras
    return BagBatch.pack(["slide"], [real_bags(model, patches)], [extras])


def storages(tensors):
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


@pytest.mark.parametrize(("name", "options"), MODELS)
@pytest.mark.parametrize("patches", [{5: 3, 10: 16, 20: 41}, {5: 70, 10: 205, 20: 611}], ids=["small", "larger"])
def test_what_is_counted_as_saved_is_what_autograd_keeps_of_a_real_step(name, options, patches):
    model = build(name, DIM, **options).train()
    batch, kept = real_batch(model, patches), {}
    read = [*batch.features.values(), *batch.extras.values()]

    def keep(tensor):
        kept.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        parts = model.training_logits(batch)
    others = storages([*model.parameters(), *read, *(logits for _, logits in parts)])
    real = sum(storage.nbytes() for key, storage in kept.items() if key not in others)
    found = training_footprint(name, options, DIM, patches, device_type="cpu")
    # a few numbers per slide are alive without being kept: the logits, the seeds of dropout
    assert found.saved == pytest.approx(real, rel=0.005, abs=256)
    assert found.features == sum(rows.nbytes for rows in read)


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_weights_and_optimiser_are_those_of_a_real_adam(name, options):
    patches = {5: 2, 10: 3, 20: 5}
    model = build(name, DIM, **options).train()
    optimizer = torch.optim.Adam(model.parameters())
    parts = model.training_logits(real_batch(model, patches))
    sum(logits.sum() for _, logits in parts).backward()
    optimizer.step()
    held = [p.grad for p in model.parameters()]
    held += [state[moment] for state in optimizer.state.values() for moment in ("exp_avg", "exp_avg_sq")]
    found = training_footprint(name, options, DIM, patches, device_type="cpu")
    assert found.weights == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert found.optimiser == sum(tensor.nbytes for tensor in held)
    assert found.total == sum(
        (found.weights, found.optimiser, found.features, found.saved, found.transient, found.reserve)
    )


def test_the_worst_moment_of_gated_attention_is_what_a_pencil_says():
    """Gradients of h come from its weighting and from two gates: two [N, H] and half a one while they are added up."""
    n, hidden = 10_000, 512
    found = training_footprint("abmil", {}, 1024, {20: n}, device_type="cpu")
    # kept: h, and tanh, sigmoid and their product of half its width; scores and attention of 1 column
    assert found.saved == pytest.approx(4 * n * hidden * 2.5, rel=0.01)
    assert 2 * 4 * n * hidden <= found.transient < 3 * 4 * n * hidden


def test_all_that_training_looks_at_is_counted(monkeypatch):
    """A model that passes twice over its bag in training keeps twice as much."""
    once = training_footprint("abmil", {}, 64, {20: 3000}, device_type="cpu")
    twice = lambda model, batch: ((0.5, model.logits(batch)), (0.5, model.logits(batch)))  # noqa: E731
    monkeypatch.setattr(ABMIL, "training_logits", twice)
    found = training_footprint("abmil", {}, 64, {20: 3000}, device_type="cpu")
    assert found.saved == pytest.approx(2 * once.saved, rel=0.001)


def test_half_features_cost_half_and_a_copy_on_a_cpu():
    """A CPU computes in float32, so stored halves are there twice: as they are, and converted."""
    patches = {20: 5000}
    single, half = (
        training_footprint("abmil", {}, 1024, patches, device_type="cpu", dtype=dtype)
        for dtype in (torch.float32, torch.float16)
    )
    assert single.features == 2 * half.features == 4 * 5000 * 1024
    assert half.saved - single.saved == single.features


def test_a_gpu_computes_in_bfloat16():
    cpu = training_footprint("abmil", {}, 1024, {20: 5000}, device_type="cpu")
    cuda = training_footprint("abmil", {}, 1024, {20: 5000}, device_type="cuda", dtype=torch.bfloat16)
    assert cuda.features == cpu.features // 2
    assert cuda.weights == cpu.weights
    assert 0.45 < (cuda.saved - cuda.weights // 2) / cpu.saved < 0.6  # the weights' copies in bfloat16 are kept too


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the kernels are chosen anyway")
@pytest.mark.parametrize(
    "name",
    [
        "crossfusion",
        pytest.param("crossfusion-concat", marks=pytest.mark.slow),
        pytest.param("crossfusion-single", marks=pytest.mark.slow),
    ],
)
def test_without_a_gpu_a_few_percent_more_are_counted_than_the_kernels_keep(name):
    pytest.importorskip("triton")
    plain = training_footprint(name, {}, 1024, LARGEST, device_type="cuda", dtype=torch.bfloat16)
    with using(**dict.fromkeys(TRITON, "triton")):
        kernels = training_footprint(name, {}, 1024, LARGEST, device_type="cuda", dtype=torch.bfloat16)
    assert kernels.saved < plain.saved < 1.12 * kernels.saved
    assert kernels.total < plain.total < 1.12 * kernels.total


def test_counting_leaves_no_trace():
    """Neither in the random generators, nor in the maps that implementations keep for lengths they have seen."""
    model = build("crossfusion", DIM, embed_dim=16).train()
    patches = {5: 7, 10: 13, 20: 29}
    batch = BagBatch.pack(["slide"], [real_bags(model, patches)])
    torch.manual_seed(5)
    before = model(batch).logits
    torch.manual_seed(5)
    training_footprint("crossfusion", {"embed_dim": 16}, DIM, patches, device_type="cpu")
    assert torch.equal(model(batch).logits, before)


def test_counting_a_step_works_where_gradients_are_off():
    counts = [training_footprint("abmil", {}, 8, {20: 9}, device_type="cpu")]
    with torch.no_grad():
        counts.append(training_footprint("abmil", {}, 8, {20: 9}, device_type="cpu"))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("arguments", "device_type", "error", "said"),
    [
        (("abmil", {}, 8, {20: 9}), "mps", ConfigError, "'mps'; choose cpu or cuda"),
        (("abmil", {}, 8, {10: 9}), "cpu", MissingScaleError, "abmil needs 20x"),
        (("crossfusion", {}, 8, {5: 1, 10: 0, 20: 9}), "cpu", MissingScaleError, "crossfusion needs 10x"),
        (("amil", {}, 8, {20: 9}), "cpu", UnknownModelError, "Did you mean abmil"),
        (("abmil", {"width": 3}, 8, {20: 9}), "cpu", ConfigError, "no option 'width'"),
    ],
)
def test_what_cannot_be_counted_is_named(arguments, device_type, error, said):
    with pytest.raises(error, match=said):
        training_footprint(*arguments, device_type=device_type)


STEP = """
import json, sys
from pathlib import Path
import torch
from cftrain.models import BagBatch, build, made_up_slide
from cftrain.survival.losses import nll_survival

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))

def step(patches):
    model = build(name, 1024, **options).train()
    optimizer = torch.optim.Adam(model.parameters())
    batch = made_up_slide({scale: patches[str(scale)] for scale in model.scales}, 1024, model.options.extras())
    losses = [
        weight * nll_survival(logits, torch.tensor([1]), torch.tensor([True]))
        for weight, logits in model.training_logits(batch)
    ]
    sum(losses).backward()
    optimizer.step()

torch.set_num_threads(1)
name, options, patches = json.loads(sys.argv[1])
step({"5": 2, "10": 5, "20": 9})  # loads libraries
before = resident("VmRSS")
step(patches)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "options", "n"),
    [
        ("abmil", {}, 2000),
        ("abmil", {}, 4000),
        ("abmil", {}, 16000),
        ("csmil", {}, 16000),
        ("dsmil", {}, 16000),
        ("mustmil", {}, 16000),
        ("crossfusion", {"embed_dim": 64}, 1024),
        ("crossfusion", {"embed_dim": 64}, 2500),
        ("crossfusion", {"embed_dim": 64}, 5000),
        ("crossfusion", {}, 1024),
        ("protosurv", {}, 8000),
        ("transmil", {}, 4000),  # fewer drown in the landmarks, which the step that loads libraries has as well
    ],
)
def test_a_real_step_on_a_cpu_rises_as_high_as_was_counted(name, options, n):
    patches = {5: n // 4, 10: n, 20: 4 * n}
    done = subprocess.run(
        [sys.executable, "-c", STEP, json.dumps([name, options, patches])],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    used = int(done.stdout)
    counted = training_footprint(name, options, 1024, patches, device_type="cpu").total
    assert counted / 2 < used < 1.15 * counted, f"{used / 2**20:.0f} MiB used, {counted / 2**20:.0f} counted"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("name", "options"), [("abmil", {}), ("crossfusion", {}), ("crossfusion-single", {}), ("transmil", {})]
)
def test_a_real_step_on_a_gpu_allocates_as_much_as_was_counted(name, options):
    device, patches = torch.device("cuda"), {5: 895, 10: 3449, 20: 13496}
    model = build(name, 1024, **options).to(device).train()
    weights = sum(p.nbytes for p in model.parameters())
    bags = {s: rows.to(device) for s, rows in real_bags(model, patches, torch.bfloat16).items()}

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(BagBatch.pack(["slide"], [bags])).logits
        labels = torch.tensor([1], device=device), torch.tensor([True], device=device)
        nll_survival(logits, *labels).backward()

    step()  # compiles, and makes gradients
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - 2 * weights - sum(rows.nbytes for rows in bags.values())
    step()
    used = torch.cuda.max_memory_allocated() - others + 2 * weights  # Adam's moments
    found = training_footprint(name, options, 1024, patches, device_type="cuda", dtype=torch.bfloat16)
    assert 0.6 * (found.total - RESERVE["cuda"]) < used < found.total
