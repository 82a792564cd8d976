"""The window convolutions on a CPU: separate convolutions as a user writes them, the definition, and what runs.

    python benchmarks/windows_cpu.py --threads 4 -o benchmarks/results/windows_cpu.json

Forward and backward in float32, one grid. "separate" is one nn.Conv2d per kernel on NCHW images; "reference" one
merged convolution with PyTorch's gradients; "merged" what `cfkernels` takes on CPUs. Each must agree with "separate"
in values and gradients before it is timed. Rounds are interleaved and the fastest counts: other processes only add.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

from cfkernels import grouped_window_conv, ppeg, using

KERNELS = {"ppeg": (7, 5, 3), "grouped_window_conv": (7, 5, 3, 1)}
COLUMNS = ("op", "side", "implementation", "forward ms", "backward ms", "both ms", "times separate")
AGREEMENT = 1e-4


def separate(op: str, x: Tensor, convolutions: nn.ModuleList, side: int) -> Tensor:
    """One convolution per kernel on an NCHW image, then back to tokens."""
    image = x.T.reshape(1, -1, side, side)
    output = sum(convolution(image) for convolution in convolutions)
    output = image + output if op == "ppeg" else output.relu()
    return output.flatten(2).squeeze(0).T


def ours(op: str, name: str, x: Tensor, convolutions: nn.ModuleList, side: int) -> Tensor:
    """The op of `cfkernels`, with the implementation of that name."""
    windows = [part for convolution in convolutions for part in (convolution.weight, convolution.bias)]
    with using(**{op: name}):
        if op == "ppeg":
            return ppeg(x, *windows, grid_sizes=(side,))
        return grouped_window_conv(x, *windows, grid_sizes=(side,))


def check(found: dict[str, list[Tensor]]) -> None:
    """Refuse to go on where an implementation differs from "separate"."""
    for name, tensors in found.items():
        for ours, theirs in zip(tensors, found["separate"], strict=True):
            error = ((ours - theirs).norm() / theirs.norm()).item()
            if not error <= AGREEMENT:
                message = f"{name} differs from separate convolutions: relative RMS {error:.1e}"
                raise ValueError(message)


def compare(op: str, side: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """One row per implementation: its fastest forward, backward and both."""
    torch.manual_seed(7)
    outputs = width if op == "ppeg" else width // 2
    convolutions = nn.ModuleList(
        nn.Conv2d(width, outputs, kernel, padding=kernel // 2, groups=outputs) for kernel in KERNELS[op]
    )
    x = torch.randn(side * side, width, requires_grad=True)
    gradient = torch.randn(side * side, outputs)
    inputs = [x, *convolutions.parameters()]
    calls: dict[str, Callable[[], Tensor]] = {
        "separate": lambda: separate(op, x, convolutions, side),
        "reference": lambda: ours(op, "reference", x, convolutions, side),
        "merged": lambda: ours(op, "merged", x, convolutions, side),
    }
    best = {name: [float("inf")] * 3 for name in calls}
    for _ in range(rounds):
        found: dict[str, list[Tensor]] = {}
        for name, call in calls.items():
            started = time.perf_counter()
            output = call()
            between = time.perf_counter()
            gradients = torch.autograd.grad(output, inputs, gradient)
            ended = time.perf_counter()
            times = (between - started, ended - between, ended - started)
            best[name] = [min(pair) for pair in zip(best[name], times, strict=True)]
            found[name] = [output, *gradients]
        check(found)
    rows = []
    for name, seconds in best.items():
        shown = [harness.significant(1e3 * value) for value in seconds]
        times = dict(zip(COLUMNS[3:6], shown, strict=True))
        ratio = harness.significant(best["separate"][2] / seconds[2], 3)
        rows.append({"op": op, "side": side, "implementation": name, **times, "times separate": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[30, 59])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--out", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    rows = [row for op in KERNELS for side in told.sides for row in compare(op, side, told.width, told.rounds)]
    harness.print_table(rows, COLUMNS)
    found = {
        "machine": harness.machine(),
        "versions": harness.versions(("torch",)),
        **harness.commit(),
        "threads": told.threads,
        "width": told.width,
        "rounds": told.rounds,
        "rows": rows,
    }
    if told.out:
        told.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
