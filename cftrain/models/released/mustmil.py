"""MuSTMIL of ilmaro8/MuSTMIL: two scales, 10x before 5x.

Its tensors do not tell which scales; those are the ones that its code reads. Its frozen ResNet (`conv_layers`) makes
the features and is no part of our model.
"""

from __future__ import annotations

from cftrain.models.released.family import Family, Sizes, State

_RENAMED = (
    (r"^embeddings_fc\.(\d+)\.0\.", r"own_heads.\1."),
    (r"^attention_general\.", "joint_attention."),
    (r"^(attentions\.\d+|joint_attention)\.0\.", r"\1.hidden."),
    (r"^(attentions\.\d+|joint_attention)\.2\.", r"\1.score."),
    (r"^classifier\.", "head."),
)


def _sizes(state: State, n_heads: int) -> Sizes:
    embed_dim, feature_dim = state["embeddings.0.weight"].shape
    three = "embeddings.2.weight" in state
    return feature_dim, {
        "scales": "5,10,20" if three else "5,10",
        "embed_dim": embed_dim,
        "attention_dim": len(state["attention_general.0.bias"]),
        "n_bins": len(state["classifier.bias"]),
    }


MUSTMIL = Family(
    models=("mustmil",),
    marks=frozenset({"embeddings.0.weight", "attention_general.0.bias", "classifier.bias"}),
    renamed=_RENAMED,
    sizes=_sizes,
    left_out=("conv_layers.",),
)
