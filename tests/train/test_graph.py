"""Sums over neighbours and graph convolutions, against loops over edges, dense tables, and cases worked by hand."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cftrain.models.graph import ChebConv, GENConv, GINConv
from cftrain.models.graph_sums import edges, normalised_sums, softmax_sums, sums_with_neighbours, undirected

LISTS = torch.tensor([[1, 2, -1], [0, -1, 4], [-1, -1, -1], [1, 0, 4], [1, 3, 0], [-1, -1, -1]])
"""Six patches: 2 lists nobody, 5 lists nobody and is listed by nobody, 0 and 1 list each other, as do 3 and 4."""


def rows(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_lists(n, k, seed=1):
    """Up to k others of each patch, none twice, holes anywhere."""
    rng = np.random.default_rng(seed)
    lists = np.full((n, k), -1)
    for i in range(n):
        others = rng.permutation([j for j in range(n) if j != i])[:k]
        lists[i, : len(others)] = np.where(rng.random(len(others)) < 0.2, -1, others)
    return torch.from_numpy(lists)


def gives_to(lists):
    """Table [N, N]: 1 where the patch of the column lists that of the row."""
    table = np.zeros((len(lists), len(lists)))
    for source, targets in enumerate(lists.tolist()):
        for target in targets:
            if target >= 0:
                table[target, source] += 1
    return table


def softmax_by_loops(x, lists, t):
    out = np.zeros(x.shape)
    for i in range(len(x)):
        sources = [j for j in range(len(x)) if i in lists[j].tolist()]
        for c in range(x.shape[1] if sources else 0):
            m = [max(float(x[j, c]), 0.0) + 1e-7 for j in sources]
            raised = [math.exp(t * (each - max(m))) for each in m]
            out[i, c] = sum(e * each for e, each in zip(raised, m, strict=True)) / sum(raised)
    return torch.from_numpy(out)


def test_a_patch_takes_from_those_that_list_it_and_not_from_those_it_lists():
    x = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [10_000.0], [100_000.0]])
    found = sums_with_neighbours(x, edges(LISTS))
    # 0 is listed by 1, 3, 4; 1 by 0, 3, 4; 2 by 0; 3 by 4; 4 by 1, 3; 5 by nobody
    assert found[:, 0].tolist() == [11_011, 11_011, 101, 11_000, 11_010, 100_000]


def test_a_softmax_over_two_worked_by_hand():
    """Patches 0 and 1 list patch 2: messages 1 and 3 at t = ln 2 have weights 2 and 8 tenths; 2 lists 0 alone."""
    lists = torch.tensor([[2, -1], [2, -1], [0, -1]])
    x = torch.tensor([[1.0], [3.0], [-5.0]], dtype=torch.float64)
    found = softmax_sums(x, edges(lists), torch.tensor([math.log(2)], dtype=torch.float64))
    assert found[:, 0].tolist() == pytest.approx([1e-7, 0.0, (2 * 1 + 8 * 3) / 10 + 1e-7], abs=1e-14)


@pytest.mark.parametrize("t", [1.0, -0.7, 0.0, 30.0])
def test_softmax_sums_equal_loops_over_edges(t):
    for lists in (LISTS, random_lists(23, 4), random_lists(1, 3), random_lists(3, 8)):
        x = 3 * rows(len(lists), 5)
        found = softmax_sums(x, edges(lists), torch.tensor([t], dtype=torch.float64))
        assert_close(found, softmax_by_loops(x, lists, t), rtol=0, atol=1e-12)


def test_sums_equal_a_dense_table():
    for lists in (LISTS, random_lists(23, 4), random_lists(1, 3)):
        x = rows(len(lists), 5)
        expected = x + torch.from_numpy(gives_to(lists)) @ x
        assert_close(sums_with_neighbours(x, edges(lists)), expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    for lists in (LISTS, random_lists(9, 3)):
        x = rows(len(lists), 3, seed=4).requires_grad_()
        t = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
        assert gradcheck(sums_with_neighbours, (x, edges(lists)))
        assert gradcheck(softmax_sums, (x, edges(lists), t))
        assert gradcheck(lambda x, lists=lists: normalised_sums(x, undirected(lists)), (x,))


def test_a_patch_that_nobody_lists_takes_nothing_and_passes_no_gradient_on():
    x = rows(6, 4).abs().requires_grad_()
    found = softmax_sums(x, edges(LISTS), torch.ones(1))
    assert torch.equal(found[5], torch.zeros(4, dtype=torch.float64))
    found[5].sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_messages_too_large_for_an_exponential_are_weighted_all_the_same():
    lists = torch.tensor([[2], [2], [-1]])
    x = torch.tensor([[900.0], [901.0], [0.0]], requires_grad=True)
    found = softmax_sums(x, edges(lists), torch.ones(1))
    assert found[2].item() == pytest.approx(900 + math.e / (1 + math.e), abs=1e-3)
    found.sum().backward()
    assert x.grad.isfinite().all()


def test_what_a_learnt_softmax_forgets_of_messages_below_zero_has_no_gradient():
    x = torch.tensor([[-1.0], [2.0], [0.0]], requires_grad=True)
    softmax_sums(x, edges(torch.tensor([[2], [2], [-1]])), torch.ones(1)).sum().backward()
    assert x.grad[0].item() == x.grad[2].item() == 0
    assert x.grad[1].item() > 0


@pytest.mark.parametrize("operation", ["softmax", "sums", "normalised"])
def test_halves_are_summed_up_in_float32(operation):
    lists = random_lists(40, 6)

    def answer(x):
        x = x.clone().requires_grad_()
        found = {
            "softmax": lambda: softmax_sums(x, edges(lists), torch.tensor([1.3])),
            "sums": lambda: sums_with_neighbours(x, edges(lists)),
            "normalised": lambda: normalised_sums(x, undirected(lists)),
        }[operation]()
        found.backward(torch.ones_like(found))
        return found.detach(), x.grad

    half = rows(40, 8).bfloat16()
    found, gradient = answer(half)
    precise, its_gradient = answer(half.float())
    assert found.dtype == gradient.dtype == torch.bfloat16
    assert torch.equal(found, precise.bfloat16())
    assert torch.equal(gradient, its_gradient.bfloat16())


def dense_union(lists):
    """Table [N, N]: 1 where either patch lists the other, and half powers of the numbers of neighbours beside it."""
    one_way = gives_to(lists) > 0
    table = (one_way | one_way.T).astype(np.float64)
    degree = table.sum(axis=1)
    half = np.array([d**-0.5 if d else 0.0 for d in degree])
    return table, half[:, None] * table * half[None, :]


def test_an_undirected_graph_joins_each_pair_once():
    graph = undirected(LISTS)
    table, normalised = dense_union(LISTS)
    assert graph.degree.tolist() == table.sum(axis=1).tolist() == [4, 3, 1, 3, 3, 0]
    x = rows(6, 3)
    assert_close(normalised_sums(x, graph), torch.from_numpy(normalised) @ x, rtol=0, atol=1e-12)
    for lists in (random_lists(23, 4), random_lists(2, 1), random_lists(1, 3)):
        x = rows(len(lists), 3)
        expected = torch.from_numpy(dense_union(lists)[1]) @ x
        assert_close(normalised_sums(x, undirected(lists)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_a_chebyshev_convolution_is_a_polynomial_of_the_dense_laplacian(order):
    """L = 1 - D^-½ A D^-½ has eigenvalues up to 2, and T_κ is taken of 2 L / 2 - 1; isolated patches have L = 1."""
    torch.manual_seed(2)
    for lists in (LISTS, random_lists(23, 4)):
        conv = ChebConv(5, 3, order).double()
        torch.nn.init.normal_(conv.bias)
        n = len(lists)
        laplacian = np.eye(n) - dense_union(lists)[1]
        assert np.linalg.eigvalsh(laplacian).max() <= 2 + 1e-12
        scaled = 2 * laplacian / 2 - np.eye(n)
        polynomials = [np.eye(n), scaled]
        while len(polynomials) < order:
            polynomials.append(2 * scaled @ polynomials[-1] - polynomials[-2])
        x = rows(n, 5)
        weights = [term.weight.detach().numpy().T for term in conv.terms]
        of_terms = [p @ x.numpy() @ w for p, w in zip(polynomials[:order], weights, strict=True)]
        expected = torch.from_numpy(sum(of_terms)) + conv.bias
        assert_close(conv(x, undirected(lists)), expected, rtol=0, atol=1e-12)


def test_a_chebyshev_convolution_on_a_path_worked_by_hand():
    """0 - 1 - 2: with degrees 1, 2, 1 L̂ joins neighbours with -1/√2. From (1, 0, 0): T_1 = (0, -1/√2, 0),
    T_2 = 2 L̂ T_1 - T_0 = (0, 0, 1)."""
    conv = ChebConv(1, 1, 3).double()
    with torch.no_grad():
        for term, weight in zip(conv.terms, (2.0, 3.0, 5.0), strict=True):
            term.weight.fill_(weight)
    lists = torch.tensor([[1, -1], [0, -1], [1, -1]])  # 1 and 2 know each other by one list only
    found = conv(torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64), undirected(lists))
    assert found[:, 0].tolist() == pytest.approx([2.0, -3 / math.sqrt(2), 5.0], abs=1e-12)


def test_a_chebyshev_convolution_starts_as_that_of_torch_geometric():
    torch.manual_seed(0)
    conv = ChebConv(60, 90, 3)
    for term in conv.terms:
        assert term.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 150), rel=0.01)
        assert term.weight.std().item() == pytest.approx(math.sqrt(2 / 150), rel=0.05)
    assert torch.equal(conv.bias, torch.zeros(90))


def test_gin_sums_before_its_network():
    torch.manual_seed(3)
    conv, x = GINConv(7, 4).double(), rows(23, 7)
    lists = random_lists(23, 4)
    summed = x + torch.from_numpy(gives_to(lists)) @ x
    hidden = torch.relu(summed @ conv.up.weight.T + conv.up.bias)
    assert_close(conv(x, edges(lists)), hidden @ conv.down.weight.T + conv.down.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_gen_adds_the_softmax_sums_before_its_network(bias):
    torch.manual_seed(3)
    conv, x = GENConv(4, bias).double(), rows(23, 4)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    lists = random_lists(23, 4)
    z = x + softmax_by_loops(x, lists, float(conv.t.detach()))
    hidden = z @ conv.up.weight.T + (conv.up.bias if bias else 0)
    centred = hidden - hidden.mean(dim=1, keepdim=True)
    normed = centred / (centred.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt() * conv.norm.weight + conv.norm.bias
    expected = torch.relu(normed) @ conv.down.weight.T + (conv.down.bias if bias else 0)
    assert_close(conv(x, edges(lists)), expected, rtol=0, atol=1e-12)
    assert (conv.up.bias is not None) == bias


class LargestResult(TorchDispatchMode):
    """The largest number of elements that any operation answers with."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(each)]
        self.elements = max([self.elements, *(each.numel() for each in tensors)])
        return out


def test_no_tensor_of_edges_is_made():
    n, width, k = 500, 32, 8
    lists, x = random_lists(n, k), rows(n, width).requires_grad_()
    t = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with LargestResult() as largest:
        sums = sums_with_neighbours(x, edges(lists)) + softmax_sums(x, edges(lists), t)
        (sums + normalised_sums(x, undirected(lists))).sum().backward()
    assert largest.elements == (n + 1) * width
