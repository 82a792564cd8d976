"""The mask in plain PyTorch: 32-bit words in int64 tensors, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


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
    groups = torch.arange((n_columns + 15) // 16, device=seed.device)
    # [R, 1] and [1, G]: the first two rounds stay vectors where their words depend on one side only
    words = (
        groups[None, :],
        rows[:, None],
        torch.tensor([[stream]], device=seed.device),
        torch.zeros_like(groups[:1, None]),
    )
    c0, c1, c2, c3 = words
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        a, b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0, c2 = (((b >> 32) ^ c1 ^ k0) & _WORD), (((a >> 32) ^ c3 ^ k1) & _WORD)
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    low, high = c0 | (c1 << 32), c2 | (c3 << 32)
    quarters = torch.stack((low, high), dim=-1).view(torch.uint8)
    return quarters.flatten(1)[:, :n_columns] >= threshold
