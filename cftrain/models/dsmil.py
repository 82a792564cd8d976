"""DSMIL, dual-stream multiple instance learning, with a survival head.

Reference: Li, Li & Eliceiri 2021, arXiv:2011.08939. One stream scores every patch alone and picks the critical one;
the other weights all patches by their likeness to it. A class of the paper is a time bin here, C = K.

    c_n = W x_n + b                                  instance logits                   [N, K]
    m_k = argmax_n c_nk                              critical patch of bin k, the first of equals
    q_n = tanh(L2 ReLU(L1 x_n))                      queries                           [N, A]
    a_k = softmax over the N patches of q_n · q_{m_k} / sqrt(A)                        [K, N]
    z_k = Σ_n a_kn x_n                               one mean of the bag for each bin  [K, D]
    logits_j = Σ_{k,d} H_{j,k,d} z_kd + h_j          the bag stream                    [K]
    critical_k = max_n c_nk                          the instance stream               [K]

Training, variant "fixed": ½ loss(logits) + ½ loss(critical); "faithful": loss(logits). Predictions are `logits`.

Who says what:

- The paper's text, for one class: linear queries, no sqrt(A), values W_v x_n, and the mean of both streams' scores as
  the prediction.
- The authors' code, binli123/dsmil-wsi, has the formulas above: a critical patch per class, queries of two layers and
  the patch itself as its value (both are options there), H as a convolution as wide as the features. It trains
  with both losses and predicts with the mean of both streams' probabilities unless told otherwise.
- RustinS/CrossFusion @ df5473d, whose outputs this reproduces, predicts with the bag stream, and trains it alone: that
  is "faithful". An arg-max passes no gradient, so its W never moves, and critical patches are those of a random
  projection.
- Re-implementations mostly copy the authors' bag stream; look which of the two losses they train.

Under bfloat16 autocast the instance logits of a large bag have many equals, of which the first is critical.

Legend: B slides, N patches, D features, A attention_dim, K time bins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.patch_maps import PatchMap
from cftrain.zoo import DSMILConfig


class DSMIL(SurvivalModel):
    """Patches of one scale, weighted by their likeness to the critical patch of each time bin.

    Weights start as PyTorch's layers do. Memory is O(N (D + A)).
    """

    def __init__(self, feature_dim: int, config: DSMILConfig) -> None:
        super().__init__("dsmil", (config.scale,), feature_dim, config)
        A, K = config.attention_dim, config.n_bins
        self.instance = nn.Linear(feature_dim, K)
        self.query = nn.Sequential(nn.Linear(feature_dim, A), nn.ReLU(), nn.Linear(A, A), nn.Tanh())
        self.head = nn.Linear(K * feature_dim, K)
        self.both_streams = config.variant == "fixed"
        # a weight that is never trained must not decay either, whatever else shares its step
        self.instance.requires_grad_(self.both_streams)
        # rounded to float32, as the authors' code does: 1e-8 of it, which shows in float64
        self.divisor = float(np.float32(math.sqrt(A)))

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards, of the bag stream: [B, K]."""
        return self._pooled(self._bags(batch))

    def training_logits(self, batch: BagBatch) -> tuple[tuple[float, Tensor], ...]:
        """Half the bag stream, half the instance stream: both [B, K]; "faithful": the bag stream alone."""
        if not self.both_streams:
            return super().training_logits(batch)
        bags = self._bags(batch)
        return (0.5, self._pooled(bags)), (0.5, torch.stack([bag.critical for bag in bags]))

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K], and the weights a of the patches, mean over the K bins: the head adds the bins' means up."""
        with self.evaluating(), torch.no_grad():
            bags = self._bags(batch)
            logits_BK = self._pooled(bags)
        weights = tuple(bag.likeness.cpu().double().softmax(dim=1).mean(dim=0) for bag in bags)
        return logits_BK, {"attention": PatchMap(self.scales[0], weights, (0.0,) * len(batch))}

    def _bags(self, batch: BagBatch) -> list[_Bag]:
        scale = self.scales[0]
        x = self.rows(batch, scale)
        lengths = list(batch.lengths[scale])
        parts = (torch.split(rows, lengths) for rows in (x, self.instance(x), self.query(x)))
        return [self._bag(*of_bag) for of_bag in zip(*parts, strict=True)]

    def _bag(self, x_ND: Tensor, c_NK: Tensor, q_NA: Tensor) -> _Bag:
        critical_K, at_K = c_NK.max(dim=0)
        return _Bag(x_ND, critical_K, q_NA[at_K] @ q_NA.T / self.divisor)

    def _pooled(self, bags: list[_Bag]) -> Tensor:
        z_BKD = torch.stack([bag.likeness.softmax(dim=1) @ bag.x for bag in bags])
        logits_BK: Tensor = self.head(z_BKD.flatten(1))
        return logits_BK


class _Bag(NamedTuple):
    """What both streams know of one slide."""

    x: Tensor
    """[N, D]."""
    critical: Tensor
    """[K]; the largest instance logit of each bin."""
    likeness: Tensor
    """[K, N]; of each patch to each critical one, before the softmax."""
