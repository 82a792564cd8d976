"""What every Triton kernel here needs to know: can it run, on what, and how it is launched.

`TRITON_INTERPRET=1`, set before the first import, runs the kernels on CPU tensors, one program after the other in
numpy: for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from cfkernels.dispatch import Candidate

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ARCHITECTURES = (80, 86, 90)


def blocker(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why Triton cannot compute on such tensors; None where it can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"{dtype} has no kernel; float32, float16 and bfloat16 have"
    if device.type == "cuda" and not INTERPRETED:
        return None if architecture(device) >= _ARCHITECTURES[0] else "the kernels need compute capability 8.0"
    return None if device.type == "cpu" and INTERPRETED else f"no kernels for the device {device.type}"


def candidate(device: torch.device, dtype: torch.dtype, merit: str, *, unless: str | None = None) -> Candidate:
    """The Triton implementation as a candidate; `unless` is one more reason why it cannot run."""
    reason = blocker(device, dtype) or unless
    interpreted = "the interpreter proves kernels, it serves nobody" if device.type == "cpu" else None
    return Candidate("triton", reason, merit, only_named=interpreted)


def architecture(device: torch.device) -> int:
    """Compute capability as one number, 86 for 8.6; for the interpreter the one with the smallest tiles, 86."""
    if device.type != "cuda":
        return 86
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tuned_for(arch: int) -> int:
    """The architecture whose tile sizes `arch` uses: 80, 86 or 90, each within its shared memory.

    8.9 and 12.x have the 99 KB of 8.6; 10.x has the 227 KB of 9.0.
    """
    if arch >= 120 or 86 <= arch < 90:
        return 86
    return 90 if arch >= 90 else 80


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what would be compiled, and for how many programs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches in place of making them; outputs stay unwritten. For compiling without a GPU."""
    global _recorded
    launches: list[Launch] = []
    _recorded = launches
    try:
        yield launches
    finally:
        _recorded = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel with its tensors and numbers, its constants, num_warps and num_stages.

    It runs where its first tensor is: Triton itself would take the current device, and `--device cuda:1` does not
    change that. Fused multiply-adds are asked for, since newer Tritons no longer contract by default.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants))
        return
    first = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)
