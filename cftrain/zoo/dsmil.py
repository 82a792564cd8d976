"""DSMIL: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.errors import ConfigError
from cftrain.zoo.options import ModelInfo, Options, check_positive

_VARIANTS = ("fixed", "faithful")


@dataclass(frozen=True)
class DSMILConfig(Options):
    """Options of the dual-stream model; the defaults are those of the authors' code, and train both streams."""

    scale: int = 20
    """The one scale it looks at."""
    attention_dim: int = 128
    """Width of the queries, and of the layer before them."""
    variant: str = "fixed"
    """fixed: training takes half the loss of the bag's logits and half that of the critical patches' own, as DSMIL's
    authors do; faithful: the bag's alone, as the survival code of CrossFusion's comparison does, so that what picks
    the critical patches stays as it was drawn. Predictions are the bag's in both."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "attention_dim", "n_bins")
        if self.variant not in _VARIANTS:
            raise ConfigError(f"dsmil: variant must be {' or '.join(_VARIANTS)}, got {self.variant!r}")


DSMIL = ModelInfo(
    name="dsmil",
    scales=(20,),
    reference="Li, Li & Eliceiri 2021, arXiv:2011.08939; DSMIL of RustinS/CrossFusion @ df5473d",
    summary="One scale; patches weighted by likeness to each time bin's critical patch.",
    options=DSMILConfig,
    maps={"attention": "Weight of a patch in the means that represent the slide, mean over the time bins."},
)
