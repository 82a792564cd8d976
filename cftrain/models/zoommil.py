"""ZoomMIL: looks at a slide at 5x, zooms into few patches at 10x, and into few of those at 20x.

Reference: Thandiackal et al. 2022, arXiv:2204.12454. This is the authors' code (histocartography/zoommil @ 825ba9f),
widened to slides that lack patches. At each scale, with weights of its own:

    h_i = ReLU(W x_i + b)                                                [H]
    a   = softmax_i(score(h_i) + log m_i),    M = Σ_i a_i h_i            a_i: maps, M: [H]
    z   = softmax_i(aux(h_i) + log m_i)       at 5x and 10x              both gated attention, H to A to 1
    C   = top-k of z                          rows: the K chosen         [K, patches], `perturbed_topk`
    logits = V (M_5 + M_10 + M_20) + v                                   [K bins]

What the finer scale reads, x and m, are K · S places, S for each chosen patch. A patch f has a parent p(f) and the
place s(f) = (its rank among the children of p(f), by row) mod S:

    w_(k,s),f = C_k,p(f) if s(f) = s, else 0                             which patch a place holds
    m_(k,s)   = Σ_f w_(k,s),f,     x_(k,s) = Σ_f w_(k,s),f x_f / m_(k,s) how many it holds, and their mean

and at 20x C_k,p is the choice among places, (C / m) w: which patches of 10x they hold. In evaluation C holds zeros
and ones, so a place is one patch. In training C is a mean over draws with noise, and a place a soft mixture of patches
with that share of presence: without it no gradient would reach what chooses.

The authors' code needs full pyramids, where the children of row i are the rows 4i to 4i + 3: then m = 1, and all this
is theirs to rounding. Patches of real slides have lost children, and CLAM's grids do not nest. Here, from `parents`:

- a place without a patch has m = 0 and weighs nothing; nothing is filled with zeros, which attention would weigh;
- a chosen patch without children brings nothing; if no chosen one has any, M of the finer scales is 0;
- more than S children share places: the mean of those that share one, weighing as many as they are. Nothing is lost;
- patches without a parent are seen at no zoom.

Variants differ in training alone. "faithful": gradients as the authors' code has them, where the choice is wrong
(`perturbed_topk`, diagonal) and m counts as constant; on full pyramids they agree with it. "fixed": those of the
formulas. Both mix features before the projection, as the authors' code does.

Memory is O((N_5 + N_10 + N_20) (D + K S)): which patch a place holds is one table over all patches of the finer scale,
so that no shape depends on data. Weights start as PyTorch's layers do, as theirs.

Legend: B slides, N patches of a slide, R places (patches themselves at 5x), D features, H hidden_dim, A attention_dim,
K n_zoomed, S n_children.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.patch_maps import PatchMap
from cftrain.models.perturbed_topk import hard_topk, perturbed_topk
from cftrain.models.pooling import GatedAttention
from cftrain.zoo import ZoomMILConfig
from cftrain.zoo.extras import parents

LOW, MID, HIGH = 5, 10, 20


class ZoomMIL(SurvivalModel):
    """Three scales, of the finer two only what lies under the patches chosen at the coarser one."""

    def __init__(self, feature_dim: int, config: ZoomMILConfig) -> None:
        super().__init__("zoommil", (LOW, MID, HIGH), feature_dim, config)
        self.config = config
        self.low = Level(feature_dim, config, zooms=True)
        self.mid = Level(feature_dim, config, zooms=True)
        self.high = Level(feature_dim, config, zooms=False)
        self.head = nn.Linear(config.hidden_dim, config.n_bins)

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]."""
        return self._read(self._views(batch))

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K], and the weights a of the patches at each scale; `elsewhere` is 1 where M is 0."""
        with self.evaluating(), torch.no_grad():
            views = self._views(batch)
            logits_BK = self._read(views)
        return logits_BK, {f"attention-{scale}x": _map(scale, of_slides) for scale, of_slides in views.items()}

    def _read(self, views: dict[int, list[View]]) -> Tensor:
        M_BH = sum(torch.stack([view.mean for view in of_slides]) for of_slides in views.values())
        logits_BK: Tensor = self.head(M_BH)
        return logits_BK

    def _views(self, batch: BagBatch) -> dict[int, list[View]]:
        """Of each scale, of each slide: what is seen there."""
        x = self.rows(batch, LOW)
        patches = [Places(None, rows.new_ones(len(rows))) for rows in torch.split(x, list(batch.lengths[LOW]))]
        low = self.low(x, patches)
        mid = self._zoomed(batch, self.mid, (LOW, MID), low)
        return {LOW: low, MID: mid, HIGH: self._zoomed(batch, self.high, (MID, HIGH), mid)}

    def _zoomed(self, batch: BagBatch, level: Level, scales: tuple[int, int], views: list[View]) -> list[View]:
        """What is seen at the finer of two scales, under the patches chosen at the coarser one."""
        coarse, fine = scales
        parent = self.extra(batch, parents(fine, coarse))
        packed = (self.rows(batch, fine), parent, self._places(parent))
        parts = (torch.split(rows, list(batch.lengths[fine])) for rows in packed)
        starts = accumulate(batch.lengths[coarse][:-1], initial=0)
        x, places = [], []
        for view, start, x_ND, parent_N, place_N in zip(views, starts, *parts, strict=True):
            places.append(self._held(self._chosen(view), parent_N - start, place_N))
            x.append(places[-1].mean_of(x_ND))
        seen: list[View] = level(torch.cat(x), places)
        return seen

    def _places(self, parent: Tensor) -> Tensor:
        """s(f) of every patch, [sum N]: its rank among the rows with the same parent, mod S."""
        order = parent.argsort(stable=True)
        ordered = parent[order]
        rank = torch.arange(len(parent), device=parent.device) - torch.searchsorted(ordered, ordered)
        return torch.empty_like(rank).scatter_(0, order, rank) % self.config.n_children

    def _chosen(self, view: View) -> Tensor:
        """C: which patches of its scale the K chosen places are, [K, N]."""
        config = self.config
        scores = torch.where(view.places.mass > 0, view.zoom, -torch.inf)
        if self.training:
            full = config.variant == "fixed"
            chosen = perturbed_topk(scores, config.n_zoomed, n_samples=config.n_samples, sigma=config.sigma, full=full)
        else:
            chosen = hard_topk(scores, config.n_zoomed)
        return view.places.spread(chosen)

    def _held(self, chosen: Tensor, parent: Tensor, place: Tensor) -> Places:
        """What the K · S places hold of the N patches of the finer scale."""
        n_coarse = chosen.shape[1]
        of_parents = functional.pad(chosen, (0, 1))  # the last stands for no parent, and is never chosen
        parent = torch.where(parent < 0, n_coarse, parent)
        at = place == torch.arange(self.config.n_children, device=place.device).unsqueeze(1)  # [S, N]
        w = (of_parents[:, parent].unsqueeze(1) * at).flatten(0, 1)
        mass = w.sum(dim=1)
        return Places(w, mass if self.config.variant == "fixed" else mass.detach())


class Level(nn.Module):
    """What one scale does with its R places: projection, attention, and the scores of where to zoom in."""

    def __init__(self, feature_dim: int, config: ZoomMILConfig, *, zooms: bool) -> None:
        super().__init__()
        sizes = (config.hidden_dim, config.attention_dim, config.dropout)
        self.projection = nn.Linear(feature_dim, config.hidden_dim)
        self.attention = GatedAttention(*sizes)
        self.zoom = GatedAttention(*sizes) if zooms else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, places: list[Places]) -> list[View]:
        """See the packed places of all slides, [sum R, D]."""
        h = self.dropout(torch.relu(self.projection(x)))
        lengths = [len(each.mass) for each in places]
        scores = self.attention(h)[:, 0]
        zooms = scores if self.zoom is None else self.zoom(h)[:, 0]  # nobody reads those of the last scale
        parts = (torch.split(rows, lengths) for rows in (h, scores, zooms))
        return [_seen(*of_slide) for of_slide in zip(places, *parts, strict=True)]


class Places(NamedTuple):
    """Where the patches of one slide's scale are seen."""

    w: Tensor | None
    """[R, N]; how much of each patch a place holds. None: a place is a patch."""
    mass: Tensor
    """m, [R]; how many patches a place holds, 0 where it is empty."""

    def mean_of(self, x: Tensor) -> Tensor:
        """The mean of what each place holds: [N, D] to [R, D], 0 where it holds nothing."""
        if self.w is None:
            return x
        held = self.w.to(x.dtype) @ x
        return held / _at_least_tiny(self.mass).unsqueeze(1)

    def spread(self, shares: Tensor) -> Tensor:
        """Shares of places as shares of the patches that they hold: [..., R] to [..., N]."""
        if self.w is None:
            return shares
        with torch.autocast(shares.device.type, enabled=False):  # the shares of a place add up to its mass
            return shares / _at_least_tiny(self.mass) @ self.w


class View(NamedTuple):
    """One slide at one scale."""

    places: Places
    weights: Tensor
    """a, [R]; 0 where a place is empty."""
    zoom: Tensor
    """z, [R]; as `weights`."""
    mean: Tensor
    """M, [H]."""


def _seen(places: Places, h: Tensor, scores: Tensor, zooms: Tensor) -> View:
    weights = _softmax(scores, places.mass)
    return View(places, weights, _softmax(zooms, places.mass), weights.to(h.dtype) @ h)


def _softmax(scores: Tensor, mass: Tensor) -> Tensor:
    """Shares in proportion to m exp(score), [R], in float32 at least; all 0 where every place is empty."""
    precise = scores.to(torch.promote_types(scores.dtype, torch.float32))
    there = mass > 0
    logits = torch.where(there, precise + _at_least_tiny(mass).log(), torch.finfo(precise.dtype).min)
    return logits.softmax(dim=0) * there


def _at_least_tiny(mass: Tensor) -> Tensor:
    """Not 0 to divide by. What is not 0 stays: shares of a place are far above the smallest number."""
    return mass.clamp_min(torch.finfo(mass.dtype).tiny)


def _map(scale: int, views: list[View]) -> PatchMap:
    """What the patches receive: what their places do."""
    scores = tuple(view.places.spread(view.weights).double().cpu() for view in views)
    return PatchMap(scale, scores, tuple(0.0 if view.places.mass.any() else 1.0 for view in views))
