"""The grouped window convolution against one conv2d per kernel, ReLU and scale, bag by bag, in float64."""

from itertools import pairwise

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional
from torch.testing import assert_close

from cfkernels import ShapeError, UnavailableError, grouped_window_conv, using
from cfkernels.dispatch import choose
from cfkernels.grouped_window_conv import candidates

GRIDS = {
    "one token": (1,),
    "smaller than every window": (2,),
    "unequal bags": (3, 1, 8),
    "around the window": (6, 7, 8),
    "a large odd grid": (17,),
}
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# what each kernel launch below shows: grids, output channels, dtype, whether channels are scaled
KERNEL_CASES = {
    "one token, float16": ((1,), 8, torch.float16, False),
    "two by two, bfloat16": ((2,), 12, torch.bfloat16, True),
    "unequal bags": ((3, 1, 8), 20, torch.float32, True),
    "strips and bands": ((9,), 8, torch.float32, False),
    "two channel blocks": ((1,), 136, torch.float32, True),
}


def draw(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def windows(channels, generator, dtype=torch.float64):
    """weight7, bias7 and so on to weight1, bias1, all needing gradients."""
    shapes = [shape for side in (7, 5, 3, 1) for shape in ((channels, 2, side, side), (channels,))]
    return [draw(shape, generator, dtype) for shape in shapes]


def case(grids, channels, dtype, scaled, seed=4):
    """Tokens, parameters in float32 (float64 with such tokens), 0 or 1.25 per channel, a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(side * side for side in grids)
    parameters = windows(channels, generator, torch.promote_types(dtype, torch.float32))
    kept = torch.rand(len(grids), channels, generator=generator) > 0.3
    gradient = draw((n_tokens, channels), generator, dtype).detach()
    return draw((n_tokens, 2 * channels), generator, dtype), parameters, kept * 1.25 if scaled else None, gradient


def written_out(x, parameters, grids, scale):
    """The sum of one conv2d per kernel, ReLU, a factor per bag and channel."""
    outputs = []
    for bag, tokens in enumerate(x.split([side * side for side in grids])):
        image = tokens.T.reshape(1, -1, grids[bag], grids[bag])
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        maps = [functional.conv2d(image, w, b, padding=w.shape[-1] // 2, groups=x.shape[1] // 2) for w, b in pairs]
        factor = 1 if scale is None else scale[bag].double()
        outputs.append(functional.relu(sum(maps)).reshape(x.shape[1] // 2, -1).T * factor)
    return torch.cat(outputs)


def exact_gradients(x, parameters, gradient, grids, scale):
    """The output in float64, and the gradients of x and of every parameter."""
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, *parameters)]
    y = written_out(doubles[0], doubles[1:], grids, scale)
    return [y, *torch.autograd.grad(y, doubles, gradient.double())]


def relative_rms(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("implementation", ["reference", "merged"])
@pytest.mark.parametrize("scaled", [False, True], ids=["as they are", "scaled"])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_it_is_four_grouped_convolutions_then_relu_and_scale(grids, scaled, implementation):
    x, parameters, scale, gradient = case(grids, 5, torch.float64, scaled)
    with using(grouped_window_conv=implementation):
        y = grouped_window_conv(x, *parameters, grid_sizes=grids, channel_scale=scale)
    found = [y, *torch.autograd.grad(y, [x, *parameters], gradient)]
    assert_close(found, exact_gradients(x, parameters, gradient, grids, scale), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("grids", "channels", "dtype", "scaled"), KERNEL_CASES.values(), ids=KERNEL_CASES.keys())
def test_the_kernels_agree_with_four_convolutions_in_float64(grids, channels, dtype, scaled):
    x, parameters, scale, gradient = case(grids, channels, dtype, scaled)
    with using(grouped_window_conv="triton"):
        y = grouped_window_conv(x, *parameters, grid_sizes=grids, channel_scale=scale)
    y_exact, x_exact, *exact = exact_gradients(x, parameters, gradient, grids, scale)
    grad_x, *grads = torch.autograd.grad(y, [x, *parameters], gradient)
    for ours, theirs in ((y, y_exact), (grad_x, x_exact)):
        assert ours.dtype == dtype
        assert relative_rms(ours, theirs) <= ROUNDING[dtype]
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == torch.float32
        assert relative_rms(ours, theirs) <= 1e-4


def test_the_kernels_repeat_their_bits_and_split_one_gradient_of_the_window():
    """Each smaller kernel's gradient is the centre of the larger one's; four biases that are added have one."""
    x, parameters, scale, gradient = case((2,), 8, torch.float32, scaled=True)
    runs = []
    for _ in range(2):
        with using(grouped_window_conv="triton"):
            y = grouped_window_conv(x, *parameters, grid_sizes=(2,), channel_scale=scale)
        runs.append([y, *torch.autograd.grad(y, [x, *parameters], gradient)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    weights, biases = runs[0][2::2], runs[0][3::2]
    for larger, smaller in pairwise(weights):
        assert torch.equal(smaller, larger[:, :, 1:-1, 1:-1])
    assert all(torch.equal(bias, biases[0]) for bias in biases)


def test_a_channel_scaled_by_zero_gives_and_takes_nothing():
    x, parameters, _, gradient = case((3, 2), 5, torch.float64, scaled=False)
    scale = torch.ones(2, 5)
    scale[0, 3] = 0
    y = grouped_window_conv(x, *parameters, grid_sizes=(3, 2), channel_scale=scale)
    assert y[:9, 3].count_nonzero() == 0
    assert y[9:, 3].count_nonzero() > 0
    assert torch.autograd.grad(y, x, gradient)[0][:9, 6:8].count_nonzero() == 0


def test_pytorch_accepts_the_op():
    x, parameters, scale, _ = case((1,), 8, torch.float32, scaled=True)
    opcheck(torch.ops.cfkernels.grouped_window_conv.default, (x, *parameters, scale, [1]))


@pytest.mark.parametrize("implementation", ["reference", "merged", "triton"])
def test_it_compiles_as_one_graph(implementation):
    x, parameters, scale, gradient = case((2,), 8, torch.float32, scaled=True)

    def call(x, *parameters):
        return grouped_window_conv(x, *parameters, grid_sizes=(2,), channel_scale=scale)

    with using(grouped_window_conv=implementation):
        eager, compiled = call(x, *parameters), torch.compile(call, fullgraph=True, backend="aot_eager")(x, *parameters)
    found = [torch.autograd.grad(y, [x, *parameters], gradient) for y in (compiled, eager)]
    assert_close([compiled, *found[0]], [eager, *found[1]])


REFUSED_GRIDS = {
    "a token too many": (10, (3,), "do not hold 10"),
    "a grid without a side": (9, (3, 0), "do not hold 9"),
    "no grids": (0, (), "do not hold 0"),
}


@pytest.mark.parametrize(("n_tokens", "grids", "message"), REFUSED_GRIDS.values(), ids=REFUSED_GRIDS.keys())
def test_grids_that_do_not_hold_the_tokens_are_refused(n_tokens, grids, message):
    parameters = windows(2, torch.Generator().manual_seed(5))
    with pytest.raises(ShapeError, match=message):
        grouped_window_conv(torch.zeros(n_tokens, 4, dtype=torch.float64), *parameters, grid_sizes=grids)


def test_an_odd_width_and_a_scale_of_another_shape_are_refused():
    parameters = windows(2, torch.Generator().manual_seed(5))
    with pytest.raises(ShapeError, match="even"):
        grouped_window_conv(torch.zeros(9, 5, dtype=torch.float64), *parameters, grid_sizes=(3,))
    x = torch.zeros(9, 4, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"channel_scale must be \[1, 2\], got \[2\]"):
        grouped_window_conv(x, *parameters, grid_sizes=(3,), channel_scale=torch.ones(2))


def test_cpus_take_the_merged_convolution_and_never_the_interpreter():
    assert choose("grouped_window_conv", candidates(torch.device("cpu"), torch.float32)).name == "merged"
    parameters = windows(2, torch.Generator().manual_seed(5))
    with using(grouped_window_conv="triton"), pytest.raises(UnavailableError, match=r"torch\.float64 has no kernel"):
        grouped_window_conv(torch.zeros(9, 4, dtype=torch.float64), *parameters, grid_sizes=(3,))
