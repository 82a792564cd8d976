"""Patch-GCN: patches as a graph in space, read by residual graph convolutions, pooled by gated attention.

Reference: Chen et al. 2021, arXiv:2107.13048. Its layers are those of Li et al. 2020, arXiv:2006.07739 (GEN), without
edge features. Sizes and order follow PatchGCN_Surv of the authors' code (mahmoodlab/Patch-GCN) with torch-geometric 2,
whose outputs this reproduces.

    h⁰ = dropout(ReLU(W x + b))                                        [N, C]
    h¹ = GEN¹(h⁰)                                                      bare: no norm, no ReLU, no residual
    hˡ = layer dropout(hˡ⁻¹ + ReLU(LN(GENˡ(hˡ⁻¹))))    l = 2 .. L-1    [N, C]
    h  = dropout(ReLU(P [h⁰ | h¹ | … | hᴸ⁻¹] + p))                     [N, LC]
    logits = gated attention pooling of h, a layer with ReLU, a linear one (`gated_head`)   [K]

    GEN(h)_i = MLP(h_i + Σ_{j in I(i)} p_ij ⊙ m_j),   m_j = ReLU(h_j) + 1e-7
    p_ij     = softmax over I(i) of t m_j, each channel for itself, t learnt for each layer
    MLP      = Linear C to 2C, LN, ReLU, Linear 2C to C

Each patch lists the k others nearest in space, and I(i) are the patches that list i, as the authors build their edges:
from none, which leaves MLP(h_i), to more than k.

Who says what:

- The paper's text has residual layers throughout; in the code, and here, the first one is bare.
- The code can also read a graph that is "latent", in features, which the notebook that builds graphs gets wrong: it
  looks coordinates up among features. `deepgraphsurv` is the model with such a graph.
- The authors' neighbours are those of an approximate search (nmslib); here they are exact.
- Linear layers within GEN had a bias in torch-geometric 1 and have none in 2: `mlp_bias`.
- The authors' code leaves out slides of more than 100,000 patches in training; here the largest one takes its turn.
- torchmil's PatchGCN has another convolution (GCN) on dense tables.

A patient of several slides is one bag of graphs that are not connected, as there. Weights start as PyTorch's do, t at
1, as in the authors' code.

Legend: N patches, D features, k neighbours, C hidden_dim, L n_layers, K time bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.gated_head import GatedHead
from cftrain.models.graph import GENConv
from cftrain.models.graph_sums import edges
from cftrain.models.layers import LayerNorm
from cftrain.models.patch_maps import PatchMap
from cftrain.models.pooling import attention_map
from cftrain.zoo import PatchGCNConfig


class PatchGCN(SurvivalModel):
    """Patches of one scale, each seen with its surroundings of n_layers - 1 steps, weighted by gated attention."""

    def __init__(self, feature_dim: int, config: PatchGCNConfig) -> None:
        super().__init__("patch-gcn", (config.scale,), feature_dim, config)
        C, wide = config.hidden_dim, config.hidden_dim * config.n_layers
        self.neighbours = config.extras()[0]
        self.projection = nn.Linear(feature_dim, C)
        residual = (ResidualLayer(config) for _ in range(config.n_layers - 2))
        self.layers = nn.ModuleList([GraphLayer(config), *residual])
        self.combination = nn.Linear(wide, wide)
        self.dropout = nn.Dropout(config.dropout)
        self.head = GatedHead(wide, config.n_bins, config.dropout)

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]."""
        logits_BK, _ = self._read(batch)
        return logits_BK

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K], and the weights of the patches in the pooling."""
        with self.evaluating(), torch.no_grad():
            logits_BK, scores = self._read(batch)
        return logits_BK, {"attention": attention_map(self.scales[0], scores)}

    def _read(self, batch: BagBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits [B, K], and the pooling's scores of each slide, [N, 1]."""
        scale = self.scales[0]
        x, targets = self.rows(batch, scale), edges(self.extra(batch, self.neighbours))
        of_layers = [self.dropout(torch.relu(self.projection(x)))]
        for layer in self.layers:
            of_layers.append(layer(of_layers[-1], targets))
        combined = self.dropout(torch.relu(self.combination(torch.cat(of_layers, dim=1))))
        logits_BK, scores = self.head(combined, batch.lengths[scale])
        return logits_BK, scores


class GraphLayer(nn.Module):
    """GEN(h): [N, C] to [N, C]."""

    def __init__(self, config: PatchGCNConfig) -> None:
        super().__init__()
        self.conv = GENConv(config.hidden_dim, config.mlp_bias)

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        out: Tensor = self.conv(h, targets)
        return out


class ResidualLayer(GraphLayer):
    """layer dropout(h + ReLU(LN(GEN(h)))): [N, C] to [N, C]."""

    def __init__(self, config: PatchGCNConfig) -> None:
        super().__init__(config)
        self.norm = LayerNorm(config.hidden_dim)
        self.dropout = nn.Dropout(config.layer_dropout)

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        out: Tensor = self.dropout(h + torch.relu(self.norm(self.conv(h, targets))))
        return out
