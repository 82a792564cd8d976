"""Choosing the k best patches: by score, or softly and with a gradient, by scores with noise.

Reference: Cordonnier et al. 2021, arXiv:2104.03059, after the perturbed optimisers of Berthet et al. 2020,
arXiv:2002.08676. Of scores s [N] and S draws of standard normal noise Z_j [N]:

    Y_j [k, N]  row i is 1 at the i-th chosen of s + σ Z_j, the k largest in the order of their places; else 0
    P   [k, N]  mean of the Y_j
    dP_in / ds_m = E[Y_in Z_m] / σ

Gradients, of a loss whose derivative by P is G, with c_j = Σ_in G_in Y_j,in:

    full      Σ_j (c_j - mean c) Z_jm / ((S - 1) σ). As E[Z] = 0, the sample covariance has the expectation of the
              formula, exactly, and far less noise: what all draws share cancels.
    diagonal  Σ_i G_im Σ_j Y_j,im Z_jm / (S σ): the terms n = m alone, as histocartography/zoommil and other code have
              it, after the listing in the paper's supplement. What the
              patch was worth that another drives out does not come in.

An example of the difference: two patches of equal worth. Which is chosen changes nothing, and `full` is 0; `diagonal`
goes by the worth itself.

A score of -inf is never chosen. Where fewer than k others are there, the last rows are 0: P is [k, N] for every N.

Memory: noise and scores with noise, 2 [S, N], and the places [S, k]; 7 MB for 8,625 patches and 100 draws in
float32. The table [S, k, N] of all Y_j, 41 MB, is never made.

Legend: N patches, k to choose, S draws.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Which k of N scores are the largest: [N] to [k, N], a 1 in every row, in the order of their places.

    Rows for which no score is left are 0.
    """
    return _indicators(_places(scores.unsqueeze(0), k), scores)


def perturbed_topk(scores: Tensor, k: int, *, n_samples: int, sigma: float, full: bool = True) -> Tensor:
    """The mean of `hard_topk` over scores with noise, from torch's generator of the device: [N] to [k, N].

    Parameters
    ----------
    scores
        [N], float32 or float64; -inf is never chosen.
    k
        Rows of the result.
    n_samples
        Draws of noise, S, at least 2.
    sigma
        The standard deviation of the noise.
    full
        Whether the gradient is that of the paper; otherwise its diagonal terms alone.
    """
    chosen: Tensor = _PerturbedTopK.apply(scores, k, n_samples, sigma, full)  # type: ignore[no-untyped-call]
    return chosen


class _PerturbedTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int, n_samples: int, sigma: float, full: bool) -> Tensor:
        noise = torch.randn(n_samples, len(scores), dtype=scores.dtype, device=scores.device)
        places = _places(scores + sigma * noise, k)
        ctx.save_for_backward(noise, places)
        ctx.sigma, ctx.full = sigma, full
        return _indicators(places, scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        noise, places = ctx.saved_tensors
        of_chosen = functional.pad(grad, (0, 1)).gather(1, places.T).T  # [S, k]; 0 where none was left
        of_scores = _full(of_chosen, noise) if ctx.full else _diagonal(of_chosen, noise, places)
        return of_scores / ctx.sigma, None, None, None, None


def _places(scores: Tensor, k: int) -> Tensor:
    """Where the k largest of [S, N] are, ascending: [S, k]; N stands for none."""
    n = scores.shape[1]
    best = scores.topk(min(k, n), dim=1, sorted=False)
    places = torch.where(best.values == -torch.inf, n, best.indices)
    return functional.pad(places.sort(dim=1).values, (0, k - places.shape[1]), value=n)


def _indicators(places: Tensor, scores: Tensor) -> Tensor:
    """[S, k] places as a mean of indicators [k, N]. Whole numbers are added up, so that no order of sums shows."""
    counts = scores.new_zeros(places.shape[1], len(scores) + 1)
    counts.scatter_add_(1, places.T, counts.new_ones(()).expand(places.T.shape))
    return counts[:, :-1] / len(places)


def _full(of_chosen: Tensor, noise: Tensor) -> Tensor:
    worth = of_chosen.sum(dim=1)
    return (worth - worth.mean()) @ noise / (len(noise) - 1)


def _diagonal(of_chosen: Tensor, noise: Tensor, places: Tensor) -> Tensor:
    own = of_chosen * functional.pad(noise, (0, 1)).gather(1, places)
    total = noise.new_zeros(noise.shape[1] + 1).scatter_add_(0, places.flatten(), own.flatten())
    return total[:-1] / len(noise)
