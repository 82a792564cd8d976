"""The only door to the store: a cohort with its folds, and streams of packed batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import cfstore
from cfstore import Cohort, CohortSlide, SlideBags, SplitSet, Store
from cftrain.config import DataConfig
from cftrain.errors import ConfigError, MissingScaleError
from cftrain.folds import FoldSlides, fold_slides, unplaced
from cftrain.models import BagBatch
from cftrain.zoo import MODELS


@dataclass(frozen=True)
class RunData:
    """What a run trains on."""

    store: Store
    cohort: Cohort
    splits: SplitSet
    folds: list[FoldSlides]
    excluded: Mapping[str, tuple[str, ...]]
    patients: Mapping[str, Mapping[str, Any]]


def load_data(store: Path, config: DataConfig, model: str, scales: Sequence[int], seed: int) -> RunData:
    """Open the store and find the run's slides and folds; reads no features.

    Raises
    ------
    MissingScaleError
        The model needs a scale the encoder lacks; names the models that would run.
    ConfigError
        No labelled slide, several split sets and none named, or a fold that cannot be used.
    StoreError
        What the store raises: no such cohort, encoder or split set.
    """
    opened = cfstore.open(store)
    encoder = opened.choose_encoder(config.cohort, config.encoder or None)
    _check_scales(model, scales, config.cohort, encoder, opened.encoders_of(config.cohort)[encoder])
    cohort = opened.cohort(config.cohort, encoder=encoder, scales=scales)
    if not cohort.slides:
        left_out = "; ".join(f"{len(ids)} slides: {reason}" for reason, ids in cohort.excluded.items())
        message = f"cohort {config.cohort} has no slide to train on ({left_out}); import labels with `cfstore clinical`"
        raise ConfigError(message)
    splits = _splits(opened, cohort, config, seed)
    excluded = dict(cohort.excluded)
    apart = unplaced(cohort, splits.folds)
    if apart:
        excluded["in no fold"] = tuple(apart)
    return RunData(opened, cohort, splits, fold_slides(cohort, splits), excluded, _patients(opened, config.cohort))


def _check_scales(model: str, scales: Sequence[int], cohort: str, encoder: str, held: Sequence[int]) -> None:
    if set(scales) <= set(held):
        return
    fitting = [name for name, info in MODELS.items() if set(info.scales) <= set(held)]
    message = (
        f"{model} needs {_listed(scales)}; encoder {encoder} of cohort {cohort} has {_listed(held)}. "
        f"Models that run on it: {', '.join(fitting) or 'none'}"
    )
    raise MissingScaleError(message)


def _listed(scales: Sequence[int]) -> str:
    return ", ".join(f"{scale}x" for scale in scales)


def _splits(store: Store, cohort: Cohort, config: DataConfig, seed: int) -> SplitSet:
    names = store.split_names(cohort.name)
    if not config.splits and len(names) > 1:
        message = f"cohort {cohort.name} has several split sets ({', '.join(names)}); name one with --splits"
        raise ConfigError(message)
    if config.splits or names:
        return store.split_set(cohort.name, config.splits or names[0])
    labels = {slide.patient_id: slide.event for slide in cohort.slides}
    made = cfstore.make_folds(list(labels), list(labels.values()), config.folds, seed)
    return SplitSet(f"made{config.folds}-seed{seed}", made)


def _patients(store: Store, cohort: str) -> dict[str, dict[str, Any]]:
    literal = cohort.replace("'", "''")
    rows = store.sql(f"SELECT * FROM patients WHERE cohort = '{literal}'").to_pylist()
    return {row["patient_id"]: row for row in rows}


@dataclass(frozen=True)
class Work:
    """What a feed has delivered; `bytes_read` are decoded bytes from the store, the cache's not counted."""

    n_slides: int
    n_patches: int
    bytes_read: int
    wait_seconds: float

    def since(self, earlier: Work) -> Work:
        return Work(
            self.n_slides - earlier.n_slides,
            self.n_patches - earlier.n_patches,
            self.bytes_read - earlier.bytes_read,
            self.wait_seconds - earlier.wait_seconds,
        )


@dataclass
class Feed:
    """Reads slides and packs them into batches, and knows how long the model waited for it."""

    data: RunData
    scales: tuple[int, ...]
    config: DataConfig
    device: torch.device
    wait_seconds: float = 0.0
    n_slides: int = 0
    n_patches: int = 0
    _reader: cfstore.SlideReader = field(init=False)

    def __post_init__(self) -> None:
        ids = [slide.slide_id for slide in self.data.cohort.slides]
        cache = self.config.cache_mib << 20
        self._reader = self.data.store.reader(self.data.cohort.encoder, self.scales, ids, cache_bytes=cache)

    @property
    def work(self) -> Work:
        """What was delivered so far."""
        return Work(self.n_slides, self.n_patches, self._reader.bytes_read, self.wait_seconds)

    def batches(self, groups: Iterable[Sequence[CohortSlide]]) -> Iterator[tuple[BagBatch, Sequence[CohortSlide]]]:
        """One packed batch per group, in order; the next slides are read while the caller computes."""
        listed = list(groups)
        order = [slide.slide_id for group in listed for slide in group]
        stream = self._reader.stream(order, threads=self.config.readers, ahead=self.config.ahead)
        for group in listed:
            started = time.perf_counter()
            slides = [next(stream) for _ in group]
            self.wait_seconds += time.perf_counter() - started
            self.n_slides += len(group)
            self.n_patches += sum(sum(slide.n_patches.values()) for slide in group)
            yield self._pack(slides), group

    def _pack(self, slides: Sequence[SlideBags]) -> BagBatch:
        bags = [{scale: torch.from_numpy(slide.bags[scale].features) for scale in self.scales} for slide in slides]
        return BagBatch.pack([slide.slide_id for slide in slides], bags).to(self.device, non_blocking=True)


def packed(slides: Sequence[CohortSlide], batch_patches: int) -> list[list[CohortSlide]]:
    """Consecutive slides together while they hold at most `batch_patches` patches; a larger one alone."""
    groups: list[list[CohortSlide]] = []
    held = 0
    for slide in slides:
        patches = sum(slide.n_patches.values())
        if not groups or held + patches > batch_patches:
            groups.append([])
            held = 0
        groups[-1].append(slide)
        held += patches
    return groups
