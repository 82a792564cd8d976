"""Mean pooling and Cox regression, the floor: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.errors import ConfigError
from cftrain.zoo.extras import Extra, mean
from cftrain.zoo.options import ModelInfo, Options, check_positive


@dataclass(frozen=True)
class MeanCoxConfig(Options):
    """Options of the Cox model on mean patches."""

    scale: int = 20
    """The one scale it looks at."""
    penalizer: float = 1.0
    """Weight of the squared coefficients of standardised features, as lifelines counts it."""

    def fit_extras(self) -> tuple[Extra, ...]:
        """The mean patches of the training slides."""
        return (mean(self.scale),)

    def __post_init__(self) -> None:
        check_positive(self, "scale", "n_bins")
        if self.penalizer <= 0:
            raise ConfigError(f"penalizer must be above 0, got {self.penalizer}")


MEAN_COX = ModelInfo(
    name="mean-cox",
    scales=(20,),
    reference="Cox 1972, doi:10.1111/j.2517-6161.1972.tb00899.x; fitted by lifelines with a ridge penalty",
    summary="The floor: patches averaged, ridge Cox regression in closed form; no gradient steps.",
    options=MeanCoxConfig,
    maps={},
    by_gradient=False,
)
