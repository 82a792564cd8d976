"""CS-MIL: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.zoo.extras import Extra
from cftrain.zoo.options import ModelInfo, Options, check_choice, check_positive, check_rate
from cftrain.zoo.pyramid import SCALES, ancestors


@dataclass(frozen=True)
class CSMILConfig(Options):
    """Options of CS-MIL; the defaults are those of its authors' code."""

    scales: str = "5,10,20"
    """The two or three scales that it looks at, coarsest first, of 5, 10 and 20."""
    embed_dim: int = 64
    """Width of an embedded patch, at every scale."""
    hidden_dim: int = 32
    """Width inside both attentions, and of the layer before the logits."""
    dropout: float = 0.5
    """Of the layer before the logits."""
    scale_softmax: bool = False
    """Whether the scores of a patch and its ancestors are brought to weights that add up to 1, as the paper writes;
    the authors' code takes them as they are."""

    def __post_init__(self) -> None:
        check_choice(self, "scales", SCALES)
        check_positive(self, "embed_dim", "hidden_dim", "n_bins")
        check_rate(self, "dropout")

    def extras(self) -> tuple[Extra, ...]:
        """The ancestors of the finest patches at each coarser scale."""
        return ancestors(self.scales)


CSMIL = ModelInfo(
    name="csmil",
    scales=(5, 10, 20),
    reference="Deng et al. 2022, arXiv:2208.07322, and 2024, arXiv:2304.00216; hrlblab/CS-MIL",
    summary="Three scales; each 20x patch fused with its 10x and 5x ancestors by attention over scales, then pooled.",
    options=CSMILConfig,
    maps={
        "attention": "Weight of a patch of the finest scale, fused with its ancestors, in the mean that represents the "
        "slide."
    },
)
