"""What an ingest would do: every file looked at, nothing written.

All headers are read first, so that bad files are known, all of them at once, before the first
byte of a store is written.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cfstore.clinical import ClinicalTable, looks_clinical, read_clinical
from cfstore.convert import ARRAY_DTYPE, BagConverter
from cfstore.errors import ClinicalError, DuplicateBagError, ShapeError, SourceError, UnreadableFileError
from cfstore.labels import CohortLabels, collect
from cfstore.names import tcga_patient_id
from cfstore.parsers import BagHead, BagSource, discover, open_bag, read_head
from cfstore.schema import check_name
from cfstore.splits import find_split_files, read_splits
from cfstore.types import Affine

Progress = Callable[[int, int], None]
Key = tuple[str, int, str]  # slide_id, scale, encoder


@dataclass(frozen=True)
class Problem:
    """One slide that cannot be ingested as it is."""

    slide_id: str
    encoder: str
    source: str
    error: SourceError


@dataclass(frozen=True)
class SlideJob:
    """One slide to write: its bags, coarse to fine, and what their files declare."""

    slide_id: str
    encoder: str
    sources: tuple[BagSource, ...]
    heads: tuple[BagHead, ...]

    @property
    def n_rows(self) -> int:
        return sum(head.n_patches for head in self.heads)


@dataclass(frozen=True)
class HeldBag:
    """What the store already has of a bag; `affine` reads its scale and zero, of int8."""

    digest: str
    dtype: str
    dim: int
    source: str
    source_bytes: int
    source_mtime_ns: int
    affine: Callable[[], Affine | None]


@dataclass(frozen=True)
class IngestPlan:
    """What was understood of a folder."""

    folder: Path
    layout: str
    notes: tuple[str, ...]
    scales: tuple[int, ...]
    dims: Mapping[str, int]
    jobs: tuple[SlideJob, ...]
    slide_ids: frozenset[str]
    n_present: int
    incomplete: Mapping[str, tuple[int, ...]]
    problems: tuple[Problem, ...]
    clinical: ClinicalTable | None
    splits: Path | None
    dtype: str

    def match_clinical(self) -> tuple[int, int]:
        """How many of the folder's slides the clinical table labels, and how many slides there are."""
        ids = sorted(self.slide_ids)
        if self.clinical is None:
            return 0, len(ids)
        labels = labels_of(self.clinical)
        return sum(any(table.patient_of(slide) for table in labels.values()) for slide in ids), len(ids)

    @property
    def n_slides(self) -> int:
        return len(self.slide_ids)

    @property
    def source_bytes(self) -> int:
        """Size of the files that would be read."""
        return sum(source.path.stat().st_size for job in self.jobs for source in job.sources)

    @property
    def feature_bytes(self) -> int:
        """Decoded bytes that would be stored, before compression."""
        size = np.dtype(ARRAY_DTYPE[self.dtype]).itemsize
        return sum(job.n_rows * self.dims[job.encoder] * size for job in self.jobs)


def labels_of(table: ClinicalTable) -> dict[str, CohortLabels]:
    """Labels of a table that is not in a store (yet)."""
    patients = [
        (row["cohort"] or "", row["patient_id"]) for row in table.patients.select(["cohort", "patient_id"]).to_pylist()
    ]
    slides = [(row["cohort"] or "", row["slide_id"], row["patient_id"]) for row in table.slides.to_pylist()]
    return collect(patients, slides)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise what `problems` found as one error of the first one's class; nothing if there are none."""
    if problems:
        lines = [str(problem.error) for problem in problems[:20]]
        if len(problems) > 20:
            lines.append(f"... and {len(problems) - 20} more files")
        raise type(problems[0].error)("\n".join(lines))


def find_clinical(folder: Path) -> Path | None:
    """The clinical table lying in `folder`; ClinicalError where several lie there."""
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".txt", ".zip"))
    found = [path for path in names if path.is_file() and looks_clinical(path)]
    if len(found) > 1:
        message = f"{folder}: several clinical tables ({', '.join(p.name for p in found)}); name one with --clinical"
        raise ClinicalError(message)
    return found[0] if found else None


def find_splits(folder: Path) -> Path | None:
    """`folder` or `folder/splits`, whichever holds `splits_<k>.csv` files."""
    places = (folder, folder / "splits")
    return next((place for place in places if place.is_dir() and find_split_files(place)), None)


def _check_splits(folder: Path, table: ClinicalTable | None) -> None:
    """Raise what importing the folds would raise, as far as it can be known before the slides are in."""
    known = list(labels_of(table).values()) if table else []

    def patient_of(entry: str) -> str:
        if any(entry in labels.patients for labels in known):
            return entry
        found = next((patient for labels in known if (patient := labels.patient_of(entry))), None)
        return found or tcga_patient_id(entry) or entry

    check_name("split", folder.resolve().name, "--splits (a folder with such a name)")
    read_splits(folder, patient_of)


def _check_unlocked(source: BagSource) -> None:
    lock = source.path.with_name(source.path.name + ".lock")
    if lock.exists():
        message = (
            f"{source.path}: {lock.name} lies beside it: TRIDENT is still writing this file, or died; "
            "finish it, or delete both"
        )
        raise UnreadableFileError(message)


def _check_magnification(source: BagSource, head: BagHead) -> None:
    declared = head.attributes.get("target_magnification")
    if declared is not None and declared != source.scale:
        message = (
            f"{source.path}: the folder says {source.scale}x, "
            f"its coords attribute target_magnification says {declared:g}x; "
            "move the file to the right folder"
        )
        raise ShapeError(message)


def _heads(
    sources: Sequence[BagSource], problems: list[Problem], progress: Progress | None
) -> dict[Key, tuple[BagSource, BagHead]]:
    found: dict[Key, tuple[BagSource, BagHead]] = {}
    for done, source in enumerate(sources):
        if progress:
            progress(done, len(sources))
        key = (source.slide_id, source.scale, source.encoder)
        try:
            if key in found:
                message = (
                    f"{source.path}: slide {source.slide_id} at {source.scale}x is also in {found[key][0].path}; "
                    "keep one of the two"
                )
                raise DuplicateBagError(message)
            _check_unlocked(source)
            head = read_head(source)
            _check_magnification(source, head)
            found[key] = (source, head)
        except SourceError as error:
            problems.append(Problem(source.slide_id, source.encoder, str(source.path), error))
    return found


def _dims(found: Mapping[Key, tuple[BagSource, BagHead]], held: Mapping[Key, HeldBag]) -> dict[str, int]:
    """Dimension of each encoder: the store's, else the most common one of this folder."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for (_, _, encoder), (_, head) in found.items():
        counts[encoder][head.dim] += 1
    dims = {encoder: counter.most_common(1)[0][0] for encoder, counter in counts.items()}
    dims.update({encoder: bag.dim for (_, _, encoder), bag in held.items() if encoder in dims})
    return dims


def _check_dim(source: BagSource, head: BagHead, dim: int) -> None:
    if head.dim != dim:
        message = (
            f"{source.path}: dimension {head.dim}, but the other slides of encoder {source.encoder} have {dim}; "
            "it comes from another encoder: ingest it under its own name with --encoder"
        )
        raise ShapeError(message)


def _digest(source: BagSource, held: HeldBag) -> str:
    """The digest that the store would record for this file."""
    converter = BagConverter(source.path, held.dtype, held.dim, held.affine())
    with open_bag(source) as bag:
        for rows in bag.blocks():
            converter.convert(rows)
        return converter.finish(bag.coords()).digest


def _check_unchanged(source: BagSource, bag: HeldBag) -> None:
    """The source is what the store holds; content is compared only where size or time differ."""
    stat = source.path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (bag.source_bytes, bag.source_mtime_ns):
        return
    if _digest(source, bag) != bag.digest:
        message = (
            f"{source.path}: slide {source.slide_id} at {source.scale}x is in the store with other content "
            f"(from {bag.source}); "
            "shards are never changed: ingest into a new --store"
        )
        raise DuplicateBagError(message)


def make_plan(
    folder: Path,
    *,
    encoder: str | None,
    scale: int | None,
    clinical: Path | None,
    splits: Path | None,
    cohort: str | None,
    dtype: str,
    held: Callable[[Sequence[str]], Mapping[Key, HeldBag]],
    progress: Progress | None = None,
) -> IngestPlan:
    """Look at every file of `folder`.

    `held` says what the store already has of the given encoders. Problems of single files are
    collected in the plan; what concerns the folder as a whole is raised (LayoutError,
    MissingScaleError, ClinicalError).
    """
    discovery = discover(folder, encoder=encoder, scale=scale)
    for name in {source.encoder for source in discovery.sources}:
        check_name("encoder", name, "--encoder")
    problems = [Problem(s.slide_id, s.encoder, str(s.path), error) for s, error in discovery.unreadable]
    found = _heads(discovery.sources, problems, progress)
    present = held(sorted({source.encoder for source in discovery.sources}))
    dims = _dims(found, present)
    todo: dict[tuple[str, str], list[tuple[BagSource, BagHead]]] = defaultdict(list)
    there: set[tuple[str, str]] = set()
    for key, (source, head) in sorted(found.items()):
        try:
            _check_dim(source, head, dims[source.encoder])
            if key in present:
                _check_unchanged(source, present[key])
                there.add((source.encoder, source.slide_id))
            else:
                todo[source.encoder, source.slide_id].append((source, head))
        except SourceError as error:
            problems.append(Problem(source.slide_id, source.encoder, str(source.path), error))
    bad = {(problem.encoder, problem.slide_id) for problem in problems}
    jobs = tuple(
        SlideJob(slide_id, name, tuple(s for s, _ in bags), tuple(h for _, h in bags))
        for (name, slide_id), bags in sorted(todo.items())
        if (name, slide_id) not in bad
    )
    path = clinical or find_clinical(folder)
    table = read_clinical(path, cohort) if path else None
    fold_files = splits or find_splits(folder)
    if fold_files:
        _check_splits(fold_files, table)
    return IngestPlan(
        folder=folder,
        layout=discovery.layout,
        notes=discovery.notes,
        scales=tuple(sorted({source.scale for source in discovery.sources})),
        dims=dims,
        jobs=jobs,
        slide_ids=frozenset([*(s.slide_id for s in discovery.sources), *(problem.slide_id for problem in problems)]),
        n_present=len(there - set(todo)),
        incomplete=_incomplete(discovery.sources, present),
        problems=tuple(problems),
        clinical=table,
        splits=fold_files,
        dtype=dtype,
    )


def _incomplete(sources: Sequence[BagSource], held: Mapping[Key, HeldBag]) -> dict[str, tuple[int, ...]]:
    """Slides that lack a scale other slides of their encoder have: slide -> missing scales."""
    scales: dict[str, set[int]] = defaultdict(set)
    have: dict[tuple[str, str], set[int]] = defaultdict(set)
    for slide_id, scale, encoder in [*((s.slide_id, s.scale, s.encoder) for s in sources), *held]:
        scales[encoder].add(scale)
        have[encoder, slide_id].add(scale)
    lacking = {slide: tuple(sorted(scales[encoder] - got)) for (encoder, slide), got in have.items()}
    return {slide: missing for slide, missing in sorted(lacking.items()) if missing}
