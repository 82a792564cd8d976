"""Ragged attention in Triton, forward and backward. One program: a tile of one bag's rows, for one head.

Flash attention (Dao 2023, arXiv 2307.08691) with base-2 exponentials and the scale folded into them. `tiles` names a
bag and a first row for each program; `q_offsets` and `kv_offsets` say where bags begin. Tiles are BM query rows x BN
keys x D columns, DH of which exist. Where SPLIT, whole tiles are computed without masks and the last with them:
on 9.0, ptxas otherwise lets every matrix product wait for the one before; elsewhere such a second copy of the loop's
body makes registers spill.

The dropout mask of (query row, key) within a bag is made again in each kernel; its stream is bag * heads + head.
Nothing is added atomically: results have the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cfkernels.dropout.kernel import keep_block


@triton.jit
def rows_at(base, rows, stride, n, DH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows as [R, D]: zeros beyond the DH columns and, where MASKED, beyond row n."""
    d = tl.arange(0, D)
    at = base + rows[:, None] * stride + d[None, :]
    if MASKED:
        if D == DH:
            return tl.load(at, mask=rows[:, None] < n, other=0.0)
        return tl.load(at, mask=(rows[:, None] < n) & (d[None, :] < DH), other=0.0)
    if D == DH:
        return tl.load(at)
    return tl.load(at, mask=d[None, :] < DH, other=0.0)


@triton.jit
def columns_at(base, rows, stride, n, DH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """As `rows_at`, transposed: [D, R]."""
    d = tl.arange(0, D)
    at = base + rows[None, :] * stride + d[:, None]
    if MASKED:
        if D == DH:
            return tl.load(at, mask=rows[None, :] < n, other=0.0)
        return tl.load(at, mask=(rows[None, :] < n) & (d[:, None] < DH), other=0.0)
    if D == DH:
        return tl.load(at)
    return tl.load(at, mask=d[:, None] < DH, other=0.0)


@triton.jit
def store_rows(base, rows, stride, n, x, DH: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    mask = rows[:, None] < n
    if D != DH:
        mask = mask & (d[None, :] < DH)
    tl.store(base + rows[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q, top, total, acc, k_base, v_base, j, m, k_row, v_row, scale, seed, rows, stream,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BN)
    k = columns_at(k_base, columns, k_row, m - j, DH, D, MASKED)
    s = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        s = tl.where(columns[None, :] < m - j, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.math.exp2(s * scale - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    if THRESHOLD > 0:
        kept = keep_block(seed, rows, j // 16 + tl.arange(0, BN // 16), stream, THRESHOLD, BM, BN)
        p = tl.where(kept, p, 0.0)
    v = rows_at(v_base, columns, v_row, m - j, DH, D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["n_queries"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr, tiles_ptr, q_offsets_ptr, kv_offsets_ptr,
    n_queries, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scale, rescale,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """scale is log2(e) / sqrt(dh); rescale is what kept probabilities are multiplied with."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bag, first = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    q_start, k_start = tl.load(q_offsets_ptr + bag).to(tl.int64), tl.load(kv_offsets_ptr + bag).to(tl.int64)
    n = (tl.load(q_offsets_ptr + bag + 1) - q_start - first).to(tl.int32)
    m = (tl.load(kv_offsets_ptr + bag + 1) - k_start).to(tl.int32)
    wide = tl.full([], 1, tl.int64)
    here = tl.arange(0, BM)
    rows = first + here
    stream = bag * tl.num_programs(1) + tl.program_id(1)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0

    q = rows_at(q_ptr + (q_start + first) * q_row + head * q_head, here, q_row, n, DH, D, True)
    k_base, v_base = k_ptr + k_start * k_row + head * k_head, v_ptr + k_start * v_row + head * v_head
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    if SPLIT:
        whole = m // BN * BN
        for j in range(0, whole, BN):
            top, total, acc = _attend(
                q, top, total, acc, k_base + wide * j * k_row, v_base + wide * j * v_row, j, m, k_row, v_row, scale,
                seed, rows, stream, DH, D, BM, BN, THRESHOLD, PRECISION, False,
            )  # fmt: skip
        if whole < m:
            top, total, acc = _attend(
                q, top, total, acc, k_base + wide * whole * k_row, v_base + wide * whole * v_row, whole, m, k_row,
                v_row, scale, seed, rows, stream, DH, D, BM, BN, THRESHOLD, PRECISION, True,
            )  # fmt: skip
    else:
        for j in range(0, m, BN):
            top, total, acc = _attend(
                q, top, total, acc, k_base + wide * j * k_row, v_base + wide * j * v_row, j, m, k_row, v_row, scale,
                seed, rows, stream, DH, D, BM, BN, THRESHOLD, PRECISION, True,
            )  # fmt: skip
    out = acc * (rescale / total)[:, None]
    store_rows(out_ptr + (q_start + first) * out_row + head * out_head, here, out_row, n, out, DH, D)
    lse = (top + tl.math.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + head * n_queries + q_start + first + here, lse, mask=here < n)


@triton.jit(do_not_specialize=["n_queries"])
def attention_delta_kernel(
    out_ptr, grad_ptr, delta_ptr, n_queries, row, head_stride,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * gradient) of each row and head; both are contiguous."""
    first, head = tl.program_id(0).to(tl.int64) * BM, tl.program_id(1).to(tl.int64)
    here = tl.arange(0, BM)
    n = n_queries - tl.program_id(0) * BM
    base = first * row + head * head_stride
    out = rows_at(out_ptr + base, here, row, n, DH, D, True).to(tl.float32)
    grad = rows_at(grad_ptr + base, here, row, n, DH, D, True).to(tl.float32)
    tl.store(delta_ptr + head * n_queries + first + here, tl.sum(out * grad, 1), mask=here < n)


@triton.jit
def _to_keys(
    grad_k, grad_v, k, v, q_base, grad_base, lse_base, delta_base, i, n, q_row, grad_row, scale, rescale,
    seed, first_group, stream,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    here = tl.arange(0, BM)
    q = columns_at(q_base, here, q_row, n - i, DH, D, MASKED)
    if MASKED:  # exp2(-inf) = 0 for rows that are not there
        lse = tl.load(lse_base + here, mask=here < n - i, other=float("inf"))
        delta = tl.load(delta_base + here, mask=here < n - i, other=0.0)
    else:
        lse, delta = tl.load(lse_base + here), tl.load(delta_base + here)
    s = tl.dot(k, q, input_precision=PRECISION)
    p = tl.math.exp2(s * scale - (lse * 1.4426950408889634)[None, :])
    grad = rows_at(grad_base, here, grad_row, n - i, DH, D, MASKED)
    grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    dropped = p
    if THRESHOLD > 0:
        groups = first_group + tl.arange(0, BN // 16)
        kept = tl.trans(keep_block(seed, i + here, groups, stream, THRESHOLD, BM, BN))
        dropped = tl.where(kept, p, 0.0)
        grad_p = tl.where(kept, grad_p * rescale, 0.0)
    grad_v = tl.dot(dropped.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_s = p * (grad_p - delta[None, :])
    grad_k = tl.dot(grad_s.to(q.dtype), tl.trans(q), grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["n_queries"])
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, seed_ptr,
    tiles_ptr, q_offsets_ptr, kv_offsets_ptr,
    n_queries, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scale, rescale, root,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of BN keys meets all queries of its bag; scores are transposed, [BN, BM]. root is 1 / sqrt(dh)."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bag, first = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    q_start, k_start = tl.load(q_offsets_ptr + bag).to(tl.int64), tl.load(kv_offsets_ptr + bag).to(tl.int64)
    n = (tl.load(q_offsets_ptr + bag + 1) - q_start).to(tl.int32)
    m = (tl.load(kv_offsets_ptr + bag + 1) - k_start - first).to(tl.int32)
    wide = tl.full([], 1, tl.int64)
    here = tl.arange(0, BN)
    stream = bag * tl.num_programs(1) + tl.program_id(1)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0

    k = rows_at(k_ptr + (k_start + first) * k_row + head * k_head, here, k_row, m, DH, D, True)
    v = rows_at(v_ptr + (k_start + first) * v_row + head * v_head, here, v_row, m, DH, D, True)
    q_base, grad_base = q_ptr + q_start * q_row + head * q_head, grad_ptr + q_start * out_row + head * out_head
    lse_base, delta_base = lse_ptr + head * n_queries + q_start, delta_ptr + head * n_queries + q_start
    grad_k = tl.zeros([BN, D], tl.float32)
    grad_v = tl.zeros([BN, D], tl.float32)
    if SPLIT:
        whole = n // BM * BM
        for i in range(0, whole, BM):
            grad_k, grad_v = _to_keys(
                grad_k, grad_v, k, v, q_base + wide * i * q_row, grad_base + wide * i * out_row, lse_base + i,
                delta_base + i, i, n, q_row, out_row, scale, rescale, seed, first // 16, stream,
                DH, D, BM, BN, THRESHOLD, PRECISION, False,
            )  # fmt: skip
        if whole < n:
            grad_k, grad_v = _to_keys(
                grad_k, grad_v, k, v, q_base + wide * whole * q_row, grad_base + wide * whole * out_row,
                lse_base + whole, delta_base + whole, whole, n, q_row, out_row, scale, rescale, seed, first // 16,
                stream, DH, D, BM, BN, THRESHOLD, PRECISION, True,
            )  # fmt: skip
    else:
        for i in range(0, n, BM):
            grad_k, grad_v = _to_keys(
                grad_k, grad_v, k, v, q_base + wide * i * q_row, grad_base + wide * i * out_row, lse_base + i,
                delta_base + i, i, n, q_row, out_row, scale, rescale, seed, first // 16, stream,
                DH, D, BM, BN, THRESHOLD, PRECISION, True,
            )  # fmt: skip
    base = (k_start + first) * out_row + head * out_head
    store_rows(grad_k_ptr + base, here, out_row, m, grad_k * root, DH, D)
    store_rows(grad_v_ptr + base, here, out_row, m, grad_v * rescale, DH, D)


@triton.jit
def _to_queries(
    grad_q, q, grad, lse, delta, k_base, v_base, j, m, k_row, v_row, scale, rescale, seed, rows, stream,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BN)
    k = columns_at(k_base, columns, k_row, m - j, DH, D, MASKED)
    v = columns_at(v_base, columns, v_row, m - j, DH, D, MASKED)
    s = tl.dot(q, k, input_precision=PRECISION)
    # keys that are not there: exp2(-lse) may be infinite, and would meet their zeros
    p = tl.math.exp2(s * scale - lse[:, None])
    if MASKED:
        p = tl.where(columns[None, :] < m - j, p, 0.0)
    grad_p = tl.dot(grad, v, input_precision=PRECISION)
    if THRESHOLD > 0:
        kept = keep_block(seed, rows, j // 16 + tl.arange(0, BN // 16), stream, THRESHOLD, BM, BN)
        grad_p = tl.where(kept, grad_p * rescale, 0.0)
    grad_s = p * (grad_p - delta[:, None])
    return tl.dot(grad_s.to(k.dtype), tl.trans(k), grad_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n_queries"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_q_ptr, seed_ptr,
    tiles_ptr, q_offsets_ptr, kv_offsets_ptr,
    n_queries, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scale, rescale, root,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of BM queries meets all keys of its bag."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bag, first = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    q_start, k_start = tl.load(q_offsets_ptr + bag).to(tl.int64), tl.load(kv_offsets_ptr + bag).to(tl.int64)
    n = (tl.load(q_offsets_ptr + bag + 1) - q_start - first).to(tl.int32)
    m = (tl.load(kv_offsets_ptr + bag + 1) - k_start).to(tl.int32)
    wide = tl.full([], 1, tl.int64)
    here = tl.arange(0, BM)
    rows = first + here
    stream = bag * tl.num_programs(1) + tl.program_id(1)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0

    base = (q_start + first) * out_row + head * out_head
    q = rows_at(q_ptr + (q_start + first) * q_row + head * q_head, here, q_row, n, DH, D, True)
    grad = rows_at(grad_ptr + base, here, out_row, n, DH, D, True)
    at = head * n_queries + q_start + first + here
    lse = tl.load(lse_ptr + at, mask=here < n, other=float("inf")) * 1.4426950408889634
    delta = tl.load(delta_ptr + at, mask=here < n, other=0.0)
    k_base, v_base = k_ptr + k_start * k_row + head * k_head, v_ptr + k_start * v_row + head * v_head
    grad_q = tl.zeros([BM, D], tl.float32)
    if SPLIT:
        whole = m // BN * BN
        for j in range(0, whole, BN):
            grad_q = _to_queries(
                grad_q, q, grad, lse, delta, k_base + wide * j * k_row, v_base + wide * j * v_row, j, m, k_row, v_row,
                scale, rescale, seed, rows, stream, DH, D, BM, BN, THRESHOLD, PRECISION, False,
            )  # fmt: skip
        if whole < m:
            grad_q = _to_queries(
                grad_q, q, grad, lse, delta, k_base + wide * whole * k_row, v_base + wide * whole * v_row, whole, m,
                k_row, v_row, scale, rescale, seed, rows, stream, DH, D, BM, BN, THRESHOLD, PRECISION, True,
            )  # fmt: skip
    else:
        for j in range(0, m, BN):
            grad_q = _to_queries(
                grad_q, q, grad, lse, delta, k_base + wide * j * k_row, v_base + wide * j * v_row, j, m, k_row, v_row,
                scale, rescale, seed, rows, stream, DH, D, BM, BN, THRESHOLD, PRECISION, True,
            )  # fmt: skip
    store_rows(grad_q_ptr + base, here, out_row, n, grad_q * root, DH, D)
