"""PatchGCN_Surv of mahmoodlab/Patch-GCN, with torch-geometric 2, or 1 as its authors had it."""

from __future__ import annotations

from cftrain.models.released.family import Family, Sizes, State

_RENAMED = (
    (r"^fc\.0\.", "projection."),
    (r"\.aggr_module\.t$", ".t"),
    (r"\.mlp\.0\.", ".up."),
    (r"\.mlp\.1\.", ".norm."),
    (r"\.mlp\.4\.", ".down."),
    (r"^path_phi\.0\.", "combination."),
    (r"^path_attention_head\.attention_a\.0\.", "head.attention.content."),
    (r"^path_attention_head\.attention_b\.0\.", "head.attention.gate."),
    (r"^path_attention_head\.attention_c\.", "head.attention.score."),
    (r"^path_rho\.0\.", "head.projection."),
    (r"^classifier\.", "head.classifier."),
)


def _sizes(state: State, n_heads: int) -> Sizes:
    hidden_dim, feature_dim = state["fc.0.weight"].shape
    return feature_dim, {
        "hidden_dim": hidden_dim,
        "n_layers": state["path_phi.0.weight"].shape[1] // hidden_dim,
        "mlp_bias": "layers.0.conv.mlp.0.bias" in state,
        "n_bins": len(state["classifier.bias"]),
    }


PATCH_GCN = Family(
    models=("patch-gcn",),
    marks=frozenset({"fc.0.weight", "layers.0.conv.mlp.0.weight", "path_phi.0.weight", "classifier.bias"}),
    renamed=_RENAMED,
    sizes=_sizes,
    left_out=("layers.0.norm.",),  # of the first layer, which is bare
)
