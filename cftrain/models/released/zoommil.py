"""ZoomMIL of histocartography/zoommil @ 825ba9f.

How many patches it zooms into leaves no trace: 12 in its configurations.

They train at 1.25x, 2.5x and 10x; here the three are 5x, 10x and 20x.
"""

from __future__ import annotations

from cftrain.models.released.family import Family, Sizes, State

_RENAMED = (
    (r"^fc_(low|mid|high)_mag\.0\.", r"\1.projection."),
    (r"^ga_(low|mid|high)_mag\.", r"\1.attention."),
    (r"^aux_ga_(low|mid)_mag\.", r"\1.zoom."),
    (r"\.attention_a\.0\.", ".content."),
    (r"\.attention_b\.0\.", ".gate."),
    (r"\.attention_c\.", ".score."),
    (r"^classify_head\.", "head."),
)


def _sizes(state: State, n_heads: int) -> Sizes:
    hidden_dim, feature_dim = state["fc_low_mag.0.weight"].shape
    return feature_dim, {
        "hidden_dim": hidden_dim,
        "attention_dim": len(state["ga_low_mag.attention_a.0.bias"]),
        "n_bins": len(state["classify_head.bias"]),
        "variant": "faithful",  # the released code trains them so; predictions are the same in both variants
    }


ZOOMMIL = Family(
    models=("zoommil",),
    marks=frozenset({"fc_low_mag.0.weight", "aux_ga_low_mag.attention_c.weight", "classify_head.bias"}),
    renamed=_RENAMED,
    sizes=_sizes,
)
