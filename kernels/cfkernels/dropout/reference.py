"""The mask: its definition, and the bytes of many masks at once.

`keep_mask` is Philox as it is written, in NumPy on a CPU. `random_bytes` computes the same for several streams, in
PyTorch and so with all threads and on any device: blocked attention spends much of its time there. Its 32-bit words
live in int64 tensors whose upper halves are left dirty where nothing reads them, and what is no vector is computed
in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF

_CHUNK = 1 << 14
"""Words of one kind at a time: some tables of them fit a core's cache."""


# an op: one node of a compiled graph in place of a hundred
@torch.library.custom_op("cfkernels::keep_mask", mutates_args=())
def keep_mask(
    seed: Tensor, rows: Tensor, n_columns: int, threshold: int, *, stream: int = 0, rounds: int = 7
) -> Tensor:
    """Whether each element is kept: [R, n_columns] bool.

    Parameters
    ----------
    seed : [1] int64
    rows : [R] int64
        Row numbers, each below 2^32.
    n_columns
        Columns 0 to n_columns - 1.
    threshold
        Rate in 256ths.
    stream
        Tells masks of one seed apart, e.g. the heads of the bags.
    """
    if seed.device.type == "cpu":
        return _keep_mask_on_cpu(int(seed), rows.numpy(), n_columns, threshold, stream, rounds)
    streams = torch.tensor([stream], device=seed.device)
    return random_bytes(seed, rows, n_columns, streams, rounds=rounds)[0] >= threshold


def _keep_mask_on_cpu(
    seed: int, rows: NDArray[np.int64], n_columns: int, threshold: int, stream: int, rounds: int
) -> Tensor:
    """In NumPy, whose calls cost less than PyTorch's: masks of small bags are made of calls, not of work."""
    n_groups = (n_columns + 15) // 16
    kept = np.empty((len(rows), n_columns), np.bool_)
    size = max(1, _CHUNK // n_groups)
    for first in range(0, len(rows), size):
        some = slice(first, first + size)
        drawn = _philox(seed, rows[some].astype(np.uint64), n_groups, stream, rounds)
        np.greater_equal(drawn[:, :n_columns], threshold, out=kept[some])
    return torch.from_numpy(kept)


def _philox(seed: int, rows: NDArray[np.uint64], n_groups: int, stream: int, rounds: int) -> NDArray[np.uint8]:
    """[R, 16 * n_groups] bytes; words are vectors until what they depend on makes them tables."""
    word, half = np.uint64(_WORD), np.uint64(32)
    c0, c1 = np.arange(n_groups, dtype=np.uint64)[None, :], rows[:, None]
    c2, c3 = np.full((1, 1), stream, np.uint64), np.zeros((1, 1), np.uint64)
    for i in range(rounds):
        key_a, key_b = (np.uint64((part + i * step) & _WORD) for part, step in ((seed, _KEY_A), (seed >> 32, _KEY_B)))
        a, b = c0 * np.uint64(_MULTIPLIER_A), c2 * np.uint64(_MULTIPLIER_B)
        c0, c1, c2, c3 = (b >> half) ^ c1 ^ key_a, b & word, (a >> half) ^ c3 ^ key_b, a & word
    words = np.empty((len(rows), n_groups, 4), np.uint32)
    for i, values in enumerate((c0, c1, c2, c3)):
        words[..., i] = values
    return words.view(np.uint8).reshape(len(rows), -1)


@keep_mask.register_fake
def _fake(seed: Tensor, rows: Tensor, n_columns: int, threshold: int, *, stream: int = 0, rounds: int = 7) -> Tensor:
    return seed.new_empty((rows.shape[0], n_columns), dtype=torch.bool)


def random_bytes(
    seed: Tensor,
    rows: Tensor,
    n_columns: int,
    streams: Tensor,
    scratch: Tensor | None = None,
    *,
    rounds: int = 7,
) -> Tensor:
    """The bytes that decide: [S, R, n_columns] uint8, a view into the scratch.

    Parameters
    ----------
    seed, rows, n_columns
        As `keep_mask` takes them.
    streams : [S] int64
    scratch : int64
        Room for 7 words for each of S * R * ceil(n_columns / 16) groups; allocated where None.
    rounds
        3 or more.
    """
    groups = torch.arange((n_columns + 15) // 16, device=seed.device)
    shape = (len(streams), len(rows), len(groups))
    size = len(streams) * len(rows) * len(groups)
    if scratch is None:
        scratch = torch.empty(7 * size, dtype=torch.int64, device=seed.device)
    c0, c1, c2, c3, free = (scratch[i * size : (i + 1) * size].view(shape) for i in range(5))
    keys = _round_keys(seed, rounds)

    # two rounds by hand, while a word depends on one or two of stream, row and group
    first_a, first_b = groups * _MULTIPLIER_A, streams[:, None] * _MULTIPLIER_B
    by_row = ((first_b >> 32) ^ rows ^ keys[0][0]) & _WORD
    by_group = ((first_a >> 32) ^ keys[0][1]) & _WORD
    second_a, second_b = by_row * _MULTIPLIER_A, by_group * _MULTIPLIER_B
    by_both = ((second_b >> 32) ^ first_b ^ keys[1][0]) & _WORD
    torch.bitwise_xor((second_a >> 32)[:, :, None], (first_a ^ keys[1][1])[None, None, :], out=c2)

    # the third: what it multiplies of the even words depends on stream and group, of the odd ones on all three
    third_a = by_both * _MULTIPLIER_A
    c2.bitwise_and_(_WORD).mul_(_MULTIPLIER_B)
    torch.bitwise_right_shift(c2, 32, out=c0)
    c0.bitwise_xor_(second_b ^ keys[2][0]).bitwise_and_(_WORD)
    torch.bitwise_xor((third_a >> 32)[:, None, :], (second_a ^ keys[2][1])[:, :, None], out=c1)
    c1.bitwise_and_(_WORD)
    c3.copy_(third_a[:, None, :].expand(shape))
    c0, c1, c2, c3 = c0, c2, c1, c3

    for key_a, key_b in keys[3:]:
        c0.mul_(_MULTIPLIER_A)
        c2.mul_(_MULTIPLIER_B)
        torch.bitwise_right_shift(c2, 32, out=free)
        c1.bitwise_xor_(free).bitwise_xor_(key_a).bitwise_and_(_WORD)
        torch.bitwise_right_shift(c0, 32, out=free)
        c3.bitwise_xor_(free).bitwise_xor_(key_b).bitwise_and_(_WORD)
        c0, c1, c2, c3 = c1, c2, c3, c0
    pairs = scratch[5 * size : 7 * size].view(*shape, 2)
    pairs[..., 0].copy_(c0.bitwise_or_(c1.bitwise_left_shift_(32)))
    pairs[..., 1].copy_(c2.bitwise_or_(c3.bitwise_left_shift_(32)))
    return pairs.view(torch.uint8).flatten(2)[..., :n_columns]


def _round_keys(seed: Tensor, rounds: int) -> Sequence[tuple[Tensor, Tensor]]:
    low, high = seed & _WORD, (seed >> 32) & _WORD
    return [((low + i * _KEY_A) & _WORD, (high + i * _KEY_B) & _WORD) for i in range(rounds)]
