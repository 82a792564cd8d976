"""What the options of all models share, and what one can know of a model before building it. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cftrain.errors import ConfigError
from cftrain.zoo.extras import Extra


@dataclass(frozen=True)
class Options:
    """Options of a model: a frozen dataclass, every field with a default; the defaults are the published settings."""

    n_bins: int = 4
    """Intervals of time."""

    def extras(self) -> tuple[Extra, ...]:
        """What a model with these options reads of a slide besides features."""
        return ()

    def fit_extras(self) -> tuple[Extra, ...]:
        """What `SurvivalModel.fit` reads of the training slides besides that."""
        return ()


@dataclass(frozen=True)
class ModelInfo:
    """What one can know of a model before building it."""

    name: str
    """What `--model` and `build` call it."""
    scales: tuple[int, ...]
    """The scales it reads with default options."""
    reference: str
    """The paper, and the code it was checked against."""
    summary: str
    """One line."""
    options: type[Options]
    """A frozen dataclass; its fields are the options of `build`."""
    maps: Mapping[str, str]
    """Name to meaning, one sentence: what `SurvivalModel.patch_maps` returns with default options; those of a scale are
    missing where an option leaves that scale out."""
    by_gradient: bool = True
    """Whether it learns by steps of an optimiser; otherwise `SurvivalModel.fit` is all its training."""


def scales_of(info: ModelInfo, options: Options) -> tuple[int, ...]:
    """The scales that a model reads with these options, coarsest first: of `scale` or `scales`, where it has one."""
    one, several = getattr(options, "scale", None), getattr(options, "scales", None)
    if several is not None:
        return tuple(int(each) for each in several.split(","))
    return info.scales if one is None else (one,)


def check_positive(options: object, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(options, name)}")


def check_rate(options: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(options, name)}")


def check_choice(options: object, name: str, choices: tuple[str, ...]) -> None:
    if getattr(options, name) not in choices:
        raise ConfigError(f"{name} must be {' or '.join(choices)}, got {getattr(options, name)!r}")
