"""Three LayerNorms and their mix: the kernel in Triton's interpreter against the formula in float64."""

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from cfkernels import ShapeError, UnavailableError, using
from cfkernels.dispatch import choose
from cfkernels.mix_layer_norms import candidates, mix_layer_norms, op

SHAPES = {
    "one row": (1, 48),
    "around a tile of rows": (17, 40),
    "D a power of two": (33, 64),
    "more columns than a tile has": (3, 1100),
}
# the rounding of the result alone
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
NAMES = (*(f"{what}{i}" for what in ("map", "weight", "bias") for i in range(3)), "mix_weight", "mix_bias")


def draw(shape, dtype, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(shape, dtype, n_maps=3):
    """Maps of different means and spreads, weights, biases, mix weight and bias; parameters are float32."""
    maps = [((i + 1) * draw(shape, dtype, 10 + i) + 2 * i).requires_grad_() for i in range(n_maps)]
    rows = [draw(shape[1:], torch.float32, 20 + i).requires_grad_() for i in range(2 * n_maps)]
    return [*maps, *rows, draw((n_maps,), torch.float32, 30).requires_grad_(), torch.ones(1, requires_grad=True)]


def grouped(tensors):
    n = (len(tensors) - 2) // 3
    return tuple(tensors[:n]), tuple(tensors[n : 2 * n]), tuple(tensors[2 * n : 3 * n]), *tensors[3 * n :]


def written_out(tensors, eps=1e-5):
    maps, weights, biases, mix_weight, mix_bias = grouped(tensors)
    mixed = mix_bias
    for i, (x, weight, bias) in enumerate(zip(maps, weights, biases, strict=True)):
        mean = x.sum(1, keepdim=True) / x.shape[1]
        variance = ((x - mean) ** 2).sum(1, keepdim=True) / x.shape[1]
        mixed = mixed + mix_weight[i] * ((x - mean) / (variance + eps).sqrt() * weight + bias)
    return mixed


def gradients(y, tensors):
    return torch.autograd.grad(y, tensors, draw(y.shape, y.dtype, seed=7))


def values_and_gradients(tensors, implementation):
    with using(mix_layer_norms=implementation):
        y = mix_layer_norms(*grouped(tensors))
    return y, *gradients(y, tensors)


def exactly(tensors):
    """The formula on the same numbers in float64; the gradient of the result is as it was rounded."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    y = written_out(exact)
    return y, *torch.autograd.grad(y, exact, draw(y.shape, tensors[0].dtype, seed=7).double())


def assert_agreement(tensors, rounding):
    ours, theirs = values_and_gradients(tensors, "triton"), exactly(tensors)
    for name, a, b, of in zip(("y", *NAMES), ours, theirs, (tensors[0], *tensors), strict=True):
        assert a.dtype == of.dtype, name
        # scalars are sums of thousands of signed terms: their error is measured against a typical one
        size = b.norm().clamp_min(ours[0].numel() ** 0.5) if name == "mix_bias" else b.norm()
        assert (a.double() - b).norm() <= rounding * size, name


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_kernel_agrees_with_the_formula_in_float64(shape, dtype):
    assert_agreement(inputs(shape, dtype), ROUNDING[dtype])


@pytest.mark.parametrize("n_maps", [1, 2, 3, 5])
def test_the_definition_is_the_formula_for_any_number_of_maps(n_maps):
    tensors = [x.detach().double().requires_grad_() for x in inputs((5, 7), torch.float32, n_maps)]
    assert_close(values_and_gradients(tensors, "reference"), exactly(tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_result_has_the_dtype_of_the_maps_also_under_autocast(implementation):
    tensors = inputs((5, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), using(mix_layer_norms=implementation):
        assert mix_layer_norms(*grouped(tensors)).dtype == torch.bfloat16


def test_rows_may_lie_apart():
    wide = draw((9, 96), torch.float32)
    maps = [wide[:, first : first + 32].requires_grad_() for first in (0, 1, 64)]
    tensors = [*maps, *inputs((9, 32), torch.float32)[3:]]
    assert not any(x.is_contiguous() for x in maps)
    assert_agreement(tensors, 1e-6)


def test_rows_beyond_two_to_the_31_elements_are_found():
    memory = torch.from_numpy(np.zeros(2**31 + 32, np.float16))  # taken where it is written
    far_apart = memory.as_strided((3, 32), (2**30, 1))
    far_apart.copy_(draw((3, 32), torch.float16, 8))
    maps = [far_apart.detach().requires_grad_() for _ in range(3)]
    assert_agreement([*maps, *inputs((3, 32), torch.float16)[3:]], 1e-3)


def test_columns_that_lie_apart_are_copied_first():
    maps = [draw((32, 9), torch.float32, seed).T.requires_grad_() for seed in range(3)]
    assert_agreement([*maps, *inputs((9, 32), torch.float32)[3:]], 1e-6)


def test_gradients_of_parameters_are_summed_over_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr(op, "_GROUPS", 3)
    assert_agreement(inputs((16 * 7 + 1, 20), torch.float32), 1e-6)


def test_two_runs_give_the_same_bits():
    tensors = inputs((50, 24), torch.float32)
    first, second = (values_and_gradients(tensors, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows_are_no_rows():
    y, *grads = values_and_gradients(inputs((0, 8), torch.float32), "triton")
    assert y.shape == (0, 8)
    assert all(grad.abs().sum() == 0 for grad in grads)


def test_pytorch_accepts_the_op():
    opcheck(torch.ops.cfkernels.mix_layer_norms.default, (*inputs((3, 20), torch.float32), 1e-5))


def test_it_compiles_as_one_graph():
    tensors = inputs((5, 16), torch.float32)

    def mixed(*tensors):
        return mix_layer_norms(*grouped(tensors))

    with using(mix_layer_norms="triton"):
        y = torch.compile(mixed, fullgraph=True, backend="aot_eager")(*tensors)
    expected = values_and_gradients(tensors, "triton")
    assert_close((y, *gradients(y, tensors)), expected, rtol=0, atol=0)


ROW, MAP = torch.zeros(8), torch.zeros(3, 8)
REFUSED = {
    "no maps": (((), (), (), ROW[:0], ROW[:1]), r"the maps must all be one \[T, D\], got \[\]"),
    "maps of two shapes": (((MAP, MAP[:2]), (ROW,) * 2, (ROW,) * 2, ROW[:2], ROW[:1]), r"got \[\[3, 8\], \[2, 8\]\]"),
    "a weight too few": (((MAP, MAP), (ROW,), (ROW,) * 2, ROW[:2], ROW[:1]), r"weights must be \[8\] for each map"),
    "a bias too short": (((MAP,), (ROW,), (ROW[1:],), ROW[:1], ROW[:1]), r"biases must be \[8\] .* got \[\[7\]\]"),
    "a mix of others": (((MAP,), (ROW,), (ROW,), ROW[:2], ROW[:1]), r"must be \[1\] and \[1\], got \[2\] and \[1\]"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_inputs_are_named(arguments, message):
    with pytest.raises(ShapeError, match=message):
        mix_layer_norms(*arguments)


def test_a_named_implementation_runs_or_says_why_not():
    with using(mix_layer_norms="triton"):
        with pytest.raises(UnavailableError, match="the kernel mixes 3 maps, not 2"):
            mix_layer_norms(*grouped(inputs((3, 8), torch.float32, n_maps=2)))
        with pytest.raises(UnavailableError, match="rows of 5000 are too wide"):
            mix_layer_norms(*grouped(inputs((1, 5000), torch.float32)))


def test_the_interpreter_is_never_chosen_without_being_asked():
    assert choose("mix_layer_norms", candidates(torch.device("cpu"), torch.float32)).name == "reference"
