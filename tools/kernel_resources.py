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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from kernel_cases import GRIDS, INTERPRETED, Case, cases  # before cfkernels: see there
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from cfkernels import triton_support

ARCHITECTURES = (80, 86, 90)
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""What one program may use of a multiprocessor's shared memory."""
REGISTERS = 65_536
"""Of a multiprocessor."""
WITHOUT_PRODUCTS = {"attention_delta_kernel"}
"""Kernels of attention that multiply no matrices."""


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
