"""Pyramid position encoding (PPEG): depth-wise windows over square grids of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from cfkernels import triton_support
from cfkernels.dispatch import Candidate, choose
from cfkernels.ppeg.merged import ppeg_merged
from cfkernels.ppeg.reference import ppeg_reference
from cfkernels.windows import check_grids, check_windows

if triton_support.HAS_TRITON:
    from cfkernels.ppeg.op import ppeg_triton

__all__ = ["candidates", "ppeg"]


def ppeg(
    x: Tensor,
    weight7: Tensor,
    bias7: Tensor,
    weight5: Tensor,
    bias5: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    *,
    grid_sizes: tuple[int, ...],
    prefix: int = 0,
) -> Tensor:
    """Add three depth-wise convolutions to the tokens of each grid: `m + dw7(m) + dw5(m) + dw3(m)`, [T, D].

    Parameters
    ----------
    x : [T, D] float
        Packed tokens; each bag has `prefix` tokens, then g * g tokens, row-major on its g x g grid.
    weight7, weight5, weight3 : [D, 1, k, k] float
        Depth-wise kernels; borders are zero-padded by k // 2.
    bias7, bias5, bias3 : [D] float
    grid_sizes
        The side g of each bag's grid, at least 1.
    prefix
        Tokens before each grid (a class token) that pass unchanged.

    Raises
    ------
    ShapeError
        The grids do not hold T tokens, or a kernel or bias has another shape.

    References
    ----------
    Shao et al. 2021 (TransMIL), arXiv:2106.00908, section 3.3.
    """
    check_grids(x, grid_sizes, prefix)
    check_windows({7: (weight7, bias7), 5: (weight5, bias5), 3: (weight3, bias3)}, x.shape[1], 1)
    weights, biases = (weight7, weight5, weight3), (bias7, bias5, bias3)
    chosen = choose("ppeg", candidates(x.device, x.dtype)).name
    if chosen == "triton":
        return ppeg_triton(x, weights, biases, grid_sizes=grid_sizes, prefix=prefix)
    compute = ppeg_merged if chosen == "merged" else ppeg_reference
    return compute(x, weights, biases, grid_sizes=grid_sizes, prefix=prefix)


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """The implementations for such tensors, best first."""
    elsewhere = None if device.type == "cpu" else "its weight gradient is written for CPUs"
    return (
        triton_support.candidate(device, dtype, "one merged window, each token loaded once per strip of eight columns"),
        Candidate("merged", elsewhere, "one depth-wise convolution; its weight gradient is another"),
        Candidate("reference", None, "PyTorch's depth-wise convolution with the merged window"),
    )
