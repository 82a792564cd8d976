"""The layers of CrossFusion, on packed rows: attention, feed-forward, block, square pad, position encoding.

Legend: T rows of all bags together, N rows of one bag, E width, H heads, g side of a bag's square grid.
Everything row-wise runs on all bags at once; `lengths` and `grids` tell the bags apart where they matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cfkernels import (
    attention,
    attention_and_lse,
    attention_column_sums,
    dropout_add,
    gelu_dropout,
    layer_norm,
    ppeg,
)
from cftrain.zoo import CrossFusionConfig

Lengths = tuple[int, ...]
Recorder = Callable[[Tensor, Lengths, Lengths], None]
"""Takes the column sums of one attention, [H, T_k], and the rows of each bag in queries and keys."""


class Attention(nn.Module):
    """Multi-head attention within each bag, with projections: [T_q, E] and [T_k, E] to [T_q, E].

    Keys and values share one product. Attention dropout acts in training only (the released code drops in
    evaluation too, which makes its predictions random).
    """

    def __init__(self, embed_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.recorder: Recorder | None = None
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key_value = nn.Linear(embed_dim, 2 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        q_lengths: Lengths,
        kv_lengths: Lengths,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Attend from x to context, both as if `shift` [E] had been added to each of their rows."""
        q = _project(x, self.query, shift).view(len(x), self.n_heads, -1)
        k, v = _project(context, self.key_value, shift).view(len(context), 2, self.n_heads, -1).unbind(1)
        dropout_p = self.dropout if self.training else 0.0
        if self.recorder is None:
            y = attention(q, k, v, q_lengths=q_lengths, kv_lengths=kv_lengths, dropout_p=dropout_p)
        else:
            y, lse = attention_and_lse(q, k, v, q_lengths=q_lengths, kv_lengths=kv_lengths, dropout_p=dropout_p)
            self.recorder(
                attention_column_sums(q, k, lse, q_lengths=q_lengths, kv_lengths=kv_lengths), q_lengths, kv_lengths
            )
        out: Tensor = self.out(y.flatten(1))
        return out


def _project(x: Tensor, linear: nn.Linear, shift: Tensor | None) -> Tensor:
    """W (x + shift) + b, with W shift + b computed first: one row instead of T."""
    bias = linear.bias if shift is None else functional.linear(shift, linear.weight, linear.bias)
    return functional.linear(x, linear.weight, bias)


class LayerNorm(nn.LayerNorm):
    """LN(x + residual) of each row, in the dtype of x, under autocast too."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return layer_norm(x, self.weight, self.bias, residual=residual, eps=self.eps)


class FeedForward(nn.Module):
    """residual + FF(x), FF = Linear E to 2E, GELU (erf), dropout, Linear 2E to E, dropout: [T, E] to [T, E]."""

    def __init__(self, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(embed_dim, 2 * embed_dim)
        self.down = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        rate = self.dropout if self.training else 0.0
        hidden = gelu_dropout(self.up(x), dropout_p=rate)
        return dropout_add(self.down(hidden), residual, dropout_p=rate)


class Block(nn.Module):
    """A transformer block: attention, then feed-forward, each after a layer norm and with a residual.

    released:  y = LN(x),  z = LN(y + Attention(y)),  z + FF(z): the residual is the *normalised* value
    text:      y = x + Attention(LN(x)),  y + FF(LN(y)): it is the block's input
    """

    def __init__(self, config: CrossFusionConfig) -> None:
        super().__init__()
        E = config.embed_dim
        self.residual_is_normalised = config.variant == "released"
        self.attention_norm = LayerNorm(E)
        self.attention = Attention(E, config.n_heads, config.attention_dropout)
        self.feed_forward_norm = LayerNorm(E)
        self.feed_forward = FeedForward(E, config.dropout)

    def forward(self, x: Tensor, lengths: Lengths, *, first_only: bool = False) -> Tensor:
        """Map [T, E] to [T, E], or to the first row of each bag, [B, E], where nobody reads the others."""
        context = self.attention_norm(x)
        query, q_lengths = context, lengths
        if first_only:
            x, query, q_lengths = first_rows(x, lengths), first_rows(context, lengths), (1,) * len(lengths)
        attended = self.attention(query, context, q_lengths, lengths)
        if self.residual_is_normalised:
            z = self.feed_forward_norm(attended, query)
            out: Tensor = self.feed_forward(z, z)
        else:
            y = x + attended
            out = self.feed_forward(self.feed_forward_norm(y), y)
        return out


class Window(nn.Module):
    """The k x k kernels and biases of one grouped convolution, for the operators of cfkernels."""

    def __init__(self, channels: int, inputs: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, inputs, side, side))
        self.bias = nn.Parameter(torch.empty(channels))


class PPEG(nn.Module):
    """Pyramid position encoding: identity plus depth-wise 7x7, 5x5 and 3x3 windows on each g x g grid."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.conv7, self.conv5, self.conv3 = (Window(embed_dim, 1, side) for side in (7, 5, 3))

    def forward(self, x: Tensor, grids: Lengths, prefix: int = 0) -> Tensor:
        """[T, E] to [T, E]; the first `prefix` rows of each bag pass unchanged."""
        c7, c5, c3 = self.conv7, self.conv5, self.conv3
        windows = (c7.weight, c7.bias, c5.weight, c5.bias, c3.weight, c3.bias)
        return ppeg(x, *windows, grid_sizes=grids, prefix=prefix)


class GridTransformer(nn.Module):
    """Blocks, position encoding, blocks, layer norm: what both kinds of transformer are made of."""

    def __init__(self, config: CrossFusionConfig) -> None:
        super().__init__()
        self.pre = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ppeg = PPEG(config.embed_dim)
        self.post = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = LayerNorm(config.embed_dim)


class PadTransformer(GridTransformer):
    """Pad-Transformer (PT): each bag padded to a square, then encoded: [sum N_b, E] to [sum g_b², E].

    Its last layer norm is left to who reads the map: the Conv Processor applies three of them in one pass.
    """

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        grids = square_grids(lengths)
        squares = tuple(side * side for side in grids)
        x = square_pad(x, lengths)
        for block in self.pre:
            x = block(x, squares)
        x = self.ppeg(x, grids)
        for block in self.post:
            x = block(x, squares)
        return x


class ClassTokenTransformer(GridTransformer):
    """The final transformer: a class token before each square grid, read at the end: [sum g_b², E] to [B, E].

    The last block computes the class token's row only, an exact saving, unless `every_row` is set.
    """

    def __init__(self, config: CrossFusionConfig) -> None:
        super().__init__(config)
        self.class_token = nn.Parameter(torch.empty(config.embed_dim))
        self.every_row = False

    def forward(self, x: Tensor, grids: Lengths) -> Tensor:
        lengths = tuple(1 + side * side for side in grids)
        token = self.class_token.to(x.dtype).unsqueeze(0)
        grids_of_bags = torch.split(x, [side * side for side in grids])
        x = torch.cat([part for tokens in grids_of_bags for part in (token, tokens)])
        for block in self.pre:
            x = block(x, lengths)
        x = self.ppeg(x, grids, prefix=1)
        for block in self.post[:-1]:
            x = block(x, lengths)
        x = self.post[-1](x, lengths, first_only=not self.every_row)
        out: Tensor = self.norm(first_rows(x, lengths) if self.every_row else x)
        return out


def square_grids(lengths: Lengths) -> Lengths:
    """The side of the smallest square that holds each bag's N rows."""
    return tuple(math.isqrt(n - 1) + 1 for n in lengths)


def square_pad(x: Tensor, lengths: Lengths) -> Tensor:
    """Fill each bag up to a square with copies of its first rows: [sum N_b, E] to [sum g_b², E]."""
    pads = [side * side - n for side, n in zip(square_grids(lengths), lengths, strict=True)]
    if not any(pads):
        return x
    bags = zip(torch.split(x, list(lengths)), pads, strict=True)
    return torch.cat([part for rows, pad in bags for part in (rows, rows[:pad])])


def first_rows(x: Tensor, lengths: Lengths) -> Tensor:
    """The first row of each bag: [T, E] to [B, E]."""
    return torch.cat([rows[:1] for rows in torch.split(x, list(lengths))])
