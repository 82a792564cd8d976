"""Weights that the authors of models released, under our names; one module per family of state dicts.

`released_model` builds the model that a state dict belongs to; `place` says where one released tensor lives in
it, and `from_released` converts them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from cftrain.errors import WeightsError
from cftrain.models.base import SurvivalModel
from cftrain.models.building import build
from cftrain.models.released.abmil import AMIL
from cftrain.models.released.crossfusion import CROSSFUSION
from cftrain.models.released.dsmil import DSMIL
from cftrain.models.released.family import Family
from cftrain.models.released.mustmil import MUSTMIL
from cftrain.models.released.patch_gcn import PATCH_GCN
from cftrain.models.released.transmil import TRANSMIL
from cftrain.models.released.zoommil import ZOOMMIL

FAMILIES: Final[tuple[Family, ...]] = (AMIL, DSMIL, TRANSMIL, PATCH_GCN, ZOOMMIL, MUSTMIL, CROSSFUSION)
_HALVES: Final = (".k_proj.", ".v_proj.")


class Place(NamedTuple):
    """Where a released tensor lives in our model."""

    name: str
    """Our parameter."""
    half: int | None
    """0 or 1 where it is the first or second half of our rows (keys, values); None where it is all of it."""


def place(released: str, model_name: str) -> Place:
    """Find our name for one key of the released state dict of a model."""
    family, name = _family(model_name), released
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    for half, part in enumerate(_HALVES):
        if part in name:
            return Place(name.replace(part, ".key_value."), half)
    return Place(name, None)


def _family(model_name: str) -> Family:
    return next(family for family in FAMILIES if model_name in family.models)


def from_released(state: Mapping[str, Tensor], model: SurvivalModel) -> dict[str, Tensor]:
    """Convert a released state dict to one that `model.load_state_dict` takes.

    Raises
    ------
    WeightsError
        The released tensors are not those of this model, at these sizes.
    """
    parts: dict[str, list[Tensor]] = {}
    left_out = _family(model.name).left_out
    for key in sorted(state):  # k_proj before v_proj
        if not key.startswith(left_out):
            parts.setdefault(place(key, model.name).name, []).append(state[key])
    own = model.state_dict()
    if parts.keys() != own.keys():
        odd = ", ".join(sorted(parts.keys() ^ own.keys()))
        raise WeightsError(f"the released weights and {model.name} do not have the same tensors: {odd}")
    return {name: _fitted(name, parts[name], own[name]) for name in own}


def _fitted(name: str, released: list[Tensor], own: Tensor) -> Tensor:
    tensor = torch.cat(released)
    if tensor.numel() != own.numel():
        found = " + ".join(str(list(part.shape)) for part in released)
        raise WeightsError(f"{name}: the released tensor is {found}, ours {list(own.shape)}")
    return tensor.reshape(own.shape)


def released_model(state: Mapping[str, Tensor], *, n_heads: int = 4) -> SurvivalModel:
    """Build the model that a released state dict belongs to, with its weights, in evaluation mode.

    Model and sizes are read from the tensors, but for those that leave no trace there: CrossFusion's number of heads,
    and TransMIL's of landmarks, half its width in the authors' code.

    Raises
    ------
    WeightsError
        No model of ours has these tensors; names those that differ.
    ConfigError
        The width is no multiple of n_heads.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}  # DataParallel adds it
    family = next((family for family in FAMILIES if family.marks <= state.keys()), None)
    if family is None:
        some = ", ".join(sorted(state)[:5])
        known = ", ".join(name for each in FAMILIES for name in each.models)
        raise WeightsError(f"these {len(state)} tensors are no released weights of {known}: {some}, ...")
    feature_dim, options = family.sizes(state, n_heads)
    model = build(family.name_of(state), feature_dim, **options)
    model.load_state_dict(from_released(state, model))
    return model.eval()
