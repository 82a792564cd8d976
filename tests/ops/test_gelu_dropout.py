"""GELU and dropout in one pass: the kernel in Triton's interpreter against the definition in float64."""

import math

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from cfkernels import RateError, ShapeError, UnavailableError, gelu_dropout, using
from cfkernels.dispatch import choose
from cfkernels.gelu_dropout import candidates

SEED = torch.tensor([-1234567890123456789])
SHAPES = {"one element": (1, 1), "around the tile": (5, 513), "many rows": (37, 48)}
# the rounding of the result alone: half a unit in the last place, twice for the gradient's factors
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def draw(shape, dtype, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_kernel_agrees_with_the_definition_in_float64(shape, dtype, dropout_p):
    x, weight = draw(shape, dtype).requires_grad_(), draw(shape, dtype, seed=4)
    with using(gelu_dropout="triton"):
        y = gelu_dropout(x, dropout_p=dropout_p, seed=SEED)
    exact = x.detach().double().requires_grad_()
    with using(gelu_dropout="reference"):
        expected = gelu_dropout(exact, dropout_p=dropout_p, seed=SEED)
    ours = torch.autograd.grad(y, x, weight)[0]
    theirs = torch.autograd.grad(expected, exact, weight.double())[0]
    for a, b in ((y, expected), (ours, theirs)):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= ROUNDING[dtype] * b.norm().clamp_min(1e-30)


def test_without_dropout_it_is_gelu_written_out():
    x = draw((4, 7), torch.float64)
    expected = [[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x.tolist()]
    assert_close(gelu_dropout(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_a_mask_belongs_to_its_seed():
    x = torch.ones(64, 64)
    first, again = (gelu_dropout(x, dropout_p=0.5, seed=SEED) for _ in range(2))
    other = gelu_dropout(x, dropout_p=0.5, seed=SEED + 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fresh_masks_follow_the_generator_of_pytorch():
    x = torch.ones(64, 64)
    torch.manual_seed(5)
    first, second = gelu_dropout(x, dropout_p=0.5), gelu_dropout(x, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, gelu_dropout(x, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_pytorch_accepts_the_op():
    opcheck(torch.ops.cfkernels.gelu_dropout.default, (draw((3, 40), torch.float32).requires_grad_(), SEED, 77))


def test_refused_inputs_are_named():
    with pytest.raises(ShapeError, match=r"x must be \[T, D\], got \[3\]"):
        gelu_dropout(torch.zeros(3))
    with pytest.raises(RateError, match=r"below 1, got 1\.5"):
        gelu_dropout(torch.zeros(3, 3), dropout_p=1.5)
    with pytest.raises(RateError, match=r"256ths; 0\.001 would not act"):
        gelu_dropout(torch.zeros(3, 3), dropout_p=0.001)


def test_a_named_implementation_runs_or_says_why_not():
    with (
        using(gelu_dropout="triton"),
        pytest.raises(UnavailableError, match=r"'triton' cannot run here: torch\.float64 has no kernel"),
    ):
        gelu_dropout(torch.zeros(3, 3, dtype=torch.float64))
    with using(gelu_dropout="cudnn"), pytest.raises(UnavailableError, match="no implementation 'cudnn'; there are tri"):
        gelu_dropout(torch.zeros(3, 3))


def test_the_interpreter_is_never_chosen_without_being_asked():
    assert choose("gelu_dropout", candidates(torch.device("cpu"), torch.float32)).name == "reference"
