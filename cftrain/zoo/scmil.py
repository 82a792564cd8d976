"""SCMIL: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.zoo.extras import Extra, coords
from cftrain.zoo.options import ModelInfo, Options, check_choice, check_positive, check_rate


@dataclass(frozen=True)
class SCMILConfig(Options):
    """Options of SCMIL; the defaults are its authors' settings, with a head of hazards in place of their mixture."""

    scale: int = 20
    """The one scale it looks at."""
    filter_dim: int = 256
    """Width inside the filter that decides which patches attend."""
    cluster_size: int = 64
    """Patches in a cluster, on average; one of twice as many or more is cut."""
    kmeans_iterations: int = 5
    """How often k-means may assign the patches of a slide to its centres."""
    coordinate_weight: float = 0.2
    """Of coordinates in the distances of k-means, the features having the rest; at 0 the model reads none."""
    n_heads: int = 8
    """Attention heads; the features must be a multiple of it wide."""
    attention_dim: int = 256
    """Width of the gated attention that pools the patches."""
    dropout: float = 0.25
    """Of attention probabilities within the clusters, and in the layers of the mixture."""
    head: str = "hazards"
    """hazards: one linear layer to the log-odds of each bin's hazard, as the other models have; mdn: the authors'
    mixture of densities over continuous time, of which the hazards of the bins are computed."""
    mdn_dim: int = 256
    """Width of the two layers of the mixture."""
    n_components: int = 100
    """Components of the mixture."""

    def extras(self) -> tuple[Extra, ...]:
        """Coordinates, unless they have no weight."""
        return (coords(self.scale),) if self.coordinate_weight else ()

    def __post_init__(self) -> None:
        check_positive(self, "scale", "filter_dim", "cluster_size", "kmeans_iterations", "n_heads", "attention_dim")
        check_positive(self, "mdn_dim", "n_components", "n_bins")
        check_rate(self, "coordinate_weight", "dropout")
        check_choice(self, "head", ("hazards", "mdn"))


SCMIL = ModelInfo(
    name="scmil",
    scales=(20,),
    reference="Yang et al. 2024, arXiv:2407.00664; formulas of yang-ze-kang/SCMIL",
    summary="One scale; patches that a learnt filter keeps attend within k-means clusters of a slide, all are pooled.",
    options=SCMILConfig,
    maps={
        "attention": "Weight of a patch in the mean that represents the slide.",
        "filter": "How far the filter lets a patch pass, as a share of the sum over the slide.",
    },
)
