"""Pyramid position encoding (PPEG): depth-wise windows over square grids of tokens."""

from __future__ import annotations

from torch import Tensor

from cfkernels.ppeg.reference import ppeg_reference
from cfkernels.windows import check_grids, check_windows

__all__ = ["ppeg"]


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
    return ppeg_reference(x, (weight7, weight5, weight3), (bias7, bias5, bias3), grid_sizes=grid_sizes, prefix=prefix)
