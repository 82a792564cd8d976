"""Graph convolutions on packed rows; which patches give to which, and what it costs, is in `graph_sums`.

I(i) are the patches that list patch i among their k others.

Legend: N patches of all bags together, D and C widths, K terms of a polynomial.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cftrain.models.graph_sums import Undirected, normalised_sums, softmax_sums, sums_with_neighbours
from cftrain.models.layers import LayerNorm


class GENConv(nn.Module):
    """Generalised aggregation (Li et al. 2020, arXiv:2006.07739): MLP(x_i + softmax_sums(x)_i), [N, C] to [N, C].

    MLP: Linear C to 2C, layer norm, ReLU, Linear 2C to C. t is learnt and starts at 1.
    """

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.ones(1))
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.norm = LayerNorm(2 * width)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        hidden = self.up(x + softmax_sums(x, targets, self.t))
        out: Tensor = self.down(torch.relu(self.norm(hidden)))
        return out


class GINConv(nn.Module):
    """Graph isomorphism convolution (Xu et al. 2019, arXiv:1810.00826): MLP(x_i + Σ_{j in I(i)} x_j), [N, D] to [N, C].

    MLP: Linear D to C, ReLU, Linear C to C. Sums are taken behind the first product, W (x_i + Σ x_j) = W x_i + Σ W x_j:
    the same numbers, C wide and not D.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(inputs, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        hidden = sums_with_neighbours(functional.linear(x, self.up.weight), targets)
        out: Tensor = self.down(torch.relu(hidden + self.up.bias.to(hidden.dtype)))
        return out


class ChebConv(nn.Module):
    """Chebyshev convolution (Defferrard et al. 2016, arXiv:1606.09375), [N, D] to [N, C]: Σ_{κ<K} T_κ(L̂) x W_κ + b.

    T_0 = 1, T_1 = L̂, T_κ = 2 L̂ T_κ-1 - T_κ-2 as in torch-geometric's ChebConv of K terms, with the symmetric Laplacian
    L = 1 - D^-½ A D^-½ of `undirected` and its largest eigenvalue taken as 2, so that L̂ = L - 1 = -D^-½ A D^-½. A row
    without neighbours has L = 1 there, hence L̂ = 0.

    The polynomial is summed up behind the products x W_κ (Clenshaw): the same numbers, C wide and not D. Weights start
    Xavier-uniform and the bias at 0, as torch-geometric's.
    """

    def __init__(self, inputs: int, width: int, order: int) -> None:
        super().__init__()
        terms = [nn.Linear(inputs, width, bias=False) for _ in range(order)]
        for term in terms:
            nn.init.xavier_uniform_(term.weight)
        self.terms = nn.ModuleList(terms)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, graph: Undirected) -> Tensor:
        current: Tensor = self.terms[-1](x)
        previous: Tensor | None = None
        for at in reversed(range(len(self.terms) - 1)):
            step = self.terms[at](x) - (2 if at else 1) * normalised_sums(current, graph)
            current, previous = (step if previous is None else step - previous), current
        return current + self.bias.to(current.dtype)
