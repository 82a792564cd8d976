"""Dropout and a sum, forward and backward, in Triton. One program: ROWS rows x COLUMNS columns.

The mask is a function of (seed, row, column), so the backward makes it again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cfkernels.dropout.kernel import keep_block


@triton.jit(do_not_specialize=["n_rows"])
def dropout_add_fwd_kernel(
    x_ptr, residual_ptr, seed_ptr, y_ptr, n_rows, n_columns, x_stride, residual_stride, rescale,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = rows[:, None].to(tl.int64)
    x = tl.load(x_ptr + at * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(residual_ptr + at * residual_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    groups = tl.program_id(1) * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
    kept = keep_block(tl.load(seed_ptr), rows, groups, 0, THRESHOLD, ROWS, COLUMNS)
    y += tl.where(kept, x * rescale, 0.0)
    tl.store(y_ptr + at * n_columns + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def dropout_add_bwd_kernel(
    grad_ptr, seed_ptr, grad_x_ptr, n_rows, n_columns, grad_stride, rescale,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = rows[:, None].to(tl.int64)
    grad = tl.load(grad_ptr + at * grad_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    groups = tl.program_id(1) * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
    kept = keep_block(tl.load(seed_ptr), rows, groups, 0, THRESHOLD, ROWS, COLUMNS)
    grad_x = tl.where(kept, grad * rescale, 0.0)
    tl.store(grad_x_ptr + at * n_columns + columns[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
