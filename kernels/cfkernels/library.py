"""The ops as PyTorch knows them: `torch.ops.cfkernels.*`, for torch.compile, fake tensors and autograd.

`register` is for what launches Triton kernels. What computes in PyTorch, but is no graph to be traced, registers
itself as a `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cfkernels.triton_support import INTERPRETED

_LIBRARY: Any = torch.library.Library("cfkernels", "DEF")  # type: ignore[no-untyped-call]
_KEYS = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)


def register(
    schema: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    """Register one op, e.g. `register("ppeg(Tensor x, ...) -> Tensor", ...)`.

    Parameters
    ----------
    schema
        Name, arguments and results in PyTorch's notation.
    launch
        Computes the results on a GPU (on CPU too under Triton's interpreter).
    fake
        Makes empty results of the right shape and dtype.
    backward, save
        As `torch.library.register_autograd` takes them; an op without them has no gradient.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in _KEYS:
        _LIBRARY.impl(name, launch, key)
    torch.library.register_fake(f"cfkernels::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"cfkernels::{name}", backward, setup_context=save, lib=_LIBRARY)
