"""What models cost on one slide: parameters, operations and bytes counted; seconds and bytes measured where asked.

A measured pass runs in a process of its own. Its peak is then its own, and where the system ends a process for lack of
memory, the others go on.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from cfstore import end_with_parent
from cftrain.cache import size_text
from cftrain.device import free_gpu
from cftrain.drawn import drawn_batch
from cftrain.errors import MeasureError, TrainError
from cftrain.footprint import blueprint, count_passes
from cftrain.memory import free_ram
from cftrain.models import BagBatch, SurvivalModel, build
from cftrain.survival.losses import nll_survival
from cftrain.zoo import model_info

SLIDES: Final[Mapping[str, Mapping[int, int]]] = {
    "average": {5: 895, 10: 3449, 20: 13496},
    "largest": {5: 8624, 10: 34498, 20: 137990},
}
"""Patches of the mean and of the largest slide of the TCGA cohorts of the CrossFusion paper, arXiv:2503.02064."""
DTYPE: Final = torch.float16
"""Of the features: what a store keeps unless told otherwise."""
_WARM_UP: Final = 256
"""Patches of a scale at most in the pass that loads libraries and compiles."""


@dataclass(frozen=True)
class PassRow:
    """One pass of one model over one slide: "prediction", a forward pass, or "training", forward and backward."""

    model: str
    slide: str
    patches: Mapping[int, int]
    """Scale to patches; the scales that the model reads."""
    kind: str
    flops: int | None = None
    """Counted (`cftrain.flops`); None where `problem` says why not."""
    nbytes: int | None = None
    """Memory counted (`cftrain.footprint`); that of training with gradients and Adam's moments."""
    seconds: tuple[float, ...] = ()
    """Measured, each repeat; without Adam, reading and copying. Empty where nothing was measured."""
    peak_bytes: int | None = None
    """Memory measured: that of the process above what it had before the model, or of the GPU's allocator."""
    problem: str = ""
    """Why something is missing."""

    @property
    def median_seconds(self) -> float | None:
        """Of the repeats; None where there is none."""
        return statistics.median(self.seconds) if self.seconds else None


def parameter_count(model_name: str, options: Mapping[str, object], feature_dim: int) -> int:
    """Numbers in the weights, counted without making them. Errors as `cftrain.models.build`."""
    return sum(parameter.numel() for parameter in blueprint(model_name, options, feature_dim).parameters())


def counted(
    model_name: str,
    options: Mapping[str, object],
    feature_dim: int,
    slide: str,
    patches: Mapping[int, int],
    *,
    device_type: str,
) -> tuple[PassRow, PassRow]:
    """Prediction and training of one slide, counted.

    A size that a model refuses is the rows' `problem`, and so is a training that takes no steps.

    Parameters
    ----------
    slide, patches
        A name, and scale to patches.
    model_name, options, feature_dim, device_type
        As `cftrain.footprint.training_footprint` takes them.

    Raises
    ------
    UnknownModelError, ConfigError
        No such model or option.
    """
    scales = blueprint(model_name, options, feature_dim).scales
    read = {scale: patches[scale] for scale in scales if scale in patches}
    rows = PassRow(model_name, slide, read, "prediction"), PassRow(model_name, slide, read, "training")
    try:
        training, prediction = count_passes(
            model_name, options, feature_dim, patches, device_type=device_type, dtype=DTYPE
        )
    except TrainError as error:
        return replace(rows[0], problem=str(error)), replace(rows[1], problem=str(error))
    predicting = replace(rows[0], flops=prediction.flops, nbytes=prediction.footprint.total)
    if not model_info(model_name).by_gradient:
        return predicting, replace(rows[1], problem="no training steps: fitted in closed form")
    return predicting, replace(rows[1], flops=training.flops, nbytes=training.footprint.total)


def measured(
    row: PassRow, options: Mapping[str, object], feature_dim: int, *, device: torch.device, repeats: int
) -> PassRow:
    """A counted row with seconds and peak measured on features drawn at random, or with the `problem` in the way.

    Nothing is tried that needs more memory than is free. On CUDA it is computed under autocast to bfloat16.

    Parameters
    ----------
    row
        Of `counted`, for the device's type.
    options, feature_dim
        As `counted` took them.
    repeats
        How often, after a pass over a small slide that loads libraries and compiles.
    """
    if row.nbytes is None:
        return row
    free = free_ram() if device.type == "cpu" else free_gpu(device)
    if free is not None and row.nbytes > free:
        where = "RAM" if device.type == "cpu" else "GPU memory"
        return replace(row, problem=f"needs {size_text(row.nbytes)} of {where}, {size_text(free)} are free")
    job = _Job(row.model, options, feature_dim, row.patches, row.kind, str(device), repeats)
    try:
        seconds, peak = _in_own_process(job)
    except TrainError as error:
        return replace(row, problem=str(error))
    return replace(row, seconds=seconds, peak_bytes=peak)


@dataclass(frozen=True)
class _Job:
    model_name: str
    options: Mapping[str, object]
    feature_dim: int
    patches: Mapping[int, int]
    kind: str
    device: str
    repeats: int


class _Model(NamedTuple):
    module: SurvivalModel
    optimiser: torch.optim.Optimizer | None
    """Holds Adam's moments."""


def _in_own_process(job: _Job) -> tuple[tuple[float, ...], int | None]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            return pool.submit(_run, job, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise MeasureError("its process was ended from outside, most likely for lack of memory") from error


def _run(job: _Job, n_threads: int) -> tuple[tuple[float, ...], int | None]:
    torch.set_num_threads(n_threads)
    try:
        return _measure(job)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise MeasureError(f"ran out of memory: {str(error).splitlines()[0]}") from None


def _measure(job: _Job) -> tuple[tuple[float, ...], int | None]:
    """Seconds of the repeats, and their peak above what the process had before the model."""
    device = torch.device(job.device)
    small = {scale: min(n, _WARM_UP) for scale, n in job.patches.items()}
    _made(job, device, small)  # loads libraries, and is gone
    before = _Peak(device)
    model = _made(job, device, small)
    batch = drawn_batch(model.module, job.patches, device=device, dtype=DTYPE)
    seconds = tuple(_timed(model.module, batch, job.kind, device) for _ in range(job.repeats))
    return seconds, before.rise()


def _made(job: _Job, device: torch.device, small: Mapping[int, int]) -> _Model:
    """A model that a small slide has passed; for training, with gradients and Adam's moments."""
    model = build(job.model_name, job.feature_dim, **job.options).to(device)
    model.train(job.kind == "training")
    _timed(model, drawn_batch(model, small, device=device, dtype=DTYPE), job.kind, device)
    if job.kind == "prediction":
        return _Model(model, None)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)
    adam.step()
    return _Model(model, adam)


def _timed(model: SurvivalModel, batch: BagBatch, kind: str, device: torch.device) -> float:
    begun = time.perf_counter()
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    if kind == "prediction":
        with torch.no_grad(), autocast:
            model(batch)
    else:
        with autocast:
            parts = model.training_logits(batch)
        labels = torch.tensor([1], device=device), torch.tensor([True], device=device)
        losses = [weight * nll_survival(logits.float(), *labels) for weight, logits in parts]
        torch.autograd.backward(losses)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


class _Peak:
    """How far memory rises from here: the process's on a CPU (Linux tells), the allocator's on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start: int | None = torch.cuda.memory_allocated(device)
        else:
            _give_back()
            self._start = _resident("VmRSS", reset=True)

    def rise(self) -> int | None:
        """Bytes; None where nobody knows."""
        if self._start is None:
            return None
        on_gpu = self._device.type == "cuda"
        peak: Any = torch.cuda.max_memory_allocated(self._device) if on_gpu else _resident("VmHWM")
        return int(peak) - self._start


def _give_back() -> None:
    """Let glibc return memory that nobody uses: taken again, it would not show."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str, *, reset: bool = False) -> int | None:
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
