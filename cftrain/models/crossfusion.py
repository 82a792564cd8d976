"""CrossFusion: three magnifications of a slide, fused by cross-attention.

Reference: "CrossFusion", MIDL 2026, arXiv:2503.02064; follows the released code, RustinS/CrossFusion @
df5473d, where paper and code differ, except that attention dropout stops in evaluation.

    coarse, source, fine = LN(W x) of the 5x, 10x, 20x patches          [N5, E], [N10, E], [N20, E]
    CAB(s, c):  u = LN(s + MHA(s + e, c + e)),  u + FF(u)               [N10, E]   e learnt, one per block
    PT(x):      pad to g x g, blocks, PPEG, blocks, LN                  [g², E]    g = ceil(sqrt(N10))
    mixed  = CP(PT(source), PT(CAB(source, fine)), PT(CAB(source, coarse)))        [g², E]
    CP:         w · (three maps) + b, grouped 7/5/3/1 windows E → E/2, ReLU, channel dropout, LN(W ·)
    logits = C LN(class token of the final transformer over [token | mixed]) + c   [K]

The grid is the order of the 10x patches wrapped into a square, not their place on the slide. The input
projection is the identity, without LN, where the features are already E wide.

Legend: B slides, N5, N10, N20 patches of a slide, D features, E embed_dim, g side of the grid, K time bins.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cfkernels import grouped_window_conv, mix_layer_norms
from cftrain.models.attention_maps import attention_maps
from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.layers import (
    Attention,
    ClassTokenTransformer,
    FeedForward,
    LayerNorm,
    Lengths,
    PadTransformer,
    Window,
    square_grids,
)
from cftrain.models.patch_maps import PatchMap, on_patches
from cftrain.zoo import CrossFusionConfig

COARSE, SOURCE, FINE = 5, 10, 20


class _ThreeScales(SurvivalModel):
    """Coarse and fine brought to the source's grid by cross-attention; a fuser makes one map of the three."""

    def __init__(self, name: str, feature_dim: int, config: CrossFusionConfig) -> None:
        super().__init__(name, (COARSE, SOURCE, FINE), feature_dim, config)
        E = config.embed_dim
        self.coarse_projection = _input_projection(feature_dim, E)
        self.source_projection = _input_projection(feature_dim, E)
        self.fine_projection = _input_projection(feature_dim, E)
        self.coarse_cross_attention = CrossAttentionBlock(E, config.n_heads, config.dropout)
        self.fine_cross_attention = CrossAttentionBlock(E, config.n_heads, config.dropout)
        self.coarse_transformer = PadTransformer(config)
        self.source_transformer = PadTransformer(config)
        self.fine_transformer = PadTransformer(config)
        self.final_transformer = ClassTokenTransformer(config)
        self.head = nn.Linear(E, config.n_bins)

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]."""
        coarse = self.coarse_projection(self.rows(batch, COARSE))
        source = self.source_projection(self.rows(batch, SOURCE))
        fine = self.fine_projection(self.rows(batch, FINE))
        n = batch.lengths
        coarse = self.coarse_cross_attention(source, coarse, n[SOURCE], n[COARSE])
        fine = self.fine_cross_attention(source, fine, n[SOURCE], n[FINE])

        coarse = self.coarse_transformer(coarse, n[SOURCE])
        source = self.source_transformer(source, n[SOURCE])
        fine = self.fine_transformer(fine, n[SOURCE])
        grids = square_grids(n[SOURCE])
        norms = (self.source_transformer.norm, self.fine_transformer.norm, self.coarse_transformer.norm)
        fused = self.fuse((source, fine, coarse), norms, grids)
        logits_BK: Tensor = self.head(self.final_transformer(fused, grids))
        return logits_BK

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits; what 5x and 20x patches receive from 10x ones, and 10x ones from their likes and the class token.

        A patch's place in the fused grid also carries what PPEG and windows brought there from places around it.
        """
        last = len(self.final_transformer.post) - 1
        looks = {
            "coarse-cross": _Look(COARSE, "coarse_cross_attention"),
            "fine-cross": _Look(FINE, "fine_cross_attention"),
            "source": _Look(SOURCE, f"source_transformer.post.{last}"),
            "fused": _Look(SOURCE, f"final_transformer.post.{last}", class_tokens=1),
        }
        return _logits_and_maps(self, batch, looks)

    @abstractmethod
    def fuse(self, maps: tuple[Tensor, ...], norms: tuple[LayerNorm, ...], grids: Lengths) -> Tensor:
        """Make one map of (source, fine, coarse), each behind its norm: 3 x [sum g², E] to [sum g², E]."""


class CrossFusion(_ThreeScales):
    """Source patches (10x) attend to coarse (5x) and fine (20x) ones; a class token reads the fused grid."""

    def __init__(self, feature_dim: int, config: CrossFusionConfig) -> None:
        super().__init__("crossfusion", feature_dim, config)
        self.conv_processor = ConvProcessor(config.embed_dim, config.dropout, n_maps=3)
        self.apply(_initialise)

    def fuse(self, maps: tuple[Tensor, ...], norms: tuple[LayerNorm, ...], grids: Lengths) -> Tensor:
        """Fuse by the Conv Processor."""
        fused: Tensor = self.conv_processor(maps, norms, grids)
        return fused


class CrossFusionConcat(_ThreeScales):
    """The ablation "w/o CP": LN(W [source | fine | coarse]) in place of the Conv Processor."""

    def __init__(self, feature_dim: int, config: CrossFusionConfig) -> None:
        super().__init__("crossfusion-concat", feature_dim, config)
        self.concatenation = nn.Linear(3 * config.embed_dim, config.embed_dim)
        self.concatenation_norm = LayerNorm(config.embed_dim)
        self.apply(_initialise)

    def fuse(self, maps: tuple[Tensor, ...], norms: tuple[LayerNorm, ...], grids: Lengths) -> Tensor:
        """Fuse by concatenating channels."""
        normed = torch.cat([norm(x) for norm, x in zip(norms, maps, strict=True)], dim=1)
        fused: Tensor = self.concatenation_norm(self.concatenation(normed))
        return fused


class CrossFusionSingle(SurvivalModel):
    """The ablation "w/o F&C": 20x patches alone, through one Pad-Transformer and a Conv Processor of one map."""

    def __init__(self, feature_dim: int, config: CrossFusionConfig) -> None:
        super().__init__("crossfusion-single", (FINE,), feature_dim, config)
        self.source_projection = _input_projection(feature_dim, config.embed_dim)
        self.source_transformer = PadTransformer(config)
        self.conv_processor = ConvProcessor(config.embed_dim, config.dropout, n_maps=1)
        self.final_transformer = ClassTokenTransformer(config)
        self.head = nn.Linear(config.embed_dim, config.n_bins)
        self.apply(_initialise)

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]."""
        lengths = batch.lengths[FINE]
        source = self.source_transformer(self.source_projection(self.rows(batch, FINE)), lengths)
        grids = square_grids(lengths)
        fused = self.conv_processor((source,), (self.source_transformer.norm,), grids)
        logits_BK: Tensor = self.head(self.final_transformer(fused, grids))
        return logits_BK

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K], and what 20x patches receive from their likes, and from the class token."""
        last = len(self.final_transformer.post) - 1
        looks = {
            "source": _Look(FINE, f"source_transformer.post.{last}"),
            "fused": _Look(FINE, f"final_transformer.post.{last}", class_tokens=1),
        }
        return _logits_and_maps(self, batch, looks)


class _Look(NamedTuple):
    """An attention whose keys stand for patches."""

    scale: int
    """Whose."""
    place: str
    """Its name in `attention_maps`."""
    class_tokens: int = 0
    """How many keys before the patches are none."""


def _logits_and_maps(
    model: SurvivalModel, batch: BagBatch, looks: dict[str, _Look]
) -> tuple[Tensor, dict[str, PatchMap]]:
    """All of one forward pass."""
    places = {look.place for look in looks.values()}
    with model.evaluating(), torch.no_grad(), attention_maps(model, places=places) as maps:
        logits_BK = model.logits(batch)
    return logits_BK, {
        name: on_patches(maps[look.place], look.scale, batch.lengths[look.scale], class_tokens=look.class_tokens)
        for name, look in looks.items()
    }


def _input_projection(feature_dim: int, embed_dim: int) -> nn.Module:
    if feature_dim == embed_dim:
        return nn.Identity()
    return nn.Sequential(nn.Linear(feature_dim, embed_dim), LayerNorm(embed_dim))


class CrossAttentionBlock(nn.Module):
    """Cross-attention block (CAB): source [sum N10, E] attends to a context of another scale.

    The scale embedding e is added to source and context for the attention, not for the residual.
    """

    def __init__(self, embed_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.scale_embedding = nn.Parameter(torch.empty(embed_dim))
        self.attention = Attention(embed_dim, n_heads, dropout=0.0)
        self.norm = LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim, dropout)

    def forward(self, source: Tensor, context: Tensor, n_source: Lengths, n_context: Lengths) -> Tensor:
        attended = self.attention(source, context, n_source, n_context, shift=self.scale_embedding)
        u = self.norm(attended, source)
        out: Tensor = self.feed_forward(u, u)
        return out


class ConvProcessor(nn.Module):
    """Conv Processor (CP): maps mixed where there are several, then windows over the mix, to [sum g², E]."""

    def __init__(self, embed_dim: int, dropout: float, n_maps: int) -> None:
        super().__init__()
        half = embed_dim // 2
        self.dropout = dropout
        if n_maps > 1:
            self.mix_weight = nn.Parameter(torch.empty(n_maps))
            self.mix_bias = nn.Parameter(torch.empty(1))
        self.conv7, self.conv5, self.conv3, self.conv1 = (Window(half, 2, side) for side in (7, 5, 3, 1))
        self.linear = nn.Linear(half, embed_dim)
        self.norm = LayerNorm(embed_dim)

    def forward(self, maps: tuple[Tensor, ...], norms: tuple[LayerNorm, ...], grids: Lengths) -> Tensor:
        if len(maps) > 1:
            weights, biases = tuple(norm.weight for norm in norms), tuple(norm.bias for norm in norms)
            mixed = mix_layer_norms(maps, weights, biases, self.mix_weight, self.mix_bias, eps=norms[0].eps)
        else:
            mixed = norms[0](maps[0])
        c7, c5, c3, c1 = self.conv7, self.conv5, self.conv3, self.conv1
        windows = (c7.weight, c7.bias, c5.weight, c5.bias, c3.weight, c3.bias, c1.weight, c1.bias)
        x = grouped_window_conv(mixed, *windows, grid_sizes=grids, channel_scale=self._channel_scale(mixed, grids))
        out: Tensor = self.norm(self.linear(x))
        return out

    def _channel_scale(self, x: Tensor, grids: Lengths) -> Tensor | None:
        """Dropout of whole channels, drawn for each bag, in training: [B, E / 2] of 0 or 1 / (1 - p)."""
        if not self.training or self.dropout == 0:
            return None
        return functional.dropout(x.new_ones(len(grids), x.shape[1] // 2, dtype=torch.float32), self.dropout)


def _initialise(module: nn.Module) -> None:
    """The released initialisation: fan_out of a grouped convolution ignores its groups, as PyTorch does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Window):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(module.bias)
    elif isinstance(module, ConvProcessor) and hasattr(module, "mix_weight"):
        nn.init.normal_(module.mix_weight, std=math.sqrt(2))
        nn.init.zeros_(module.mix_bias)
    elif isinstance(module, CrossAttentionBlock):
        nn.init.trunc_normal_(module.scale_embedding, std=0.02)
    elif isinstance(module, ClassTokenTransformer):
        nn.init.normal_(module.class_token, std=1e-6)
