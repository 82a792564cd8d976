"""What runs would do, read and need, before they do it: `cftrain run --dry-run`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cftrain.cache import size_text
from cftrain.config import RunConfig
from cftrain.estimate import seconds_per_patch
from cftrain.experiment import Prepared
from cftrain.folds import FoldExamples, inner_fold
from cftrain.learner import make_model

_TRIED_SLIDES = 3
_VALIDATION = 1 / 3
"""Of the time of a training step: a forward pass alone."""


@dataclass(frozen=True)
class RunForecast:
    """One run: its model and what its largest step needs; seconds are of all folds and epochs.

    `held_out` is the share of the training patients that inner models are validated on, 0 where there are none; the
    seconds count those models.
    """

    model: str
    seed: int
    epochs: int
    n_parameters: int
    batch_patches: int
    step_bytes: int
    compute_seconds: float
    held_out: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What is known beforehand; times are measured on slides of the mean size, with the machine as busy as it is.

    Parameters
    ----------
    passes
        Over the cohort: one per epoch and one to validate the last.
    bytes_per_pass
        Decoded bytes that the store is asked for in a pass, where no cache helps.
    read_seconds
        To read those, by as many threads as a run uses.
    """

    cohort: str
    encoder: str
    n_slides: int
    n_patients: int
    n_events: int
    n_patches: int
    largest_slide: str
    folds: list[dict[str, int]]
    excluded: dict[str, int]
    splits: str
    unit: str
    groups: int
    jobs: int
    fused: bool
    passes: int
    cohort_bytes: int
    bytes_per_pass: int
    cache: str
    read_seconds: float
    device: str
    runs: list[RunForecast]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        folds = [
            f"  fold {fold['fold']}: {fold['train']} to train on ({fold['train_events']} deaths), "
            f"{fold['val']} to validate ({fold['val_events']} deaths)"
            for fold in self.folds
        ]
        runs = [
            f"  {run.model}, seed {run.seed}: {run.epochs} epochs, {run.n_parameters:,} parameters, batches of up to "
            f"{run.batch_patches:,} patches; the largest step needs {size_text(run.step_bytes)}, "
            f"computing takes about {_duration(run.compute_seconds)}"
            + (
                f", the inner models that choose an epoch counted ({100 * run.held_out:g} % held out)"
                * bool(run.held_out)
            )
            for run in self.runs
        ]
        together = f", in {self.groups} groups" if self.groups > 1 else ""
        sharing = f"folds share readings{together}" if self.fused else "every fold reads for itself"
        return [
            f"cohort {self.cohort}, encoder {self.encoder}: {self.n_slides:,} slides of {self.n_patients:,} patients, "
            f"{self.n_events:,} deaths, {self.n_patches:,} patches; largest slide {self.largest_slide}",
            *[f"  left out: {n} slides, {reason}" for reason, n in self.excluded.items()],
            f"splits {self.splits}, one example is a {self.unit}",
            *folds,
            f"device {self.device}; {self.jobs} job{'s' * (self.jobs != 1)}, {sharing}",
            *runs,
            f"reading: {self.passes} passes of {size_text(self.bytes_per_pass)}, about "
            f"{_duration(self.read_seconds)} each without a cache",
            f"  {self.cache}",
            "nothing was trained or written; times are for slides of the mean size on this machine as it is now",
        ]


def forecast(ready: Prepared) -> Forecast:
    """Count what runs would do, and time one slide of each model and a few readings (a few seconds)."""
    data, groups = ready.data, ready.teams()
    slides = data.cohort.slides
    people = {slide.patient_id: slide.event for slide in slides}
    largest = max(data.examples, key=lambda example: example.total_patches)
    readings = len(groups) if ready.fused else len(groups) * _share_visited(ready)
    rate = _bytes_per_second(ready)
    per_pass = int(ready.cohort_bytes * readings)
    return Forecast(
        cohort=data.cohort.name,
        encoder=data.cohort.encoder,
        n_slides=len(slides),
        n_patients=len(people),
        n_events=sum(people.values()),
        n_patches=sum(example.total_patches for example in data.examples),
        largest_slide=f"{largest.name} ({largest.total_patches:,} patches)",
        folds=[
            {
                "fold": fold.number,
                "train": len(fold.train),
                "train_events": sum(each.event for each in fold.train),
                "val": len(fold.val),
                "val_events": sum(each.event for each in fold.val),
            }
            for fold in data.folds
        ],
        excluded={reason: len(ids) for reason, ids in data.excluded.items()},
        splits=data.splits.name,
        unit=ready.configs[0].data.unit,
        groups=len(groups),
        jobs=ready.jobs,
        fused=ready.fused,
        passes=max(config.train.epochs for config in ready.configs) + 1,
        cohort_bytes=ready.cohort_bytes,
        bytes_per_pass=per_pass,
        cache=ready.cache.why,
        read_seconds=per_pass / rate,
        device=str(ready.device),
        runs=[_run(ready, number) for number in range(len(ready.configs))],
    )


def _share_visited(ready: Prepared) -> float:
    """The part of the cohort that a learner trains or is validated on, on average."""
    folds = [fold for config in ready.configs for fold in _folds(ready, config)]
    return sum(len(fold.train) + len(fold.val) for fold in folds) / len(folds) / len(ready.data.examples)


def _folds(ready: Prepared, config: RunConfig) -> list[FoldExamples]:
    """What the learners of a run are trained and validated on, the inner ones last."""
    train, folds = config.train, ready.data.folds
    inner = [inner_fold(fold, train.nested, train.seed) for fold in folds] if config.has_inner else []
    return [*folds, *inner]


def _run(ready: Prepared, number: int) -> RunForecast:
    config, data = ready.configs[number], ready.data
    mean = {
        scale: max(1, round(float(np.mean([e.n_patches[scale] for e in data.examples]))))
        for scale in ready.scales[number]
    }
    model = make_model(config, data.cohort.dim).to(ready.device)
    per_patch = seconds_per_patch(model, mean, ready.device)
    folds = _folds(ready, config)
    trained = sum(example.total_patches for fold in folds for example in fold.train)
    validated = sum(example.total_patches for fold in folds for example in fold.val)
    seconds = config.train.epochs * per_patch * (trained + _VALIDATION * validated) / ready.jobs
    return RunForecast(
        model=config.model.name,
        seed=config.train.seed,
        epochs=config.train.epochs,
        n_parameters=ready.n_parameters[number],
        batch_patches=config.train.batch_patches,
        step_bytes=ready.step_bytes[number],
        compute_seconds=seconds,
        held_out=config.train.nested if config.has_inner else 0.0,
    )


def _bytes_per_second(ready: Prepared) -> float:
    """How fast slides are read: the median ones, by as many threads as a run uses."""
    data, config = ready.data, ready.configs[0].data
    by_size = sorted(data.examples, key=lambda example: example.total_patches)
    middle = by_size[len(by_size) // 2 :][: _TRIED_SLIDES * config.readers]
    ids = [example.slide_ids[0] for example in middle]
    reader = data.store.reader(data.cohort.encoder, data.cohort.scales, ids)
    started = time.perf_counter()
    for slide in reader.stream(ids, threads=config.readers):
        del slide
    return max(reader.bytes_read, 1) / max(time.perf_counter() - started, 1e-6)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
