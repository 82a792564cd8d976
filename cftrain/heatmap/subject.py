"""The slide that is explained: its bags with coordinates, and which folds of the run may speak of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cfstore
from cfstore import Bag, SlideBags, Store
from cftrain.errors import ConfigError
from cftrain.examples import Example
from cftrain.extras import ExtraReader, derive_missing
from cftrain.models import BagBatch, Extra
from cftrain.prediction.slides import find_target
from cftrain.prediction.trained import Member, TrainedRun
from cftrain.run_directory import stored_provenance, stored_store


@dataclass(frozen=True, eq=False)
class Subject:
    """A slide and what the models are shown of it.

    Parameters
    ----------
    slide_id
        The slide.
    patient_id, cohort
        As the store knows them; patient None where it does not.
    example
        What a model sees at once: the slide, or all slides of its patient where the run's unit is the patient.
    encoder
        Of the features.
    batch
        The example's bags, on the CPU, as stored (int8 as float32).
    rows
        By scale: which rows of those bags are the slide's.
    bags
        The slide's own bags with coordinates, by scale.
    catalog
        The catalog's rows of those bags.
    seen_by
        Folds of the run that were trained on the slide's patient; none where the run does not know them.
    synthetic
        Whether the slide is invented.
    """

    slide_id: str
    patient_id: str | None
    cohort: str
    example: Example
    encoder: str
    batch: BagBatch
    rows: Mapping[int, slice]
    bags: Mapping[int, Bag]
    catalog: Sequence[Mapping[str, Any]]
    seen_by: frozenset[int]
    synthetic: bool


@dataclass(frozen=True)
class Source:
    """Where slides are: a store or tars, and the encoder of the features; None: those of the run."""

    store: Path | str | None = None
    shards: str | None = None
    encoder: str | None = None

    def resolved(self, trained: TrainedRun) -> Source:
        """With the run's own store or tars where none are named.

        Raises
        ------
        ConfigError
            The run's store is not where it was.
        """
        if self.store is not None or self.shards is not None:
            return self
        origin = stored_provenance(trained.path)
        if origin.get("shards"):
            return Source(None, str(origin["shards"]), self.encoder)
        store = stored_store(trained.path) or Path()
        if isinstance(store, Path) and not (store / "store.json").is_file():
            message = f"{trained.path}: its store is no longer at {store}; name where it is with --store"
            raise ConfigError(message)
        return Source(store, None, self.encoder)


def find_subject(trained: TrainedRun, source: Source, slide_id: str) -> Subject:
    """Read one slide as the run's models see it, with coordinates.

    Raises
    ------
    SlideNotFoundError
        The store has no such slide; the message names similar ones.
    ConfigError, MissingScaleError, ShapeError, StoreError
        The store has not the features that the models read.
    """
    opened = cfstore.open_tars(source.shards) if source.shards is not None else cfstore.open(source.store or "")
    found = opened.slide_rows(slide_id)
    patient, cohort = found["slide"]["patient_id"], found["slide"]["cohort"]
    whole = trained.config.data.unit == "patient" and patient is not None
    where = (
        f"patient_id = {_quoted(patient)} AND cohort = {_quoted(cohort)}"
        if whole
        else f"slide_id = {_quoted(slide_id)}"
    )
    target = find_target(
        trained,
        source.store,
        cohort=None,
        where=where,
        encoder=source.encoder,
        shards=source.shards,
        allow_training_patients=True,
    )
    example = next((each for each in target.data.examples if slide_id in each.slide_ids), None)
    if example is None:
        left_out = "; ".join(reason for reason, ids in target.data.excluded.items() if slide_id in ids)
        message = f"slide {slide_id} cannot be explained: {left_out}"
        raise ConfigError(message)
    encoder = target.data.cohort.encoder
    bags = _read(opened, encoder, trained.scales, example.slide_ids)
    extras = _extras(opened, encoder, trained.config.extras(), bags)
    own = [row for row in found["bags"] if row["encoder"] == encoder and row["scale"] in trained.scales]
    place = example.slide_ids.index(slide_id)
    return Subject(
        slide_id=slide_id,
        patient_id=patient,
        cohort=cohort,
        example=example,
        encoder=encoder,
        batch=_batch(example, bags, trained.scales, extras),
        rows={scale: _own_rows(bags, scale, place) for scale in trained.scales},
        bags=bags[place].bags,
        catalog=own,
        seen_by=_seen_by(trained, slide_id, patient, cohort),
        synthetic=bool((found["patient"] or {}).get("synthetic")),
    )


def _quoted(name: str) -> str:
    """A text of SQL."""
    return "'" + name.replace("'", "''") + "'"


def _read(store: Store, encoder: str, scales: Sequence[int], slide_ids: Sequence[str]) -> list[SlideBags]:
    reader = store.reader(encoder, scales, slide_ids, with_coords=True)
    return [reader.read(slide_id).dequantised() for slide_id in slide_ids]


def _extras(
    store: Store, encoder: str, extras: Sequence[Extra], slides: Sequence[SlideBags]
) -> list[dict[Extra, torch.Tensor]]:
    """What the model reads of each slide besides features; derived first where the store lacks it."""
    slide_ids = [slide.slide_id for slide in slides]
    derive_missing(store, encoder, extras, slide_ids, lambda done, total: None)
    reader = ExtraReader(store, encoder, extras, slide_ids)
    return [{extra: torch.from_numpy(rows) for extra, rows in reader.read(slide).items()} for slide in slides]


def _batch(
    example: Example, slides: Sequence[SlideBags], scales: Sequence[int], extras: Sequence[Mapping[Extra, torch.Tensor]]
) -> BagBatch:
    """The bags of all slides of an example as one, in the order in which training puts them."""
    bags = [{scale: torch.from_numpy(slide.bags[scale].features) for scale in scales} for slide in slides]
    return BagBatch.pack([slide.slide_id for slide in slides], bags, extras).grouped([example.name], [len(slides)])


def _own_rows(bags: Sequence[SlideBags], scale: int, place: int) -> slice:
    start = sum(slide.bags[scale].n_patches for slide in bags[:place])
    return slice(start, start + bags[place].bags[scale].n_patches)


def _seen_by(trained: TrainedRun, slide_id: str, patient: str | None, cohort: str) -> frozenset[int]:
    """All folds but those that validated the slide or its patient; none where the run knows neither."""
    known = [trained.patients[name] for name in (str(patient), f"{cohort}/{patient}") if name in trained.patients]
    validated = frozenset(trained.slides.get(slide_id, ())) or frozenset().union(*known)
    return frozenset(member.fold for member in trained.members) - validated if validated else frozenset()


def choose_members(
    trained: TrainedRun, subject: Subject, *, fold: int | None = None, ensemble: bool = False
) -> tuple[Member, ...]:
    """The models that explain a slide.

    Parameters
    ----------
    fold
        This one.
    ensemble
        All of them.

    Returns
    -------
    tuple
        With neither: those that were not trained on the slide's patient; all, where the run does not know the patient.

    Raises
    ------
    ConfigError
        No such fold, or both are given.
    """
    if fold is not None and ensemble:
        message = "--fold and --ensemble say different things; give one of them"
        raise ConfigError(message)
    folds = [member.fold for member in trained.members]
    if fold is not None and fold not in folds:
        message = f"{trained.path}: no fold {fold}; its folds are {', '.join(map(str, folds))}"
        raise ConfigError(message)
    if fold is not None:
        return tuple(member for member in trained.members if member.fold == fold)
    if ensemble:
        return trained.members
    return tuple(member for member in trained.members if member.fold not in subject.seen_by)


def honesty(members: Sequence[Member], subject: Subject) -> str:
    """Whether these models have seen the slide's patient in training, one sentence."""
    seen = [member.fold for member in members if member.fold in subject.seen_by]
    which = f"fold {members[0].fold}" if len(members) == 1 else f"the mean of {len(members)} folds"
    if not subject.seen_by:
        return f"{which}; the run does not know this slide's patient"
    if not seen:
        return f"{which}, not trained on this slide's patient"
    if len(members) == 1:
        return f"{which}, TRAINED on this slide's patient: what it shows here it may have learnt by heart"
    return f"{which}, {len(seen)} of them TRAINED on this slide's patient"
