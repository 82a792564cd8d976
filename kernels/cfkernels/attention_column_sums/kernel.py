"""Column sums of attention in Triton. One program: BN keys of one bag and head, for one share of its queries.

Scores are transposed, [BN keys, BM queries], and added as they are; one sum over the queries ends the program.
Where SPLIT, whole tiles of queries are computed without masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cfkernels.attention.kernel import columns_at, rows_at


@triton.jit
def _add(
    acc, k, q_base, lse_base, i, n, q_row, scale,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    here = tl.arange(0, BM)
    q = columns_at(q_base, here, q_row, n - i, DH, D, MASKED)
    # exp2(-inf) = 0 for rows that are not there
    lse = tl.load(lse_base + here, mask=here < n - i, other=float("inf"))
    s = tl.dot(k, q, input_precision=PRECISION)
    return acc + tl.math.exp2(s * scale - (lse * 1.4426950408889634)[None, :])


@triton.jit(do_not_specialize=["n_queries", "n_keys"])
def attention_column_sums_kernel(
    q_ptr, k_ptr, lse_ptr, sums_ptr, tiles_ptr, q_offsets_ptr, kv_offsets_ptr,
    n_queries, n_keys, q_row, q_head, k_row, k_head, scale,
    DH: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """sums is [shares, heads, n_keys]; scale is log2(e) / sqrt(dh)."""
    tile, head, share = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    bag, first = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    q_start, k_start = tl.load(q_offsets_ptr + bag).to(tl.int64), tl.load(kv_offsets_ptr + bag).to(tl.int64)
    n = (tl.load(q_offsets_ptr + bag + 1) - q_start).to(tl.int32)
    m = (tl.load(kv_offsets_ptr + bag + 1) - k_start - first).to(tl.int32)
    wide = tl.full([], 1, tl.int64)
    here = tl.arange(0, BN)

    per_share = tl.cdiv(tl.cdiv(n, tl.num_programs(2)), BM) * BM
    low = tl.minimum(tl.program_id(2) * per_share, n)
    high = tl.minimum(low + per_share, n)
    k = rows_at(k_ptr + (k_start + first) * k_row + head * k_head, here, k_row, m, DH, D, True)
    q_base, lse_base = q_ptr + q_start * q_row + head * q_head, lse_ptr + head * n_queries + q_start
    acc = tl.zeros([BN, BM], tl.float32)
    whole = low + (high - low) // BM * BM if SPLIT else low
    if SPLIT:
        for i in range(low, whole, BM):
            acc = _add(acc, k, q_base + wide * i * q_row, lse_base + i, i, n, q_row, scale, DH, D, BM, PRECISION, False)
    for i in range(whole, high, BM):
        acc = _add(acc, k, q_base + wide * i * q_row, lse_base + i, i, n, q_row, scale, DH, D, BM, PRECISION, True)
    at = (share * tl.num_programs(1) + head) * n_keys + k_start + first + here
    tl.store(sums_ptr + at, tl.sum(acc, 1), mask=here < m)
