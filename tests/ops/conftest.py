"""Kernels run in Triton's interpreter, and every output starts as NaN: what a kernel leaves unwritten shows."""

from __future__ import annotations

import interpreter
import pytest
import torch

interpreter.mend()


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """`torch.empty` and its like give NaN, or the largest integer: PyTorch's own check for uninitialised memory."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
