"""DeepGraphSurv: patches as a graph, read by three graph convolutions, pooled by gated attention.

References: Li, Yao, Zhu, Li & Huang 2018, "Graph CNN for Survival Analysis on Whole Slide Pathological Images", MICCAI,
doi:10.1007/978-3-030-00934-2_20; and DeepGraphConv_Surv of mahmoodlab/Patch-GCN (Chen et al. 2021, arXiv:2107.13048),
which recent comparisons mean by this name, and which this is by default.

    h⁰ = x                                                        [N, D]
    hˡ = ReLU(convˡ(hˡ⁻¹))                            l = 1, 2, 3 [N, C]
    logits = gated attention pooling of h³, a layer with ReLU, a linear one (`gated_head`)   [K]

    gin:   conv(h)_i = W₂ ReLU(W₁ (h_i + Σ_{j in I(i)} h_j) + b₁) + b₂
    cheb:  conv(h)   = Σ_{κ < cheb_order} T_κ(L̂) h W_κ + b,   L̂ = -D^-½ A D^-½

Each patch lists k others: the ones with the most similar features, or the nearest. gin: I(i) are the patches that list
i. cheb: A joins two patches of which at least one lists the other, each pair once and with weight 1, so that the
Laplacian is symmetric; the rest is torch-geometric's ChebConv with lambda_max = 2.

Who says what:

- The paper, and its authors' code (uta-smile/DeepGraphSurv, TensorFlow 1): two spectral layers, of Chebyshev
  polynomials, on a Laplacian whose metric between features is learnt with the weights, beside a given graph; attention
  without gates; one risk trained with Cox's loss. All pairs of patches are compared in every step, so it samples one to
  two thousand of them. cheb keeps its kind of convolution, on a graph of all patches that is given once.
- DeepGraphConv_Surv has the formulas of gin. It raises AttributeError in its first step as shipped, as it asks for
  `pool`, which it never sets: nothing can be run to be faithful to, so there is no such variant here, and this is held
  to the formulas. Its graph is "latent" by default, in features, as here; but the notebook that builds it looks
  coordinates up among features, and this one is built right, and exactly. Its option to drop features at the input
  (`resample`, off by default) is left out.
- torchmil's DeepGraphSurv is spectral, on dense tables.

Weights start as in DeepGraphConv_Surv, as PyTorch's do; those of cheb as torch-geometric's.

Legend: N patches, D features, k neighbours, C hidden_dim, K time bins.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.gated_head import GatedHead
from cftrain.models.graph import ChebConv, GINConv
from cftrain.models.graph_sums import edges, undirected
from cftrain.models.patch_maps import PatchMap
from cftrain.models.pooling import attention_map
from cftrain.zoo import DeepGraphSurvConfig

N_CONVOLUTIONS = 3


class DeepGraphSurv(SurvivalModel):
    """Patches of one scale, each seen with its neighbours of three layers, weighted by gated attention."""

    def __init__(self, feature_dim: int, config: DeepGraphSurvConfig) -> None:
        super().__init__("deepgraphsurv", (config.scale,), feature_dim, config)
        C = config.hidden_dim
        self.neighbours, self.spectral = config.extras()[0], config.conv == "cheb"
        widths = pairwise((feature_dim, *[C] * N_CONVOLUTIONS))
        self.convolutions = nn.ModuleList(_convolution(*each, config) for each in widths)
        self.head = GatedHead(C, config.n_bins, config.dropout)

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
        h = self.rows(batch, scale)
        lists = self.extra(batch, self.neighbours)
        graph = undirected(lists) if self.spectral else edges(lists)
        for convolution in self.convolutions:
            h = torch.relu(convolution(h, graph))
        logits_BK, scores = self.head(h, batch.lengths[scale])
        return logits_BK, scores


def _convolution(inputs: int, width: int, config: DeepGraphSurvConfig) -> GINConv | ChebConv:
    return GINConv(inputs, width) if config.conv == "gin" else ChebConv(inputs, width, config.cheb_order)
