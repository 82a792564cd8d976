"""Slides out of the store, as files that others read: WebDataset tars, or CLAM's HDF5 folders.

Everything is written into a hidden folder of the target, flushed, and renamed at the end: a
folder that shows files holds all of them.
"""

from __future__ import annotations

import csv
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import h5py
import numpy as np

from cfstore.catalog import connect
from cfstore.cohort import choose_encoder
from cfstore.convert import ARRAY_DTYPE
from cfstore.digests import stored_digest
from cfstore.errors import DamagedShardError, SourceError, StoreWriteError
from cfstore.ingest import BYTES_PER_SHARD, SLIDES_PER_SHARD
from cfstore.locks import discard, hold, sweep
from cfstore.names import strip_suffixes
from cfstore.reader import SlideReader
from cfstore.render import plain
from cfstore.selection import select_slides
from cfstore.shards import TEMPORARY_PREFIX, BagRecord, ShardRecord, open_writer, sync
from cfstore.shards.files import sync_tree
from cfstore.types import Bag, SlideBags

ExportFormat = Literal["webdataset", "h5"]
FORMATS: Final[tuple[ExportFormat, ...]] = ("webdataset", "h5")
_LABELS: Final = ("cohort", "patient_id", "time_months", "event")
_MAX_NAME_BYTES: Final = 255
_H5_ATTRIBUTES: Final = ("mpp", "level0_magnification", "patch_size", "patch_size_level0")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    directory: str
    format: str
    encoder: str
    n_slides: int
    n_bags: int
    n_without_label: int
    n_files: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Slide:
    """What the catalog says of one slide; `patient` is its row of `patients`, if there is one."""

    slide_id: str
    cohort: str
    patient_id: str | None
    dtype: str
    dim: int
    bags: tuple[BagRecord, ...]
    patient: Mapping[str, Any] | None
    splits: Mapping[str, Mapping[str, str]]

    @property
    def nbytes(self) -> int:
        return sum(bag.n_patches for bag in self.bags) * self.dim * np.dtype(ARRAY_DTYPE[self.dtype]).itemsize


def export(
    root: Path,
    directory: Path,
    *,
    form: ExportFormat = "webdataset",
    where: str | None = None,
    cohort: str | None = None,
    encoder: str | None = None,
    shard_slides: int = SLIDES_PER_SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write slides of one encoder, with their labels, into a new or empty folder.

    Parameters
    ----------
    root
        The store.
    directory
        Where to; must hold no files.
    form
        "webdataset": `000000.tar`, ... with the stored precision, labels and folds in each
        sample's JSON. "h5": CLAM's `x20/h5_files/<slide>.h5` in float32, and clinical.csv.
    where, cohort
        Which slides; see `select_slides`.
    encoder
        Of the features; may be left out where the slides have only one.
    shard_slides
        At most so many slides in a tar, and 2 GiB.

    Raises
    ------
    SourceError
        The folder holds files, or (h5) a slide id cannot be a file's name.
    SlideNotFoundError, QueryError
        No such slides.
    DamagedShardError
        Rows are not what was ingested.
    StoreWriteError
        The folder cannot be written; nothing is left in it then.
    """
    started = time.monotonic()
    ids = select_slides(root, where, cohort)
    encoder = choose_encoder(root, cohort, encoder, where)
    slides = _read_slides(root, ids, encoder)
    if form == "h5":
        for slide in slides:
            _check_file_name(slide.slide_id)
    with _folder(directory) as temporary:
        done = _checked_slides(root, encoder, slides, progress)
        write = _write_tars if form == "webdataset" else _write_h5
        write(temporary, encoder, done, shard_slides)
        if form == "h5":
            _write_clinical(temporary / "clinical.csv", slides)
    files = [path for path in directory.rglob("*") if path.is_file()]
    return ExportReport(
        directory=str(directory),
        format=form,
        encoder=encoder,
        n_slides=len(slides),
        n_bags=sum(len(slide.bags) for slide in slides),
        n_without_label=sum((slide.patient or {}).get("event") is None for slide in slides),
        n_files=len(files),
        bytes=sum(path.stat().st_size for path in files),
        seconds=time.monotonic() - started,
    )


# -- what is exported ----------------------------------------------------------------------------


def _read_slides(root: Path, slide_ids: Sequence[str], encoder: str) -> list[_Slide]:
    """The chosen slides that have the encoder, by id."""
    with connect(root) as connection:
        rows = {
            name: connection.sql(query, params=parameters).to_arrow_table().to_pylist()
            for name, query, parameters in (
                ("slides", "SELECT * FROM slides WHERE list_contains(?, slide_id) ORDER BY slide_id", [slide_ids]),
                ("bags", "SELECT * FROM bags WHERE encoder = ? ORDER BY slide_id, scale", [encoder]),
                ("patients", "SELECT * FROM patients", []),
                ("splits", "SELECT * FROM splits ORDER BY name, fold", []),
            )
        }
    bags: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows["bags"]:
        bags[row["slide_id"]].append(row)
    patients = {(row["cohort"], row["patient_id"]): row for row in rows["patients"]}
    splits: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows["splits"]:
        splits[row["cohort"], row["patient_id"]][row["name"]][str(row["fold"])] = row["part"]
    names = [field.name for field in fields(BagRecord)]
    return [
        _Slide(
            slide_id=row["slide_id"],
            cohort=row["cohort"],
            patient_id=row["patient_id"],
            dtype=held[0]["dtype"],
            dim=held[0]["dim"],
            bags=tuple(BagRecord(**{name: bag[name] for name in names}) for bag in held),
            patient=patients.get((row["cohort"], row["patient_id"])),
            splits=splits.get((row["cohort"], row["patient_id"]), {}),
        )
        for row in rows["slides"]
        if (held := bags[row["slide_id"]])
    ]


Done = Iterator[tuple[_Slide, SlideBags]]


def _checked_slides(
    root: Path, encoder: str, slides: Sequence[_Slide], progress: Callable[[int, int], None] | None
) -> Done:
    """Every slide with its rows as stored, read ahead, and compared with the digests of ingest."""
    by_scales: dict[tuple[int, ...], SlideReader] = {}
    runs: list[tuple[tuple[int, ...], list[_Slide]]] = []
    for slide in slides:
        scales = tuple(bag.scale for bag in slide.bags)
        if not runs or runs[-1][0] != scales:
            runs.append((scales, []))
        runs[-1][1].append(slide)
    count = 0
    for scales, run in runs:
        if scales not in by_scales:
            ids = [slide.slide_id for held, slides_of in runs if held == scales for slide in slides_of]
            by_scales[scales] = SlideReader(root, encoder, scales, ids, with_coords=True)
        stream = by_scales[scales].stream([slide.slide_id for slide in run], ahead=4)
        for slide, held in zip(run, stream, strict=True):
            for bag in slide.bags:
                if stored_digest(held.bags[bag.scale]) != bag.digest:
                    message = (
                        f"{root}: slide {slide.slide_id} at {bag.scale}x is not what was ingested; "
                        "find out more with `cfstore verify`"
                    )
                    raise DamagedShardError(message)
            yield slide, held
            count += 1
            if progress:
                progress(count, len(slides))


def labels_of(slide: _Slide) -> dict[str, Any]:
    """What a sample's JSON says of the slide's patient: plain values, None for what is unknown."""
    patient = None if slide.patient is None else dict(slide.patient)
    return {
        "cohort": slide.cohort,
        "patient_id": slide.patient_id,
        "time_months": plain(patient and patient["time_months"]),
        "event": plain(patient and patient["event"]),
        "patient": None if patient is None else plain({k: v for k, v in patient.items() if k not in _LABELS}),
        "splits": {name: dict(folds) for name, folds in slide.splits.items()},
    }


# -- WebDataset ----------------------------------------------------------------------------------


def _write_tars(folder: Path, encoder: str, slides: Done, shard_slides: int) -> None:
    writer, written, kind, room = None, [], None, 0  # type: Any, list[Any], Any, int
    number = 0
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        for slide, held in slides:
            full = len(written) >= shard_slides or slide.nbytes > room or kind != (slide.dtype, slide.dim)
            if writer is None or full:
                if writer is not None:
                    writer.finish(written)
                    number += 1
                kind, room, written = (slide.dtype, slide.dim), BYTES_PER_SHARD, []
                head = ShardRecord("", "webdataset", encoder, slide.dim, slide.dtype, "none", created)
                writer = open_writer(folder / f"{number:06d}.tar", head, [])
            room -= slide.nbytes
            affine = next(iter(held.bags.values())).affine
            writer.begin_slide(slide.slide_id, affine)
            for bag in slide.bags:
                writer.begin_bag(bag.scale, bag.n_patches)
                writer.append(held.bags[bag.scale].features)
                writer.end_bag(held.bags[bag.scale].coords, bag.n_patches)
            # where the sources lay is nobody's business who gets the tars
            bags = [replace(bag, row_start=None, source=Path(bag.source).name) for bag in slide.bags]
            written.append(writer.end_slide(slide.slide_id, slide.cohort, slide.cohort, bags, labels_of(slide)))
        if writer is not None:
            writer.finish(written)
    finally:
        if writer is not None:
            writer.close()


# -- HDF5 ----------------------------------------------------------------------------------------


def _check_file_name(slide_id: str) -> None:
    name = f"{slide_id}.h5"
    unsafe = "/" in slide_id or "\0" in slide_id or slide_id.startswith(".") or slide_id == ""
    if unsafe or len(name.encode()) > _MAX_NAME_BYTES or strip_suffixes(name) != slide_id:
        message = (
            f"slide {slide_id!r}: cannot be the name of a file that `cfstore ingest` finds again; "
            "leave it out with --where, or export --format webdataset"
        )
        raise SourceError(message)


def _write_h5(folder: Path, encoder: str, slides: Done, shard_slides: int) -> None:
    for slide, held in slides:
        for record in slide.bags:
            path = folder / f"x{record.scale}" / "h5_files" / f"{slide.slide_id}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_bag(path, record, held.bags[record.scale].dequantised())


def _write_bag(path: Path, record: BagRecord, bag: Bag) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=bag.features.astype(np.float32, copy=False))
        if bag.coords is not None:
            coords = file.create_dataset("coords", data=bag.coords)
            known = {name: getattr(record, name) for name in _H5_ATTRIBUTES}
            coords.attrs.update({name: value for name, value in known.items() if value is not None})
            coords.attrs["target_magnification"] = record.scale


def _write_clinical(path: Path, slides: Sequence[_Slide]) -> None:
    """One row per slide of a known patient, in the words that `cfstore clinical` knows; nothing where there is none."""
    rows = [{"slide_id": slide.slide_id, **slide.patient} for slide in slides if slide.patient]
    if rows:
        names = list(rows[0])
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(names)
            table.writerows([_cell(row[name]) for name in names] for row in rows)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return int(value) if isinstance(value, bool) else value


# -- the folder ----------------------------------------------------------------------------------


@contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    """A hidden folder in `directory`; what it holds at the end is moved up, else it is removed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sweep(directory, TEMPORARY_PREFIX)
        if any(directory.iterdir()):
            message = f"{directory}: holds files already; name a new or empty folder"
            raise SourceError(message)
        temporary = directory / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        temporary.mkdir()
        with hold(temporary):
            try:
                yield temporary
                sync_tree(temporary)
                for path in sorted(temporary.iterdir()):
                    path.rename(directory / path.name)
                sync(directory)
            finally:
                discard(temporary)
    except StoreWriteError:
        raise
    except OSError as error:
        message = f"{directory}: cannot be written ({error.strerror or error}); free space or name another folder"
        raise StoreWriteError(message) from error
