"""The GPU's benchmarks work: dry runs where there is no GPU, their checks and one step where there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script, *words):
    """In a process of its own, which decides itself whether kernels are interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    call = [sys.executable, BENCHMARKS / script, *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=inherited)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_the_benchmark_of_kernels_runs_dry(tmp_path):
    run("kernels.py", "--dry-run", "-o", tmp_path / "kernels.json")
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["wrong"] == {}
    assert {row["op"] for row in report["rows"]} == {
        "attention", "attention_column_sums", "dropout_add", "gelu_dropout", "grouped_window_conv", "layer_norm",
        "mix_layer_norms", "ppeg",
    }  # fmt: skip
    assert all(isinstance(row["ms"], float) for row in report["rows"])


@pytest.mark.slow
def test_the_benchmark_of_a_training_step_runs_dry(tmp_path):
    run("train_step.py", "--dry-run", "--threads", 1, "-o", tmp_path / "step.json")
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["dropout"] for row in rows] == ["none", "feed-forward", "all"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_the_gpu_agree_with_their_definitions():
    assert "all kernels agree" in run("kernels.py", "--check")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_training_step_on_the_gpu_agrees_with_plain_pytorch(tmp_path):
    run("train_step.py", "--bags", "small", "--repeats", 2, "-o", tmp_path / "step.json")
    assert len(json.loads((tmp_path / "step.json").read_text())["rows"]) == 3
