"""LayerNorm of a sum: the kernel in Triton's interpreter against the formula in float64."""

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from cfkernels import ShapeError, UnavailableError, using
from cfkernels.dispatch import choose
from cfkernels.layer_norm import candidates, layer_norm, op

SHAPES = {
    "one element": (1, 1),
    "one row": (1, 48),
    "around a tile of rows": (17, 40),
    "D a power of two": (33, 64),
    "more columns than a tile has": (3, 2100),
}
# the rounding of the result alone
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def draw(shape, dtype, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(shape, dtype, *, residual=True):
    """x, the residual, weight and bias, all needing gradients; parameters are float32."""
    x = (3 * draw(shape, dtype) + 5).requires_grad_()
    parameters = [draw(shape[1:], torch.float32, seed).requires_grad_() for seed in (5, 6)]
    return [x, draw(shape, dtype, 4).requires_grad_() if residual else None, *parameters]


def written_out(x, residual, weight, bias, eps=1e-5):
    total = x if residual is None else x + residual
    mean = total.sum(1, keepdim=True) / total.shape[1]
    variance = ((total - mean) ** 2).sum(1, keepdim=True) / total.shape[1]
    return (total - mean) / (variance + eps).sqrt() * weight + bias


def gradients(y, tensors):
    return torch.autograd.grad(y, [x for x in tensors if x is not None], draw(y.shape, y.dtype, seed=7))


def values_and_gradients(tensors, implementation):
    x, residual, weight, bias = tensors
    with using(layer_norm=implementation):
        y = layer_norm(x, weight, bias, residual=residual)
    return y, *gradients(y, tensors)


def exactly(tensors):
    """The formula on the same numbers in float64; the gradient of the result is as it was rounded."""
    exact = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    y = written_out(*exact)
    weight = draw(y.shape, tensors[0].dtype, seed=7).double()
    return y, *torch.autograd.grad(y, [x for x in exact if x is not None], weight)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("residual", [False, True], ids=["x alone", "x and residual"])
def test_the_kernel_agrees_with_the_formula_in_float64(shape, dtype, residual):
    tensors = inputs(shape, dtype, residual=residual)
    ours, theirs = values_and_gradients(tensors, "triton"), exactly(tensors)
    given = [tensors[0], *(x for x in tensors if x is not None)]
    for a, b, of in zip(ours, theirs, given, strict=True):
        assert a.dtype == of.dtype
        # a row of one element has a gradient of zero
        assert (a.double() - b).norm() <= ROUNDING[dtype] * b.norm().clamp_min(1e-3)


@pytest.mark.parametrize("residual", [False, True], ids=["x alone", "x and residual"])
def test_the_definition_is_the_formula(residual):
    tensors = [None if x is None else x.detach().double().requires_grad_() for x in inputs((5, 7), torch.float32)]
    tensors[1] = tensors[1] if residual else None
    assert_close(values_and_gradients(tensors, "reference"), exactly(tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_result_has_the_dtype_of_x_whatever_the_parameters_have_also_under_autocast(implementation):
    x, residual, weight, bias = inputs((5, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), using(layer_norm=implementation):
        assert layer_norm(x, weight, bias, residual=residual).dtype == torch.bfloat16
        assert layer_norm(x, weight, bias, residual=residual.float()).dtype == torch.bfloat16


def test_a_residual_of_another_dtype_gets_its_gradient_in_it():
    x, _, weight, bias = inputs((5, 8), torch.bfloat16)
    residual = draw((5, 8), torch.float32, 4).requires_grad_()
    grad_x, grad_residual, *_ = values_and_gradients([x, residual, weight, bias], "triton")[1:]
    assert (grad_x.dtype, grad_residual.dtype) == (torch.bfloat16, torch.float32)


def test_rows_may_lie_apart():
    wide, weight, bias = draw((9, 96), torch.float32), draw((32,), torch.float32, 5), draw((32,), torch.float32, 6)
    x, residual = wide[:, 64:].requires_grad_(), wide[:, 1:33].requires_grad_()
    tensors = [x, residual, weight.requires_grad_(), bias.requires_grad_()]
    assert not x.is_contiguous()
    for a, b in zip(values_and_gradients(tensors, "triton"), exactly(tensors), strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


@pytest.fixture(scope="module")
def far_apart():
    """Three rows of 32 elements, the last 2^31 elements behind the first; memory is taken where it is written."""
    memory = torch.from_numpy(np.zeros(2**31 + 32, np.float16))
    rows = memory.as_strided((3, 32), (2**30, 1))
    rows.copy_(draw((3, 32), torch.float16, 8))
    return rows


def test_rows_beyond_two_to_the_31_elements_are_found(far_apart):
    x, residual = (far_apart.detach().requires_grad_() for _ in range(2))
    tensors = [x, residual, *inputs((3, 32), torch.float16)[2:]]
    for a, b in zip(values_and_gradients(tensors, "triton"), exactly(tensors), strict=True):
        assert (a.double() - b).norm() <= 1e-3 * b.norm()


def test_columns_that_lie_apart_are_copied_first():
    x, weight, bias = draw((32, 9), torch.float32).T, draw((32,), torch.float32), draw((32,), torch.float32)
    with using(layer_norm="triton"):
        assert_close(layer_norm(x, weight, bias), layer_norm(x.contiguous(), weight, bias), rtol=0, atol=0)


def test_rows_far_from_zero_keep_their_digits():
    """A variance computed as E[x^2] - E[x]^2 would be lost here."""
    x = draw((4, 64), torch.float64) + 1000
    weight, bias = torch.ones(64), torch.zeros(64)
    with using(layer_norm="triton"):
        y = layer_norm(x.float(), weight, bias)
    assert_close(y.double(), written_out(x.float().double(), None, weight, bias), rtol=1e-4, atol=1e-4)


def test_gradients_of_parameters_are_summed_over_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr(op, "_GROUPS", 3)
    tensors = inputs((16 * 7 + 1, 20), torch.float32)
    for a, b in zip(values_and_gradients(tensors, "triton"), exactly(tensors), strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


def test_two_runs_give_the_same_bits():
    tensors = inputs((50, 24), torch.float32)
    first, second = (values_and_gradients(tensors, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows_are_no_rows():
    x = torch.zeros(0, 8, requires_grad=True)
    weight, bias = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)
    y, *grads = values_and_gradients([x, None, weight, bias], "triton")
    assert y.shape == (0, 8)
    assert [grad.abs().sum().item() for grad in grads] == [0, 0, 0]


@pytest.mark.parametrize("residual", [False, True], ids=["x alone", "x and residual"])
def test_pytorch_accepts_the_op(residual):
    x, other, weight, bias = inputs((3, 40), torch.float32, residual=residual)
    opcheck(torch.ops.cfkernels.layer_norm.default, (x, other, weight, bias, 1e-5))


def test_it_compiles_as_one_graph():
    tensors = inputs((5, 16), torch.float32)

    def normed(x, residual, weight, bias):
        return layer_norm(x, weight, bias, residual=residual)

    with using(layer_norm="triton"):
        y = torch.compile(normed, fullgraph=True, backend="aot_eager")(*tensors)
    expected = values_and_gradients(tensors, "triton")
    assert_close((y, *gradients(y, tensors)), expected, rtol=0, atol=0)


REFUSED = {
    "x without rows": (((8,), (8,), (8,)), None, r"x must be \[T, D\], got \[8\]"),
    "a residual of another shape": (((3, 8), (8,), (8,)), (1, 8), r"residual must be \[3, 8\] as x, got \[1, 8\]"),
    "a weight of another width": (((3, 8), (4,), (8,)), None, r"weight must be \[8\], got \[4\]"),
    "a bias of another rank": (((3, 8), (8,), (1, 8)), None, r"bias must be \[8\], got \[1, 8\]"),
}


@pytest.mark.parametrize(("shapes", "residual", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_inputs_are_named(shapes, residual, message):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ShapeError, match=message):
        layer_norm(*tensors, residual=None if residual is None else torch.zeros(residual))


def test_a_named_implementation_runs_or_says_why_not():
    x = torch.zeros(1, 5000)
    with using(layer_norm="triton"), pytest.raises(UnavailableError, match="rows of 5000 are too wide"):
        layer_norm(x, x[0], x[0])


def test_the_interpreter_is_never_chosen_without_being_asked():
    assert choose("layer_norm", candidates(torch.device("cpu"), torch.float32)).name == "reference"
