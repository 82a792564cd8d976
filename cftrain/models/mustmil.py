"""MuSTMIL, multi-scale task multiple instance learning, with a survival head.

Reference: Marini et al. 2021, "Multi-Scale Task Multiple Instance Learning for the Classification of Digital
Pathology Images with Global Annotations", PMLR 156:170-181. Formulas and widths are those of the authors' code
(ilmaro8/MuSTMIL), whose outputs this reproduces.

Row n is a patch of the finest scale with its ancestor at each coarser one. A class of the paper is a time bin here.

    e_ns = W_s x_ns + b_s                                       embedded                          [L]
    a_s  = softmax over the N rows of V_s tanh(U_s e_ns)       an attention for each time bin    [N, K]
    o_s  = C_s (Σ_n a_snk e_ns for each bin, one after the other) + c_s         logits of scale s [K]
    e_n  = e_n of the finest scale | next | coarsest                                              [S L]
    a    = softmax over the N rows of V tanh(U e_n)                                               [N, K]
    logits = C (Σ_n a_nk e_n for each bin, one after the other) + c                               [K]

Training: loss(logits) + Σ_s loss(o_s), all with weight 1: the code reads an alpha and does not use it.
Predictions are `logits`.

Where this differs from the code:

- The code's two scales are 10x and 5x. The formulas are for any; by default here there are three.
- It clamps probabilities to [1e-7, 1 - 1e-7]; here the losses take logits, and nothing is clamped.
- Its rows come from a list of pairs, so that every patch has a parent. Here one without takes in its place the mean
  embedding of the slide's patches at that scale, which tells of the slide and nothing of the place; a patch of the
  finest scale is never dropped. A coarse patch without children is in no row, as there; it counts in that mean alone.
- Its ResNet is frozen, and is not part of this model.

The rows are never made. Coarse patches are embedded, scored and averaged once, with the number of their children as a
weight, or the sum of what their children receive: the same numbers, and the memory of a coarse scale is its own.

Legend: B slides, N patches of the finest scale, M of a coarse one, D features, L embed_dim, A attention_dim, S scales,
K time bins, T rows of a scale: N, or M + B where a row for missing parents stands behind those of every slide.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cftrain.models.ancestors import Ancestors
from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.patch_maps import PatchMap
from cftrain.zoo import MuSTMILConfig
from cftrain.zoo.pyramid import scales_of


class MuSTMIL(SurvivalModel):
    """Patches with their ancestors: an attention over each scale, and one over all scales together.

    Weights start as PyTorch's layers do, those of the scales with the same numbers, as in the authors' code. Memory is
    O(N (D + L)).
    """

    def __init__(self, feature_dim: int, config: MuSTMILConfig) -> None:
        super().__init__("mustmil", scales_of(config.scales), feature_dim, config)
        L, K, S = config.embed_dim, config.n_bins, len(self.scales)
        self.embeddings = _alike(nn.Linear(feature_dim, L), S)
        self.attentions = _alike(RowAttention(L, config.attention_dim, K), S)
        self.own_heads = _alike(nn.Linear(K * L, K), S)
        self.joint_attention = RowAttention(S * L, config.attention_dim, K)
        self.head = nn.Linear(K * S * L, K)

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards, of all scales together: [B, K]."""
        scales = self._embedded(batch)
        return self._joint_logits(scales, self._joint_scores(scales))

    def training_logits(self, batch: BagBatch) -> tuple[tuple[float, Tensor], ...]:
        """Those of all scales together, then each scale's own, the finest first: all [B, K], with weight 1."""
        scales = self._embedded(batch)
        joint = self._joint_logits(scales, self._joint_scores(scales))
        own = zip(scales, self._own_scores(scales), self.own_heads, strict=True)
        return (1.0, joint), *((1.0, head(_means(scale, scores).flatten(1))) for scale, scores, head in own)

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K]; the weights a of the finest patches, and of each scale a_s, mean over the K bins.

        With two scales there are the maps of those two. In a coarse scale's own map a patch receives what all rows do
        that it is in; what rows without a parent receive there is elsewhere.
        """
        with self.evaluating(), torch.no_grad():
            scales = self._embedded(batch)
            joint, own = self._joint_scores(scales), self._own_scores(scales)
            logits_BK = self._joint_logits(scales, joint)
        maps = {"joint": _map(scales[0], joint)}
        for scale, scores in zip(reversed(scales), reversed(own), strict=True):
            maps[f"own-{scale.scale}x"] = _map(scale, scores)
        return logits_BK, maps

    def _embedded(self, batch: BagBatch) -> list[_Scale]:
        """Of every scale, the finest first."""
        finest = self.scales[-1]
        return [
            self._embedded_scale(batch, scale, embedding, None if scale == finest else Ancestors.of(self, batch, scale))
            for scale, embedding in zip(reversed(self.scales), self.embeddings, strict=True)
        ]

    def _embedded_scale(self, batch: BagBatch, scale: int, embedding: nn.Module, lookup: Ancestors | None) -> _Scale:
        e, lengths = embedding(self.rows(batch, scale)), batch.lengths[scale]
        if lookup is None:
            return _Scale(scale, e, lengths, None)
        means_BL = torch.stack([own.mean(dim=0) for own in torch.split(e, list(lengths))])
        return _Scale(scale, lookup.table(e, means_BL), lookup.table_lengths, lookup)

    def _own_scores(self, scales: Sequence[_Scale]) -> list[Tensor]:
        """Each scale's [T, K], before the softmax over the rows of a slide; -inf where there is no child."""
        return [
            attention(scale.e) + scale.log_children() for scale, attention in zip(scales, self.attentions, strict=True)
        ]

    def _joint_scores(self, scales: Sequence[_Scale]) -> Tensor:
        """[N, K], before the softmax. The first layer is linear: its part of a coarse scale is computed there."""
        hidden = self.joint_attention.hidden
        columns = hidden.weight.tensor_split(len(scales), dim=1)
        inside = functional.linear(scales[0].e, columns[0], hidden.bias)
        for scale, own in zip(scales[1:], columns[1:], strict=True):
            inside = inside + scale.of_rows(functional.linear(scale.e, own))
        return self.joint_attention.scores(inside)

    def _joint_logits(self, scales: Sequence[_Scale], scores: Tensor) -> Tensor:
        weights = torch.cat(_softmax(scores, scales[0].lengths))
        means = [_weighted(scale, torch.split(scale.received(weights), list(scale.lengths))) for scale in scales]
        logits_BK: Tensor = self.head(torch.cat(means, dim=2).flatten(1))
        return logits_BK


class RowAttention(nn.Module):
    """A score for each time bin of every row, before the softmax: [T, L] to [T, K]."""

    def __init__(self, width: int, attention_dim: int, n_bins: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, attention_dim)
        self.score = nn.Linear(attention_dim, n_bins)

    def forward(self, rows: Tensor) -> Tensor:
        return self.scores(self.hidden(rows))

    def scores(self, inside: Tensor) -> Tensor:
        """Of the hidden layer, [T, A] before its tanh; in float32 at least, for a softmax over a large bag."""
        scores: Tensor = self.score(torch.tanh(inside))
        return scores.to(_precision(scores))


class _Scale(NamedTuple):
    """What is known of one scale of a batch."""

    scale: int
    e: Tensor
    """[T, L]."""
    lengths: tuple[int, ...]
    """Rows of each slide, T in all."""
    ancestors: Ancestors | None
    """Where the rows of the finest scale find theirs here; None at the finest."""

    def of_rows(self, values: Tensor) -> Tensor:
        """[T, W] to [N, W]."""
        return self.ancestors.look_up(values) if self.ancestors else values

    def received(self, weights: Tensor) -> Tensor:
        """Weights of the rows, [N, K], added up over children: [T, K]."""
        return self.ancestors.gather(weights) if self.ancestors else weights

    def log_children(self) -> Tensor | float:
        """Logarithms of how many rows each of [T, 1] is in."""
        if self.ancestors is None:
            return 0.0
        at = self.ancestors.at
        ones = torch.ones(len(at), 1, dtype=_precision(self.e), device=at.device)
        return self.ancestors.gather(ones).log()


def _means(scale: _Scale, scores: Tensor) -> Tensor:
    return _weighted(scale, _softmax(scores, scale.lengths))


def _weighted(scale: _Scale, weights: Sequence[Tensor]) -> Tensor:
    """Weighted sums of the rows of every slide: [B, K, L]."""
    bags = torch.split(scale.e, list(scale.lengths))
    return torch.stack([own.T.to(rows.dtype) @ rows for own, rows in zip(weights, bags, strict=True)])


def _softmax(scores: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return [own.softmax(dim=0) for own in torch.split(scores, list(lengths))]


def _map(scale: _Scale, scores: Tensor) -> PatchMap:
    shares = [own.mean(dim=1) for own in _softmax(scores.cpu().double(), scale.lengths)]
    if scale.ancestors is None:
        return PatchMap(scale.scale, tuple(shares), (0.0,) * len(shares))
    return PatchMap(scale.scale, tuple(own[:-1] for own in shares), tuple(float(own[-1]) for own in shares))


def _precision(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _alike(module: nn.Module, n: int) -> nn.ModuleList:
    """N copies that start with the same weights."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(n))
