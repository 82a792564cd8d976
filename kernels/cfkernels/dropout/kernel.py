"""The mask inside a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_block(seed, rows, groups, stream, THRESHOLD: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Whether each element of a tile is kept: [R, C] bool.

    rows [R] are row numbers, groups [C / 16] are column numbers // 16; seed is int64, stream any integer.
    """
    c0 = (groups[None, :] + rows[:, None] * 0).to(tl.uint32)
    c1 = (rows[:, None] + groups[None, :] * 0).to(tl.uint32)
    zero = c0 * 0
    c2 = (zero + stream).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, zero, 7)
    # join adds a last axis of two: joining crosswise makes the flattened order w0, w1, w2, w3
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, C // 16, 4))
    even = tl.join(words & 0xFF, (words >> 16) & 0xFF)
    odd = tl.join((words >> 8) & 0xFF, words >> 24)
    return tl.reshape(tl.join(even, odd), (R, C)) >= THRESHOLD
