"""ProtoSurv: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.errors import ConfigError
from cftrain.zoo.extras import Extra, nearest, prototypes
from cftrain.zoo.options import ModelInfo, Options, check_positive, check_rate


@dataclass(frozen=True)
class ProtoSurvConfig(Options):
    """Options of ProtoSurv; the defaults are those of its authors' code."""

    scale: int = 20
    """The one scale it looks at."""
    k: int = 4
    """Nearest patches that a patch sends its message to."""
    n_classes: int = 5
    """Pseudo-classes of patches: k-means centres of the fold's training patches; tissue classes in the paper."""
    n_prototypes: int = 8
    """Prototypes of each class."""
    embed_dim: int = 768
    """Width of prototypes and of what they read of the graph, a multiple of n_heads."""
    n_heads: int = 3
    """Attention heads."""
    mlp_dim: int = 512
    """Width inside the MLP of a cross-attention layer."""
    class_layers: int = 2
    """Cross-attention layers of each class over the patches."""
    fusion_layers: int = 4
    """Cross-attention layers of all prototypes over the nodes of the graph."""
    graph_dim: int = 128
    """Width of a node in the graph layers."""
    graph_layers: int = 3
    """Graph layers; the authors count the projection before them as a fourth."""
    dropout: float = 0.2
    """Of what a cross-attention layer adds to the prototypes, and of the projected class means."""
    node_dropout: float = 0.25
    """Of the nodes before the graph layers, and inside the projection behind them."""
    graph_dropout: float = 0.1
    """Of what each graph layer but the first hands on."""

    def extras(self) -> tuple[Extra, ...]:
        """Each patch's nearest neighbours on the slide."""
        return (nearest(self.scale, self.k),)

    def fit_extras(self) -> tuple[Extra, ...]:
        """Centres of pseudo-classes."""
        return (prototypes(self.scale, self.n_classes),)

    def __post_init__(self) -> None:
        check_positive(self, "scale", "k", "n_classes", "n_prototypes", "embed_dim", "n_heads", "mlp_dim")
        check_positive(self, "class_layers", "fusion_layers", "graph_dim", "graph_layers", "n_bins")
        check_rate(self, "dropout", "node_dropout", "graph_dropout")
        if self.embed_dim % self.n_heads:
            found = f"embed_dim={self.embed_dim}, n_heads={self.n_heads}"
            raise ConfigError(f"protosurv: embed_dim must be a multiple of n_heads, got {found}")


PROTOSURV = ModelInfo(
    name="protosurv",
    scales=(20,),
    reference="Wu et al. 2024, NeurIPS, openreview tsIKrvexBd; formulas of wjx-error/ProtoSurv, held to them by tests",
    summary="One scale; prototypes of pseudo-classes (k-means of the training fold) read patches and a spatial graph; "
    "without the authors' zero-shot classes, augmentations and two regularisers.",
    options=ProtoSurvConfig,
    maps={
        "attention": "Attention that a patch's node in the graph receives from the prototypes in the last layer, mean "
        "over prototypes and heads."
    },
)
