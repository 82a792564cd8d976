"""Dropout and a sum in one pass: the kernel in Triton's interpreter against the definition in float64."""

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from cfkernels import RateError, ShapeError, UnavailableError, using
from cfkernels.dispatch import choose
from cfkernels.dropout import keep_mask
from cfkernels.dropout_add import candidates, dropout_add

SEED = torch.tensor([-1234567890123456789])
SHAPES = {"one element": (1, 1), "around the tile": (5, 513), "many rows": (37, 48)}
# the rounding of the result alone
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def draw(shape, dtype, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def written_out(x, residual):
    """dropout_p = 0.3 acts as 77/256: what is kept is multiplied with 256 / (256 - 77)."""
    kept = keep_mask(SEED, torch.arange(len(x)), x.shape[1], 77)
    return kept * x * (256 / 179) + residual


def values_and_gradients(x, residual, implementation):
    with using(dropout_add=implementation):
        y = dropout_add(x, residual, dropout_p=0.3, seed=SEED)
    return y, *torch.autograd.grad(y, (x, residual), draw(y.shape, y.dtype, seed=5))


def exactly(x, residual):
    exact = [one.detach().double().requires_grad_() for one in (x, residual)]
    y = written_out(*exact)
    weight = draw(y.shape, torch.promote_types(x.dtype, residual.dtype), seed=5).double()
    return y, *torch.autograd.grad(y, exact, weight)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_kernel_agrees_with_the_formula_in_float64(shape, dtype):
    x, residual = draw(shape, dtype).requires_grad_(), draw(shape, dtype, 4).requires_grad_()
    for a, b in zip(values_and_gradients(x, residual, "triton"), exactly(x, residual), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= ROUNDING[dtype] * b.norm()


def test_the_definition_is_the_formula():
    x, residual = draw((5, 37), torch.float64).requires_grad_(), draw((5, 37), torch.float64, 4).requires_grad_()
    ours = values_and_gradients(x, residual, "reference")
    assert_close(ours, exactly(x, residual), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_without_dropout_it_is_the_sum(implementation):
    x, residual = draw((4, 7), torch.float32), draw((4, 7), torch.float32, 4)
    with using(dropout_add=implementation):
        assert torch.equal(dropout_add(x, residual), x + residual)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_two_dtypes_give_the_wider_one_and_each_its_own_gradient(implementation):
    x, residual = draw((4, 7), torch.bfloat16).requires_grad_(), draw((4, 7), torch.float32, 4).requires_grad_()
    y, grad_x, grad_residual = values_and_gradients(x, residual, implementation)
    assert [one.dtype for one in (y, grad_x, grad_residual)] == [torch.float32, torch.bfloat16, torch.float32]


def test_rows_may_lie_apart():
    wide = draw((9, 96), torch.float32)
    x, residual = wide[:, 64:].requires_grad_(), wide[:, 1:33].requires_grad_()
    for a, b in zip(values_and_gradients(x, residual, "triton"), exactly(x, residual), strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


@pytest.fixture(scope="module")
def far_apart():
    """Three rows of 32 elements, the last 2^31 elements behind the first; memory is taken where it is written."""
    memory = torch.from_numpy(np.zeros(2**31 + 32, np.float16))
    rows = memory.as_strided((3, 32), (2**30, 1))
    rows.copy_(draw((3, 32), torch.float16, 8))
    return rows


def test_rows_beyond_two_to_the_31_elements_are_found(far_apart):
    x, residual = far_apart.detach().requires_grad_(), far_apart.detach().requires_grad_()
    for a, b in zip(values_and_gradients(x, residual, "triton"), exactly(x, residual), strict=True):
        assert (a.double() - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_columns_may_lie_apart(implementation):
    x, residual = draw((7, 9), torch.float32).T.requires_grad_(), draw((7, 9), torch.float32, 4).T.requires_grad_()
    for a, b in zip(values_and_gradients(x, residual, implementation), exactly(x, residual), strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


def test_a_mask_belongs_to_its_seed_and_follows_the_generator_of_pytorch():
    x, zero = torch.ones(64, 64), torch.zeros(64, 64)
    torch.manual_seed(5)
    first, second = (dropout_add(x, zero, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, dropout_add(x, zero, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_no_rows_are_no_rows():
    x = torch.zeros(0, 8, requires_grad=True)
    assert [one.shape for one in values_and_gradients(x, x, "triton")] == [(0, 8)] * 3


def test_pytorch_accepts_the_op():
    tensors = draw((3, 40), torch.float32).requires_grad_(), draw((3, 40), torch.float32, 4).requires_grad_()
    opcheck(torch.ops.cfkernels.dropout_add.default, (*tensors, SEED, 77))


def test_it_compiles_as_one_graph():
    x, residual = draw((5, 16), torch.float32).requires_grad_(), draw((5, 16), torch.float32, 4).requires_grad_()

    def added(x, residual, seed):
        return dropout_add(x, residual, dropout_p=0.3, seed=seed)

    with using(dropout_add="triton"):
        y = torch.compile(added, fullgraph=True, backend="aot_eager")(x, residual, SEED)
    ours = y, *torch.autograd.grad(y, (x, residual), draw(y.shape, y.dtype, seed=5))
    assert_close(ours, values_and_gradients(x, residual, "triton"), rtol=0, atol=0)


def test_refused_inputs_are_named():
    with pytest.raises(ShapeError, match=r"both be \[T, D\], got \[3\] and \[3\]"):
        dropout_add(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ShapeError, match=r"got \[3, 4\] and \[1, 4\]"):
        dropout_add(torch.zeros(3, 4), torch.zeros(1, 4))
    with pytest.raises(RateError, match=r"below 1, got 1\.5"):
        dropout_add(torch.zeros(3, 3), torch.zeros(3, 3), dropout_p=1.5)


def test_a_named_implementation_runs_or_says_why_not():
    x = torch.zeros(3, 3, dtype=torch.float64)
    with using(dropout_add="triton"), pytest.raises(UnavailableError, match=r"torch\.float64 has no kernel"):
        dropout_add(x, x, dropout_p=0.5)


def test_the_interpreter_is_never_chosen_without_being_asked():
    assert choose("dropout_add", candidates(torch.device("cpu"), torch.float32)).name == "reference"
