"""CrossFusion as one would write it in plain PyTorch: one slide at a time, NCHW convolutions, PyTorch's attention.

The yardstick of `train_step.py`, and the oracle of tests: its parameters have the names of the released code's
state dict (RustinS/CrossFusion @ df5473d, arXiv:2503.02064), so released weights load as they are. It shares no code
with `cftrain.models`. Attention dropout acts in training only, everything else is as released.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["CrossFusion", "CrossFusionConcat", "CrossFusionSingle"]


class Attention(nn.Module):
    """Multi-head attention from x [N, E] to context [M, E]."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def by_head(rows: Tensor) -> Tensor:
            return rows.view(1, len(rows), self.heads, -1).transpose(1, 2)

        q, k, v = by_head(self.q_proj(x)), by_head(self.k_proj(context)), by_head(self.v_proj(context))
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.out_proj(y.transpose(1, 2).reshape(len(x), -1))
        return out


class CrossAttention(Attention):
    """Attention after a learnt vector was added to both sides."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, 0.0)
        self.scale_embeddings = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        e = self.scale_embeddings[0]
        return super().forward(x + e, context + e)


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear, dropout."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Layers(nn.Module):
    """Transformer blocks whose residual is the normalised value."""

    def __init__(self, dim: int, heads: int, depth: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(dim), Attention(dim, heads, attention_dropout), nn.LayerNorm(dim),
                           FeedForward(dim, dropout)])
            for _ in range(depth)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for norm1, attention, norm2, feed_forward in self.layers:  # type: ignore[misc]
            x = norm1(x)
            x = x + attention(x, x)
            x = norm2(x)
            x = x + feed_forward(x)
        return x


class PPEG(nn.Module):
    """Three depth-wise convolutions beside the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.proj1 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor) -> Tensor:
        image = to_image(tokens)
        return to_tokens(self.proj(image) + image + self.proj1(image) + self.proj2(image))


class Transformer(nn.Module):
    """Blocks, position encoding around a class token where there is one, blocks."""

    def __init__(self, dim: int, heads: int, depth: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.pre_layers = Layers(dim, heads, depth, dropout, attention_dropout)
        self.ppeg = PPEG(dim)
        self.post_layers = Layers(dim, heads, depth, dropout, attention_dropout)

    def forward(self, x: Tensor, *, class_token: bool = False) -> Tensor:
        x = self.pre_layers(x)
        first = int(class_token)
        x = torch.cat([x[:first], self.ppeg(x[first:])])
        y: Tensor = self.post_layers(x)
        return y


class ConvBlock(nn.Module):
    """Grouped convolutions of four sizes, two channels to one, summed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.proj = nn.Conv2d(dim, half, 7, padding=3, groups=half)
        self.proj1 = nn.Conv2d(dim, half, 5, padding=2, groups=half)
        self.proj2 = nn.Conv2d(dim, half, 3, padding=1, groups=half)
        self.x_proj = nn.Conv2d(dim, half, 1, groups=half)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.proj(image) + self.x_proj(image) + self.proj1(image) + self.proj2(image)
        return y


class ConvProcessor(nn.Module):
    """Mix of the maps (where there are several), grouped convolutions, ReLU, channel dropout, linear, norm."""

    def __init__(self, dim: int, dropout: float, maps: int) -> None:
        super().__init__()
        if maps > 1:
            self.conv3d = nn.Conv3d(maps, 1, 1)
        self.conv_block = nn.Sequential(ConvBlock(dim), nn.ReLU(), nn.Dropout2d(dropout))
        self.linear = nn.Sequential(nn.Linear(dim // 2, dim), nn.LayerNorm(dim))

    def forward(self, *maps: Tensor) -> Tensor:
        images = torch.stack([to_image(tokens)[0] for tokens in maps]).unsqueeze(0)
        image = self.conv3d(images)[0] if len(maps) > 1 else images[0]
        y: Tensor = self.linear(to_tokens(self.conv_block(image)))
        return y


class PlainCrossFusion(nn.Module):
    """The released model or one of its two ablations, for one slide: x5 [N5, D], x10, x20 to logits [C]."""

    def __init__(
        self,
        kind: Kind = "CrossFusion",
        *,
        embed_dim: int = 512,
        heads: int = 4,
        layers: int = 1,
        backbone_dim: int = 1024,
        dropout: float = 0.3,
        attention_dropout: float = 0.2,
        n_classes: int = 4,
    ) -> None:
        super().__init__()
        self.kind, E = kind, embed_dim
        sizes = (E, heads, layers, dropout, attention_dropout)
        names = _NAMES[kind]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, E))
        for scale in names.scales:
            self.add_module(names.projection.format(scale), projection(backbone_dim, E))
            self.add_module(names.transformer.format(scale), Transformer(*sizes))
            self.add_module(names.norm.format(scale), nn.LayerNorm(E))
        for scale in names.contexts:
            self.add_module(names.cross.format(scale), CrossAttention(E, heads))
            self.add_module(names.cross.format(scale) + "_ln", nn.LayerNorm(E))
            self.add_module(names.cross.format(scale) + "_ffn", FeedForward(E, dropout))
        if kind == "CrossFusionConcat":
            self.pre_final_linear = nn.Sequential(nn.Linear(3 * E, E), nn.LayerNorm(E))
        else:
            self.conv_processor = ConvProcessor(E, dropout, len(names.scales))
        self.final_transformer = Transformer(*sizes)
        self.final_ln = nn.LayerNorm(E)
        self.mlp_head = nn.Sequential(nn.Linear(E, n_classes))

    def forward(self, x5: Tensor, x10: Tensor, x20: Tensor) -> Tensor:
        names = _NAMES[self.kind]
        coarse, source, fine = names.coarse, names.source, names.fine
        if self.kind == "CrossFusionSingle":
            fused = self.conv_processor(self._padded(source, self._project(source, x20)))
        else:
            s = self._project(source, x10)
            c = self._padded(coarse, self._cross(coarse, s, self._project(coarse, x5)))
            f = self._padded(fine, self._cross(fine, s, self._project(fine, x20)))
            s = self._padded(source, s)
            concat = self.kind == "CrossFusionConcat"
            fused = self.pre_final_linear(torch.cat([s, f, c], dim=1)) if concat else self.conv_processor(s, f, c)
        x = self.final_transformer(torch.cat([self.cls_token[0], fused]), class_token=True)
        logits: Tensor = self.mlp_head(self.final_ln(x)[0])
        return logits

    def _project(self, scale: str, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(_NAMES[self.kind].projection.format(scale))(x)
        return y

    def _cross(self, scale: str, s: Tensor, context: Tensor) -> Tensor:
        name = _NAMES[self.kind].cross.format(scale)
        u = self.get_submodule(name + "_ln")(s + self.get_submodule(name)(s, context))
        y: Tensor = u + self.get_submodule(name + "_ffn")(u)
        return y

    def _padded(self, scale: str, x: Tensor) -> Tensor:
        names = _NAMES[self.kind]
        side = math.isqrt(len(x) - 1) + 1
        x = torch.cat([x, x[: side * side - len(x)]])
        x = self.get_submodule(names.transformer.format(scale))(x)
        y: Tensor = self.get_submodule(names.norm.format(scale))(x)
        return y


class _Names:
    """How one released class calls its parts."""

    def __init__(self, projection: str, transformer: str, norm: str, cross: str, scales: tuple[str, ...]) -> None:
        self.projection, self.transformer, self.norm, self.cross = projection, transformer, norm, cross
        self.scales = scales
        self.coarse, self.source, self.fine = scales if len(scales) == 3 else ("", scales[0], "")
        self.contexts = (self.fine, self.coarse) if len(scales) == 3 else ()


_LONG = ("{}_pre_cross_attn", "{}_transformer", "{}_ln", "{}_cross_attn")
_NAMES: dict[str, _Names] = {
    "CrossFusion": _Names("{}_lin_proj", "{}_transformer", "{}_transformer_ln", "{}_cross_attn", ("c", "s", "f")),
    "CrossFusionConcat": _Names(*_LONG, ("coarse", "source", "fine")),
    "CrossFusionSingle": _Names(*_LONG, ("source",)),
}


def projection(feature_dim: int, embed_dim: int) -> nn.Module:
    """Linear and norm; nothing where the features already have the model's width."""
    if feature_dim == embed_dim:
        return nn.Identity()
    return nn.Sequential(nn.Linear(feature_dim, embed_dim), nn.LayerNorm(embed_dim))


def to_image(tokens: Tensor) -> Tensor:
    """[g * g, C] tokens, row-major, to a [1, C, g, g] image."""
    side = math.isqrt(len(tokens))
    return tokens.T.reshape(1, -1, side, side)


def to_tokens(image: Tensor) -> Tensor:
    """[1, C, g, g] to [g * g, C]."""
    return image.flatten(2)[0].T
