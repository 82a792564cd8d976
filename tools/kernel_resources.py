"""Compile every kernel of cfkernels for three GPUs, without a GPU, and hold it to what these GPUs have.

    python tools/kernel_resources.py                 # the table; exit code 1 where a limit is broken
    python tools/kernel_resources.py -o FILE.json    # also as JSON, with versions, machine and commit

Every op runs forward and backward on small CPU tensors while its launches are recorded, not made. Each launch is
compiled as Triton's launcher would (types, constants, alignment), for sm_80, sm_86 and sm_90, with the ptxas of
Triton's wheel. Refused are spilled registers, more shared memory or registers than a processor has, attention
without tensor cores (without wgmma on sm_90), and kernels that would be compiled anew for another bag's length.

Instructions are counted in the PTX; `--machine-code` counts them in what ptxas made of it, which takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@contextlib.contextmanager
def _serving_cpu_tensors() -> Iterator[None]:
    """Register what is launched on CUDA for CPU tensors too, as under the interpreter: here nothing is launched."""
    register = torch.library.Library.impl

    def impl(self: Any, name: Any, function: Any, key: str = "", **how: Any) -> None:
        for each in ("CUDA", "CPU") if key == "CUDA" else (key,):
            register(self, name, function, each, **how)

    torch.library.Library.impl = impl  # type: ignore[method-assign,assignment]
    yield
    torch.library.Library.impl = register  # type: ignore[method-assign]


with contextlib.nullcontext() if INTERPRETED else _serving_cpu_tensors():
    from cfkernels import triton_support
    from cfkernels.attention.op import attention_triton
    from cfkernels.attention_column_sums.op import attention_column_sums_triton
    from cfkernels.dropout_add.op import dropout_add_triton
    from cfkernels.gelu_dropout.op import gelu_dropout_triton
    from cfkernels.grouped_window_conv.op import grouped_window_conv_triton
    from cfkernels.layer_norm.op import layer_norm_triton
    from cfkernels.mix_layer_norms.op import mix_layer_norms_triton
    from cfkernels.ppeg.op import ppeg_triton

ARCHITECTURES = (80, 86, 90)
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""What one program may use of a multiprocessor's shared memory."""
REGISTERS = 65_536
"""Of a multiprocessor."""
WIDTH = 512
THRESHOLD = 51
WITHOUT_PRODUCTS = {"attention_delta_kernel"}
"""Kernels of attention that multiply no matrices."""

GRIDS = ((4, 4), (1,), (1, 6))
"""Sides of the bags' grids in three batches: 32, 1 and 37 rows. Triton compiles apart what is 1, divisible by 16, or
neither; a length must not be treated so."""


Outcome = tuple[Tensor, Sequence[Tensor]]
Run = Callable[..., Outcome]


class Case(NamedTuple):
    """One op on one kind of tensors; `run` takes a dtype and the sides of the bags' grids."""

    op: str
    what: str
    dtype: torch.dtype
    run: Run
    """Returns the result and what to take gradients of."""
    head_dim: int | None = None
    """None where it is no attention."""
    extra: bool = False
    """Whether only `--all` compiles it."""


class Build(NamedTuple):
    """What decides a kernel's machine code, in the order of the kernel's parameters."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    """Parameters known to be divisible by 16."""
    options: tuple[tuple[str, Any], ...]
    arch: int


@dataclass(frozen=True)
class Resources:
    """One kernel, compiled."""

    op: str
    kernel: str
    case: str
    dtype: str
    arch: int
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: str | None
    """Why ptxas made each wgmma wait for the one before; None where it did not."""
    counts: dict[str, int]
    """Of the INSTRUCTIONS."""
    head_dim: int | None
    """None where the kernel is no attention."""
    seconds: float


INSTRUCTIONS = {
    "HGMMA": (r"\bwgmma\.mma_async", r"\bHGMMA"),
    "HMMA": (r"\bmma\.sync", r"\bHMMA"),
    "FFMA": (r"\bfma\.rn(?:\.ftz)?\.f32\b", r"\bFFMA"),
    "LDG.128": (r"\bld\.global\S*\.(?:v4\.[buf]32|v2\.[buf]64)", r"\bLDG\.E(?:\.\w+)*\.128"),
}
"""Each as PTX and as machine code spell it: wgmma, the older tensor core instruction, a float32 multiply-add outside of
tensor cores, a load of 128 bits."""


# What is compiled: every op, as the model calls it


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _rows(grids: tuple[int, ...]) -> int:
    return sum(side * side for side in grids)


def _seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def _attention(dtype: torch.dtype, grids: tuple[int, ...], *, head_dim: int, threshold: int) -> Outcome:
    packed = _empty((_rows(grids), 3 * WIDTH), dtype)
    q, k, v = packed.unflatten(1, (3, WIDTH // head_dim, head_dim)).unbind(1)
    lengths = tuple(side * side for side in grids)
    return attention_triton(q, k, v, _seed() if threshold else None, lengths, lengths, threshold)[0], [packed]


def _column_sums(dtype: torch.dtype, grids: tuple[int, ...], *, head_dim: int) -> Outcome:
    q, k = torch.empty(_rows(grids), 2, WIDTH // head_dim, head_dim, dtype=dtype).unbind(1)
    lengths = tuple(side * side for side in grids)
    return attention_column_sums_triton(q, k, torch.empty(q.shape[1], q.shape[0]), lengths, lengths), []


def _gelu_dropout(dtype: torch.dtype, grids: tuple[int, ...], *, threshold: int) -> Outcome:
    x = _empty((_rows(grids), WIDTH), dtype)
    return gelu_dropout_triton(x, _seed() if threshold else None, threshold), [x]


def _dropout_add(dtype: torch.dtype, grids: tuple[int, ...]) -> Outcome:
    x, residual = (_empty((_rows(grids), WIDTH), dtype) for _ in range(2))
    return dropout_add_triton(x, residual, _seed(), THRESHOLD), [x, residual]


def _layer_norm(dtype: torch.dtype, grids: tuple[int, ...], *, residual: bool = True, width: int = WIDTH) -> Outcome:
    x, other = (_empty((_rows(grids), width), dtype) for _ in range(2))
    return layer_norm_triton(x, other if residual else None, _empty((width,)), _empty((width,)), 1e-5), [x]


def _mix_layer_norms(dtype: torch.dtype, grids: tuple[int, ...]) -> Outcome:
    maps = tuple(_empty((_rows(grids), WIDTH), dtype) for _ in range(3))
    weights, biases = (tuple(_empty((WIDTH,)) for _ in range(3)) for _ in range(2))
    return mix_layer_norms_triton(maps, weights, biases, _empty((3,)), _empty((1,)), 1e-5), maps


def _windows(channels: int, inputs: int, sides: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    weights = tuple(_empty((channels, inputs, side, side)) for side in sides)
    return weights, tuple(_empty((channels,)) for _ in sides)


def _ppeg(dtype: torch.dtype, grids: tuple[int, ...]) -> Outcome:
    x = _empty((_rows(grids) + len(grids), WIDTH), dtype)
    return ppeg_triton(x, *_windows(WIDTH, 1, (7, 5, 3)), grid_sizes=grids, prefix=1), [x]


def _grouped_window_conv(dtype: torch.dtype, grids: tuple[int, ...], *, scaled: bool = True) -> Outcome:
    x = _empty((_rows(grids), WIDTH), dtype)
    scale = torch.empty(len(grids), WIDTH // 2) if scaled else None
    windows = _windows(WIDTH // 2, 2, (7, 5, 3, 1))
    return grouped_window_conv_triton(x, *windows, scale, grid_sizes=grids), [x]


def _attention_case(head_dim: int, dropout: bool, dtype: torch.dtype = torch.bfloat16) -> Case:
    run = partial(_attention, head_dim=head_dim, threshold=THRESHOLD if dropout else 0)
    return Case("attention", f"head_dim {head_dim}{', dropout' * dropout}", dtype, run, head_dim)


def _column_sums_case(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    run = partial(_column_sums, head_dim=head_dim)
    return Case("attention_column_sums", f"head_dim {head_dim}", dtype, run, head_dim)


def cases() -> list[Case]:
    """Every op in every configuration that its launches have, slow ones first."""
    bf16, fp32 = torch.bfloat16, torch.float32
    common = [
        *(_attention_case(128, dropout) for dropout in (True, False)),
        _column_sums_case(128),
        Case("grouped_window_conv", "", bf16, _grouped_window_conv),
        Case("ppeg", "", bf16, _ppeg),
        Case("mix_layer_norms", "", bf16, _mix_layer_norms),
        Case("layer_norm", "residual", bf16, _layer_norm),
        Case("layer_norm", "residual", fp32, _layer_norm),
        Case("gelu_dropout", "dropout", bf16, partial(_gelu_dropout, threshold=THRESHOLD)),
        Case("dropout_add", "", bf16, _dropout_add),
    ]
    others = [
        *(_attention_case(head_dim, dropout, fp32) for dropout in (True, False) for head_dim in (128, 64, 32)),
        *(_attention_case(*kind) for kind in product((64, 32, 16), (True, False))),
        *(_column_sums_case(head_dim, fp32) for head_dim in (128, 64, 32)),
        *(_column_sums_case(head_dim) for head_dim in (64, 32, 16)),
        Case("grouped_window_conv", "", fp32, _grouped_window_conv),
        Case("grouped_window_conv", "unscaled", bf16, partial(_grouped_window_conv, scaled=False)),
        Case("ppeg", "", fp32, _ppeg),
        Case("mix_layer_norms", "", fp32, _mix_layer_norms),
        Case("layer_norm", "", bf16, partial(_layer_norm, residual=False)),
        *(Case("layer_norm", "D 4096", dtype, partial(_layer_norm, width=4096)) for dtype in (bf16, fp32)),
        Case("gelu_dropout", "", bf16, partial(_gelu_dropout, threshold=0)),
        Case("gelu_dropout", "dropout", fp32, partial(_gelu_dropout, threshold=THRESHOLD)),
        Case("dropout_add", "", fp32, _dropout_add),
    ]
    return common + [case._replace(extra=True) for case in others]


# From launches to builds


@contextlib.contextmanager
def pretending(arch: int) -> Iterator[None]:
    """Let cfkernels choose its tile sizes for such a GPU."""
    original = triton_support.architecture
    modules = [module for name, module in sys.modules.items() if name.startswith("cfkernels")]
    patched = [module for module in modules if getattr(module, "architecture", None) is original]
    for module in patched:
        module.architecture = lambda device: arch  # type: ignore[attr-defined]
    for value in [value for module in modules for value in vars(module).values()]:
        if callable(getattr(value, "cache_clear", None)):
            value.cache_clear()
    try:
        yield
    finally:
        for module in patched:
            module.architecture = original  # type: ignore[attr-defined]


def record(case: Case, arch: int, grids: tuple[int, ...]) -> list[Build]:
    """What the op launches, forward and backward, on such a GPU."""
    with pretending(arch), triton_support.recording() as launches:
        y, inputs = case.run(case.dtype, grids)
        if y.requires_grad:
            torch.autograd.grad(y, inputs, torch.empty_like(y))
    return [build(launch, arch) for launch in launches]


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def build(launch: triton_support.Launch, arch: int) -> Build:
    """A launch as Triton's launcher sees it: types, constants, and which arguments are divisible by 16."""
    params = launch.kernel.params
    given = dict(zip((param.name for param in params), launch.arguments, strict=False))
    named = {name: value for name, value in launch.constants.items() if name in launch.kernel.arg_names}
    options = {name: value for name, value in launch.constants.items() if name not in named}
    given |= named
    signature, constants, aligned = [], [], []
    for param in params:
        value = given.get(param.name, param.default)
        special = not (param.is_constexpr or param.do_not_specialize)
        if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature.append((param.name, "constexpr"))
            constants.append((param.name, value))
            continue
        signature.append((param.name, _type_of(value)))
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if special and type(number) is int and number % 16 == 0:
            aligned.append(param.name)
    function = launch.kernel.fn
    options = {"enable_fp_fusion": True} | options
    return Build(
        function.__module__, function.__name__, tuple(signature), tuple(constants), tuple(aligned),
        tuple(sorted(options.items())), arch,
    )  # fmt: skip


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def collect(selected: Sequence[Case], architectures: Sequence[int]) -> tuple[dict[Build, Case], list[str]]:
    """Each different build with the first case that needs it, and complaints about those that depend on lengths."""
    builds: dict[Build, Case] = {}
    complaints = []
    for arch in architectures:
        for case in selected:
            first, *others = (record(case, arch, grids) for grids in GRIDS)
            for one in first:
                builds.setdefault(one, case)
            for grids, other in zip(GRIDS[1:], others, strict=True):
                changed = sorted({one.kernel for one in set(first) ^ set(other)})
                if changed:
                    where = f"{case.op}, sm_{arch}: {', '.join(changed)}"
                    complaints.append(f"{where} compiled anew for bags of {grids} after bags of {GRIDS[0]}")
    return builds, complaints


# From builds to resources


def compile_build(one: Build, case: Case, *, machine_code: bool = False) -> Resources:
    """Compile one build and read its resources from ptxas's report, and its instructions."""
    kernel = getattr(importlib.import_module(one.module), one.kernel)
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(one.signature),
        constexprs={place[name]: value for name, value in one.constants},
        attrs={place[name]: [["tt.divisibility", 16]] for name in one.aligned},
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        compiled = triton.compile(source, target=GPUTarget("cuda", one.arch, 32), options=dict(one.options))
    log, seconds = output.getvalue(), time.perf_counter() - start
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise RuntimeError(f"{one.kernel}: ptxas reported no registers: {log[:200]!r}")
    serialized = re.search(r"wgmma\S* instructions are serialized due to (.*?)(?: in the function|\n)", log)
    code = _machine_code(compiled.asm["cubin"]) if machine_code else compiled.asm["ptx"]
    return Resources(
        op=case.op, kernel=one.kernel, case=case.what, dtype=_TYPES[case.dtype], arch=one.arch,
        warps=compiled.metadata.num_warps, stages=compiled.metadata.num_stages,
        registers=int(registers[1]), shared_bytes=compiled.metadata.shared,
        spilled_bytes=sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
        serialized=serialized[1] if serialized else None,
        counts={name: len(re.findall(spelled[machine_code], code)) for name, spelled in INSTRUCTIONS.items()},
        head_dim=case.head_dim, seconds=round(seconds, 2),
    )  # fmt: skip


def _machine_code(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout


def compile_all(builds: Mapping[Build, Case], jobs: int, *, machine_code: bool = False) -> list[Resources]:
    """Compile in so many processes, into an empty cache, since only what is compiled is reported on."""
    # the same code is made faster without line numbers
    triton.knobs.compilation.disable_line_info = True
    triton.knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as workers:
            futures = [
                workers.submit(compile_build, one, case, machine_code=machine_code) for one, case in builds.items()
            ]
            return [future.result() for future in futures]


def complaints_about(one: Resources, limit_registers: int = REGISTERS) -> list[str]:
    """Which limits a compiled kernel breaks, each with the numbers."""
    found = []
    threads = 32 * one.warps
    if one.spilled_bytes:
        found.append(f"spills {one.spilled_bytes} bytes")
    if one.shared_bytes > SHARED_BYTES[one.arch]:
        found.append(f"takes {one.shared_bytes} bytes of shared memory, there are {SHARED_BYTES[one.arch]}")
    if one.registers * threads > limit_registers:
        found.append(f"takes {one.registers} registers in each of {threads} threads, there are {limit_registers}")
    if one.serialized:
        found.append(f"ptxas serialized its wgmma: {one.serialized}")
    return [f"{one.kernel} ({label(one)}), sm_{one.arch}: {text}" for text in found + _tensor_core_complaints(one)]


def _tensor_core_complaints(one: Resources) -> list[str]:
    """Attention kernels in bfloat16 multiply matrices on tensor cores, on sm_90 with wgmma alone."""
    if one.head_dim is None or one.dtype != "bf16" or one.kernel in WITHOUT_PRODUCTS:
        return []
    new, old = one.counts["HGMMA"], one.counts["HMMA"]
    if one.arch >= 90 and one.head_dim >= 64 and (old or not new):
        return [f"has {new} wgmma (HGMMA) and {old} older tensor core instructions (HMMA)"]
    return [] if old or new else ["uses no tensor cores"]


def label(one: Resources) -> str:
    """The case in a few words."""
    return ", ".join(part for part in (one.dtype, one.case) if part)


# The report


def table(rows: Sequence[Resources]) -> str:
    """One line for each build."""
    head = ["kernel", "case", "sm", "warps", "registers", "spilled B", "shared B", *INSTRUCTIONS]
    cells = [
        [one.kernel, label(one), one.arch, one.warps, one.registers, one.spilled_bytes, one.shared_bytes,
         *one.counts.values()]
        for one in sorted(rows, key=_place)
    ]  # fmt: skip
    lines = [[str(cell) for cell in line] for line in [head, *cells]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = [
        [cell.ljust(width) if i < 2 else cell.rjust(width)
         for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def summary(rows: Sequence[Resources]) -> str:
    """For a document: one line for each kernel and case, registers and shared memory on every architecture."""
    head = ["kernel", "case", *(f"sm_{arch}" for arch in ARCHITECTURES), "matrix instructions on sm_90"]
    found: dict[tuple[str, str], dict[int, Resources]] = {}
    for one in sorted(rows, key=_place):
        found.setdefault((one.kernel, label(one)), {})[one.arch] = one
    lines = [head, ["---"] * len(head)]
    for (kernel, case), by_arch in found.items():
        cells = [f"{one.registers} / {one.shared_bytes / 1024:.0f}" for one in by_arch.values()]
        used = [f"{n} {name}" for name, n in by_arch[max(by_arch)].counts.items() if n and name.endswith("MMA")]
        lines.append([kernel, case, *cells, ", ".join(used)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _place(one: Resources) -> tuple[str, str, str, str, int]:
    return one.op, one.kernel, one.case, one.dtype, one.arch


def surroundings() -> dict[str, Any]:
    """Versions, machine and commit."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()

    ptxas = get_ptxas(ARCHITECTURES[-1])
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "ptxas": ptxas.version,
        "python": platform.python_version(),
        "cpu": next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain")),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="also write the table as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table for a document")
    parser.add_argument("--all", action="store_true", help="also float32 and rarer cases")
    parser.add_argument("--machine-code", action="store_true", help="count instructions of the machine code")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES, help="only this architecture")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--limit-registers", type=int, default=REGISTERS, help="registers of a multiprocessor")
    options = parser.parse_args(words)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    selected = [case for case in cases() if options.all or not case.extra]
    selected = [case for case in selected if not options.op or case.op in options.op]
    start = time.perf_counter()
    builds, complaints = collect(selected, options.arch or ARCHITECTURES)
    rows = compile_all(builds, options.jobs, machine_code=options.machine_code)
    complaints += [text for one in rows for text in complaints_about(one, options.limit_registers)]
    print(summary(rows) if options.markdown else table(rows))
    print(
        f"\n{len(rows)} kernels in {time.perf_counter() - start:.1f} s, {len(complaints)} complaints", file=sys.stderr
    )
    for text in complaints:
        print(text, file=sys.stderr)
    if options.output:
        report = surroundings() | {"complaints": complaints, "rows": [asdict(one) for one in rows]}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
