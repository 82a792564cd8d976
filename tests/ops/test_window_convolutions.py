"""PPEG and the grouped window convolution against one conv2d per kernel, bag by bag, in float64."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from cfkernels import ShapeError, grouped_window_conv, ppeg

GRIDS = {
    "one token": (1,),
    "smaller than every window": (2,),
    "unequal bags": (3, 1, 8),
    "around the window": (6, 7, 8),
    "a large odd grid": (17,),
}


def windows(channels, inputs, sides, generator):
    """weight, bias for each side, all needing gradients."""
    shapes = [shape for side in sides for shape in ((channels, inputs, side, side), (channels,))]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def separate_convolutions(tokens, parameters, side, groups):
    """The sum of one conv2d per kernel over one bag's grid: [g * g, C]."""
    image = tokens.T.reshape(1, -1, side, side)
    pairs = zip(parameters[::2], parameters[1::2], strict=True)
    maps = [functional.conv2d(image, w, b, padding=w.shape[-1] // 2, groups=groups) for w, b in pairs]
    return sum(maps).reshape(maps[0].shape[1], -1).T


def separate_ppeg(x, parameters, grids, prefix):
    outputs, start = [], 0
    for side in grids:
        middle, end = start + prefix, start + prefix + side * side
        outputs.append(x[start:middle])
        outputs.append(x[middle:end] + separate_convolutions(x[middle:end], parameters, side, groups=x.shape[1]))
        start = end
    return torch.cat(outputs)


def assert_same_values_and_gradients(ours, theirs, tensors, generator):
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((output * weight).sum(), tensors) for output in (ours, theirs)]
    assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 1, 3], ids=lambda n: f"{n} tokens before")
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_ppeg_equals_the_identity_plus_three_depthwise_convolutions(grids, prefix):
    generator = torch.Generator().manual_seed(3)
    n_tokens = sum(prefix + side * side for side in grids)
    x = torch.randn(n_tokens, 6, generator=generator, dtype=torch.float64).requires_grad_()
    parameters = windows(6, 1, (7, 5, 3), generator)
    ours = ppeg(x, *parameters, grid_sizes=grids, prefix=prefix)
    theirs = separate_ppeg(x, parameters, grids, prefix)
    assert_same_values_and_gradients(ours, theirs, [x, *parameters], generator)


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_grouped_window_conv_equals_four_grouped_convolutions(grids):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(sum(side * side for side in grids), 10, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    parameters = windows(5, 2, (7, 5, 3, 1), generator)
    ours = grouped_window_conv(x, *parameters, grid_sizes=grids)
    bags = x.split([side * side for side in grids])
    theirs = torch.cat(
        [separate_convolutions(bag, parameters, side, groups=5) for bag, side in zip(bags, grids, strict=True)]
    )
    assert_same_values_and_gradients(ours, theirs, [x, *parameters], generator)


def test_ppeg_keeps_small_weights_in_bfloat16():
    """A kernel with the identity's 1 inside would round weights of 0.001 at its centre away."""
    x = torch.zeros(1, 8, dtype=torch.bfloat16) + 1
    weights = [torch.full((8, 1, side, side), 0.001, dtype=torch.bfloat16) for side in (7, 5, 3)]
    bias = torch.full((8,), -1, dtype=torch.bfloat16)
    zero = torch.zeros_like(bias)
    output = ppeg(x, weights[0], bias, weights[1], zero, weights[2], zero, grid_sizes=(1,))
    assert_close(output.float(), torch.full((1, 8), 0.003), rtol=0.5, atol=0)


REFUSED_GRIDS = {
    "a token too many": (10, (3,), "do not hold 10"),
    "a grid without a side": (9, (3, 0), "do not hold 9"),
    "no grids": (0, (), "do not hold 0"),
}


@pytest.mark.parametrize(("n_tokens", "grids", "message"), REFUSED_GRIDS.values(), ids=REFUSED_GRIDS.keys())
def test_both_operators_refuse(n_tokens, grids, message):
    generator = torch.Generator().manual_seed(5)
    x = torch.zeros(n_tokens, 4, dtype=torch.float64)
    with pytest.raises(ShapeError, match=message):
        ppeg(x, *windows(4, 1, (7, 5, 3), generator), grid_sizes=grids)
    with pytest.raises(ShapeError, match=message):
        grouped_window_conv(x, *windows(2, 2, (7, 5, 3, 1), generator), grid_sizes=grids)


def test_ppeg_refuses_a_kernel_of_another_width_and_names_it():
    parameters = windows(4, 1, (7, 5, 3), torch.Generator().manual_seed(5))
    parameters[2] = parameters[2][:3]
    with pytest.raises(ShapeError, match=r"weight5, bias5 must be \[4, 1, 5, 5\]"):
        ppeg(torch.zeros(9, 4, dtype=torch.float64), *parameters, grid_sizes=(3,))


def test_grouped_window_conv_refuses_an_odd_width():
    parameters = windows(2, 2, (7, 5, 3, 1), torch.Generator().manual_seed(5))
    with pytest.raises(ShapeError, match="even"):
        grouped_window_conv(torch.zeros(9, 5, dtype=torch.float64), *parameters, grid_sizes=(3,))
