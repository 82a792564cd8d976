"""CrossFusion and its ablations: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.errors import ConfigError
from cftrain.zoo.options import ModelInfo, Options, check_positive, check_rate

VARIANTS = ("released", "text")


@dataclass(frozen=True)
class CrossFusionConfig(Options):
    """Options of CrossFusion and its ablations; the defaults are the published settings."""

    embed_dim: int = 512
    """Width of every token, a multiple of n_heads and of 2."""
    n_heads: int = 4
    """Attention heads."""
    n_layers: int = 1
    """Blocks before, and as many after, each position encoding."""
    dropout: float = 0.3
    """In the feed-forward layers, and of whole channels in the Conv Processor."""
    attention_dropout: float = 0.2
    """Of self-attention probabilities, in training only. Cross-attention has none."""
    variant: str = "released"
    """released: residuals carry the normalised value, as the authors' code does; text: the block's input, as
    the paper writes."""

    def __post_init__(self) -> None:
        check_positive(self, "embed_dim", "n_heads", "n_layers", "n_bins")
        check_rate(self, "dropout", "attention_dropout")
        if self.embed_dim % self.n_heads or self.embed_dim % 2:
            found = f"embed_dim={self.embed_dim}, n_heads={self.n_heads}"
            raise ConfigError(f"crossfusion: embed_dim must be a multiple of n_heads and of 2, got {found}")
        if self.variant not in VARIANTS:
            raise ConfigError(f"crossfusion: variant must be {' or '.join(VARIANTS)}, got {self.variant!r}")


_SOURCE_MAP = (
    "Attention that a {} patch receives in the last block of the source Pad-Transformer, mean over queries and heads."
)
_FUSED_MAP = (
    "Attention that a {} patch's place receives from the class token in the last block of the final transformer, mean "
    "over heads."
)
_CROSS_MAP = "Attention that a {} patch receives from the 10x patches in cross-attention, mean over queries and heads."
_THREE_SCALE_MAPS = {
    "coarse-cross": _CROSS_MAP.format("5x"),
    "fine-cross": _CROSS_MAP.format("20x"),
    "source": _SOURCE_MAP.format("10x"),
    "fused": _FUSED_MAP.format("10x"),
}

CROSSFUSION = ModelInfo(
    name="crossfusion",
    scales=(5, 10, 20),
    reference="CrossFusion, MIDL 2026, arXiv:2503.02064; RustinS/CrossFusion @ df5473d",
    summary="Three scales; 10x patches attend to 5x and 20x, then transformers and convolutions.",
    options=CrossFusionConfig,
    maps=_THREE_SCALE_MAPS,
)

CONCAT = ModelInfo(
    name="crossfusion-concat",
    scales=(5, 10, 20),
    reference="CrossFusion, ablation w/o CP; CrossFusionConcat of RustinS/CrossFusion @ df5473d",
    summary="Ablation: the three maps concatenated in place of the Conv Processor.",
    options=CrossFusionConfig,
    maps=_THREE_SCALE_MAPS,
)

SINGLE = ModelInfo(
    name="crossfusion-single",
    scales=(20,),
    reference="CrossFusion, ablation w/o F&C; CrossFusionSingle of RustinS/CrossFusion @ df5473d",
    summary="Ablation: one scale, 20x, through the same transformers; the most expensive of the three.",
    options=CrossFusionConfig,
    maps={"source": _SOURCE_MAP.format("20x"), "fused": _FUSED_MAP.format("20x")},
)
