"""LayerNorm of a sum, forward and backward, in Triton. One program holds ROWS whole rows of up to COLUMNS elements.

Row lengths and strides are the model's, so they may be specialised; numbers of rows are the bags'.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_sum(
    x_ptr, residual_ptr, rows, columns, mask, x_stride, residual_stride, RESIDUAL: tl.constexpr
):  # fmt: skip
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = rows[:, None] * residual_stride + columns[None, :]
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    n_rows, n_columns, x_stride, residual_stride, eps,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    x = load_sum(x_ptr, residual_ptr, rows, columns, mask, x_stride, residual_stride, RESIDUAL)
    mean = tl.sum(x, axis=1) / n_columns
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, axis=1) / n_columns + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    y = deviation * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + rows[:, None] * n_columns + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def layer_norm_bwd_kernel(
    grad_ptr, x_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    n_rows, n_tiles, n_columns, grad_stride, x_stride, residual_stride,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # a program takes n_tiles tiles of ROWS rows, one after the other, and leaves its sums of the parameters'
    # gradients in its own [2, D] of partial
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < n_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    grad_bias = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(n_tiles):
        rows = (program * n_tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (rows[:, None] < n_rows) & inside[None, :]
        x = load_sum(x_ptr, residual_ptr, rows, columns, mask, x_stride, residual_stride, RESIDUAL)
        at = rows[:, None] * grad_stride + columns[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        normed = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        grad_weight += grad * normed
        grad_bias += grad
        slope = grad * weight[None, :]
        along = tl.sum(slope * normed, axis=1) / n_columns
        level = tl.sum(slope, axis=1) / n_columns
        grad_x = (slope - normed * along[:, None] - level[:, None]) * rstd[:, None]
        at = rows[:, None] * n_columns + columns[None, :]
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    at = partial_ptr + program * 2 * n_columns + columns
    tl.store(at, tl.sum(grad_weight, axis=0), mask=inside)
    tl.store(at + n_columns, tl.sum(grad_bias, axis=0), mask=inside)
