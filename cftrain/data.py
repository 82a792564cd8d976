"""The only door to the store: a cohort with its labels, folds and shards, from a store or from tars alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cfstore
from cfstore import Cohort, SplitSet, Store
from cftrain.config import DataConfig
from cftrain.errors import ConfigError, MissingExtraError, MissingScaleError
from cftrain.examples import Example, make_examples
from cftrain.folds import FoldExamples, fold_examples, unplaced
from cftrain.order import ShardOrder
from cftrain.zoo import MODELS, Extra


@dataclass(frozen=True)
class RunData:
    """What runs train on; `order` says how their slides lie in shards, where they are visited by shard."""

    store: Store
    cohort: Cohort
    splits: SplitSet
    examples: tuple[Example, ...]
    folds: list[FoldExamples]
    excluded: Mapping[str, tuple[str, ...]]
    patients: Mapping[str, Mapping[str, Any]]
    order: ShardOrder | None = None


def load_data(
    store: Path | str,
    config: DataConfig,
    models: Mapping[str, Sequence[int]],
    seed: int,
    extras: Mapping[str, Sequence[Extra]] = MappingProxyType({}),
) -> RunData:
    """Open the store, or the tars of `config.shards`, and find the slides and folds; reads no features.

    Parameters
    ----------
    models
        The models by name, and the scales each needs; all train on the slides that have all of these.
    seed
        Of made splits.
    extras
        What each reads besides features; slides without the coordinates for it are left out.

    Raises
    ------
    MissingScaleError
        The model needs a scale the encoder lacks; names the models that would run.
    MissingExtraError
        It needs coordinates, which no slide has, or graphs, which tars do not hold.
    ConfigError
        No labelled slide, several cohorts or split sets and none named, or a fold that cannot be used.
    StoreError
        What the store raises: no such cohort, encoder or split set, a condition it cannot read.
    """
    opened = cfstore.open_tars(config.shards) if config.shards else cfstore.open(store)
    named, where = config.cohort or None, config.where or None
    encoder = opened.choose_encoder(named, config.encoder or None, where)
    what = f"encoder {encoder} of " + (f"cohort {named}" if named else "the chosen slides")
    held = opened.encoders_of(named, where)[encoder]
    for model, needed in models.items():
        _check_scales(model, needed, what, held)
    scales = sorted(set().union(*models.values()))
    cohort = opened.cohort(named, encoder=encoder, scales=scales, where=where)
    if not cohort.slides:
        left_out = "; ".join(f"{len(ids)} slides: {reason}" for reason, ids in cohort.excluded.items())
        message = f"cohort {cohort.name} has no slide to train on ({left_out}); import labels with `cfstore clinical`"
        raise ConfigError(message)
    cohort = with_coordinates(opened, cohort, extras, of_tars=bool(config.shards))
    splits = _splits(opened, cohort, config, seed)
    excluded = dict(cohort.excluded)
    apart = unplaced(cohort, splits.folds)
    if apart:
        excluded["in no fold"] = tuple(apart)
    examples = make_examples(cohort.slides, config.unit)
    folds, order = fold_examples(examples, splits), None
    if config.order == "shard":
        listed = opened.shard_order(cohort.encoder, [slide.slide_id for slide in cohort.slides])
        order = ShardOrder(tuple(tuple(shard) for shard in listed), sequential=bool(config.shards))
    return RunData(opened, cohort, splits, examples, folds, excluded, _patients(opened, cohort), order)


def _check_scales(model: str, scales: Sequence[int], encoder: str, held: Sequence[int]) -> None:
    if set(scales) <= set(held):
        return
    fitting = [name for name, info in MODELS.items() if set(info.scales) <= set(held)]
    message = (
        f"{model} needs {_listed(scales)}; {encoder} has {_listed(held)}. "
        f"Models that run on it: {', '.join(fitting) or 'none'}"
    )
    raise MissingScaleError(message)


def with_coordinates(store: Store, cohort: Cohort, extras: Mapping[str, Sequence[Extra]], *, of_tars: bool) -> Cohort:
    """The cohort without the slides that lack coordinates which a model needs.

    Parameters
    ----------
    extras
        By model.
    of_tars
        Whether there is no store, which alone keeps graphs and parents.

    Raises
    ------
    MissingExtraError
        No slide is left, or a model needs what tars do not hold.
    """
    without = slides_without_coordinates(store, cohort.encoder)
    excluded, slides = dict(cohort.excluded), cohort.slides
    for model, needed in extras.items():
        kept_by_stores = [extra for extra in needed if extra.kind != "coords"]
        if of_tars and kept_by_stores:
            message = f"{model} needs {kept_by_stores[0].label}, which tars do not hold; run it on the store itself"
            raise MissingExtraError(message)
        for extra, scale in ((each, scale) for each in needed for scale in each.from_coordinates):
            lacking = tuple(slide.slide_id for slide in slides if slide.slide_id in without.get(scale, ()))
            slides = tuple(slide for slide in slides if slide.slide_id not in without.get(scale, ()))
            if lacking:
                excluded[f"no coordinates at {scale}x"] = lacking
            if lacking and not slides:
                message = (
                    f"{model} needs {extra.label}, and no slide of encoder {cohort.encoder} has coordinates at "
                    f"{scale}x (files of CLAM and TRIDENT have, .pt files have not); `--model all` runs what can run"
                )
                raise MissingExtraError(message)
    return dataclasses.replace(cohort, slides=slides, excluded=excluded)


def slides_without_coordinates(store: Store, encoder: str) -> dict[int, set[str]]:
    """By scale: the slides of an encoder whose source gave no coordinates."""
    quoted = encoder.replace("'", "''")
    query = f"SELECT scale, list(slide_id) AS slides FROM bags WHERE encoder = '{quoted}' AND NOT has_coords GROUP BY 1"
    return {row["scale"]: set(row["slides"]) for row in store.sql(query).to_pylist()}


def _listed(scales: Sequence[int]) -> str:
    return ", ".join(f"{scale}x" for scale in scales)


def _splits(store: Store, cohort: Cohort, config: DataConfig, seed: int) -> SplitSet:
    """The named split set, or the cohort's only one, or folds by patient; a condition takes none unless named."""
    if config.splits:
        return store.split_set(cohort.name, config.splits)
    names = [] if config.where else store.split_names(cohort.name)
    if len(names) > 1:
        message = f"cohort {cohort.name} has several split sets ({', '.join(names)}); name one with --splits"
        raise ConfigError(message)
    if names:
        return store.split_set(cohort.name, names[0])
    labels = {slide.patient_id: slide.event for slide in cohort.slides}
    made = cfstore.make_folds(list(labels), list(labels.values()), config.folds, seed)
    return SplitSet(f"made{config.folds}-seed{seed}", made)


def _patients(store: Store, cohort: Cohort) -> dict[str, dict[str, Any]]:
    """What the clinical tables say of the patients of the cohort's slides, by the cohort's patient_id.

    A cohort of a query calls a patient "cohort/patient_id" where two cohorts share an id.
    """
    quoted = ", ".join(
        "'" + name.replace("'", "''") + "'" for name in sorted({slide.cohort for slide in cohort.slides})
    )
    rows = store.sql(f"SELECT * FROM patients WHERE cohort IN ({quoted})").to_pylist()
    by_key = {(row["cohort"], row["patient_id"]): row for row in rows}
    found = {}
    for slide in cohort.slides:
        own, prefixed = (slide.cohort, slide.patient_id), slide.patient_id.removeprefix(f"{slide.cohort}/")
        found[slide.patient_id] = by_key[own if own in by_key else (slide.cohort, prefixed)]
    return found
