"""GELU and dropout in plain PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cfkernels.dropout import drop


def gelu_dropout_reference(x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """As `cfkernels.gelu_dropout`, with the rate in 256ths; the seed is None where it is 0."""
    y = functional.gelu(x)
    if seed is None or threshold == 0:
        return y
    dropped: Tensor = drop(y, seed, threshold)
    return dropped
