"""Sums over the neighbours of a patch, on packed rows, in memory for the patches and not the edges.

A slide's graph is a list of k others for each patch, `nearest` or `similar` of `cftrain.zoo.extras`. Patch j gives to
each patch that it lists, so patch i takes from the patches that list it: I(i) = {j: i is in the list of j}, from none
to many of them. That is the direction of torch-geometric's messages for edges (patch, neighbour), which Patch-GCN's
authors build.

The source of the c-th edge of every list is the row itself. So a column of lists is one scatter of all rows, and one
gather in the backward: the columns follow one another, and no [edges, C] tensor is made. What names no patch goes to a
dummy row behind the last, so that shapes do not depend on the data. Sums are taken in float32 at least.

A GPU adds up what meets in a row in no fixed order: results agree to rounding there, not to the bit.

Legend: N patches of all bags together, k others in a list, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

EPSILON = 1e-7
"""What GEN adds to a message, so that none is 0."""


def edges(lists: Tensor) -> Tensor:
    """Where each row gives to: lists [N, k], -1 for none, to [k, N] rows, N for none."""
    return torch.where(lists < 0, len(lists), lists).T.contiguous()


def sums_with_neighbours(x: Tensor, targets: Tensor) -> Tensor:
    """x_i + Σ_{j in I(i)} x_j.

    Parameters
    ----------
    x
        [N, C].
    targets
        [k, N], of `edges`.
    """
    out: Tensor = _Sums.apply(x, targets)  # type: ignore[no-untyped-call]
    return out


def softmax_sums(x: Tensor, targets: Tensor, t: Tensor) -> Tensor:
    """Means of messages, each channel weighted by its own softmax: Σ_{j in I(i)} p_ij ⊙ m_j, 0 where I(i) is empty.

    m_j = ReLU(x_j) + 1e-7, and p_ij is the softmax over I(i) of t m_j.

    Parameters
    ----------
    x
        [N, C].
    targets
        [k, N], of `edges`.
    t
        [1]; the temperature's inverse.
    """
    out: Tensor = _SoftmaxSums.apply(x, targets, t)  # type: ignore[no-untyped-call]
    return out


class Undirected(NamedTuple):
    """The graph of all pairs of patches of which at least one lists the other, each pair once, with weight 1."""

    listed: Tensor
    """[k, N]: what each row lists, N for none."""
    one_way: Tensor
    """[k, N]: the same without what lists the row too."""
    degree: Tensor
    """[N]; the neighbours of each row."""


def undirected(lists: Tensor) -> Undirected:
    """Both directions of all edges: lists [N, k], -1 for none; a list names no patch twice."""
    listed = edges(lists)
    rows = torch.arange(len(lists), device=lists.device)
    behind = torch.cat([lists, lists.new_full((1, lists.shape[1]), -1)])  # the dummy row lists nothing
    mutual = torch.stack([(behind[column] == rows[:, None]).any(dim=1) for column in listed])
    one_way = torch.where(mutual, len(lists), listed)
    taken = torch.zeros(len(lists) + 1, dtype=torch.int64, device=lists.device)
    taken.index_add_(0, one_way.flatten(), torch.ones_like(one_way.flatten()))
    return Undirected(listed, one_way, (listed < len(lists)).sum(dim=0) + taken[:-1])


def normalised_sums(x: Tensor, graph: Undirected) -> Tensor:
    """D^-½ A D^-½ x of [N, C], A the adjacency and D the degrees; 0 for a row without neighbours."""
    out: Tensor = _NormalisedSums.apply(x, *graph)  # type: ignore[no-untyped-call]
    return out


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _with_dummy(x: Tensor) -> Tensor:
    """A row of zeros behind the last, in float32 at least."""
    return functional.pad(_precise(x), (0, 0, 0, 1))


def _scattered(out: Tensor, targets: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Add `rows` to where each column of targets says, in place."""
    for column in targets:
        out.index_add_(0, column, rows)
    return out


def _gathered(out: Tensor, targets: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Add the rows [N + 1, C] that each column of targets names, in place."""
    for column in targets:
        out += rows[column]
    return out


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(targets)
        return _scattered(_with_dummy(x), targets.unbind(), _precise(x))[:-1].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (targets,) = ctx.saved_tensors
        rows = _with_dummy(grad)
        return _gathered(rows[:-1].clone(), targets.unbind(), rows).to(grad.dtype), None


class _NormalisedSums(torch.autograd.Function):
    """A symmetric product: it is its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, listed: Tensor, one_way: Tensor, degree: Tensor) -> Tensor:
        ctx.save_for_backward(listed, one_way, degree)
        return _normalised(x, listed, one_way, degree)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _normalised(grad, *ctx.saved_tensors), None, None, None


def _normalised(x: Tensor, listed: Tensor, one_way: Tensor, degree: Tensor) -> Tensor:
    precise = _precise(x)
    scale = degree.clamp(min=1).to(precise.dtype).rsqrt().unsqueeze(1)
    rows = _with_dummy(precise * scale)
    out = _scattered(torch.zeros_like(rows), one_way.unbind(), rows[:-1])[:-1]
    return (_gathered(out, listed.unbind(), rows) * scale).to(x.dtype)


class _SoftmaxSums(torch.autograd.Function):
    """Keeps x, the results and the logarithm of each softmax's denominator; weights are made again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, targets: Tensor, t: Tensor) -> Tensor:
        m = _messages(x)
        s = t.to(m.dtype) * m
        largest = m.new_full((len(m) + 1, m.shape[1]), -torch.inf)
        for column in targets:
            largest.scatter_reduce_(0, column.unsqueeze(1).expand_as(s), s, "amax")
        total, weighted = torch.zeros_like(largest), torch.zeros_like(largest)
        for column in targets:
            e = (s - largest[column]).exp_()
            total.index_add_(0, column, e)
            weighted.index_add_(0, column, e.mul_(m))
        # where anything arrives, the largest of it adds exactly 1
        out = weighted.div_(total.clamp_(min=1))[:-1]
        ctx.save_for_backward(x, targets, t, out, largest.add_(total.log_()))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        """With a_j = Σ_i p_ij g_i and b_j = Σ_i p_ij g_i out_i: m_j has gradient a_j + t (m_j a_j - b_j)."""
        x, targets, t, out, log_total = ctx.saved_tensors
        m = _messages(x)
        s = t.to(m.dtype) * m
        g = _with_dummy(grad)
        g_out = functional.pad(g[:-1] * out, (0, 0, 0, 1))
        a, b = torch.zeros_like(m), torch.zeros_like(m)
        for column in targets:
            p = (s - log_total[column]).exp_()
            a += p * g[column]
            b += p.mul_(g_out[column])
        tilt = m * a - b
        grad_t = (m * tilt).sum().to(t.dtype).reshape(t.shape)
        return ((a + t.to(m.dtype) * tilt) * (x > 0)).to(x.dtype), None, grad_t


def _messages(x: Tensor) -> Tensor:
    return torch.relu(_precise(x)) + EPSILON
