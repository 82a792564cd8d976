"""A head that gives the chance of death by every month as a mixture, and hazards of time bins computed of it.

Reference: SCMIL (Yang et al. 2024, arXiv:2407.00664), after the survival mixture density networks of Han et al. 2022.

    w = softmax(W MLP(z) + b)                                    [C], a slide's weights of the components
    mu = clamp(linear(m), -200, 200)                             [C], of all slides; m starts at linspace(0, 200)
    sigma = clamp(softplus(linear(1)), 0.01, 100)                [C], of all slides
    F(t) = Σ_c w_c Φ((softplus⁻¹(t) - mu_c) / sigma_c)           chance of death by month t
    softplus⁻¹(t) = log(eᵗ - 1 + 1e-6)                           as t + log(1 - (1 - 1e-6) e⁻ᵗ): no eᵗ, inf from 89 on

Of a time bin that ends at month t_k, t_0 = 0, with ε = 1e-6:

    hazard_k = (F(t_k) - F(t_{k-1})) / (1 - F(t_{k-1})),  logit_k = log(F(t_k) - F(t_{k-1}) + ε) - log(1 - F(t_k) + ε)

The two agree but for ε, which the authors' loss adds in the same places to density and survival. It bounds logits by
14, and gradients where a slide's month is far from all components. F(0) is 0, that of a softplus, whatever 1e-6 makes
of softplus⁻¹(0). From Φ on all is float64: what F loses to rounding, 1e-16, is nothing beside ε.

The authors train the density at a patient's month. Here the likelihood of the bins is trained, as of every model, so
that losses can be compared; a censored patient counts as alive until the end of the bin, as there. The last bin is
open. Its hazard would be 1 if it ended at infinity, and nobody could be censored in it: it ends at the longest
follow-up of the training fold instead, or, where nobody there was followed into it, at twice its begin.

Legend: B slides, D features, C components, K time bins.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cftrain.errors import ConfigError
from cftrain.models.fitting import TrainingFold

FARTHEST = 200.0
NARROWEST, WIDEST = 0.01, 100.0
EPSILON = 1e-6


class SurvivalMixture(nn.Module):
    """Pooled slides [B, D] to log-odds of the hazards of K time bins [B, K]; NaN before `fit`.

    m goes through a linear layer as a vector, C to C, and a constant 1 through another. The first starts as the
    identity, so that components start spread evenly over 0 to 200; other layers start as PyTorch's do.
    """

    months: Tensor
    """[K]; where each bin ends."""

    def __init__(self, width: int, hidden_dim: int, n_components: int, n_bins: int, dropout: float) -> None:
        super().__init__()
        layers = [
            layer
            for n_in in (width, hidden_dim)
            for layer in (nn.Linear(n_in, hidden_dim), nn.GELU(), nn.Dropout(dropout))
        ]
        self.weights = nn.Sequential(*layers, nn.Linear(hidden_dim, n_components))
        self.mu_register = nn.Parameter(torch.linspace(0, FARTHEST, n_components))
        self.mu = nn.Linear(n_components, n_components)
        nn.init.eye_(self.mu.weight)
        nn.init.zeros_(self.mu.bias)
        self.sigma = nn.Linear(1, n_components)
        self.register_buffer("months", torch.full((n_bins,), torch.nan))

    def fit(self, fold: TrainingFold) -> None:
        """Take the ends of the bins: the fold's edges, then the longest follow-up of its training examples.

        Raises
        ------
        ConfigError
            The fold has another number of bins.
        """
        ends = torch.tensor(bin_ends(fold), dtype=torch.float64)
        if len(ends) != len(self.months):
            raise ConfigError(f"scmil: n_bins={len(self.months)}, the fold has {len(ends)} bins; set n_bins to that")
        with torch.no_grad():
            self.months.copy_(ends)

    def forward(self, z: Tensor) -> Tensor:
        w = self.weights(z).double().softmax(dim=1)
        died, alive = self._of_components()
        F_BK = w @ died
        of_bins = torch.diff(F_BK, dim=1, prepend=F_BK.new_zeros(len(F_BK), 1))
        logits_BK = torch.log(of_bins + EPSILON) - torch.log(w @ alive + EPSILON)
        return logits_BK.to(torch.promote_types(z.dtype, torch.float32))

    def _of_components(self) -> tuple[Tensor, Tensor]:
        """Each component's chance of being dead, and of being alive, at the end of each bin: 2 x [C, K] float64.

        Without autocast: bfloat16 tells no months apart.
        """
        with torch.autocast(self.months.device.type, enabled=False):
            mu = self.mu(self.mu_register).double().clamp(-FARTHEST, FARTHEST).unsqueeze(1)
            raw = self.sigma(self.sigma.weight.new_ones(1)).double().unsqueeze(1)
            deviates = (inverse_softplus(self.months.double()) - mu) / functional.softplus(raw).clamp(NARROWEST, WIDEST)
            return torch.special.ndtr(deviates), torch.special.ndtr(-deviates)


def bin_ends(fold: TrainingFold) -> tuple[float, ...]:
    """The K months at which the bins of a fold end: its edges, then the end of the last bin."""
    begin, longest = (0.0, *fold.edges)[-1], float(np.max(fold.time_months))
    return (*fold.edges, longest if longest > begin else 2 * begin)


def inverse_softplus(t: Tensor) -> Tensor:
    """log(eᵗ - 1 + 1e-6), for all t >= 0."""
    inverse: Tensor = t + torch.log1p(-(1 - EPSILON) * torch.exp(-t))
    return inverse
