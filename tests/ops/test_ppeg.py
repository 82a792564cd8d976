"""PPEG against one conv2d per kernel, bag by bag, in float64: definition, CPU path and Triton kernels."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional
from torch.testing import assert_close

from cfkernels import ShapeError, UnavailableError, ppeg, using
from cfkernels.dispatch import choose
from cfkernels.ppeg import candidates
from cfkernels.windows.launches import window_tiles

GRIDS = {
    "one token": (1,),
    "smaller than every window": (2,),
    "unequal bags": (3, 1, 8),
    "around the window": (6, 7, 8),
    "a large odd grid": (17,),
}
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# what each kernel launch below shows: grids, tokens before, width, dtype
KERNEL_CASES = {
    "one token": ((1,), 0, 16, torch.float32),
    "two by two, bfloat16": ((2,), 1, 24, torch.bfloat16),
    "unequal bags": ((3, 1, 8), 1, 40, torch.float32),
    "unequal bags, float16": ((3, 1), 3, 16, torch.float16),
    "two strips, two bands": ((9,), 3, 16, torch.float32),
    "two channel blocks": ((2,), 1, 136, torch.float32),
}


def draw(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def windows(width, generator, dtype=torch.float64):
    """weight7, bias7, weight5, bias5, weight3, bias3, all needing gradients."""
    shapes = [shape for side in (7, 5, 3) for shape in ((width, 1, side, side), (width,))]
    return [draw(shape, generator, dtype) for shape in shapes]


def case(grids, prefix, width, dtype, seed=3):
    """Tokens of one dtype, float32 parameters (float64 for float64), and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(prefix + side * side for side in grids), width)
    parameters = windows(width, generator, torch.promote_types(dtype, torch.float32))
    return draw(shape, generator, dtype), parameters, draw(shape, generator, dtype).detach()


def written_out(x, parameters, grids, prefix):
    """Tokens before each grid as they are; the identity and one conv2d per kernel."""
    outputs, start = [], 0
    for side in grids:
        middle, end = start + prefix, start + prefix + side * side
        image = x[middle:end].T.reshape(1, -1, side, side)
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        maps = [functional.conv2d(image, w, b, padding=w.shape[-1] // 2, groups=x.shape[1]) for w, b in pairs]
        outputs += [x[start:middle], (image + sum(maps)).reshape(x.shape[1], -1).T]
        start = end
    return torch.cat(outputs)


def exact_gradients(x, parameters, gradient, grids, prefix):
    """The output in float64, and the gradients of x and of every parameter."""
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, *parameters)]
    y = written_out(doubles[0], doubles[1:], grids, prefix)
    return [y, *torch.autograd.grad(y, doubles, gradient.double())]


def relative_rms(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("implementation", ["reference", "merged"])
@pytest.mark.parametrize("prefix", [0, 1, 3], ids=lambda n: f"{n} tokens before")
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_it_is_the_identity_plus_three_depthwise_convolutions(grids, prefix, implementation):
    x, parameters, gradient = case(grids, prefix, 6, torch.float64)
    with using(ppeg=implementation):
        y = ppeg(x, *parameters, grid_sizes=grids, prefix=prefix)
    found = [y, *torch.autograd.grad(y, [x, *parameters], gradient)]
    assert_close(found, exact_gradients(x, parameters, gradient, grids, prefix), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("grids", "prefix", "width", "dtype"), KERNEL_CASES.values(), ids=KERNEL_CASES.keys())
def test_the_kernels_agree_with_three_convolutions_in_float64(grids, prefix, width, dtype):
    x, parameters, gradient = case(grids, prefix, width, dtype)
    with using(ppeg="triton"):
        y = ppeg(x, *parameters, grid_sizes=grids, prefix=prefix)
    y_exact, x_exact, *exact = exact_gradients(x, parameters, gradient, grids, prefix)
    grad_x, *grads = torch.autograd.grad(y, [x, *parameters], gradient)
    for ours, theirs in ((y, y_exact), (grad_x, x_exact)):
        assert ours.dtype == dtype
        assert relative_rms(ours, theirs) <= ROUNDING[dtype]
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == torch.float32
        assert relative_rms(ours, theirs) <= 1e-4


def test_the_kernels_repeat_their_bits_and_split_one_gradient_of_the_window():
    """dw5 is the centre of dw7, dw3 that of dw5; three biases that are added have one gradient."""
    x, parameters, gradient = case((2,), 0, 16, torch.float32)
    runs = []
    for _ in range(2):
        with using(ppeg="triton"):
            y = ppeg(x, *parameters, grid_sizes=(2,))
        runs.append([y, *torch.autograd.grad(y, [x, *parameters], gradient)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    _, _, weight7, bias7, weight5, bias5, weight3, bias3 = runs[0]
    assert torch.equal(weight5, weight7[:, :, 1:6, 1:6])
    assert torch.equal(weight3, weight5[:, :, 1:4, 1:4])
    assert torch.equal(bias5, bias7)
    assert torch.equal(bias3, bias7)


def test_float32_on_a_cpu_keeps_its_accuracy_on_a_grid_of_several_bands():
    """The weight gradient is summed in bands of rows; the last band is shorter."""
    x, parameters, gradient = case((35,), 0, 8, torch.float32)
    with using(ppeg="merged"):
        y = ppeg(x, *parameters, grid_sizes=(35,))
    found = [y, *torch.autograd.grad(y, [x, *parameters], gradient)]
    for ours, theirs in zip(found, exact_gradients(x, parameters, gradient, (35,), 0), strict=True):
        assert relative_rms(ours, theirs) <= 1e-6


@pytest.mark.parametrize("columns", [4, 8], ids=lambda n: f"{n} columns")
@pytest.mark.parametrize("grids", [*GRIDS.values(), (186,), (30, 59, 1, 117)], ids=str)
def test_tiles_cover_every_token_of_every_grid_once(grids, columns):
    prefix = 1
    tiles = window_tiles(grids, prefix, columns, 4, torch.device("cpu")).tolist()
    covered = torch.zeros(sum(prefix + side * side for side in grids), dtype=torch.int64)
    for first, side, top, bottom, left, bag in tiles:
        assert side == grids[bag]
        covered[first : first + side * side].view(side, side)[top:bottom, left : left + columns] += 1
    starts = [sum(prefix + side * side for side in grids[:bag]) for bag in range(len(grids))]
    expected = torch.ones_like(covered)
    expected[starts] = 0
    assert torch.equal(covered, expected)


def test_the_largest_grid_of_a_cohort_fills_an_h100_once():
    """Three programs on each of 132 multiprocessors: 396, of which four channel blocks of 96 tiles take 384."""
    assert len(window_tiles((186,), 1, 8, 4, torch.device("cpu"))) == 96


def test_pytorch_accepts_the_op():
    x, parameters, _ = case((1,), 1, 16, torch.float32)
    opcheck(torch.ops.cfkernels.ppeg.default, (x, *parameters, [1], 1))


@pytest.mark.parametrize("implementation", ["reference", "merged", "triton"])
def test_it_compiles_as_one_graph(implementation):
    x, parameters, gradient = case((2,), 1, 16, torch.float32)

    def call(x, *parameters):
        return ppeg(x, *parameters, grid_sizes=(2,), prefix=1)

    with using(ppeg=implementation):
        eager, compiled = call(x, *parameters), torch.compile(call, fullgraph=True, backend="aot_eager")(x, *parameters)
    found = [torch.autograd.grad(y, [x, *parameters], gradient) for y in (compiled, eager)]
    assert_close([compiled, *found[0]], [eager, *found[1]])


@pytest.mark.parametrize("implementation", ["reference", "merged"])
def test_it_keeps_small_weights_in_bfloat16(implementation):
    """A bfloat16 kernel with the identity's 1 inside would round weights of 0.001 at its centre away."""
    x = torch.zeros(1, 8, dtype=torch.bfloat16) + 1
    weights = [torch.full((8, 1, side, side), 0.001, dtype=torch.bfloat16) for side in (7, 5, 3)]
    bias = torch.full((8,), -1, dtype=torch.bfloat16)
    zero = torch.zeros_like(bias)
    with using(ppeg=implementation):
        output = ppeg(x, weights[0], bias, weights[1], zero, weights[2], zero, grid_sizes=(1,))
    assert_close(output.float(), torch.full((1, 8), 0.003), rtol=0.5, atol=0)


REFUSED_GRIDS = {
    "a token too many": (10, (3,), "do not hold 10"),
    "a grid without a side": (9, (3, 0), "do not hold 9"),
    "no grids": (0, (), "do not hold 0"),
}


@pytest.mark.parametrize(("n_tokens", "grids", "message"), REFUSED_GRIDS.values(), ids=REFUSED_GRIDS.keys())
def test_grids_that_do_not_hold_the_tokens_are_refused(n_tokens, grids, message):
    parameters = windows(4, torch.Generator().manual_seed(5))
    with pytest.raises(ShapeError, match=message):
        ppeg(torch.zeros(n_tokens, 4, dtype=torch.float64), *parameters, grid_sizes=grids)


def test_a_kernel_of_another_width_is_refused_by_its_name():
    parameters = windows(4, torch.Generator().manual_seed(5))
    parameters[2] = parameters[2][:3]
    with pytest.raises(ShapeError, match=r"weight5, bias5 must be \[4, 1, 5, 5\]"):
        ppeg(torch.zeros(9, 4, dtype=torch.float64), *parameters, grid_sizes=(3,))


def test_cpus_take_the_merged_convolution_and_never_the_interpreter():
    assert choose("ppeg", candidates(torch.device("cpu"), torch.float32)).name == "merged"
    parameters = windows(4, torch.Generator().manual_seed(5))
    with using(ppeg="triton"), pytest.raises(UnavailableError, match=r"torch\.float64 has no kernel"):
        ppeg(torch.zeros(9, 4, dtype=torch.float64), *parameters, grid_sizes=(3,))
