"""The models by name: scales, options and their defaults, maps, sources. Loads no torch.

`cftrain models`, the validation of configurations and `cftrain.models.build` all read this table; one module per model
or family, beside its code in `cftrain/models/`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from cftrain.errors import ConfigError, UnknownModelError
from cftrain.zoo.abmil import ABMIL, ABMILConfig
from cftrain.zoo.crossfusion import CONCAT, CROSSFUSION, SINGLE, VARIANTS, CrossFusionConfig
from cftrain.zoo.csmil import CSMIL, CSMILConfig
from cftrain.zoo.deepgraphsurv import DEEPGRAPHSURV, DeepGraphSurvConfig
from cftrain.zoo.dsmil import DSMIL, DSMILConfig
from cftrain.zoo.extras import Extra
from cftrain.zoo.mean_cox import MEAN_COX, MeanCoxConfig
from cftrain.zoo.mustmil import MUSTMIL, MuSTMILConfig
from cftrain.zoo.options import ModelInfo, Options, scales_of
from cftrain.zoo.patch_gcn import PATCH_GCN, PatchGCNConfig
from cftrain.zoo.protosurv import PROTOSURV, ProtoSurvConfig
from cftrain.zoo.scmil import SCMIL, SCMILConfig
from cftrain.zoo.transmil import TRANSMIL, TransMILConfig
from cftrain.zoo.zoommil import ZOOMMIL, ZoomMILConfig

__all__ = [
    "MODELS",
    "VARIANTS",
    "ABMILConfig",
    "CSMILConfig",
    "CrossFusionConfig",
    "DSMILConfig",
    "DeepGraphSurvConfig",
    "Extra",
    "MeanCoxConfig",
    "ModelInfo",
    "MuSTMILConfig",
    "Options",
    "PatchGCNConfig",
    "ProtoSurvConfig",
    "SCMILConfig",
    "TransMILConfig",
    "ZoomMILConfig",
    "model_info",
    "model_options",
    "scales_of",
]

_ALL: tuple[ModelInfo, ...] = (
    MEAN_COX,
    ABMIL,
    DSMIL,
    TRANSMIL,
    DEEPGRAPHSURV,
    PATCH_GCN,
    SCMIL,
    PROTOSURV,
    SINGLE,
    ZOOMMIL,
    MUSTMIL,
    CSMIL,
    CONCAT,
    CROSSFUSION,
)
MODELS: Mapping[str, ModelInfo] = {model.name: model for model in _ALL}


def model_info(name: str) -> ModelInfo:
    """Look a model up.

    Raises
    ------
    UnknownModelError
        Lists near names, and all of them.
    """
    if name not in MODELS:
        raise UnknownModelError(f"no model {name!r}.{_suggest(name, MODELS)} Models: {', '.join(sorted(MODELS))}")
    return MODELS[name]


def model_options(name: str, options: Mapping[str, object]) -> Options:
    """Check a model's options and complete them with its defaults.

    Raises
    ------
    UnknownModelError
        No model of this name.
    ConfigError
        An option is unknown (near names are listed), of the wrong type, or outside its range.
    """
    info = model_info(name)
    defaults = {field.name: field.default for field in dataclasses.fields(info.options)}
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in defaults:
            known = ", ".join(sorted(defaults))
            raise ConfigError(f"{name}: no option {option!r}.{_suggest(option, defaults)} Options: {known}")
        values[option] = _converted(name, option, value, type(defaults[option]))
    return info.options(**values)


def _converted(name: str, option: str, value: object, wanted: type) -> object:
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{name}: {option} must be {wanted.__name__}, got {value!r}")
    return value


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
