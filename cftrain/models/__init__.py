"""Survival models on bags of patches: `build` one by name, give it a `BagBatch`, get a `SurvivalOutput`."""

from cftrain.models.attention_maps import attention_maps
from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.building import available, build
from cftrain.models.fitting import TrainingFold
from cftrain.models.made_up import made_up_slide
from cftrain.models.output import SurvivalOutput
from cftrain.models.patch_maps import PatchMap
from cftrain.zoo import Extra, ModelInfo

__all__ = [
    "BagBatch",
    "Extra",
    "ModelInfo",
    "PatchMap",
    "SurvivalModel",
    "SurvivalOutput",
    "TrainingFold",
    "attention_maps",
    "available",
    "build",
    "made_up_slide",
]
