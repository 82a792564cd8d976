"""DeepGraphSurv: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.zoo.extras import Extra, nearest, similar
from cftrain.zoo.options import ModelInfo, Options, check_choice, check_positive, check_rate


@dataclass(frozen=True)
class DeepGraphSurvConfig(Options):
    """Options of DeepGraphSurv; the defaults are those of DeepGraphConv_Surv in Patch-GCN's code."""

    scale: int = 20
    """The one scale it looks at."""
    graph: str = "features"
    """What neighbours are: features, the patches with the most similar ones; space, the nearest patches."""
    k: int = 8
    """Neighbours that each patch lists."""
    conv: str = "gin"
    """gin: sums over neighbours and a small network, as DeepGraphConv_Surv; cheb: Chebyshev polynomials of the graph's
    Laplacian, a spectral convolution as in the paper."""
    cheb_order: int = 3
    """Terms of the polynomial, where conv is cheb: a patch sees as many steps away as this minus 1."""
    hidden_dim: int = 256
    """Width of a patch in and behind the graph layers."""
    dropout: float = 0.25
    """In both gates and before the last layer."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "k", "cheb_order", "hidden_dim", "n_bins")
        check_rate(self, "dropout")
        check_choice(self, "graph", ("features", "space"))
        check_choice(self, "conv", ("gin", "cheb"))

    def extras(self) -> tuple[Extra, ...]:
        """The graph, in features or in space."""
        return ((similar if self.graph == "features" else nearest)(self.scale, self.k),)


DEEPGRAPHSURV = ModelInfo(
    name="deepgraphsurv",
    scales=(20,),
    reference="Li et al. 2018, MICCAI, doi:10.1007/978-3-030-00934-2_20; DeepGraphConv_Surv of mahmoodlab/Patch-GCN",
    summary="One scale; graph convolutions over neighbours in features, then gated attention.",
    options=DeepGraphSurvConfig,
    maps={"attention": "Weight of a patch, as the graph layers left it, in the mean that represents the slide."},
)
