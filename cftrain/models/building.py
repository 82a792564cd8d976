"""`build`: a model by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from cftrain import zoo
from cftrain.errors import ConfigError
from cftrain.models.abmil import ABMIL
from cftrain.models.base import SurvivalModel
from cftrain.models.crossfusion import CrossFusion, CrossFusionConcat, CrossFusionSingle
from cftrain.models.csmil import CSMIL
from cftrain.models.deepgraphsurv import DeepGraphSurv
from cftrain.models.dsmil import DSMIL
from cftrain.models.mean_cox import MeanCox
from cftrain.models.mustmil import MuSTMIL
from cftrain.models.patch_gcn import PatchGCN
from cftrain.models.protosurv import ProtoSurv
from cftrain.models.scmil import SCMIL
from cftrain.models.transmil import TransMIL
from cftrain.models.zoommil import ZoomMIL

_CLASSES: Final[Mapping[str, Callable[[int, Any], SurvivalModel]]] = {
    "abmil": ABMIL,
    "crossfusion": CrossFusion,
    "crossfusion-concat": CrossFusionConcat,
    "crossfusion-single": CrossFusionSingle,
    "csmil": CSMIL,
    "deepgraphsurv": DeepGraphSurv,
    "dsmil": DSMIL,
    "mean-cox": MeanCox,
    "mustmil": MuSTMIL,
    "patch-gcn": PatchGCN,
    "protosurv": ProtoSurv,
    "scmil": SCMIL,
    "transmil": TransMIL,
    "zoommil": ZoomMIL,
}


def available() -> tuple[str, ...]:
    """The names of all models, sorted; `cftrain.zoo.MODELS` says more of each."""
    return tuple(sorted(zoo.MODELS))


def build(name: str, feature_dim: int, **options: object) -> SurvivalModel:
    """Build a model with fresh weights.

    Parameters
    ----------
    name
        One of `available()`.
    feature_dim
        D, the width of a patch's features.
    **options
        Fields of the model's options, e.g. `cftrain.zoo.CrossFusionConfig`; the rest keep their defaults.

    Raises
    ------
    UnknownModelError
        No model of this name; lists near names, and all.
    ConfigError
        An option is unknown (near names are listed), of the wrong type, or outside its range.
    """
    config = zoo.model_options(name, options)
    if feature_dim < 1:
        raise ConfigError(f"{name}: feature_dim must be at least 1, got {feature_dim}")
    return _CLASSES[name](feature_dim, config)
