"""Weights of the released code, RustinS/CrossFusion @ df5473d, under our names.

`place` says where one released tensor lives in our model; `from_released` converts a state dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cftrain.errors import ShapeError
from cftrain.models.base import SurvivalModel

_RENAMED = (
    (r"^cls_token$", "final_transformer.class_token"),
    (r"^final_ln\.", "final_transformer.norm."),
    (r"^mlp_head\.0\.", "head."),
    (r"^conv_processor\.conv3d\.", "conv_processor.mix_"),
    (r"^conv_processor\.conv_block\.0\.x_proj\.", "conv_processor.conv1."),
    (r"^conv_processor\.conv_block\.0\.", "conv_processor."),
    (r"^conv_processor\.linear\.0\.", "conv_processor.linear."),
    (r"^conv_processor\.linear\.1\.", "conv_processor.norm."),
    (r"^([csf])_lin_proj\.", r"\1_projection."),
    (r"^([csf])_cross_attn\.scale_embeddings$", r"\1_cross_attention.scale_embedding"),
    (r"^([csf])_cross_attn\.", r"\1_cross_attention.attention."),
    (r"^([csf])_cross_attn_ln\.", r"\1_cross_attention.norm."),
    (r"^([csf])_cross_attn_ffn\.net\.", r"\1_cross_attention.feed_forward."),
    (r"^([csf])_transformer_ln\.", r"\1_transformer.norm."),
    (r"\.(pre|post)_layers\.layers\.(\d+)\.0\.", r".\1.\2.attention_norm."),
    (r"\.(pre|post)_layers\.layers\.(\d+)\.1\.", r".\1.\2.attention."),
    (r"\.(pre|post)_layers\.layers\.(\d+)\.2\.", r".\1.\2.feed_forward_norm."),
    (r"\.(pre|post)_layers\.layers\.(\d+)\.3\.net\.", r".\1.\2.feed_forward."),
    (r"\.proj\.", ".conv7."),
    (r"\.proj1\.", ".conv5."),
    (r"\.proj2\.", ".conv3."),
    (r"\.q_proj\.", ".query."),
    (r"\.out_proj\.", ".out."),
    (r"^c_", "coarse_"),
    (r"^s_", "source_"),
    (r"^f_", "fine_"),
    # gated attention pooling (AMIL)
    (r"^attention_net\.0\.", "projection."),
    (r"^attention_net\.2\.attention_a\.0\.", "attention.content."),
    (r"^attention_net\.2\.attention_b\.0\.", "attention.gate."),
    (r"^attention_net\.2\.attention_c\.", "attention.score."),
    (r"^classifiers\.", "head."),
)


class Place(NamedTuple):
    """Where a released tensor lives in our model."""

    name: str
    """Our parameter."""
    half: int | None
    """0 or 1 where it is the first or second half of our rows (keys, values); None where it is all of it."""


def place(released: str) -> Place:
    """Find our name for one key of a released state dict."""
    name = released
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    for half, part in enumerate((".k_proj.", ".v_proj.")):
        if part in name:
            return Place(name.replace(part, ".key_value."), half)
    return Place(name, None)


def from_released(state: Mapping[str, Tensor], model: SurvivalModel) -> dict[str, Tensor]:
    """Convert a released CrossFusion or AMIL state dict to one that `model.load_state_dict` takes.

    Raises
    ------
    ShapeError
        The released tensors are not those of this model, at these sizes.
    """
    parts: dict[str, list[Tensor]] = {}
    for key in sorted(state):  # k_proj before v_proj
        parts.setdefault(place(key).name, []).append(state[key])
    own = model.state_dict()
    if parts.keys() != own.keys():
        raise ShapeError(f"released weights do not name what {model.name} has: {sorted(parts.keys() ^ own.keys())}")
    return {name: _fitted(name, torch.cat(parts[name]), own[name]) for name in own}


def _fitted(name: str, released: Tensor, own: Tensor) -> Tensor:
    if released.numel() != own.numel():
        raise ShapeError(f"{name}: the released tensor has {released.numel()} values, ours {list(own.shape)}")
    return released.reshape(own.shape)
