"""Cross-attention of a few prototypes over all patches of a slide, without keys or values of every patch.

For prototypes p and rows x of one slide, each of H heads for itself, LN without weights over the dh numbers of a head:

    a = softmax over N of LN(W_q p + b_q) · LN(W_k x_n + b_k) / √dh          [Q, N]
    p = p + LN(W_o (Σ_n a_n (W_v x_n + b_v)) + b_o)
    p = p + LN(MLP(p)),   MLP = Linear E to M, LN, GELU, Linear M to E

Values are folded, exactly: as a adds up to 1, Σ_n a_n (W_v x_n + b_v) = W_v (Σ_n a_n x_n) + b_v. Keys cannot be, for
their norm; they are made of `ROWS` rows at a time, and made again in the backward. What is kept is a, H Q N numbers:
13 MB for 8 prototypes, 3 heads and 137,990 patches in float32, where keys and values of width 768 are 848 MB.

Legend: B slides, N patches of a slide, T of all slides, Q prototypes of a slide, E width of a prototype, H heads,
dh = E / H, X width of the rows, M mlp_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

ROWS: Final = 16_384
"""Rows of a piece: keys of 48 MiB at width 768 in float32, which the C library gives back when they are freed; pieces
below 32 MiB stay with the process, in fragments, and a step rises far above what it holds."""


class PrototypeAttention(nn.Module):
    """One layer, MLP included: prototypes [B, Q, E] read the rows of their slide, B tensors [N_b, X]."""

    def __init__(self, embed_dim: int, rows_dim: int, mlp_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(rows_dim, embed_dim)
        self.value = nn.Linear(rows_dim, embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, mlp_dim), nn.LayerNorm(mlp_dim), nn.GELU(), nn.Linear(mlp_dim, embed_dim)
        )
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, p: Tensor, bags: Sequence[Tensor]) -> Tensor:
        """Map prototypes [B, Q, E] to [B, Q, E]."""
        return self.read(p, bags, self.weights(p, bags))

    def weights(self, p: Tensor, bags: Sequence[Tensor]) -> list[Tensor]:
        """What the patches of each slide receive from each prototype: B tensors [H, Q, N_b], in float32 at least."""
        q = self._normalised(self.query(p))
        return [self._scores(own, rows).softmax(dim=-1) for own, rows in zip(q, bags, strict=True)]

    def read(self, p: Tensor, bags: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The prototypes [B, Q, E] after a layer whose attention is `weights`."""
        means = torch.stack([own.flatten(0, 1) @ rows for own, rows in zip(weights, bags, strict=True)])
        means = means.view(len(p), self.n_heads, p.shape[1], -1)  # [B, H, Q, X]
        values = torch.einsum("bhqx,hex->bqhe", means, self.value.weight.view(self.n_heads, -1, means.shape[-1]))
        attended = self.out(values.flatten(2) + self.value.bias)
        p = p + self.attention_norm(self.dropout(attended))
        out: Tensor = p + self.mlp_norm(self.dropout(self.mlp(p)))
        return out

    def _scores(self, q: Tensor, rows: Tensor) -> Tensor:
        """[H, Q, N] of q [Q, H, dh] and rows [N, X]."""

        def scores(part: Tensor) -> Tensor:
            k = self._normalised(self.key(part))
            with torch.autocast(part.device.type, enabled=False):  # bfloat16 would blur the softmax
                return torch.einsum("qhd,nhd->hqn", q * q.shape[-1] ** -0.5, k)

        return in_pieces(scores, rows, dim=-1)

    def _normalised(self, x: Tensor) -> Tensor:
        """[..., E] to [..., H, dh]: LN without weights over the numbers of a head, in float32 at least."""
        heads = x.to(torch.promote_types(x.dtype, torch.float32)).view(*x.shape[:-1], self.n_heads, -1)
        return functional.layer_norm(heads, heads.shape[-1:])


def in_pieces(make: Callable[..., Tensor], *rows: Tensor, dim: int = 0, draws: bool = False) -> Tensor:
    """make(*rows), of `ROWS` rows at a time, and made again in the backward, so that nothing inside is kept.

    Parameters
    ----------
    make
        Looks at each row alone.
    rows
        One or more [N, ...].
    dim
        Where N is in the result.
    draws
        Whether `make` draws random numbers, such as dropout's; the backward then draws the same.
    """
    pieces = zip(*(torch.split(each, ROWS) for each in rows), strict=True)
    parts = [checkpoint(make, *piece, use_reentrant=False, preserve_rng_state=draws) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
