"""ProtoSurv: prototypes of patch classes read the patches and their spatial graph; with a head of hazards.

Reference: Wu et al., "Leveraging tumor heterogeneity: heterogeneous graph representation learning for cancer survival
prediction in whole slide images", NeurIPS 2024. Sizes, norms and places of dropout follow the authors' code,
wjx-error/ProtoSurv.

    class(n) = argmin_c |f_n - centre_c|                                   centres of the training fold, see below
    μ_c  = GELU(LN(W mean of f over class c + b))                          [E]; of centre_c where the slide has none
    p_ck = μ_c + exp(logsigma_c) ⊙ direction_ck                            P prototypes of each class, learnt
    p_c  = 2 layers of cross-attention, each class its own, over all f     [P, E]
    h0   = GELU(LN(W f + b))                                               [N, G]
    h1   = GEN(h0),   h_l+1 = h_l + GELU(LN(GEN(h_l)))                     GEN as in Patch-GCN, see `GENConv`
    x    = W' GELU(LN(W [h0 | h1 | h2 | h3] + b)) + b'                     nodes, [N, E]
    p    = 4 layers of cross-attention of all C P prototypes over x        see `prototype_attention`
    logits = W LN(mean of p over the C P prototypes) + b                   [K]; LN without weights

Row n of the neighbour table lists the 4 patches nearest to n; edges go from n to them, so that a node hears from the
patches that list it, be they none.

What differs from the authors' code:

- Their classes are tumour, stroma, infiltrate, necrosis and other, told by the vision-language model CONCH. Here they
  are pseudo-classes: k-means centres of the patches of the fold's *training* examples (`fit`). Centres of a whole
  cohort would have seen the validated slides. They are kept with the weights; until `fit`, they are NaN, and so are
  the logits.
- The class of a patch passes no gradient, as with theirs; unlike theirs it may change with the features.
- A class that a slide lacks starts at its centre, as with the authors' pre-prototypes.
- K hazards with a bias in place of one Cox risk without.
- One loss, that of all models. Left out are the authors' two regularisers of the prototypes (compatibility with the
  patches of their own class, 0.01; orthogonality, 0.1) and their augmentations (noise on nodes, nodes set to zero,
  edges dropped, 10 to 30 % each; at most 25,000 patches). The "same loss" of a comparison has no room for them.

Legend: B slides, N patches of a slide, T of all slides, D features, C n_classes, P n_prototypes of a class,
E embed_dim, G graph_dim, K time bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cfkernels import gelu_dropout
from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.fitting import TrainingFold
from cftrain.models.graph import GENConv
from cftrain.models.graph_sums import edges
from cftrain.models.layers import LayerNorm
from cftrain.models.patch_maps import PatchMap, on_patches
from cftrain.models.prototype_attention import ROWS, PrototypeAttention, in_pieces
from cftrain.zoo import ProtoSurvConfig


class ProtoSurv(SurvivalModel):
    """Patches of one scale and their graph, read by prototypes of pseudo-classes.

    Weights start as the authors': PyTorch's own, logsigma Xavier uniform, directions normal. Memory is that of the
    nodes, O(N E), and of the prototypes' attention.
    """

    class_centres: Tensor
    """[C, D]; NaN before `fit`."""

    def __init__(self, feature_dim: int, config: ProtoSurvConfig) -> None:
        super().__init__("protosurv", (config.scale,), feature_dim, config)
        C, E = config.n_classes, config.embed_dim
        self.register_buffer("class_centres", torch.full((C, feature_dim), torch.nan))
        self.neighbours = config.extras()[0]
        self.class_projection = nn.Sequential(
            nn.Linear(feature_dim, E), nn.LayerNorm(E), nn.GELU(), nn.Dropout(config.dropout)
        )
        self.logsigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(C, 1, E)))
        self.directions = nn.Parameter(torch.randn(C, config.n_prototypes, E))
        self.class_layers = nn.ModuleList(_layers(config, feature_dim, config.class_layers) for _ in range(C))
        self.nodes = Nodes(feature_dim, config)
        self.fusion_layers = _layers(config, E, config.fusion_layers)
        self.norm = nn.LayerNorm(E, elementwise_affine=False)
        self.head = nn.Linear(E, config.n_bins)

    def fit(self, fold: TrainingFold) -> None:
        """Take the centres of the classes from the training patches of the fold, and from no others."""
        with torch.no_grad():
            self.class_centres.copy_(fold.prototypes(self.scales[0], len(self.class_centres)))

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]. NaN before `fit`."""
        p, bags = self._read(batch)
        return self._answered(self.fusion_layers[-1](p, bags))

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K], and the attention of the last layer, mean over prototypes and heads.

        A patch's score is what its node in the graph receives, which knows of its neighbours too.
        """
        with self.evaluating(), torch.no_grad():
            p, bags = self._read(batch)
            last = cast(PrototypeAttention, self.fusion_layers[-1])
            weights = last.weights(p, bags)
            logits_BK = self._answered(last.read(p, bags, weights))
        scale = self.scales[0]
        return logits_BK, {
            "attention": on_patches([each.flatten(0, 1) for each in weights], scale, batch.lengths[scale])
        }

    def _read(self, batch: BagBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """What the last layer reads: all prototypes [B, C P, E], and the nodes of each slide, B tensors [N_b, E]."""
        scale = self.scales[0]
        f, lengths = self.rows(batch, scale), list(batch.lengths[scale])
        patches = torch.split(f, lengths)
        classes = torch.split(self._classes(batch.features[scale]), lengths)
        p = self._prototypes(patches, classes)
        nodes = torch.split(self.nodes(f, self.extra(batch, self.neighbours)), lengths)
        for layer in self.fusion_layers[:-1]:
            p = layer(p, nodes)
        return p, nodes

    def _classes(self, features: Tensor) -> Tensor:
        """The class of each patch, [T], in the precision of the centres, whatever the rest is computed in."""
        centres = self.class_centres.detach()
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            squares = centres.square().sum(dim=1)
            pieces = torch.split(features, ROWS)
            found = [(squares - 2 * rows.to(centres.dtype) @ centres.T).argmin(dim=1) for rows in pieces]
        return torch.cat(found)

    def _prototypes(self, patches: Sequence[Tensor], classes: Sequence[Tensor]) -> Tensor:
        """The prototypes of all classes after the layers of their class: [B, C P, E]."""
        means = torch.stack([self._means(f, own) for f, own in zip(patches, classes, strict=True)])
        mu = self.class_projection(means).unsqueeze(2)  # [B, C, 1, E]
        starts = mu + self.logsigma.exp() * self.directions
        found = []
        for p, layers in zip(starts.unbind(1), self.class_layers, strict=True):
            for layer in cast(nn.ModuleList, layers):
                p = layer(p, patches)
            found.append(p)
        return torch.cat(found, dim=1)

    def _means(self, f: Tensor, classes: Tensor) -> Tensor:
        """The mean patch of each class of a slide, [C, D]; the centre of a class that it lacks."""
        belongs = classes == torch.arange(len(self.class_centres), device=f.device).unsqueeze(1)
        counts = belongs.sum(dim=1, keepdim=True)
        sums = belongs.to(f.dtype) @ f
        return torch.where(counts > 0, sums / counts.clamp(min=1), self.class_centres.to(f.dtype))

    def _answered(self, p: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(self.norm(p.mean(dim=1)))
        return logits_BK


class Nodes(nn.Module):
    """Patches that heard from their neighbours: features [T, D] to nodes [T, E]."""

    def __init__(self, feature_dim: int, config: ProtoSurvConfig) -> None:
        super().__init__()
        G, E = config.graph_dim, config.embed_dim
        self.node_dropout, self.graph_dropout = config.node_dropout, config.graph_dropout
        self.projection = nn.Linear(feature_dim, G)
        self.projection_norm = LayerNorm(G)
        self.convolutions = nn.ModuleList(GENConv(G, bias=False) for _ in range(config.graph_layers))
        self.norms = nn.ModuleList(LayerNorm(G) for _ in range(config.graph_layers - 1))
        self.wide = nn.Linear((1 + config.graph_layers) * G, E)
        self.wide_norm = LayerNorm(E)
        self.out = nn.Linear(E, E)

    def forward(self, f: Tensor, neighbours: Tensor) -> Tensor:
        """[T, D] features and int64 [T, k] rows that each patch sends to, to [T, E]."""
        rate, targets = self.graph_dropout if self.training else 0.0, edges(neighbours)
        first = self._activated(self.projection_norm(self.projection(f)))
        found = [first, _convolved(self.convolutions[0], first, targets)]
        for convolution, norm in zip(self.convolutions[1:], self.norms, strict=True):
            h = found[-1]
            h = h + functional.gelu(norm(_convolved(convolution, h, targets)))
            found.append(functional.dropout(h, rate))
        return in_pieces(self._joined, *found, draws=True)

    def _joined(self, *found: Tensor) -> Tensor:
        wide = self._activated(self.wide_norm(self.wide(torch.cat(found, dim=1))))
        out: Tensor = self.out(wide)
        return out

    def _activated(self, x: Tensor) -> Tensor:
        return gelu_dropout(x, dropout_p=self.node_dropout if self.training else 0.0)


def _convolved(convolution: nn.Module, h: Tensor, targets: Tensor) -> Tensor:
    """Made again in the backward: of what is as long as the edges, nothing is kept."""
    out: Tensor = checkpoint(convolution, h, targets, use_reentrant=False, preserve_rng_state=False)
    return out


def _layers(config: ProtoSurvConfig, rows_dim: int, n: int) -> nn.ModuleList:
    """Layers of cross-attention over rows so wide."""
    return nn.ModuleList(
        PrototypeAttention(config.embed_dim, rows_dim, config.mlp_dim, config.n_heads, config.dropout) for _ in range(n)
    )
