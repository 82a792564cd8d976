"""The costs of `cftrain models`: counted, measured, as rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import click

from cftrain.cache import size_text
from cftrain.cli.columns import padded

if TYPE_CHECKING:
    from cftrain.costs import PassRow

SIZES: Final = {"average": ("average",), "largest": ("largest",), "both": ("average", "largest")}


@dataclass(frozen=True)
class CostRequest:
    """What was asked for; `measure` is a key of SIZES, or None to count only."""

    dim: int
    device: str
    measure: str | None
    repeats: int


def on_device(request: CostRequest) -> CostRequest:
    """The request with the device it is for; costs on "cuda" are counted also where there is none."""
    from cftrain.device import choose_device

    if request.device in ("cpu", "cuda") and not request.measure:
        return request
    return replace(request, device=str(choose_device(request.device)))


def cost_rows(name: str, request: CostRequest) -> Iterator[PassRow]:
    """Passes over both slides, or over those that are measured, with what is measured."""
    from torch import device as torch_device

    from cftrain.costs import SLIDES, counted, measured

    device = torch_device(request.device)
    for slide in SIZES[request.measure or "both"]:
        for row in counted(name, {}, request.dim, slide, SLIDES[slide], device_type=device.type):
            if not request.measure:
                yield row
                continue
            click.echo(f"{name}: {row.kind} of the {slide} slide on {device} ...", err=True)
            yield measured(row, {}, request.dim, device=device, repeats=request.repeats)


def row_json(row: PassRow) -> dict[str, Any]:
    """For machines; what is missing is null."""
    return {
        "slide": row.slide,
        "patches": {str(scale): n for scale, n in row.patches.items()},
        "pass": row.kind,
        "flops": row.flops,
        "bytes": row.nbytes,
        "median_seconds": row.median_seconds,
        "seconds": list(row.seconds),
        "peak_bytes": row.peak_bytes,
        "problem": row.problem or None,
    }


def cost_lines(rows: Sequence[PassRow], parameters: Mapping[str, int], request: CostRequest) -> Iterator[str]:
    """A table of all rows, why something is missing in it, and what its numbers are."""
    header = ["model", "slide", "patches", "parameters", "pass", "operations", "memory"]
    if request.measure:
        header += ["measured", "seconds"]
    yield from padded([header, *(_cells(row, parameters[row.model], request) for row in rows)])
    for row in rows:
        if row.problem:
            yield f"{row.model}, {row.slide}, {row.kind}: {row.problem}"
    yield from _legend(request)


def _cells(row: PassRow, n_parameters: int, request: CostRequest) -> list[str]:
    cells = [row.model, row.slide, _patches_text(row.patches), f"{n_parameters / 1e6:.2f} M", row.kind]
    cells += [_told(row.flops, flop_text), _told(row.nbytes, size_text)]
    if request.measure:
        cells += [_told(row.peak_bytes, size_text), _told(row.median_seconds, lambda value: f"{value:.3g}")]
    return cells


def _patches_text(patches: Mapping[int, int]) -> str:
    if len(patches) == 1:
        return "".join(f"{n:,} at {scale}x" for scale, n in patches.items())
    return " + ".join(f"{n:,}" for n in patches.values())


def _told(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if value is None else text(value)


def _legend(request: CostRequest) -> Iterator[str]:
    from torch import get_num_threads

    threads = f" with {get_num_threads()} thread(s)" if request.measure and request.device == "cpu" else ""
    yield f"one slide of float16 features of width {request.dim:,}, on {request.device}{threads}"
    yield "prediction: a forward pass without gradients; training: forward and backward"
    yield "operations: products of matrices and convolutions, 2 for a multiply-add; element-wise work is not counted"
    yield "memory: counted without running; that of training with gradients and Adam's moments"
    if request.measure:
        yield "measured: the peak of memory above that of an idle process"
        yield f"seconds: the median of {request.repeats}; neither Adam nor reading is in it"


def flop_text(flops: float) -> str:
    """Operations for people: "31.7 TFLOP"; a number of 100 or more without decimals."""
    value, unit = float(flops), "FLOP"
    for larger in ("kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "FLOP" or value >= 99.95 else f"{value:.1f} {unit}"
