"""Three LayerNorms and their mix, forward and backward, in Triton. One program holds ROWS rows of all three maps.

With xi the normalised rows of map i, y = sum_i mix_i (xi weight_i + bias_i) + mix_bias. Gradients of all parameters
come from four rows of sums over all rows of the maps, S_i = sum of grad * xi and S_3 = sum of grad:
weight_i: mix_i S_i; bias_i: mix_i S_3; mix_i: sum over columns of weight_i S_i + bias_i S_3; mix_bias: sum of S_3.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(x_ptr, columns, n_columns):
    return tl.load(x_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)


@triton.jit
def load_rows(x_ptr, rows, columns, mask, stride):
    return tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalise(x_ptr, statistics_ptr, rows, columns, mask, n_rows, n_columns, stride, eps):
    x = load_rows(x_ptr, rows, columns, mask, stride)
    mean = tl.sum(x, axis=1) / n_columns
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, axis=1) / n_columns + eps)
    tl.store(statistics_ptr + rows, mean, mask=rows < n_rows)
    tl.store(statistics_ptr + n_rows + rows, rstd, mask=rows < n_rows)
    return deviation * rstd[:, None]


@triton.jit
def load_normed(x_ptr, statistics_ptr, rows, columns, mask, n_rows, stride):
    x = load_rows(x_ptr, rows, columns, mask, stride)
    mean = tl.load(statistics_ptr + rows, mask=rows < n_rows, other=0.0)
    rstd = tl.load(statistics_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)
    return tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0), rstd


@triton.jit
def store_grad(grad_x_ptr, grad, normed, rstd, weight, at, mask, n_columns):
    slope = grad * weight[None, :]
    along = tl.sum(slope * normed, axis=1) / n_columns
    level = tl.sum(slope, axis=1) / n_columns
    grad_x = (slope - normed * along[:, None] - level[:, None]) * rstd[:, None]
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def mix_layer_norms_fwd_kernel(
    x0_ptr, x1_ptr, x2_ptr, weight0_ptr, weight1_ptr, weight2_ptr, bias0_ptr, bias1_ptr, bias2_ptr,
    mix_weight_ptr, mix_bias_ptr, y_ptr, statistics_ptr,
    n_rows, n_columns, stride0, stride1, stride2, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # statistics: [3, 2, n_rows], mean and rstd of each map
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    mix0 = tl.load(mix_weight_ptr).to(tl.float32)
    mix1 = tl.load(mix_weight_ptr + 1).to(tl.float32)
    mix2 = tl.load(mix_weight_ptr + 2).to(tl.float32)
    bias = mix0 * load_row(bias0_ptr, columns, n_columns)
    bias += mix1 * load_row(bias1_ptr, columns, n_columns)
    bias += mix2 * load_row(bias2_ptr, columns, n_columns)
    bias += tl.load(mix_bias_ptr).to(tl.float32)
    normed0 = normalise(x0_ptr, statistics_ptr, rows, columns, mask, n_rows, n_columns, stride0, eps)
    normed1 = normalise(x1_ptr, statistics_ptr + 2 * n_rows, rows, columns, mask, n_rows, n_columns, stride1, eps)
    normed2 = normalise(x2_ptr, statistics_ptr + 4 * n_rows, rows, columns, mask, n_rows, n_columns, stride2, eps)
    y = normed0 * (mix0 * load_row(weight0_ptr, columns, n_columns))[None, :] + bias[None, :]
    y += normed1 * (mix1 * load_row(weight1_ptr, columns, n_columns))[None, :]
    y += normed2 * (mix2 * load_row(weight2_ptr, columns, n_columns))[None, :]
    at = rows[:, None] * n_columns + columns[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def mix_layer_norms_bwd_kernel(
    grad_ptr, x0_ptr, x1_ptr, x2_ptr, weight0_ptr, weight1_ptr, weight2_ptr, mix_weight_ptr, statistics_ptr,
    grad_x0_ptr, grad_x1_ptr, grad_x2_ptr, partial_ptr,
    n_rows, n_tiles, n_columns, grad_stride, stride0, stride1, stride2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # a program takes n_tiles tiles of ROWS rows, one after the other, and leaves its sums S_0 to S_3 in its own
    # [4, D] of partial
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < n_columns
    weight0 = tl.load(mix_weight_ptr).to(tl.float32) * load_row(weight0_ptr, columns, n_columns)
    weight1 = tl.load(mix_weight_ptr + 1).to(tl.float32) * load_row(weight1_ptr, columns, n_columns)
    weight2 = tl.load(mix_weight_ptr + 2).to(tl.float32) * load_row(weight2_ptr, columns, n_columns)
    sum0 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sum1 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sum2 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sum3 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(n_tiles):
        rows = (program * n_tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (rows[:, None] < n_rows) & inside[None, :]
        at = rows[:, None] * n_columns + columns[None, :]
        grad = load_rows(grad_ptr, rows, columns, mask, grad_stride)
        sum3 += grad
        normed, rstd = load_normed(x0_ptr, statistics_ptr, rows, columns, mask, n_rows, stride0)
        sum0 += grad * normed
        store_grad(grad_x0_ptr, grad, normed, rstd, weight0, at, mask, n_columns)
        normed, rstd = load_normed(x1_ptr, statistics_ptr + 2 * n_rows, rows, columns, mask, n_rows, stride1)
        sum1 += grad * normed
        store_grad(grad_x1_ptr, grad, normed, rstd, weight1, at, mask, n_columns)
        normed, rstd = load_normed(x2_ptr, statistics_ptr + 4 * n_rows, rows, columns, mask, n_rows, stride2)
        sum2 += grad * normed
        store_grad(grad_x2_ptr, grad, normed, rstd, weight2, at, mask, n_columns)
    at = partial_ptr + program * 4 * n_columns + columns
    tl.store(at, tl.sum(sum0, axis=0), mask=inside)
    tl.store(at + n_columns, tl.sum(sum1, axis=0), mask=inside)
    tl.store(at + 2 * n_columns, tl.sum(sum2, axis=0), mask=inside)
    tl.store(at + 3 * n_columns, tl.sum(sum3, axis=0), mask=inside)
