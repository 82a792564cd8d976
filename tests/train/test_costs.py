"""What models cost: operations against formulas written out here, and against a real step; the command's table."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import cftrain.costs
from cfkernels import attention, using
from cftrain.cli import main
from cftrain.cli.model_costs import flop_text
from cftrain.costs import SLIDES, PassRow, counted, measured, parameter_count
from cftrain.drawn import drawn_batch
from cftrain.errors import MeasureError, MissingScaleError, UnknownModelError
from cftrain.flops import FORMULAS, FlopCount
from cftrain.footprint import count_passes, training_footprint
from cftrain.models import build

SMALL, AVERAGE = {5: 7, 10: 23, 20: 90}, {5: 895, 10: 3449, 20: 13496}
TRITON = ("attention", "dropout_add", "gelu_dropout", "grouped_window_conv", "layer_norm", "mix_layer_norms", "ppeg")
ELEMENTWISE = {"drop", "keep_mask", "dropout_add", "gelu_dropout", "layer_norm", "mix_layer_norms"}


def flops(name, options, dim, patches, **more):
    """Of a prediction, and of training."""
    training, prediction = count_passes(name, options, dim, patches, device_type="cpu", **more)
    return prediction.flops, training.flops


def test_gated_attention_costs_what_a_pencil_says():
    N, D, H, A, K = 90, 24, 16, 8, 4
    projection, gates, score, pooling, head = N * D * H, 2 * N * H * A, N * A, N * H, H * K
    forward = 2 * (projection + gates + score + pooling + head)
    backward = 2 * (projection + 2 * (gates + score + pooling + head))  # nobody asks for the features' gradient
    found = flops("abmil", {"hidden_dim": H, "attention_dim": A}, D, SMALL)
    assert found == (forward, forward + backward)


def test_dsmil_costs_what_a_pencil_says():
    N, D, A, K = 90, 24, 16, 4
    instances, first, second = N * D * K, N * D * A, N * A * A
    likeness, pooling, head = K * A * N, K * N * D, K * D * K
    forward = 2 * (instances + first + second + likeness + pooling + head)
    backward = 2 * (instances + first + pooling + 2 * (second + likeness + head))  # pooled are the features themselves
    assert flops("dsmil", {"attention_dim": A}, D, SMALL) == (forward, forward + backward)


def crossfusion(patches, D, E, K=4):
    """Multiply-adds of its parts: input projections, attention, and all else; one layer a block."""
    n5, n10, n20 = patches.values()
    T = math.isqrt(n10 - 1) + 1
    T *= T

    def block(queries, keys):
        # projections of queries, of keys and values, and of the output; then E to 2E to E
        return (2 * queries + 2 * keys) * E * E + 4 * queries * E * E, 2 * queries * keys * E

    ppeg = 49 * E * T
    windows, after = T * (E // 2) * 2 * 49, T * (E // 2) * E
    # a learnt vector is added to source and context: once through three projections
    blocks = [block(n10, n5), block(n10, n20), *[block(T, T)] * 6, block(T + 1, T + 1), block(1, T + 1)]
    others = sum(each[0] for each in blocks) + 2 * 3 * E * E + 4 * ppeg + windows + after + E * K
    return (n5 + n10 + n20) * D * E, sum(each[1] for each in blocks), others


@pytest.mark.parametrize(("patches", "D", "E"), [(SMALL, 24, 16), (AVERAGE, 1024, 512)])
def test_crossfusion_costs_what_its_parts_add_up_to(patches, D, E):
    projections, attended, others = crossfusion(patches, D, E)
    forward = 2 * (projections + attended + others)
    # five products where the forward has two; no gradient of the features
    backward = 2 * (projections + 5 * attended // 2 + 2 * others)
    assert flops("crossfusion", {"embed_dim": E}, D, patches) == (forward, forward + backward)


def test_crossfusion_costs_as_much_as_the_released_code_less_what_nobody_reads():
    """475 GFLOP were counted for the released code, whose last block also computes the rows behind the class token."""
    found, _ = flops("crossfusion", {}, 1024, AVERAGE)
    assert found / 475e9 == pytest.approx(0.92, abs=0.01)
    E, T = 512, 59**2
    unread = 2 * (2 * T * E * E + 4 * T * E * E + 2 * T * (T + 1) * E)
    assert found + unread == pytest.approx(475e9, rel=0.002)


def test_transmil_costs_what_its_parts_add_up_to():
    D, E, H, m, iterations = 1024, 512, 8, 256, 6
    N, L = 13496, 1 + 117**2
    M = -(-L // m) * m
    layer = 3 * M * E * E + 2 * m * M * E  # projections; the landmarks read all rows
    inverse = H * m * m * (E // H) + 4 * iterations * H * m**3 + H * m * m * (E // H)
    rows = [L, 1]  # those that read the landmarks, and are projected; of the second layer only the token's
    read = sum(2 * n * m * E + n * E * E for n in rows)
    convolved = 33 * E * (L + 1 + 16)
    forward = 2 * (N * D * E + 2 * (layer + inverse) + read + convolved + 49 * E * 117**2 + E * 4)
    found, training = flops("transmil", {}, D, AVERAGE)
    assert found == forward
    assert 2.9 < training / found < 3.2


def counted_pass(work, *inputs):
    """Operations of work(*inputs) and of its backward."""
    with FlopCount() as forward:
        out = work(*(x.requires_grad_() for x in inputs))
    with FlopCount() as backward:
        out.sum().backward()
    return forward.total, backward.total


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_a_convolution_costs_as_much_for_each_gradient_as_forwards_whatever_its_groups(groups, fake):
    """PyTorch's formula would count the gradient of depth-wise weights as often as there are channels."""
    once = 2 * (5 * 6) * 8 * (8 // groups) * 3 * 3
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad():
        x, weight = torch.randn(1, 8, 5, 6), torch.randn(8, 8 // groups, 3, 3)
        work = lambda x, w: functional.conv2d(x, w, padding=1, groups=groups)  # noqa: E731
        assert counted_pass(work, x, weight) == (once, 2 * once)


def test_a_transposed_convolution_too():
    once = 2 * (5 * 6) * 4 * 3 * 2 * 2  # each of 4 x 5 x 6 inputs meets 3 x 2 x 2 weights
    assert counted_pass(functional.conv_transpose2d, torch.randn(1, 4, 5, 6), torch.randn(4, 3, 2, 2)) == (
        once,
        2 * once,
    )


@pytest.mark.parametrize("name", ["sdpa", "blocked", "reference"])
def test_attention_counts_pairs_of_each_bag_whatever_computes_it(name):
    H, width, q_lengths, kv_lengths = 2, 16, (3, 5), (7, 4)
    pairs = 3 * 7 + 5 * 4
    q, k, v = (torch.randn(rows, H, width) for rows in (8, 11, 11))

    def work(q, k, v):
        return attention(q, k, v, q_lengths=q_lengths, kv_lengths=kv_lengths)

    with using(attention=name):
        forward, backward = counted_pass(work, q, k, v)
    assert forward == 2 * (2 * pairs * H * width)
    # the definition keeps its scores, the others make them again
    assert backward == 2 * ((4 if name == "reference" else 5) * pairs * H * width)


def test_products_with_one_vector_are_counted():
    matrix, vector = torch.randn(3, 5), torch.randn(5)
    with FlopCount() as count:
        matrix @ vector
    assert count.total == 2 * 15
    with FlopCount() as count:
        vector @ vector
    assert count.total == 2 * 5
    with FlopCount() as count:
        functional.linear(vector, matrix, torch.randn(3))
    assert count.total == 2 * 15


def test_every_op_of_the_kernels_is_counted_or_known_to_be_elementwise():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cfkernels::")}
    elementwise = {f"cfkernels::{name}{way}" for name in ELEMENTWISE for way in ("", "_backward")}
    assert "cfkernels::attention_blocked_backward" in names
    assert names - elementwise <= FORMULAS.keys()


def test_kernels_count_as_much_as_the_cpu():
    pytest.importorskip("triton")
    args = ("crossfusion", {"embed_dim": 64}, 24, SMALL)
    with using(**dict.fromkeys(TRITON, "triton")):
        training, prediction = count_passes(*args, device_type="cuda")
    assert (prediction.flops, training.flops) == flops(*args)


@pytest.mark.parametrize(("name", "options"), [("abmil", {}), ("crossfusion", {"embed_dim": 32})])
def test_fake_tensors_cost_as_much_as_real_ones(name, options):
    model = build(name, 24, **options).train()
    with FlopCount() as count:
        parts = model.training_logits(drawn_batch(model, SMALL, device=torch.device("cpu")))
        torch.autograd.backward([logits.sum() for _, logits in parts])
    assert count.total == flops(name, options, 24, SMALL)[1]


def test_a_prediction_keeps_nothing_for_a_backward():
    N, D, H = 10_000, 1024, 512
    training, prediction = count_passes("abmil", {}, D, {20: N}, device_type="cpu")
    assert training.footprint == training_footprint("abmil", {}, D, {20: N}, device_type="cpu")
    found = prediction.footprint
    assert (found.optimiser, found.saved) == (0, 0)
    assert (found.weights, found.features) == (training.footprint.weights, 4 * N * D)
    # at worst the rows before the ReLU and behind it, or those behind it and the gates, each half as wide
    assert 2 * 4 * N * H <= found.transient < 2.6 * 4 * N * H


def test_parameters_are_those_of_the_released_models():
    released = {"abmil": 789_765, "dsmil": 168_200, "transmil": 2_673_172, "crossfusion": 22_963_720}
    assert {name: parameter_count(name, {}, 1024) for name in released} == released


def test_a_drawn_slide_has_what_the_model_reads():
    batch = drawn_batch(build("crossfusion", 8, embed_dim=16), {40: 9, **SMALL}, device=torch.device("cpu"))
    assert {scale: tuple(rows.shape) for scale, rows in batch.features.items()} == {5: (7, 8), 10: (23, 8), 20: (90, 8)}
    with pytest.raises(MissingScaleError, match="abmil needs 20x"):
        drawn_batch(build("abmil", 8), {10: 3}, device=torch.device("cpu"))


def test_a_size_that_a_model_refuses_is_a_row_that_says_so():
    prediction, training = counted("abmil", {"scale": 40}, 8, "small", SMALL, device_type="cpu")
    assert prediction.problem == training.problem == "abmil needs 40x, of which there is no patch"
    assert (training.flops, training.nbytes) == (None, None)
    assert measured(training, {"scale": 40}, 8, device=torch.device("cpu"), repeats=1) == training
    with pytest.raises(UnknownModelError):
        counted("amil", {}, 8, "small", SMALL, device_type="cpu")


def test_a_model_fitted_in_closed_form_has_no_training_steps_to_measure():
    patches = {20: 64}
    predicting, training = counted("mean-cox", {}, 8, "small", patches, device_type="cpu")
    assert training.problem == "no training steps: fitted in closed form"
    assert (training.flops, training.nbytes) == (None, None)
    assert measured(training, {}, 8, device=torch.device("cpu"), repeats=1) == training
    assert measured(predicting, {}, 8, device=torch.device("cpu"), repeats=1).median_seconds > 0


def test_what_needs_more_memory_than_is_free_is_not_tried(monkeypatch):
    monkeypatch.setattr(cftrain.costs, "free_ram", lambda: 10**8)
    _, row = counted("crossfusion", {}, 1024, "average", SLIDES["average"], device_type="cpu")
    found = measured(row, {}, 1024, device=torch.device("cpu"), repeats=1)
    assert found.problem == "needs 1.5 GB of RAM, 100 MB are free"
    assert (found.seconds, found.peak_bytes, found.median_seconds) == ((), None, None)


def test_a_process_ended_from_outside_is_a_reason(monkeypatch):
    monkeypatch.setattr(cftrain.costs, "_run", exec)
    monkeypatch.setattr(torch, "get_num_threads", dict)
    with pytest.raises(MeasureError, match="ended from outside"):
        cftrain.costs._in_own_process("import os; os._exit(9)")


@pytest.mark.slow
def test_running_out_of_memory_is_a_reason():
    row = PassRow("abmil", "huge", {20: 8_000_000}, "prediction", flops=1, nbytes=1)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, before[1]))
    try:
        found = measured(row, {}, 1024, device=torch.device("cpu"), repeats=1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert found.problem.startswith("ran out of memory: ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prediction", "training"])
@pytest.mark.parametrize(("name", "patches"), [("abmil", {20: 20_000}), ("crossfusion", {5: 100, 10: 400, 20: 1600})])
def test_a_measured_pass_rises_about_as_high_as_was_counted(name, patches, kind):
    (row,) = (row for row in counted(name, {}, 1024, "large", patches, device_type="cpu") if row.kind == kind)
    # one pass: repeated ones leave holes in glibc's heap, up to a quarter more
    found = measured(row, {}, 1024, device=torch.device("cpu"), repeats=1)
    assert 0.5 * row.nbytes < found.peak_bytes < 1.15 * row.nbytes
    assert replace(found, seconds=(), peak_bytes=None) == row


def run(*arguments):
    done = CliRunner().invoke(main, ["models", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_what_was_counted():
    (row,) = json.loads(run("abmil", "--device", "cpu", "--dim", "64", "--json"))
    assert (row["dim"], row["device"], row["parameters"]) == (64, "cpu", parameter_count("abmil", {}, 64))
    costs = {(cost["slide"], cost["pass"]): cost for cost in row["costs"]}
    assert costs.keys() == {(slide, kind) for slide in SLIDES for kind in ("prediction", "training")}
    training, prediction = count_passes("abmil", {}, 64, AVERAGE, device_type="cpu", dtype=torch.float16)
    assert costs["average", "prediction"]["flops"] == prediction.flops
    assert costs["average", "training"]["bytes"] == training.footprint.total
    assert costs["largest", "training"]["patches"] == {"20": 137990}
    assert costs["largest", "training"]["seconds"] == []


def test_the_command_prints_options_maps_and_an_aligned_table():
    text = run("abmil", "dsmil", "--device", "cpu")
    assert "--set model.hidden_dim=512" in text
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("model "))
    header, *rows = lines[at : at + 9]
    for end in ("parameters", "operations", "memory"):
        column = header.index(end) + len(end)
        assert {line[column : column + 2].strip() for line in (header, *rows)} == {""}
        assert all(line[column - 1] != " " for line in rows)
    assert " ".join(rows[0].split()) == "abmil average 13,496 at 20x 0.79 M prediction 21.2 GFLOP 181 MB"
    assert "element-wise work is not counted" in text


def test_the_list_alone_has_no_costs():
    assert "FLOP" not in run()
    assert "costs" not in json.loads(run("--json"))[0]


def test_the_command_says_why_a_model_is_not_measured(monkeypatch):
    monkeypatch.setattr(cftrain.costs, "free_ram", lambda: 10**6)
    text = run("abmil", "--measure", "average", "--device", "cpu")
    assert "abmil, average, training: needs 301 MB of RAM, 1.0 MB are free" in text
    assert "--set" not in text


@pytest.mark.slow
def test_the_command_measures(monkeypatch):
    monkeypatch.setitem(cftrain.costs.SLIDES, "average", {5: 20, 10: 80, 20: 320})
    (row,) = json.loads(
        run("abmil", "--measure", "average", "--repeats", "2", "--dim", "64", "--device", "cpu", "--json")
    )
    assert [cost["pass"] for cost in row["costs"]] == ["prediction", "training"]
    for cost in row["costs"]:
        assert len(cost["seconds"]) == 2
        assert cost["median_seconds"] > 0
        assert cost["problem"] is None


@pytest.mark.parametrize(
    ("operations", "text"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (21_248_106_496, "21.2 GFLOP"), (475e9, "475 GFLOP"), (31.7e12, "31.7 TFLOP")],
)
def test_operations_are_told_in_units(operations, text):
    assert flop_text(operations) == text


def test_seconds_are_those_of_every_repeat_and_their_median():
    (row, _) = counted("abmil", {}, 16, "small", {20: 50}, device_type="cpu")
    found = measured(row, {}, 16, device=torch.device("cpu"), repeats=3)
    assert len(found.seconds) == 3
    assert min(found.seconds) <= found.median_seconds <= max(found.seconds)
