"""`PatchMap`: how much attention each patch of a slide receives. B slides, N_b patches of slide b, H heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class PatchMap(NamedTuple):
    """One map of B slides. A slide's scores, and what is elsewhere, add up to 1 but for rounding."""

    scale: int
    """Whose patches."""
    scores: tuple[Tensor, ...]
    """Per slide [N_b] float64 on the CPU, in the stored order of the patches: the share that each receives."""
    elsewhere: tuple[float, ...]
    """Per slide: the share that no patch receives, such as a class token's own, or that of padding with zeros."""


def on_patches(received: Sequence[Tensor], scale: int, lengths: Sequence[int], *, class_tokens: int = 0) -> PatchMap:
    """Bring what the keys of an attention receive to the patches that they stand for.

    A bag may be padded to a square with copies of its first patches, stored behind them. What a copy receives belongs
    to the patch it copies, so it is added there: the first g² - N patches count twice because the model sees them
    twice.

    Parameters
    ----------
    received
        B tensors [H, M_b], each row adding up to 1: class tokens first, then N_b patches, then at most N_b copies of
        the first of them.
    scale
        Whose patches.
    lengths
        N_b.
    class_tokens
        How many keys before the patches are none.
    """
    shares = [each.double().mean(dim=0).cpu() for each in received]
    scores = tuple(_folded(share[class_tokens:], n) for share, n in zip(shares, lengths, strict=True))
    return PatchMap(scale, scores, tuple(float(share[:class_tokens].sum()) for share in shares))


def _folded(share: Tensor, n: int) -> Tensor:
    scores = share[:n].clone()
    scores[: len(share) - n] += share[n:]
    return scores
