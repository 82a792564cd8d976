"""Gated attention pooling (ABMIL) with a survival head.

Reference: Ilse, Tomczak & Welling 2018, arXiv:1802.04712. Sizes and the absence of dropout follow the
AMIL of RustinS/CrossFusion, whose outputs it reproduces.

    h_n = ReLU(W x_n + b)                                        [N, H]
    s_n = w · (tanh(V h_n) ⊙ sigmoid(U h_n))                     [N]
    a   = softmax over the N patches of s,   z = Σ_n a_n h_n     [H]
    logits = C z + c                                             [K]

Legend: B slides, N patches, D features, H hidden_dim, A attention_dim, K time bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.patch_maps import PatchMap
from cftrain.models.pooling import GatedAttention, attention_map, weighted_means
from cftrain.zoo import ABMILConfig


class ABMIL(SurvivalModel):
    """Patches of one scale, weighted by gated attention.

    Linear weights start Xavier-normal and biases at 0, the custom for this model.
    """

    def __init__(self, feature_dim: int, config: ABMILConfig) -> None:
        super().__init__("abmil", (config.scale,), feature_dim, config)
        self.projection = nn.Linear(feature_dim, config.hidden_dim)
        self.attention = GatedAttention(config.hidden_dim, config.attention_dim, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden_dim, config.n_bins)
        self.apply(_initialise)

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]."""
        return self._pooled(self._scored(batch))

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K], and the weights a_n of the patches."""
        with self.evaluating(), torch.no_grad():
            scored = self._scored(batch)
            logits_BK = self._pooled(scored)
        return logits_BK, {"attention": attention_map(self.scales[0], [score_N1 for score_N1, _ in scored])}

    def _scored(self, batch: BagBatch) -> list[tuple[Tensor, Tensor]]:
        """Of each bag: s [N, 1], and h [N, H]."""
        scale = self.scales[0]
        h_NH = self.dropout(torch.relu(self.projection(self.rows(batch, scale))))
        lengths = list(batch.lengths[scale])
        return list(zip(torch.split(self.attention(h_NH), lengths), torch.split(h_NH, lengths), strict=True))

    def _pooled(self, bags: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        logits_BK: Tensor = self.head(weighted_means(bags))
        return logits_BK


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)
