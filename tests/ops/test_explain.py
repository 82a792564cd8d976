"""What `explain` says must be what the ops do, and fit a terminal."""

import pkgutil
from dataclasses import FrozenInstanceError

import pytest
import torch

import cfkernels
from cfkernels import UnavailableError, triton_support, using
from cfkernels.explain import Explanation, explain


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that this machine has a GPU of such a compute capability, and no interpreter."""

    def pretend(major, minor):
        monkeypatch.setattr(triton_support, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    return pretend


def implementations(explanation):
    return {row.op: row.implementation for row in explanation.rows}


def test_every_op_is_explained():
    packages = {found.name for found in pkgutil.iter_modules(cfkernels.__path__) if found.ispkg}
    assert packages - {"dropout", "windows"} == set(implementations(explain())) - {"attention_and_lse"}


def test_on_a_cpu_everything_is_pytorch():
    explanation = explain("cpu")
    assert explanation.dtype == torch.float32
    assert "triton" not in implementations(explanation).values()
    for row in explanation.rows:
        assert "the interpreter proves kernels, it serves nobody" in dict(row.alternatives)["triton"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=str)
def test_on_a_gpu_everything_with_dropout_is_triton_in_bfloat16(gpu, capability):
    gpu(*capability)
    explanation = explain()
    assert (explanation.device.type, explanation.dtype) == ("cuda", torch.bfloat16)
    assert set(implementations(explanation).values()) == {"triton"}


def test_on_an_old_gpu_nothing_is_triton_and_the_reason_is_given(gpu):
    gpu(7, 5)
    for row in explain().rows:
        assert row.implementation != "triton"
        assert dict(row.alternatives)["triton"] == "the kernels need compute capability 8.0"


def test_float64_is_never_triton_and_the_reason_is_given():
    for row in explain("cpu", torch.float64).rows:
        assert row.implementation != "triton"
        assert dict(row.alternatives)["triton"].startswith("torch.float64 has no kernel")


def test_it_answers_for_the_heads_and_the_dropout_that_are_asked_about(gpu):
    gpu(8, 6)
    assert implementations(explain(head_dim=200))["attention"] != "triton"
    reasons = {row.op: dict(row.alternatives) for row in explain(head_dim=200).rows}
    assert "head_dim 200 has no kernel" in reasons["attention"]["triton"]
    with_dropout, without = (
        {row.op: dict(row.alternatives) for row in explain(dropout=dropout).rows} for dropout in (True, False)
    )
    assert with_dropout["attention"]["sdpa"] != without["attention"]["sdpa"]


def test_it_respects_using_and_says_so():
    with using(ppeg="triton", attention="reference"):
        rows = {row.op: row for row in explain("cpu").rows}
    assert (rows["ppeg"].implementation, rows["attention"].implementation) == ("triton", "reference")
    assert rows["attention_and_lse"].implementation == "reference"
    assert rows["ppeg"].why.startswith("named by `using`; ")
    assert dict(rows["ppeg"].alternatives)["reference"].startswith("not the first that can run")
    assert not explain("cpu").rows[0].why.startswith("named by")


def test_a_named_implementation_that_cannot_run_is_shown_with_the_error_its_op_would_raise():
    with using(layer_norm="triton", gelu_dropout="cudnn"):
        rows = {row.op: row for row in explain("cpu", torch.float64).rows}
        with pytest.raises(UnavailableError) as error:
            cfkernels.gelu_dropout(torch.zeros(2, 2, dtype=torch.float64))
    assert (rows["layer_norm"].implementation, rows["gelu_dropout"].implementation) == ("none", "none")
    assert "'triton' cannot run here: torch.float64 has no kernel" in rows["layer_norm"].why
    assert rows["gelu_dropout"].why == str(error.value)


def test_printed_it_is_a_table_of_at_most_110_columns(gpu):
    gpu(8, 6)
    with using(gelu_dropout="cudnn"):  # a long message
        text = str(explain())
    lines = text.splitlines()
    assert lines[0] == "cfkernels on cuda, bfloat16, heads of 128, with attention dropout"
    assert max(map(len, lines)) <= 110
    assert not any(line.endswith(" ") for line in lines)
    start = lines[2].index("because")
    continued = [line for line in lines if line and not line[:start].strip()]
    assert continued
    assert all(line[start] != " " for line in continued)


def test_an_explanation_cannot_be_changed():
    explanation = explain("cpu")
    assert isinstance(explanation, Explanation)
    with pytest.raises(FrozenInstanceError):
        explanation.rows = ()
