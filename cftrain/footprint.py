"""Bytes and floating-point operations that a training step or a prediction needs, counted without running it.

Fake tensors have shapes and no data. A model passes over them forwards and backwards, and every storage is followed
from its making to its end: what is there after the forward is kept for the backward, what is there for a while is
transient. One count takes about a second, for any slide.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cftrain.drawn import drawn_batch
from cftrain.errors import ConfigError
from cftrain.flops import FlopCount
from cftrain.models import BagBatch, SurvivalModel, build

RESERVE: Final = {"cpu": 64 << 20, "cuda": 256 << 20}
"""For what is not counted: tables of blocked attention (31 MiB), workspaces of oneDNN, cuBLAS and cuDNN. That of
CUDA is a guess."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device that computes, at their highest."""

    weights: int
    """Parameters and buffers, float32."""
    optimiser: int
    """Gradients and Adam's two moments."""
    features: int
    """The bags of the batch, of the scales that the model reads."""
    saved: int
    """Kept by the forward for the backward."""
    transient: int
    """Alive beside all that at the worst moment, between two operations or within one."""
    reserve: int
    """Allowance for what is not counted (`RESERVE`)."""

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.optimiser + self.features + self.saved + self.transient + self.reserve


def blueprint(model_name: str, options: Mapping[str, object], feature_dim: int) -> SurvivalModel:
    """The model without numbers, on PyTorch's meta device: to ask for its scales or shapes. Errors as `build`."""
    with torch.device("meta"):
        return build(model_name, feature_dim, **options)


def training_footprint(
    model_name: str,
    options: Mapping[str, object],
    feature_dim: int,
    patches: Mapping[int, int],
    *,
    device_type: str,
    dtype: torch.dtype = torch.float32,
) -> Footprint:
    """What a training step on one slide needs: forward, backward and Adam.

    On "cuda" it is a step under autocast to bfloat16. Where there is a GPU it is counted with the implementations
    that run on it, elsewhere with the CPU's, which keep up to 9 % more than the kernels.

    Repeated steps on a CPU may hold more: glibc keeps what is freed below 32 MiB, with holes in it. Four steps
    of TransMIL on 13,496 patches rose to 1.4 of the total, with MALLOC_MMAP_THRESHOLD_=1000000 in the environment to
    0.93, in up to a fifth more time.

    First steps on a CPU raised the resident memory by 0.62 to 1.00 of the total (abmil and crossfusion, 90 to
    810 MiB); Adam's moments come after the worst moment of a first step, and stay. On a GPU the
    total was not compared with a real step yet.

    Parameters
    ----------
    model_name, options, feature_dim
        As `cftrain.models.build` takes them.
    patches
        Scale to patches of the slide; scales that the model does not read are left out.
    device_type
        "cpu" or "cuda".
    dtype
        Of the features when the model gets them: as stored, float32 for int8.

    Raises
    ------
    UnknownModelError, ConfigError
        No such model, option or device.
    MissingScaleError
        The model reads a scale of which there is no patch.
    """
    return _Counter(model_name, options, feature_dim, device_type, dtype).training(patches).footprint


@dataclass(frozen=True)
class PassCost:
    """What one pass of a model over one slide takes."""

    flops: int
    """Floating-point operations, as `cftrain.flops` counts them; those of Adam are not counted."""
    footprint: Footprint


def count_passes(
    model_name: str,
    options: Mapping[str, object],
    feature_dim: int,
    patches: Mapping[int, int],
    *,
    device_type: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[PassCost, PassCost]:
    """What one slide costs: a training step, forward and backward; and a prediction, a forward without gradients.

    Parameters and errors are those of `training_footprint`, whose count is the first footprint. That of a prediction
    has weights, features, what is alive at the worst moment, and the reserve.
    """
    counter = _Counter(model_name, options, feature_dim, device_type, dtype)
    return counter.training(patches), counter.prediction(patches)


class _Counter:
    """Counts one step of one model on one kind of device."""

    def __init__(
        self,
        model_name: str,
        options: Mapping[str, object],
        feature_dim: int,
        device_type: str,
        dtype: torch.dtype,
    ) -> None:
        if device_type not in RESERVE:
            raise ConfigError(f"no footprint for the device {device_type!r}; choose {' or '.join(RESERVE)}")
        self._device_type, self._dtype = device_type, dtype
        self._device = torch.device("cuda" if device_type == "cuda" and torch.cuda.is_available() else "cpu")
        self._blueprint = partial(blueprint, model_name, options, feature_dim)

    def training(self, patches: Mapping[int, int]) -> PassCost:
        """Forward and backward of one slide. Gradients are there from the start, as in a step's later batches."""
        with self._counting() as (flops, storages, model), torch.enable_grad():
            model.train()
            weights = storages.now
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            held = storages.now
            batch = self._batch(model, patches)
            features = storages.now - held
            with self._autocast():
                parts = [logits.float() for _, logits in model.training_logits(batch)]
            saved = storages.now - held - features
            torch.autograd.backward([logits.sum() for logits in parts if logits.requires_grad])
            transient = storages.peak - held - features - saved
        learnt = sum(parameter.nbytes for parameter in model.parameters())
        found = Footprint(weights, 3 * learnt, features, saved, transient, RESERVE[self._device_type])
        return PassCost(flops.total, found)

    def prediction(self, patches: Mapping[int, int]) -> PassCost:
        """Forward of one slide in evaluation mode."""
        with self._counting() as (flops, storages, model), torch.no_grad(), model.evaluating():
            weights = storages.now
            batch = self._batch(model, patches)
            features = storages.now - weights
            with self._autocast():
                model(batch)
            transient = storages.peak - weights - features
        return PassCost(flops.total, Footprint(weights, 0, features, 0, transient, RESERVE[self._device_type]))

    @contextmanager
    def _counting(self) -> Iterator[tuple[FlopCount, _Storages, SurvivalModel]]:
        model = self._blueprint()
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCount() as flops, _Storages() as storages:
            yield flops, storages, model.to_empty(device=self._device)

    def _batch(self, model: SurvivalModel, patches: Mapping[int, int]) -> BagBatch:
        return drawn_batch(model, patches, device=self._device, dtype=self._dtype)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._device_type == "cpu":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages made in its block: those alive now, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in _tensors(result):
            self._follow(made.untyped_storage())
        # what such an op does inside is not seen: blocked attention, the worst, makes float32 copies of all it reads
        inside = sum(4 * read.numel() for read in _tensors(args)) if func.namespace == "cfkernels" else 0
        self.peak = max(self.peak, self.now + inside)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += self._alive[key]
            weakref.finalize(storage, self._end, key).atexit = False

    def _end(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _tensors(values: object) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
