"""DSMIL of RustinS/CrossFusion @ df5473d."""

from __future__ import annotations

from cftrain.models.released.family import Family, Sizes, State

_RENAMED = (
    (r"^i_classifier\.fc\.0\.", "instance."),
    (r"^b_classifier\.q\.", "query."),
    (r"^b_classifier\.fcc\.", "head."),
)


def _sizes(state: State, n_heads: int) -> Sizes:
    n_bins, feature_dim = state["i_classifier.fc.0.weight"].shape
    # the released code trains them so; predictions are the same in both variants
    attention_dim = len(state["b_classifier.q.0.bias"])
    return feature_dim, {"attention_dim": attention_dim, "n_bins": n_bins, "variant": "faithful"}


DSMIL = Family(
    models=("dsmil",),
    marks=frozenset({"i_classifier.fc.0.weight", "b_classifier.q.0.bias"}),
    renamed=_RENAMED,
    sizes=_sizes,
)
