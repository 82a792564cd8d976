"""AMIL of RustinS/CrossFusion @ df5473d."""

from __future__ import annotations

from cftrain.models.released.family import Family, Sizes, State

_RENAMED = (
    (r"^attention_net\.0\.", "projection."),
    (r"^attention_net\.2\.attention_a\.0\.", "attention.content."),
    (r"^attention_net\.2\.attention_b\.0\.", "attention.gate."),
    (r"^attention_net\.2\.attention_c\.", "attention.score."),
    (r"^classifiers\.", "head."),
)


def _sizes(state: State, n_heads: int) -> Sizes:
    hidden_dim, feature_dim = state["attention_net.0.weight"].shape
    attention_dim = len(state["attention_net.2.attention_a.0.bias"])
    n_bins = len(state["classifiers.bias"])
    return feature_dim, {"hidden_dim": hidden_dim, "attention_dim": attention_dim, "n_bins": n_bins}


AMIL = Family(
    models=("abmil",),
    marks=frozenset({"attention_net.0.weight", "attention_net.2.attention_a.0.bias", "classifiers.bias"}),
    renamed=_RENAMED,
    sizes=_sizes,
)
