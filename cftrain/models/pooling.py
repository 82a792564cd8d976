"""Pooling by attention: scores of patches, the means that they weight, and the weights as a map.

Legend: B slides, N_b patches of slide b, H width of a patch, A width of the attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cftrain.models.patch_maps import PatchMap


class GatedAttention(nn.Module):
    """One score per patch, [N, H] to [N, 1], before the softmax over a bag: w · (tanh(V h) ⊙ sigmoid(U h)).

    Reference: Ilse, Tomczak & Welling 2018, arXiv:1802.04712, eq. 9; with biases.
    """

    def __init__(self, hidden_dim: int, attention_dim: int, dropout: float) -> None:
        super().__init__()
        self.content = nn.Linear(hidden_dim, attention_dim)
        self.gate = nn.Linear(hidden_dim, attention_dim)
        self.score = nn.Linear(attention_dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_NH: Tensor) -> Tensor:
        content_NA = self.dropout(torch.tanh(self.content(h_NH)))
        gate_NA = self.dropout(torch.sigmoid(self.gate(h_NH)))
        score_N1: Tensor = self.score(content_NA * gate_NA)
        return score_N1


def weighted_means(bags: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean patch of each bag, weighted by the softmax of its scores: pairs ([N_b, 1], [N_b, H]) to [B, H]."""
    return torch.cat([score_N1.softmax(dim=0).T.to(rows_NH.dtype) @ rows_NH for score_N1, rows_NH in bags])


def attention_map(scale: int, scores: Sequence[Tensor]) -> PatchMap:
    """Those weights as a map: of each slide's scores [N_b, 1]."""
    weights = tuple(score[:, 0].cpu().double().softmax(dim=0) for score in scores)
    return PatchMap(scale, weights, (0.0,) * len(weights))
