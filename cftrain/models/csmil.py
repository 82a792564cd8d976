"""CS-MIL, cross-scale attention guided multiple instance learning, with a survival head.

References: Deng et al. 2022, arXiv:2208.07322 (MMMI 2022), and Deng et al. 2024, arXiv:2304.00216 (Medical Image
Analysis). Formulas and widths are those of the authors' code (hrlblab/CS-MIL).

Instance n is a patch of the finest scale with its ancestor at each coarser one. All scales share every weight.

    e_ns = ReLU(W x_ns + b)                              embedded                          [E]
    g_ns = w' · ReLU(V' e_ns + v') + b'                  score of a scale                  scalar
    h_n  = Σ_s g_ns e_ns                                 fused                             [E]
    a    = softmax over the N instances of w · tanh(V h_n + v) + b                         [N]
    logits = C dropout(ReLU(U Σ_n a_n h_n + u)) + c                                        [K]

Who says what:

- The paper weights the scales with a softmax over g_ns; the code takes the scores as they are, of either sign, and
  applies the softmax only for pictures. `scale_softmax` is the paper, the default the code.
- The code's instances are sampled: 8 k-means clusters of each slide, about 3 patches of each, a new bag every step, and
  the mean of 100 such bags as the prediction. Here all patches of a slide are its bag, which needs no clusters and no
  draws.
- The code's one sigmoid is K hazards here.
- Its instances are triples, so that every patch has its ancestors. Here a missing one is left out: it adds nothing to
  h_n, and the softmax over scales is one over those that there are. A patch of the finest scale is never dropped; a
  coarse patch without children is in no instance.

Coarse patches are embedded and scored once, and what they add to h_n is looked up by their children.

Legend: B slides, N patches of the finest scale, M of a coarse one, D features, E embed_dim, S scales, K time bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cftrain.models.ancestors import Ancestors
from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.patch_maps import PatchMap
from cftrain.models.pooling import attention_map, weighted_means
from cftrain.zoo import CSMILConfig
from cftrain.zoo.pyramid import scales_of


class CSMIL(SurvivalModel):
    """Patches fused with their ancestors by an attention over scales, then weighted by an attention over patches.

    Weights start as PyTorch's layers do, as in the authors' code. Memory is O(N (D + E)).
    """

    def __init__(self, feature_dim: int, config: CSMILConfig) -> None:
        super().__init__("csmil", scales_of(config.scales), feature_dim, config)
        E, H = config.embed_dim, config.hidden_dim
        self.embedding = nn.Sequential(nn.Linear(feature_dim, E), nn.ReLU())
        self.scale_attention = nn.Sequential(nn.Linear(E, H), nn.ReLU(), nn.Linear(H, 1))
        self.attention = nn.Sequential(nn.Linear(E, H), nn.Tanh(), nn.Linear(H, 1))
        self.head = nn.Sequential(nn.Linear(E, H), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(H, config.n_bins))
        self.softmax_over_scales = config.scale_softmax

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]."""
        return self._pooled(self._scored(batch))

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K], and the weights a_n of the finest patches.

        There is no map of the scales: their scores are of either sign and add up to nothing.
        """
        with self.evaluating(), torch.no_grad():
            scored = self._scored(batch)
            logits_BK = self._pooled(scored)
        return logits_BK, {"attention": attention_map(self.scales[-1], [score_N1 for _, score_N1 in scored])}

    def _scored(self, batch: BagBatch) -> list[tuple[Tensor, Tensor]]:
        """Of each bag: h [N, E], and the score of each instance before the softmax [N, 1], in float32 at least."""
        views = [self._view(batch, scale) for scale in reversed(self.scales)]
        h_NE = _by_softmax(views) if self.softmax_over_scales else _by_score(views)
        score_N1 = _wide(self.attention(h_NE))
        lengths = list(batch.lengths[self.scales[-1]])
        return list(zip(torch.split(h_NE, lengths), torch.split(score_N1, lengths), strict=True))

    def _view(self, batch: BagBatch, scale: int) -> _View:
        ancestors = None if scale == self.scales[-1] else Ancestors.of(self, batch, scale)
        e = self.embedding(self.rows(batch, scale))
        return _View(e, self.scale_attention(e), ancestors)

    def _pooled(self, bags: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        z_BE = weighted_means((score_N1, h_NE) for h_NE, score_N1 in bags)
        logits_BK: Tensor = self.head(z_BE)
        return logits_BK


class _View(NamedTuple):
    """One scale of a batch."""

    e: Tensor
    """[M, E], or [N, E] at the finest."""
    g: Tensor
    """[M, 1]."""
    ancestors: Ancestors | None
    """None at the finest."""

    def of_instances(self, rows: Tensor, missing: float) -> Tensor:
        """[M, W] to [N, W]; what a missing ancestor is."""
        if self.ancestors is None:
            return rows
        spare = rows.new_full((len(self.ancestors.lengths), rows.shape[1]), missing)
        return self.ancestors.look_up(self.ancestors.table(rows, spare))


def _by_score(views: Sequence[_View]) -> Tensor:
    """h, [N, E]."""
    fused = views[0].g * views[0].e
    for view in views[1:]:
        fused = fused + view.of_instances(view.g * view.e, missing=0.0)
    return fused


def _by_softmax(views: Sequence[_View]) -> Tensor:
    """h, [N, E]; a missing scale has the weight 0."""
    scores_NS = torch.cat([view.of_instances(_wide(view.g), missing=-torch.inf) for view in views], dim=1)
    weights = torch.split(scores_NS.softmax(dim=1).to(views[0].e.dtype), 1, dim=1)
    fused = weights[0] * views[0].e
    for weight, view in zip(weights[1:], views[1:], strict=True):
        fused = fused + weight * view.of_instances(view.e, missing=0.0)
    return fused


def _wide(scores: Tensor) -> Tensor:
    """In float32 at least, under autocast too."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
