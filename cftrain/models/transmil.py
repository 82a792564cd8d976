"""TransMIL: patches of one scale as a sequence for a transformer with a class token, in time for N rather than N².

References: Shao et al. 2021, arXiv:2106.00908; its attention is that of Xiong et al. 2021 (Nyströmformer),
arXiv:2102.03902, with the iterated inverse of Razavi et al. 2014. Sizes, and what the papers leave open, follow the
authors' code (szc19990412/TransMIL) and the `nystrom_attention` package that it calls, as RustinS/CrossFusion @ df5473d
carries them, whose outputs this reproduces: no feed-forward layers; in the attention zeros put in front and not masked,
no bias before it, and one start of the inverse for all heads of a slide.

    x_n = ReLU(W f_n + b)                                          [N, E]
    X   = [token | x, copies of its first rows up to g x g]        [L, E]    L = 1 + g², g = ceil(sqrt(N))
    X   = X + Nyström(LN X)
    X   = [token | X + its 7 x 7, 5 x 5, 3 x 3 windows]            PPEG; the token passes unchanged
    X   = X + Nyström(LN X)
    logits = C LN(token) + c                                       [K]

Nyström attention, each head for itself:

    Y         = LN X, zero rows put in front until its M rows are a multiple of m          [M, E]
    q, k, v   = Y W                                                                        [M, dh]
    q̃, k̃      = means of M/m consecutive rows of q, k: the landmarks                       [m, dh]
    A1 = softmax(q k̃ᵀ / √dh)   A2 = softmax(q̃ k̃ᵀ / √dh)   A3 = softmax(q̃ kᵀ / √dh)        [M, m], [m, m], [m, M]
    Nyström(Y) = [A1 Z (A3 v) + v convolved along the rows]_heads W' + b                   Z ≈ inverse of A2

A1 Z A3 stands for the table softmax(q kᵀ / √dh). Neither A1 nor A3 is held: each belongs to an attention whose keys, or
queries, are the landmarks (`cfkernels.attention`). The grid is the order of the patches wrapped into a square, not
their place on the slide. Of the second attention only the token's row is read, so only that is computed, an exact
saving.

Legend: B slides, N patches of a slide, L its tokens, M with the rows in front, m landmarks, T tokens of all slides,
D features, E embed_dim, H heads, dh = E / H, K time bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cfkernels import attention, dropout_add
from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.models.layers import PPEG, LayerNorm, Lengths, Window, first_rows, square_grids, square_pad
from cftrain.models.patch_maps import PatchMap, on_patches
from cftrain.zoo import TransMILConfig

TAPS = 33
"""Rows that the convolution of the values sees, as many before a row as behind it."""


class TransMIL(SurvivalModel):
    """Patches of one scale, read by a class token through two layers of Nyström attention."""

    def __init__(self, feature_dim: int, config: TransMILConfig) -> None:
        super().__init__("transmil", (config.scale,), feature_dim, config)
        E = config.embed_dim
        self.projection = nn.Linear(feature_dim, E)
        self.class_token = nn.Parameter(torch.empty(E))
        self.layer1 = NystromLayer(config)
        self.ppeg = PPEG(E)
        self.layer2 = NystromLayer(config)
        self.norm = LayerNorm(E)
        self.head = nn.Linear(E, config.n_bins)
        self.apply(_initialise)

    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards: [B, K]."""
        return self._read(*self._encoded(batch))

    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K], and the class token's row of the second layer's attention, the mean over heads.

        The row is one of A1 Z A3, an approximation of attention: a patch may receive slightly less than 0, and what all
        keys receive adds up to 1 only as nearly as Z is the inverse (within 0.6 % at random weights). Scores are left
        as they are; `elsewhere` is 1 minus their sum: what the class token and the rows of zeros in front receive, most
        of it where N is small, and what the approximation misses.

        Besides a forward pass: two tables of n_landmarks x N numbers at a time.
        """
        with self.evaluating(), torch.no_grad():
            x, lengths = self._encoded(batch)
            received = self.layer2.first_rows_of_attention(x, lengths)
            logits_BK = self._read(x, lengths)
        scale = self.scales[0]
        of_tokens = [row[:, -n:] for row, n in zip(received, lengths, strict=True)]
        found = on_patches(of_tokens, scale, batch.lengths[scale], class_tokens=1)
        elsewhere = tuple(1 - float(scores.sum()) for scores in found.scores)
        return logits_BK, {"attention": found._replace(elsewhere=elsewhere)}

    def _encoded(self, batch: BagBatch) -> tuple[Tensor, Lengths]:
        """What the second layer reads, [T, E], and its rows of each bag, class token first."""
        scale = self.scales[0]
        n_patches = batch.lengths[scale]
        grids = square_grids(n_patches)
        lengths = tuple(1 + side * side for side in grids)
        squares = square_pad(torch.relu(self.projection(self.rows(batch, scale))), n_patches)
        token = self.class_token.to(squares.dtype).unsqueeze(0)
        bags = torch.split(squares, [side * side for side in grids])
        x = torch.cat([part for rows in bags for part in (token, rows)])
        return self.ppeg(self.layer1(x, lengths), grids, prefix=1), lengths

    def _read(self, x: Tensor, lengths: Lengths) -> Tensor:
        logits_BK: Tensor = self.head(self.norm(self.layer2(x, lengths, first_only=True)))
        return logits_BK


class NystromLayer(nn.Module):
    """x + dropout(Nyström(LN x)): packed rows [T, E] to [T, E]."""

    def __init__(self, config: TransMILConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm = LayerNorm(config.embed_dim)
        self.attention = NystromAttention(config.embed_dim, config.n_heads, config.n_landmarks, config.pinv_iterations)

    def forward(self, x: Tensor, lengths: Lengths, *, first_only: bool = False) -> Tensor:
        """Map [T, E] to [T, E], or to the first row of each bag, [B, E]."""
        attended = self.attention(self.norm(x), lengths, first_only=first_only)
        residual = first_rows(x, lengths) if first_only else x
        return dropout_add(attended, residual, dropout_p=self.dropout if self.training else 0.0)

    def first_rows_of_attention(self, x: Tensor, lengths: Lengths) -> list[Tensor]:
        """`NystromAttention.first_row` of each bag of [T, E]."""
        return [self.attention.first_row(rows) for rows in torch.split(self.norm(x), list(lengths))]


class NystromAttention(nn.Module):
    """Attention within each bag through landmarks, with projections: [T, E] to [T, E]."""

    def __init__(self, embed_dim: int, n_heads: int, n_landmarks: int, iterations: int) -> None:
        super().__init__()
        self.n_heads, self.n_landmarks, self.iterations = n_heads, n_landmarks, iterations
        self.query_key_value = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.convolution = nn.Conv2d(n_heads, n_heads, (TAPS, 1), padding=(TAPS // 2, 0), groups=n_heads, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, lengths: Lengths, *, first_only: bool = False) -> Tensor:
        """Map [T, E] to [T, E], or to the first row of each bag, [B, E], where nobody reads the others."""
        bags = [self._attended(rows, first_only) for rows in torch.split(x, list(lengths))]
        out: Tensor = self.out(torch.cat(bags).flatten(1))
        return out

    def first_row(self, x: Tensor) -> Tensor:
        """How much a bag's first row, of [L, E], attends to each of its rows: the first row of A1 Z A3, [H, M].

        The M - L rows put in front come first. The entries are an approximation: each head's add up to 1 as nearly as Z
        is the inverse, and some are below 0. Head by head: two tables [m, M] at a time.
        """
        q, k, _ = self._heads(x)
        landmarks_q, landmarks_k = self._landmarks(q), self._landmarks(k)
        queries, keys = landmarks_q.transpose(0, 1), landmarks_k.transpose(0, 1)  # [H, m, dh]
        with torch.autocast(x.device.type, enabled=False):
            to_landmarks = _softmax_scores(q[len(q) - len(x)].unsqueeze(1), keys)  # [H, 1, m]
            through = to_landmarks @ pseudo_inverse(_softmax_scores(queries, keys), self.iterations)
            rows = [row @ _softmax_scores(queries[head], k[:, head]) for head, row in enumerate(through)]
        return torch.cat(rows)

    def _attended(self, x: Tensor, first_only: bool) -> Tensor:
        """One bag: [L, E] to [L, H, dh], or to its first row, [1, H, dh]."""
        q, k, v = self._heads(x)
        m, n_front = self.n_landmarks, len(q) - len(x)
        n_rows = 1 if first_only else len(x)
        landmarks_q, landmarks_k = self._landmarks(q), self._landmarks(k)
        read = attention(landmarks_q, k, v, q_lengths=(m,), kv_lengths=(len(k),))
        # made again in the backward: its 30 tables [m, m] per head would outweigh a small bag
        values: Tensor = checkpoint(
            inverted, landmarks_q, landmarks_k, read, self.iterations, use_reentrant=False, preserve_rng_state=False
        )
        queries = q[n_front : n_front + n_rows]
        y = attention(queries, landmarks_k, values, q_lengths=(n_rows,), kv_lengths=(m,))
        return y + self._convolved(v[n_front : n_front + n_rows + TAPS // 2])[:n_rows]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, 3 x [M, H, dh], of [L, E]."""
        x = functional.pad(x, (0, 0, -len(x) % self.n_landmarks, 0))
        q, k, v = self.query_key_value(x).view(len(x), 3, self.n_heads, -1).unbind(1)
        return q, k, v

    def _landmarks(self, rows: Tensor) -> Tensor:
        """Means of consecutive rows: [M, H, dh] to [m, H, dh]."""
        return rows.view(self.n_landmarks, -1, *rows.shape[1:]).mean(dim=1)

    def _convolved(self, v: Tensor) -> Tensor:
        """Each head's values, [L, H, dh], convolved along the rows."""
        out: Tensor = self.convolution(v.transpose(0, 1).unsqueeze(0))  # [1, H, L, dh]
        return out.squeeze(0).transpose(0, 1)


def inverted(landmarks_q: Tensor, landmarks_k: Tensor, read: Tensor, iterations: int) -> Tensor:
    """Z (A3 v) of one bag from q̃, k̃ and A3 v: 3 x [m, H, dh] to [m, H, dh], as they are.

    In float32 at least, under autocast too: an inverse makes rounding errors large.
    """
    with torch.autocast(read.device.type, enabled=False):
        A2 = _softmax_scores(landmarks_q.transpose(0, 1), landmarks_k.transpose(0, 1))
        values = pseudo_inverse(A2, iterations) @ read.transpose(0, 1).to(A2.dtype)
    return values.transpose(0, 1).to(read.dtype)


def pseudo_inverse(A: Tensor, iterations: int) -> Tensor:
    """Approximate the Moore-Penrose inverse of every table of [H, m, m]; each step about cubes what is missing.

    Z starts as Aᵀ / (largest row sum · largest column sum), the largest of all H tables together, and becomes
    Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4.
    """
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    sizes = A.abs()
    Z: Tensor = A.mT / (sizes.sum(dim=-1).max() * sizes.sum(dim=-2).max())
    for _ in range(iterations):
        AZ = A @ Z
        Z = 0.25 * Z @ (13 * identity - AZ @ (15 * identity - AZ @ (7 * identity - AZ)))
    return Z


def _softmax_scores(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √dh): [..., n, dh] and [..., m, dh] to [..., n, m], in float32 at least."""
    precision = torch.promote_types(q.dtype, torch.float32)
    scores: Tensor = (q.to(precision) * q.shape[-1] ** -0.5) @ k.to(precision).mT
    return scores.softmax(dim=-1)


def _initialise(module: nn.Module) -> None:
    """The authors' initialisation: PyTorch's own, which for windows is that of a depth-wise convolution."""
    if isinstance(module, Window):
        bound = module.weight[0].numel() ** -0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, TransMIL):
        nn.init.normal_(module.class_token)
