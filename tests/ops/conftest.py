"""Kernels run in Triton's interpreter, and every output starts as NaN: what a kernel leaves unwritten shows."""

from __future__ import annotations

import interpreter
import pytest
import torch

interpreter.mend()


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """`torch.empty`, `empty_like` and `new_empty` filled with NaN, or the largest integer."""

    def poisoned(make):
        def call(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_meta or not isinstance(x, torch.Tensor) or type(x) is not torch.Tensor:
                return x
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
