"""The end of Patch-GCN and DeepGraphConv: gated attention pooling, one more layer, logits.

B slides, N_b patches of slide b, H width, K time bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cftrain.models.pooling import GatedAttention, weighted_means


class GatedHead(nn.Module):
    """Packed rows h [sum N_b, H] to logits [B, K].

    s_n = w · (tanh(V h_n) ⊙ sigmoid(U h_n)),  a = softmax of a slide's s,  z = Σ_n a_n h_n,  logits = C ReLU(P z): with
    biases, all H wide; dropout in both gates and behind the ReLU.
    """

    def __init__(self, width: int, n_bins: int, dropout: float) -> None:
        super().__init__()
        self.attention = GatedAttention(width, width, dropout)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, n_bins)

    def forward(self, h: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits [B, K], and each slide's scores s [N_b, 1]."""
        scores = torch.split(self.attention(h), list(lengths))
        z_BH = weighted_means(zip(scores, torch.split(h, list(lengths)), strict=True))
        logits_BK: Tensor = self.classifier(self.dropout(torch.relu(self.projection(z_BH))))
        return logits_BK, scores
