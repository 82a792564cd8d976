"""Dropout and a sum in plain PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor

from cfkernels.dropout import drop


def dropout_add_reference(x: Tensor, residual: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """As `cfkernels.dropout_add`, with the rate in 256ths; the seed is None where it is 0."""
    if seed is None or threshold == 0:
        return x + residual
    dropped: Tensor = drop(x, seed, threshold)
    return dropped + residual
