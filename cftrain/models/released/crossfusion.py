"""CrossFusion and its ablations, RustinS/CrossFusion @ df5473d. Their number of heads leaves no trace."""

from __future__ import annotations

import re

from cftrain.models.released.family import Family, Sizes, State

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
)


def _sizes(state: State, n_heads: int) -> Sizes:
    embed_dim = len(state["final_ln.weight"])
    layers = {found[1] for key in state if (found := re.match(r"final_transformer\.pre_layers\.layers\.(\d+)\.", key))}
    projections = (f"{part}.0.weight" for part in ("s_lin_proj", "source_pre_cross_attn"))
    widths = [state[key].shape[1] for key in projections if key in state]
    options: dict[str, int | str] = {
        "embed_dim": embed_dim,
        "n_heads": n_heads,
        "n_layers": len(layers),
        "n_bins": len(state["mlp_head.0.bias"]),
    }
    return widths[0] if widths else embed_dim, options


def _which(state: State) -> str:
    if "pre_final_linear.0.weight" in state:
        return "crossfusion-concat"
    return "crossfusion" if "conv_processor.conv3d.weight" in state else "crossfusion-single"


CROSSFUSION = Family(
    models=("crossfusion", "crossfusion-concat", "crossfusion-single"),
    marks=frozenset({"final_ln.weight", "mlp_head.0.bias"}),
    renamed=_RENAMED,
    sizes=_sizes,
    which=_which,
)
