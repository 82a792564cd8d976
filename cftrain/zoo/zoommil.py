"""ZoomMIL: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.errors import ConfigError
from cftrain.zoo.extras import Extra, parents
from cftrain.zoo.options import ModelInfo, Options, check_choice, check_positive, check_rate


@dataclass(frozen=True)
class ZoomMILConfig(Options):
    """Options of ZoomMIL; the defaults are those of the authors' configurations, but for `n_children`, `variant`."""

    hidden_dim: int = 512
    """Width of a projected patch."""
    attention_dim: int = 256
    """Width of every gated attention."""
    dropout: float = 0.25
    """After the projections and in both gates."""
    n_zoomed: int = 12
    """Patches to zoom into, K, at 5x and again at 10x; all where there are fewer."""
    sigma: float = 0.002
    """Standard deviation of the noise that chooses in training, on attention that adds up to 1."""
    n_samples: int = 100
    """Draws of that noise."""
    n_children: int = 9
    """Places for the children of a patch. Grids that nest need 4, as in the authors' code; a grid that is shifted
    against the coarser one up to 9. Further children share places: none is lost, but those of a place are averaged."""
    variant: str = "fixed"
    """fixed: the choice has the gradient of its paper; faithful: the part of it that the authors' code computes.
    Predictions are made the same way in both."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden_dim", "attention_dim", "n_zoomed", "n_children", "n_bins")
        check_rate(self, "dropout")
        check_choice(self, "variant", ("fixed", "faithful"))
        if not self.sigma > 0:
            raise ConfigError(f"sigma must be above 0, got {self.sigma}")
        if self.n_samples < 2:
            raise ConfigError(f"n_samples must be at least 2, got {self.n_samples}")

    def extras(self) -> tuple[Extra, ...]:
        """The parents that make the pyramid."""
        return parents(10, 5), parents(20, 10)


def _meaning(scale: int, zoomed: str) -> str:
    return f"Weight of a {scale}x patch in the mean of its scale, one of the three that are added up{zoomed}."


ZOOMMIL = ModelInfo(
    name="zoommil",
    scales=(5, 10, 20),
    reference="Thandiackal et al. 2022, arXiv:2204.12454; histocartography/zoommil @ 825ba9f",
    summary="Zooms into few patches of 5x, and of what it finds into few of 10x; gated attention at each scale.",
    options=ZoomMILConfig,
    maps={
        "attention-5x": _meaning(5, ""),
        "attention-10x": _meaning(10, ", 0 where it did not zoom in"),
        "attention-20x": _meaning(20, ", 0 where it did not zoom in"),
    },
)
