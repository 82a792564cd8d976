"""SCMIL: a learnt filter keeps patches, which attend within clusters of a slide; with a head of hazards or a mixture.

Reference: Yang et al., "SCMIL: Sparse Context-aware Multiple Instance Learning for Predicting Cancer Survival
Probability Distribution in Whole Slide Images", MICCAI 2024, arXiv:2407.00664. Formulas and sizes follow the authors'
code, yang-ze-kang/SCMIL, in the branch whose attention is as wide as the features; its first projection is not used
there, and not here.

    p_n = sigmoid(w · GELU(W f_n + b) + c)                            the filter: how far a patch passes
    x_n = p_n f_n                                                     [D]
    kept = patches with p_n > 0.5, in clusters of about 64, see below
    y_n = x_n + MSA(x of n's cluster)_n for kept patches,  y_n = x_n for the others
    a   = softmax over all N patches of the slide of u · (tanh(V y_n) ⊙ sigmoid(U y_n))
    z   = Σ_n a_n y_n                                                 [D]
    logits = C z + c                                                  [K]; head "mdn": `SurvivalMixture`

MSA is attention of H heads, D / H wide, without a layer norm.

Clusters of a slide's M kept patches (`slide_clusters`): k-means of max(1, M // 64) centres, at most 5 iterations, on
0.8 · standardised x beside 0.2 · standardised coordinates; clusters of 128 and more are cut. They come from one slide
and pass no gradient: none sees another slide, or a label. Where all slides of a patient are one bag, they are clustered
as if they lay on one another.

The logits jump where p_n passes 0.5 and where a patch changes its cluster, so that gradients tell less of them than
of those of a smooth model.

Where facts of the authors' code are open, or this differs:

- The head. A comparison "with the same loss" wants hazards of time bins: that is the default, a linear layer in place
  of the whole mixture. "mdn" is the authors' mixture, of which hazards of the bins are computed; it is trained with
  the loss of the other models, not with theirs.
- Projections of the attention have biases.
- K-means starts at patches drawn at random, ends on an assignment, and cuts a cluster of s patches into s // 64 runs.
- Dropout acts on attention probabilities within the clusters, and in the mixture; the gates have none.
- Weights start as PyTorch's layers do. So at the start p is near 0.5, and chance has it on which side. Of a batch
  without a kept patch the attention is left out; its weights get gradients of zero.

Legend: B slides, N patches of a slide, T of all slides, M kept ones, D features, H heads, K time bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cfkernels import attention
from cftrain.errors import ConfigError
from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.fitting import TrainingFold
from cftrain.models.patch_maps import PatchMap
from cftrain.models.pooling import GatedAttention, attention_map, weighted_means
from cftrain.models.slide_clusters import Clusters, slide_clusters, without_numbers
from cftrain.models.survival_mixture import SurvivalMixture
from cftrain.zoo import Extra, SCMILConfig


class SCMIL(SurvivalModel):
    """Patches of one scale: filtered, in attention within clusters where they are kept, then pooled.

    Memory is O(N D): about 8 rows of D numbers a patch are kept for the backward. Time is O(M · 64) for the attention
    and O(M² / 64) for the clusters; without gradients as with them.

    Where memory is counted with tensors that hold no numbers, all patches are kept: the worst case.

    Raises
    ------
    ConfigError
        The features are not a multiple of n_heads wide.
    """

    def __init__(self, feature_dim: int, config: SCMILConfig) -> None:
        super().__init__("scmil", (config.scale,), feature_dim, config)
        _check_width(feature_dim, config.n_heads)
        self.read: Extra | None = next(iter(config.extras()), None)
        self.coordinate_weight = config.coordinate_weight
        self.cluster_size, self.kmeans_iterations = config.cluster_size, config.kmeans_iterations
        self.filter = nn.Sequential(
            nn.Linear(feature_dim, config.filter_dim), nn.GELU(), nn.Linear(config.filter_dim, 1)
        )
        self.context = ClusterAttention(feature_dim, config.n_heads, config.dropout)
        self.attention = GatedAttention(feature_dim, config.attention_dim, dropout=0.0)
        self.head = _head(feature_dim, config)

    def fit(self, fold: TrainingFold) -> None:
        """Head "mdn": take where the time bins end. Nothing otherwise."""
        if isinstance(self.head, SurvivalMixture):
            self.head.fit(fold)

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]. With the head "mdn", NaN before `fit`."""
        return self._pooled(self._encoded(batch))

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K]; the weights a_n of the patches; and p_n as a share of the sum of p over the slide.

        What a kept patch weighs holds what it heard from its cluster.
        """
        with self.evaluating(), torch.no_grad():
            bags = self._encoded(batch)
            logits_BK = self._pooled(bags)
        passed = [bag.filter_score[:, 0].cpu().double().sigmoid() for bag in bags]
        shares = PatchMap(self.scales[0], tuple(p / p.sum() for p in passed), (0.0,) * len(batch))
        return logits_BK, {"attention": attention_map(self.scales[0], [bag.score for bag in bags]), "filter": shares}

    def _encoded(self, batch: BagBatch) -> list[_Bag]:
        scale = self.scales[0]
        f, lengths = self.rows(batch, scale), list(batch.lengths[scale])
        filter_score = self.filter(f)
        x = torch.sigmoid(filter_score) * f
        clusters = self._clusters(x, filter_score, batch)
        # each row of `order` is there once: a sum in place, and nothing left to chance on a GPU
        y = x.index_add(0, clusters.order, self.context(x[clusters.order], clusters.sizes).to(x.dtype))
        parts = (torch.split(rows, lengths) for rows in (y, self.attention(y), filter_score))
        return [_Bag(*of_bag) for of_bag in zip(*parts, strict=True)]

    def _clusters(self, x: Tensor, filter_score: Tensor, batch: BagBatch) -> Clusters:
        """Of all slides: rows of the packed batch, and the sizes of all clusters, slide after slide."""
        lengths = list(batch.lengths[self.scales[0]])
        places = torch.split(self.extra(batch, self.read), lengths) if self.read else (None,) * len(lengths)
        bags = zip(torch.split(x, lengths), torch.split(filter_score, lengths), places, strict=True)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            found = [self._clusters_of(*bag) for bag in bags]
        order = torch.cat([own.order + start for own, start in zip(found, accumulate([0, *lengths]), strict=False)])
        return Clusters(order, tuple(size for own in found for size in own.sizes))

    def _clusters_of(self, x: Tensor, filter_score: Tensor, places: Tensor | None) -> Clusters:
        """Of one slide: its rows, and the sizes of its clusters."""
        kept = _kept(filter_score)
        order, sizes = slide_clusters(
            x[kept],
            None if places is None else places[kept],
            weight=self.coordinate_weight,
            size=self.cluster_size,
            iterations=self.kmeans_iterations,
        )
        return Clusters(kept[order], sizes)

    def _pooled(self, bags: Sequence[_Bag]) -> Tensor:
        logits_BK: Tensor = self.head(weighted_means((bag.score, bag.y) for bag in bags))
        return logits_BK


class _Bag(NamedTuple):
    """What the pooling knows of one slide."""

    y: Tensor
    """[N, D]."""
    score: Tensor
    """[N, 1]; of the pooling, before the softmax."""
    filter_score: Tensor
    """[N, 1]; p before the sigmoid."""


class ClusterAttention(nn.Module):
    """Attention within each cluster, with projections: [M, D] to [M, D], clusters one after the other."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        q, k, v = self.query_key_value(x).view(len(x), 3, self.n_heads, x.shape[1] // self.n_heads).unbind(1)
        if sizes:
            dropout_p = self.dropout if self.training else 0.0
            y = attention(q, k, v, q_lengths=sizes, kv_lengths=sizes, dropout_p=dropout_p)
        else:
            y = v  # no rows; weights get gradients all the same, so that a step does not depend on its packs
        out: Tensor = self.out(y.flatten(1))
        return out


def _kept(scores: Tensor) -> Tensor:
    """The rows with p > 0.5, which is a score above 0: int64 [M] of [N, 1]; all rows where there are no numbers."""
    if without_numbers(scores):
        return torch.arange(len(scores), device=scores.device)
    return (scores[:, 0] > 0).nonzero()[:, 0]


def _head(width: int, config: SCMILConfig) -> nn.Module:
    if config.head == "hazards":
        return nn.Linear(width, config.n_bins)
    return SurvivalMixture(width, config.mdn_dim, config.n_components, config.n_bins, config.dropout)


def _check_width(width: int, n_heads: int) -> None:
    if width % n_heads:
        divisor = max(n for n in range(1, n_heads) if width % n == 0)
        found = f"got {width} features and n_heads={n_heads}"
        raise ConfigError(f"scmil: features must be a multiple of n_heads wide, {found}; set n_heads to {divisor}")
