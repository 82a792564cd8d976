"""Every kernel against PyTorch's own ways to compute the same, on a GPU: forward and backward, in bfloat16.

    python benchmarks/kernels.py -o benchmarks/results/kernels-GPU.json
    python benchmarks/kernels.py --only ppeg,attention --bags average
    python benchmarks/kernels.py --dry-run          # tiny shapes on the CPU, kernels in Triton's interpreter

Each op is first held to its definition in float64 on ragged bags, gradients included; an op that fails prints what is
wrong, gets no timings, and the exit code is 1. Times are medians of `triton.testing.do_bench` (cache flushed between
calls). "floor" is the larger of arithmetic and traffic at the GPU's datasheet rates, where they are known.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DRY = "--dry-run" in sys.argv
if DRY:  # read when the kernels are defined, so before they are imported
    os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

import harness  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import cfkernels  # noqa: E402
from cfkernels import using  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPE = torch.float32 if DRY else torch.bfloat16  # the interpreter's bfloat16 is wrong
H, DH = (2, 16) if DRY else (4, 128)
E = H * DH
BAGS = {"average": (895, 3449, 13496), "largest": (8624, 34498, 137990)}
if DRY:
    BAGS = {"dry": (3, 7, 19)}
RATES = {  # dense bfloat16 and float32 FLOP/s, bytes/s: datasheets
    "H100": (989e12, 67e12, 3.35e12),
    "H200": (989e12, 67e12, 4.8e12),
    "A4000": (76.7e12, 19.2e12, 0.448e12),
}
GOALS = {  # milliseconds on an H100
    ("ppeg", "largest", "forward"): 0.070,
    ("ppeg", "largest", "weight gradient"): 0.110,
    ("attention_column_sums", "fine, largest", "forward"): 12.0,
}


@dataclass
class Case:
    """One shape of one op: several ways to compute it, their inputs, the work in it."""

    op: str
    shape: str
    providers: dict[str, Callable[[], Any]]
    inputs: tuple[Tensor, ...] = ()
    flops: float = 0.0
    nbytes: float = 0.0
    matrix: bool = False
    backward_flops: float = field(default=0.0)


def rows(n: int, *shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    """Normal numbers [n, ...] in the benchmark's dtype."""
    generator = torch.Generator(DEVICE).manual_seed(seed + n)
    return torch.randn(n, *shape, generator=generator, device=DEVICE).to(DTYPE).requires_grad_(grad)


def windows(channels: int, inputs: int, sides: tuple[int, ...]) -> list[Tensor]:
    """weight, bias for each side, in float32 as a model keeps them."""
    shapes = [shape for side in sides for shape in ((channels, inputs, side, side), (channels,))]
    return [(0.1 * torch.randn(shape, device=DEVICE)).requires_grad_() for shape in shapes]


def side_of(n: int) -> int:
    """The grid that holds n patches."""
    side = 1
    while side * side < n:
        side += 1
    return side


def attention_cases(bag: str, n5: int, n10: int, n20: int) -> Iterator[Case]:
    """Self-attention of the padded grid, fine cross-attention; with and without dropout."""
    padded = side_of(n10) ** 2
    for shape, n, m, rate in (
        (f"self, {bag}", padded, padded, 0.0),
        (f"self with dropout, {bag}", padded, padded, 0.2),
        (f"fine, {bag}", n10, n20, 0.0),
        (f"coarse, {bag}", n10, n5, 0.0),
    ):
        q, k, v = rows(n, H, DH), rows(m, H, DH, seed=1), rows(m, H, DH, seed=2)
        lengths = {"q_lengths": (n,), "kv_lengths": (m,)}

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, rate: float = rate, lengths: Any = lengths) -> Tensor:
            with using(attention="triton"):
                return cfkernels.attention(q, k, v, dropout_p=rate, **lengths)

        providers: dict[str, Callable[[], Any]] = {"cfkernels": ours}
        backends = {"math": SDPBackend.MATH} if DRY else {
            "sdpa flash": SDPBackend.FLASH_ATTENTION,
            "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
            "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
        }  # fmt: skip
        for name, backend in backends.items():
            providers[name] = sdpa(q, k, v, rate, backend)
        flops = 4.0 * n * m * E
        nbytes = 2.0 * (2 * n + 2 * m) * E
        yield Case("attention", shape, providers, (q, k, v), flops, nbytes, True, 2.5 * flops)


def sdpa(q: Tensor, k: Tensor, v: Tensor, rate: float, backend: SDPBackend) -> Callable[[], Tensor]:
    """PyTorch's attention, pinned to one backend."""

    def call() -> Tensor:
        batch = (x.transpose(0, 1)[None] for x in (q, k, v))
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(*batch, dropout_p=rate)[0].transpose(0, 1)

    return call


def column_sum_cases(bag: str, n5: int, n10: int, n20: int) -> Iterator[Case]:
    """Importance of every fine patch to the source patches."""
    q, k, v = rows(n10, H, DH, grad=False), rows(n20, H, DH, seed=1, grad=False), rows(n20, H, DH, seed=2, grad=False)
    lengths = {"q_lengths": (n10,), "kv_lengths": (n20,)}
    with using(attention="triton"):
        _, lse = cfkernels.attention_and_lse(q, k, v, **lengths)

    def by(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with using(attention_column_sums=name):
                return cfkernels.attention_column_sums(q, k, lse, **lengths)

        return call

    flops = 2.0 * n10 * n20 * E
    providers = {"cfkernels": by("triton"), "PyTorch in row blocks": by("reference")}
    yield Case("attention_column_sums", f"fine, {bag}", providers, (), flops, 2.0 * (n10 + n20) * E, True)


def ppeg_cases(bag: str, n5: int, n10: int, n20: int) -> Iterator[Case]:
    """One position encoding."""
    side = side_of(n10)
    x, parameters = rows(side * side, E), windows(E, 1, (7, 5, 3))

    def by(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with using(ppeg=name):
                return cfkernels.ppeg(x, *parameters, grid_sizes=(side,))

        return call

    providers = {"cfkernels": by("triton"), "one merged convolution": by("reference")}
    for name, layout in (("three convolutions", torch.contiguous_format), ("same, channels last", torch.channels_last)):
        providers[name] = convolutions(x, parameters, side, layout, E, identity=True)
    n = side * side
    yield Case("ppeg", bag, providers, (x, *parameters), 2.0 * 49 * n * E, 4.0 * n * E, backward_flops=4.0 * 49 * n * E)


def convolutions(
    x: Tensor, parameters: list[Tensor], side: int, layout: torch.memory_format, groups: int, *, identity: bool
) -> Callable[[], Tensor]:
    """One conv2d per kernel on an image, in the dtype of x."""
    pairs = [(w.to(x.dtype), b.to(x.dtype)) for w, b in zip(parameters[::2], parameters[1::2], strict=True)]

    def call() -> Tensor:
        image = x.T.reshape(1, -1, side, side).contiguous(memory_format=layout)
        maps = [functional.conv2d(image, w, b, padding=w.shape[-1] // 2, groups=groups) for w, b in pairs]
        y = sum(maps[1:], maps[0])
        return y + image if identity else torch.relu(y)

    return call


def grouped_cases(bag: str, n5: int, n10: int, n20: int) -> Iterator[Case]:
    """The windows of the Conv Processor."""
    side = side_of(n10)
    n = side * side
    x, parameters = rows(n, E), windows(E // 2, 2, (7, 5, 3, 1))

    def by(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with using(grouped_window_conv=name):
                return cfkernels.grouped_window_conv(x, *parameters, grid_sizes=(side,))

        return call

    providers = {
        "cfkernels": by("triton"),
        "one merged convolution": by("reference"),
        "four convolutions": convolutions(x, parameters, side, torch.contiguous_format, E // 2, identity=False),
    }
    flops = 2.0 * 98 * n * E / 2
    yield Case("grouped_window_conv", bag, providers, (x, *parameters), flops, 3.0 * n * E, backward_flops=2 * flops)


def row_cases(bag: str, n5: int, n10: int, n20: int) -> Iterator[Case]:
    """The row-wise ops at the padded grid."""
    n = side_of(n10) ** 2
    x, y, wide = rows(n, E), rows(n, E, seed=1), rows(n, 2 * E)
    maps = tuple(rows(n, E, seed=seed) for seed in range(3))
    norms = [torch.ones(E, device=DEVICE, requires_grad=True) for _ in range(4)]
    shifts = [torch.zeros(E, device=DEVICE, requires_grad=True) for _ in range(4)]
    mix = torch.ones(3, device=DEVICE, requires_grad=True), torch.zeros(1, device=DEVICE, requires_grad=True)

    def by(op: str, name: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def named() -> Tensor:
            with using(**{op: name}):
                return call()

        return named

    def plain_mix() -> Tensor:
        normed = [functional.layer_norm(m, (E,), w.to(m.dtype), b.to(m.dtype)) for m, w, b in
                  zip(maps, norms[:3], shifts[:3], strict=True)]  # fmt: skip
        return mix[0][0] * normed[0] + mix[0][1] * normed[1] + mix[0][2] * normed[2] + mix[1]

    calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], tuple[Tensor, ...], float]] = {
        "layer_norm": (
            lambda: cfkernels.layer_norm(x, norms[3], shifts[3], residual=y),
            lambda: functional.layer_norm(x + y, (E,), norms[3].to(x.dtype), shifts[3].to(x.dtype)),
            (x, y, norms[3], shifts[3]),
            6.0 * n * E,
        ),
        "gelu_dropout": (
            lambda: cfkernels.gelu_dropout(wide, dropout_p=0.3),
            lambda: functional.dropout(functional.gelu(wide), 0.3),
            (wide,),
            8.0 * n * E,
        ),
        "dropout_add": (
            lambda: cfkernels.dropout_add(x, y, dropout_p=0.3),
            lambda: y + functional.dropout(x, 0.3),
            (x, y),
            6.0 * n * E,
        ),
        "mix_layer_norms": (
            lambda: cfkernels.mix_layer_norms(maps, tuple(norms[:3]), tuple(shifts[:3]), *mix),
            plain_mix,
            (*maps, *norms[:3], *shifts[:3], *mix),
            8.0 * n * E,
        ),
    }
    for op, (ours, theirs, inputs, nbytes) in calls.items():
        yield Case(op, bag, {"cfkernels": by(op, "triton", ours), "PyTorch": theirs}, inputs, 0.0, nbytes)


def held_to_definition() -> dict[str, str | None]:
    """For each op, what its kernel gets wrong on ragged bags against the definition in float64; None where right."""
    grids, q_lengths, kv_lengths = (3, 1, 5), (9, 1, 25), (19, 3, 33)
    n, m = sum(q_lengths), sum(kv_lengths)
    q, k, v = rows(n, H, DH), rows(m, H, DH, seed=1), rows(m, H, DH, seed=2)
    x, wide = rows(n, E), rows(n, 2 * E)
    seed = torch.tensor([7], device=DEVICE)
    lengths = {"q_lengths": q_lengths, "kv_lengths": kv_lengths}
    norm = [torch.rand(E, device=DEVICE).requires_grad_() for _ in range(8)]
    mix = torch.rand(3, device=DEVICE).requires_grad_(), torch.rand(1, device=DEVICE).requires_grad_()
    w753, w7531 = windows(E, 1, (7, 5, 3)), windows(E // 2, 2, (7, 5, 3, 1))
    scale = torch.rand(3, E // 2, device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, rate: float = 0.0) -> Tensor:
        return cfkernels.attention(q, k, v, dropout_p=rate, seed=seed, **lengths)

    def column_sums(q: Tensor, k: Tensor) -> Tensor:
        scores = [(a @ b.transpose(1, 2) / DH**0.5).logsumexp(2) for a, b in zip(
            q.detach().transpose(0, 1).split(list(q_lengths), 1), k.detach().transpose(0, 1).split(list(kv_lengths), 1),
            strict=True)]  # fmt: skip
        lse = torch.cat(scores, 1).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        return cfkernels.attention_column_sums(q, k, lse, **lengths)

    checks: dict[str, tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "attention": ("attention", attend, (q, k, v)),
        "attention, dropout": ("attention", lambda *a: attend(*a, rate=0.2), (q, k, v)),
        "attention_column_sums": ("attention_column_sums", column_sums, (q.detach(), k.detach())),
        "ppeg": ("ppeg", lambda x, *w: cfkernels.ppeg(x, *w, grid_sizes=grids), (x, *w753)),
        "grouped_window_conv": (
            "grouped_window_conv",
            lambda x, *w: cfkernels.grouped_window_conv(x, *w, grid_sizes=grids, channel_scale=scale.to(w[0].dtype)),
            (x, *w7531),
        ),
        "layer_norm": (
            "layer_norm",
            lambda a, b, w, c: cfkernels.layer_norm(a, w, c, residual=b),
            (x, rows(n, E, seed=5), *norm[:2]),
        ),
        "gelu_dropout": ("gelu_dropout", lambda a: cfkernels.gelu_dropout(a, dropout_p=0.3, seed=seed), (wide,)),
        "dropout_add": ("dropout_add", lambda a: cfkernels.dropout_add(a, a, dropout_p=0.3, seed=seed), (x,)),
        "mix_layer_norms": (
            "mix_layer_norms",
            lambda a, b, c, *p: cfkernels.mix_layer_norms((a, b, c), p[:3], p[3:6], p[6], p[7]),
            (x, rows(n, E, seed=3), rows(n, E, seed=4), *norm[:6], *mix),
        ),
    }
    return {name: disagreement(op, call, inputs) for name, (op, call, inputs) in checks.items()}


def disagreement(op: str, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> str | None:
    """Compare values and gradients, relative to the norm of the exact ones."""
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    with using(**{op: "triton"}):
        y = call(*inputs)
    with using(**{op: "reference"}):
        expected = call(*exact)
    pairs = [("values", y, expected)]
    if y.requires_grad:
        weight = torch.randn(y.shape, device=DEVICE)
        ours = torch.autograd.grad(y, inputs, weight.to(y.dtype))
        theirs = torch.autograd.grad(expected, exact, weight.to(y.dtype).double())
        pairs += [(f"gradient {i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    bound = 1e-4 if torch.float32 == DTYPE else 1.5e-2
    for what, a, b in pairs:
        off = ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()
        if not off <= bound:
            return f"{what}: relative error {off:.1e}, at most {bound:.0e} is right"
    return None


def milliseconds(call: Callable[[], Any]) -> float | str:
    """The median of one provider; a string where it cannot run."""
    try:
        if DRY:
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=300, return_mode="median"))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        torch.cuda.empty_cache()
        return f"cannot run: {str(error).splitlines()[0][:120]}"


def backward_of(call: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The gradient alone, of a forward done beforehand."""
    y = call()
    weight = torch.randn_like(y)
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(y, wanted, weight, retain_graph=True)


def floor(case: Case, flops: float) -> float | None:
    """Milliseconds below which no kernel on this GPU can be."""
    name = "" if DRY else torch.cuda.get_device_name()
    for gpu, (matrix, vector, bandwidth) in RATES.items():
        if gpu in name:
            return 1e3 * max(flops / (matrix if case.matrix else vector), case.nbytes / bandwidth)
    return None


def measure(case: Case) -> Iterator[dict[str, Any]]:
    """One row per provider and direction."""
    directions: list[tuple[str, float, Callable[[Callable[[], Tensor]], Callable[[], Any]]]] = [
        ("forward", case.flops, lambda call: call)
    ]
    if case.inputs:
        backward_flops = case.backward_flops or 2 * case.flops
        directions.append(("backward", backward_flops, lambda call: backward_of(call, case.inputs)))
    if case.op == "ppeg":
        directions.append(("weight gradient", case.flops, lambda call: backward_of(call, case.inputs[1:])))
    for direction, flops, make in directions:
        least = floor(case, flops)
        for provider, call in case.providers.items():
            grad = nullcontext() if direction != "forward" else torch.no_grad()
            with grad:
                try:
                    work = make(call)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    work, found = None, f"cannot run: {str(error).splitlines()[0][:120]}"
                if work is not None:
                    found = milliseconds(work)
            row: dict[str, Any] = {"op": case.op, "shape": case.shape, "direction": direction, "provider": provider}
            row["ms"] = harness.significant(found) if isinstance(found, float) else found
            if isinstance(found, float):
                row["tflops"] = harness.significant(flops / found / 1e9) if flops else None
                row["of_floor"] = harness.significant(found / least) if least else None
            goal = GOALS.get((case.op, case.shape, direction)) if provider == "cfkernels" else None
            yield row | ({"goal_ms": goal} if goal else {})


FAMILIES = {
    "attention": attention_cases,
    "attention_column_sums": column_sum_cases,
    "ppeg": ppeg_cases,
    "grouped_window_conv": grouped_cases,
    "rows": row_cases,
}


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)} [default: all]")
    parser.add_argument("--bags", default=",".join(BAGS), help=f"of {', '.join(BAGS)} [default: all]")
    parser.add_argument("--check", action="store_true", help="hold every op to its definition, and time nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny, in the interpreter: does the script work?")
    parser.add_argument("-o", "--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        sys.exit("no GPU here; --dry-run tries the script without one")
    wrong = {name: found for name, found in held_to_definition().items() if found}
    for name, found in wrong.items():
        print(f"WRONG {name}: {found}", file=sys.stderr)
    red = {name.partition(",")[0] for name in wrong}
    results: list[dict[str, Any]] = []
    for family in [] if args.check else args.only.split(","):
        for bag in args.bags.split(","):
            for case in FAMILIES[family](bag, *BAGS[bag]):
                if case.op not in red:
                    results += measure(case)
    if args.check and not wrong:
        print(f"all kernels agree with their definitions on {'the interpreter' if DRY else DEVICE}", file=sys.stderr)
    harness.print_table(results, ["op", "shape", "direction", "provider", "ms", "tflops", "of_floor", "goal_ms"])
    report = {
        "benchmark": "kernels",
        "machine": harness.machine() | {"gpu": None if DRY else torch.cuda.get_device_name()},
        "versions": harness.versions(["torch", "triton"]) | {"cuda": torch.version.cuda},
        **harness.commit(),
        "dtype": str(DTYPE),
        "wrong": wrong,
        "rows": results,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
