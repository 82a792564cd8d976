"""GELU and dropout, forward and backward, in Triton. One program: ROWS rows x COLUMNS columns.

The mask is a function of (seed, row, column), so the backward makes it again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cfkernels.dropout.kernel import keep_block


@triton.jit(do_not_specialize=["n_rows"])
def gelu_dropout_fwd_kernel(
    x_ptr, seed_ptr, y_ptr, n_rows, n_columns, rescale,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = rows[:, None].to(tl.int64) * n_columns + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    if THRESHOLD > 0:
        groups = tl.program_id(1) * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
        kept = keep_block(tl.load(seed_ptr), rows, groups, 0, THRESHOLD, ROWS, COLUMNS)
        y = tl.where(kept, y * rescale, 0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def gelu_dropout_bwd_kernel(
    grad_ptr, x_ptr, seed_ptr, grad_x_ptr, n_rows, n_columns, rescale,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = rows[:, None].to(tl.int64) * n_columns + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        groups = tl.program_id(1) * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
        kept = keep_block(tl.load(seed_ptr), rows, groups, 0, THRESHOLD, ROWS, COLUMNS)
        grad = tl.where(kept, grad * rescale, 0.0)
    # d/dx x Phi(x) = Phi(x) + x phi(x)
    slope = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(grad_x_ptr + at, (grad * slope).to(grad_x_ptr.dtype.element_ty), mask=mask)
