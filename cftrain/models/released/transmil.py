"""TransMIL of RustinS/CrossFusion @ df5473d. Its number of landmarks leaves no trace: half its width there."""

from __future__ import annotations

from cftrain.models.released.family import Family, Sizes, State

_RENAMED = (
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


def _sizes(state: State, n_heads: int) -> Sizes:
    embed_dim, feature_dim = state["_fc1.0.weight"].shape
    return feature_dim, {
        "embed_dim": embed_dim,
        "n_heads": len(state["layer1.attn.res_conv.weight"]),
        "n_landmarks": max(1, embed_dim // 2),
        "n_bins": len(state["_fc2.bias"]),
    }


TRANSMIL = Family(
    models=("transmil",),
    marks=frozenset({"_fc1.0.weight", "layer1.attn.res_conv.weight", "_fc2.bias"}),
    renamed=_RENAMED,
    sizes=_sizes,
)
