"""Weights of the released code, RustinS/CrossFusion @ df5473d, under our names.

`released_model` builds the model that a state dict belongs to; `place` says where one released tensor lives in
it, and `from_released` converts them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cftrain.errors import WeightsError
from cftrain.models.base import SurvivalModel
from cftrain.models.building import build

_RENAMED = (
    (r"^cls_token$", "final_transformer.class_token"),
    (r"^final_ln\.", "final_transformer.norm."),
    (r"^mlp_head\.0\.", "head."),
    (r"^conv_processor\.conv3d\.", "conv_processor.mix_"),
    (r"^conv_processor\.conv_block\.0\.x_proj\.", "conv_processor.conv1."),
    (r"^conv_processor\.conv_block\.0\.", "conv_processor."),
    (r"^conv_processor\.linear\.0\.", "conv_processor.linear."),
    (r"^conv_processor\.linear\.1\.", "conv_processor.norm."),
    (r"^c_", "coarse_"),
    (r"^s_", "source_"),
    (r"^f_", "fine_"),
    (r"^(coarse|source|fine)_(lin_proj|pre_cross_attn)\.", r"\1_projection."),
    (r"^(coarse|fine)_cross_attn\.scale_embeddings$", r"\1_cross_attention.scale_embedding"),
    (r"^(coarse|fine)_cross_attn\.", r"\1_cross_attention.attention."),
    (r"^(coarse|fine)_cross_attn_ln\.", r"\1_cross_attention.norm."),
    (r"^(coarse|fine)_cross_attn_ffn\.net\.", r"\1_cross_attention.feed_forward."),
    (r"^(coarse|source|fine)_(transformer_)?ln\.", r"\1_transformer.norm."),
    (r"^pre_final_linear\.0\.", "concatenation."),
    (r"^pre_final_linear\.1\.", "concatenation_norm."),
    (r"\.(pre|post)_layers\.layers\.(\d+)\.0\.", r".\1.\2.attention_norm."),
    (r"\.(pre|post)_layers\.layers\.(\d+)\.1\.", r".\1.\2.attention."),
    (r"\.(pre|post)_layers\.layers\.(\d+)\.2\.", r".\1.\2.feed_forward_norm."),
    (r"\.(pre|post)_layers\.layers\.(\d+)\.3\.net\.", r".\1.\2.feed_forward."),
    (r"\.feed_forward\.0\.", ".feed_forward.up."),
    (r"\.feed_forward\.3\.", ".feed_forward.down."),
    (r"\.proj\.", ".conv7."),
    (r"\.proj1\.", ".conv5."),
    (r"\.proj2\.", ".conv3."),
    (r"\.q_proj\.", ".query."),
    (r"\.out_proj\.", ".out."),
    # gated attention pooling (AMIL)
    (r"^attention_net\.0\.", "projection."),
    (r"^attention_net\.2\.attention_a\.0\.", "attention.content."),
    (r"^attention_net\.2\.attention_b\.0\.", "attention.gate."),
    (r"^attention_net\.2\.attention_c\.", "attention.score."),
    (r"^classifiers\.", "head."),
    # DSMIL
    (r"^i_classifier\.fc\.0\.", "instance."),
    (r"^b_classifier\.q\.", "query."),
    (r"^b_classifier\.fcc\.", "head."),
)
_RENAMED_TRANSMIL = (
    (r"^_fc1\.0\.", "projection."),
    (r"^cls_token$", "class_token"),
    (r"^pos_layer\.proj\.", "ppeg.conv7."),
    (r"^pos_layer\.proj1\.", "ppeg.conv5."),
    (r"^pos_layer\.proj2\.", "ppeg.conv3."),
    (r"\.attn\.to_qkv\.", ".attention.query_key_value."),
    (r"\.attn\.to_out\.0\.", ".attention.out."),
    (r"\.attn\.res_conv\.", ".attention.convolution."),
    (r"^_fc2\.", "head."),
)


_Options = dict[str, int | str]


class Place(NamedTuple):
    """Where a released tensor lives in our model."""

    name: str
    """Our parameter."""
    half: int | None
    """0 or 1 where it is the first or second half of our rows (keys, values); None where it is all of it."""


def place(released: str, model_name: str) -> Place:
    """Find our name for one key of the released state dict of a model."""
    name = released
    for pattern, replacement in _RENAMED_TRANSMIL if model_name == "transmil" else _RENAMED:
        name = re.sub(pattern, replacement, name)
    for half, part in enumerate((".k_proj.", ".v_proj.")):
        if part in name:
            return Place(name.replace(part, ".key_value."), half)
    return Place(name, None)


def from_released(state: Mapping[str, Tensor], model: SurvivalModel) -> dict[str, Tensor]:
    """Convert a released state dict to one that `model.load_state_dict` takes.

    Raises
    ------
    WeightsError
        The released tensors are not those of this model, at these sizes.
    """
    parts: dict[str, list[Tensor]] = {}
    for key in sorted(state):  # k_proj before v_proj
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

    Model and sizes are read from the tensors, but for two that leave no trace there: CrossFusion's number of heads, and
    TransMIL's of landmarks, half its width in the authors' code.

    Raises
    ------
    WeightsError
        No model of ours has these tensors; names those that differ.
    ConfigError
        The width is no multiple of n_heads.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}  # DataParallel adds it
    name, feature_dim, options = _sizes(state, n_heads)
    model = build(name, feature_dim, **options)
    model.load_state_dict(from_released(state, model))
    return model.eval()


def _sizes(state: Mapping[str, Tensor], n_heads: int) -> tuple[str, int, _Options]:
    """The model's name, its feature_dim and the options that its tensors tell."""
    if {"attention_net.0.weight", "attention_net.2.attention_a.0.bias", "classifiers.bias"} <= state.keys():
        return "abmil", *_abmil_sizes(state)
    if {"i_classifier.fc.0.weight", "b_classifier.q.0.bias"} <= state.keys():
        return "dsmil", *_dsmil_sizes(state)
    if {"_fc1.0.weight", "layer1.attn.res_conv.weight", "_fc2.bias"} <= state.keys():
        return "transmil", *_transmil_sizes(state)
    if {"final_ln.weight", "mlp_head.0.bias"} <= state.keys():
        return _kind(state), *_crossfusion_sizes(state, n_heads)
    some = ", ".join(sorted(state)[:5])
    raise WeightsError(
        f"no released CrossFusion (or ablation, or AMIL, DSMIL or TransMIL) has these {len(state)} tensors: {some}, ..."
    )


def _abmil_sizes(state: Mapping[str, Tensor]) -> tuple[int, _Options]:
    hidden_dim, feature_dim = state["attention_net.0.weight"].shape
    attention_dim = len(state["attention_net.2.attention_a.0.bias"])
    n_bins = len(state["classifiers.bias"])
    return feature_dim, {"hidden_dim": hidden_dim, "attention_dim": attention_dim, "n_bins": n_bins}


def _dsmil_sizes(state: Mapping[str, Tensor]) -> tuple[int, _Options]:
    n_bins, feature_dim = state["i_classifier.fc.0.weight"].shape
    # the released code trains them so; predictions are the same in both variants
    attention_dim = len(state["b_classifier.q.0.bias"])
    return feature_dim, {"attention_dim": attention_dim, "n_bins": n_bins, "variant": "faithful"}


def _transmil_sizes(state: Mapping[str, Tensor]) -> tuple[int, _Options]:
    embed_dim, feature_dim = state["_fc1.0.weight"].shape
    options: _Options = {
        "embed_dim": embed_dim,
        "n_heads": len(state["layer1.attn.res_conv.weight"]),
        "n_landmarks": max(1, embed_dim // 2),
        "n_bins": len(state["_fc2.bias"]),
    }
    return feature_dim, options


def _crossfusion_sizes(state: Mapping[str, Tensor], n_heads: int) -> tuple[int, _Options]:
    embed_dim = len(state["final_ln.weight"])
    layers = {found[1] for key in state if (found := re.match(r"final_transformer\.pre_layers\.layers\.(\d+)\.", key))}
    projections = (f"{part}.0.weight" for part in ("s_lin_proj", "source_pre_cross_attn"))
    widths = [state[key].shape[1] for key in projections if key in state]
    options: _Options = {
        "embed_dim": embed_dim,
        "n_heads": n_heads,
        "n_layers": len(layers),
        "n_bins": len(state["mlp_head.0.bias"]),
    }
    return widths[0] if widths else embed_dim, options


def _kind(state: Mapping[str, Tensor]) -> str:
    if "pre_final_linear.0.weight" in state:
        return "crossfusion-concat"
    return "crossfusion" if "conv_processor.conv3d.weight" in state else "crossfusion-single"
