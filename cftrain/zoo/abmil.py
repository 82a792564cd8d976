"""ABMIL: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.zoo.options import ModelInfo, Options, check_positive, check_rate


@dataclass(frozen=True)
class ABMILConfig(Options):
    """Options of gated attention pooling; the defaults are those of CrossFusion's comparison."""

    scale: int = 20
    """The one scale it looks at."""
    hidden_dim: int = 512
    """Width of a projected patch."""
    attention_dim: int = 256
    """Width of the gated attention."""
    dropout: float = 0.0
    """After the projection and in both gates; 0.25 is usual elsewhere."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "hidden_dim", "attention_dim", "n_bins")
        check_rate(self, "dropout")


ABMIL = ModelInfo(
    name="abmil",
    scales=(20,),
    reference="Ilse et al. 2018, arXiv:1802.04712; AMIL of RustinS/CrossFusion",
    summary="One scale; patches weighted by gated attention and averaged.",
    options=ABMILConfig,
    maps={"attention": "Weight of a patch in the mean that represents the slide (softmax over its patches)."},
)
