"""The differentiable top-k against its definition written out draw by draw, and against integrals."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cftrain.models.perturbed_topk import hard_topk, perturbed_topk

NONE = -torch.inf


def scores_of(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(scores, k, n_samples, sigma, seed=3):
    """Noise [S, N], and of each draw the indicators [S, k, N], by sorting lists."""
    torch.manual_seed(seed)
    noise = torch.randn(n_samples, len(scores), dtype=scores.dtype)
    indicators = torch.zeros(n_samples, k, len(scores), dtype=scores.dtype)
    for j, row in enumerate((scores + sigma * noise).tolist()):
        best = sorted(range(len(row)), key=lambda n: -row[n])[:k]
        for i, n in enumerate(sorted(n for n in best if row[n] > -math.inf)):
            indicators[j, i, n] = 1
    return noise, indicators


def chosen(scores, k, n_samples=50, sigma=0.5, seed=3, **options):
    torch.manual_seed(seed)
    return perturbed_topk(scores, k, n_samples=n_samples, sigma=sigma, **options)


def test_the_largest_are_chosen_in_the_order_of_their_places():
    assert hard_topk(scores_of(3, 1, 5, 2), 2).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert hard_topk(scores_of(1, 4, 5, 2), 3).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_where_there_are_no_more_than_k_all_are_chosen_and_rows_without_one_are_zero():
    assert hard_topk(scores_of(2, 1), 2).tolist() == [[1, 0], [0, 1]]
    assert hard_topk(scores_of(2, 1), 3).tolist() == [[1, 0], [0, 1], [0, 0]]
    assert chosen(scores_of(2, 1), 4).tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]


def test_a_score_of_minus_infinity_is_never_chosen_and_leaves_the_order_of_the_others():
    scores = scores_of(NONE, 1, NONE, 0, NONE)
    expected = [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert hard_topk(scores, 3).tolist() == expected
    assert chosen(scores, 3).tolist() == expected
    assert hard_topk(scores[:1], 2).tolist() == [[0], [0]]


@pytest.mark.parametrize("scores", [scores_of(0.1, 0.9, 0.5, 0.4, 0.6), scores_of(0.1, NONE, 0.5, 0.4, NONE, 0.3)])
def test_the_soft_choice_is_the_mean_of_sorted_indicators_over_the_draws(scores):
    _, indicators = drawn(scores, 3, 50, 0.5)
    found = chosen(scores, 3)
    assert_close(found, indicators.mean(dim=0), rtol=0, atol=1e-12)
    assert ((found > 0) & (found < 1)).any()


@pytest.mark.parametrize("full", [True, False])
def test_gradients_are_what_indicators_and_noise_have_in_common_over_sigma(full):
    scores = scores_of(0.1, 0.9, 0.5, 0.4, 0.6, NONE).requires_grad_()
    worth = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (chosen(scores, 3, full=full) * worth).sum().backward()
    noise, indicators = drawn(scores.detach(), 3, 50, 0.5)
    expected = torch.zeros(6, dtype=torch.float64)
    for m in range(6):
        for i in range(3):
            if full:
                for n in range(6):
                    expected[m] += worth[i, n] * torch.stack([indicators[:, i, n], noise[:, m]]).cov()[0, 1] / 0.5
            else:
                expected[m] += worth[i, m] * (indicators[:, i, m] * noise[:, m]).mean() / 0.5
    assert_close(scores.grad, expected, rtol=0, atol=1e-12)


def standard_normal(x):
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def test_of_two_the_first_is_chosen_as_often_as_the_normal_distribution_says_with_its_slope():
    """P(s0 + σ z0 > s1 + σ z1) = Φ((s0 - s1) / (σ √2))."""
    scores = scores_of(0.3, 0.0).requires_grad_()
    found = chosen(scores, 1, n_samples=200_000, sigma=0.4)
    found[0, 0].backward()
    apart = torch.tensor(0.3 / (0.4 * math.sqrt(2)))
    slope = float(standard_normal(apart)) / (0.4 * math.sqrt(2))
    assert float(found[0, 0].detach()) == pytest.approx(float(torch.special.ndtr(apart)), abs=0.005)
    assert scores.grad.tolist() == pytest.approx([slope, -slope], rel=0.02)


def two_of_three(scores, sigma):
    """P by quadrature, from the chance of each to be the least: the other two are chosen."""
    x = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    z = (x - scores[:, None]) / sigma
    density, above = standard_normal(z) / sigma, 1 - torch.special.ndtr(z)
    least = [torch.trapezoid(density[m] * above[m - 1] * above[m - 2], x) for m in range(3)]
    first = torch.stack([1 - least[0], least[0], torch.zeros_like(least[0])])
    return torch.stack([first, torch.stack([torch.zeros_like(least[0]), least[2], 1 - least[2]])])


def test_two_of_three_have_the_chances_and_slopes_of_the_integral_and_the_diagonal_has_not():
    scores, worth = scores_of(0.2, 0.5, 0.0), torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, -1.0]], dtype=torch.float64)
    exact, full, diagonal = (scores.clone().requires_grad_() for _ in range(3))
    expected = two_of_three(exact, 0.4)
    (expected * worth).sum().backward()
    found = chosen(full, 2, n_samples=400_000, sigma=0.4)
    (found * worth).sum().backward()
    (chosen(diagonal, 2, n_samples=400_000, sigma=0.4, full=False) * worth).sum().backward()
    assert_close(found.detach(), expected.detach(), rtol=0, atol=0.005)
    assert_close(full.grad, exact.grad, rtol=0, atol=0.03)
    assert (diagonal.grad - exact.grad).abs().max() > 0.5


def test_which_of_equally_worthy_patches_is_chosen_has_no_gradient_but_by_the_diagonal():
    for k in (2, 4):  # of four, and all four
        full, diagonal = (torch.zeros(4, dtype=torch.float64).requires_grad_() for _ in range(2))
        chosen(full, k).sum().backward()
        chosen(diagonal, k, full=False).sum().backward()
        assert full.grad.abs().max() < 1e-12
        assert diagonal.grad.abs().max() > 0.01


def test_the_noise_comes_from_the_generator_of_torch():
    scores = torch.zeros(6)
    assert torch.equal(chosen(scores, 2), chosen(scores, 2))
    assert not torch.equal(chosen(scores, 2), chosen(scores, 2, seed=4))


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


def test_no_table_of_all_draws_is_made_in_either_direction():
    scores = torch.randn(8625).requires_grad_()
    with LargestResult() as largest:
        chosen(scores, 12, n_samples=100).square().sum().backward()
    assert largest.elements == 100 * 8625
