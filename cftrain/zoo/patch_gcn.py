"""Patch-GCN: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.errors import ConfigError
from cftrain.zoo.extras import Extra, nearest
from cftrain.zoo.options import ModelInfo, Options, check_positive, check_rate


@dataclass(frozen=True)
class PatchGCNConfig(Options):
    """Options of Patch-GCN; the defaults are those of its authors' code."""

    scale: int = 20
    """The one scale it looks at."""
    k: int = 8
    """Patches nearest in space to which a patch gives in each graph layer."""
    hidden_dim: int = 128
    """Width of a patch in the graph layers; behind them it is n_layers times that."""
    n_layers: int = 4
    """Layers whose outputs are put side by side: the projection of the features, and n_layers - 1 of the graph."""
    dropout: float = 0.25
    """Behind the three layers with ReLU outside the graph layers, and in both gates."""
    layer_dropout: float = 0.1
    """Behind each graph layer but the first."""
    mlp_bias: bool = False
    """Whether the linear layers within graph layers have a bias: they had one with torch-geometric 1, of the time of
    the paper, and have none with torch-geometric 2."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "k", "hidden_dim", "n_layers", "n_bins")
        check_rate(self, "dropout", "layer_dropout")
        if self.n_layers < 2:
            found = f"n_layers={self.n_layers}"
            raise ConfigError(f"patch-gcn: n_layers counts the projection and must be at least 2, got {found}")

    def extras(self) -> tuple[Extra, ...]:
        """The graph in space."""
        return (nearest(self.scale, self.k),)


PATCH_GCN = ModelInfo(
    name="patch-gcn",
    scales=(20,),
    reference="Chen et al. 2021, arXiv:2107.13048; PatchGCN_Surv of mahmoodlab/Patch-GCN",
    summary="One scale; graph convolutions over neighbours in space, then gated attention.",
    options=PatchGCNConfig,
    maps={"attention": "Weight of a patch, as the graph layers left it, in the mean that represents the slide."},
)
