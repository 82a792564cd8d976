"""The public face of cfkernels."""

import subprocess
import sys

import cfkernels


def test_cfkernels_exports_exactly_its_operators_and_errors():
    assert cfkernels.__all__ == [
        "Explanation",
        "KernelError",
        "RateError",
        "ShapeError",
        "UnavailableError",
        "attention",
        "attention_and_lse",
        "attention_column_sums",
        "dropout_add",
        "explain",
        "gelu_dropout",
        "grouped_window_conv",
        "layer_norm",
        "mix_layer_norms",
        "ppeg",
        "using",
    ]
    assert all(callable(getattr(cfkernels, name)) for name in cfkernels.__all__)


def test_shape_errors_can_be_caught_as_kernel_errors_and_as_value_errors():
    assert issubclass(cfkernels.ShapeError, cfkernels.KernelError)
    assert issubclass(cfkernels.ShapeError, ValueError)


WITHOUT_TRITON = """
import importlib.util, sys
sys.modules["triton"] = None  # importing it fails
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch, cfkernels
q = torch.ones(4, 2, 16)
assert cfkernels.attention(q, q, q, q_lengths=(1, 3), kv_lengths=(2, 2), dropout_p=0.2).shape == (4, 2, 16)
assert "not triton" in str(cfkernels.explain()) and "triton is not installed" in str(cfkernels.explain())
"""


def test_everything_runs_where_triton_is_not_installed():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
