"""`--model all`: the models that can run on a store's features, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cfstore
from cftrain.config import DataConfig, RunConfig, load_config
from cftrain.data import slides_without_coordinates
from cftrain.errors import ConfigError, MissingScaleError
from cftrain.footprint import blueprint
from cftrain.zoo import MODELS, model_options

ALL: Final = "all"
MOST: Final = 0.9
"""Of the slides: models that need coordinates run where so many have them, for all models train on the same slides."""


@dataclass(frozen=True)
class Fitting:
    """Which models run on some features.

    Parameters
    ----------
    models
        Their names, in the order of the zoo.
    left_out
        The others, with the reason.
    """

    models: tuple[str, ...]
    left_out: Mapping[str, str]


def fitting_models(
    store: Path | str,
    *,
    preset: str | None,
    file: Path | None,
    flags: Mapping[str, str | None],
    settings: Sequence[str],
) -> Fitting:
    """Find the models whose scales, coordinates and graphs the features have; reads no features.

    Parameters
    ----------
    preset, file, flags, settings
        As `load_config` takes them; decide the features, and every model's options.

    Raises
    ------
    ConfigError
        See `load_config`.
    MissingScaleError
        There is none.
    StoreError
        What the store raises: no such cohort or encoder.
    """
    configs = [
        load_config(preset=preset, file=file, flags={**flags, "model.name": name}, settings=settings) for name in MODELS
    ]
    ground = _ground(store, configs[0].data)
    reasons = {config.model.name: _reason(config, ground) for config in configs}
    models = tuple(name for name, reason in reasons.items() if not reason)
    if not models:
        message = f"no model runs on encoder {ground.encoder}: " + "; ".join(map(": ".join, reasons.items()))
        raise MissingScaleError(message)
    return Fitting(models, {name: reason for name, reason in reasons.items() if reason})


@dataclass(frozen=True)
class _Ground:
    """What there is for models: scales, and of each how many slides there are, and how many have coordinates."""

    encoder: str
    dim: int
    scales: Sequence[int]
    located: Mapping[int, tuple[int, int]]
    of_tars: bool


def _ground(store: Path | str, config: DataConfig) -> _Ground:
    opened = cfstore.open_tars(config.shards) if config.shards else cfstore.open(store)
    named, where = config.cohort or None, config.where or None
    encoder = opened.choose_encoder(named, config.encoder or None, where)
    scales = opened.encoders_of(named, where)[encoder]
    without = slides_without_coordinates(opened, encoder)
    cohorts = {scale: opened.cohort(named, encoder=encoder, scales=[scale], where=where) for scale in scales}
    located = {
        scale: (sum(slide.slide_id not in without.get(scale, ()) for slide in cohort.slides), len(cohort.slides))
        for scale, cohort in cohorts.items()
    }
    dim = cohorts[scales[0]].dim  # an encoder's, hence the same at every scale
    return _Ground(encoder, dim, scales, located, bool(config.shards))


def _reason(config: RunConfig, ground: _Ground) -> str:
    """Why a model cannot run; nothing where it can."""
    own = model_options(config.model.name, config.model.options)
    scales = config.scales()
    if not set(scales) <= set(ground.scales):
        return f"needs {_listed(scales)}, there is {_listed(ground.scales)}"
    extras = own.extras() + own.fit_extras()
    for extra in extras:
        for n_located, n_slides in (ground.located[scale] for scale in extra.from_coordinates):
            if n_located < MOST * n_slides or not n_located:
                few = f"only {n_located} of {n_slides} slides have" if n_located else "no slide has"
                return f"needs {extra.label}, and {few} coordinates"
    try:
        blueprint(config.model.name, config.model.options, ground.dim)
    except ConfigError as error:
        return str(error)
    kept = [extra for extra in extras if extra.kind != "coords"]
    return f"needs {kept[0].label}, which tars do not hold" if kept and ground.of_tars else ""


def _listed(scales: Sequence[int]) -> str:
    return ", ".join(f"{scale}x" for scale in scales)
