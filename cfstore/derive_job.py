"""Derived arrays of a few slides: computed, written aside, renamed, registered.

Runs in the process that was asked, in one of several, or on another machine. Kill it anywhere: what was being
written is swept away by the next command that writes, and a file that was renamed but not registered is registered. Run
it again for the same task: it knows by their name the files that it had published already.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cfstore import catalog
from cfstore.alignment import align, patch_edge
from cfstore.attempts import registered_sources
from cfstore.derivation import Derivation
from cfstore.derived_files import (
    CHANGED,
    SUFFIX,
    DerivedFile,
    DerivedWriter,
    folder_of,
    read_file,
)
from cfstore.derived_tables import SOURCE
from cfstore.errors import ShapeError
from cfstore.halves import widened
from cfstore.locks import LOCK_SECONDS, discard, disk_errors, hold, write_lock
from cfstore.neighbours import nearest_patches, similar_patches
from cfstore.reader import SlideReader
from cfstore.shards import TEMPORARY_PREFIX, sync
from cfstore.types import Bag
from cfstore.writing import commit, is_staged

BLOCK_BYTES: Final = 16 << 20
"""Of stored features that are read at once for a mean."""
_CHANGED_REASON: Final = "its bags changed meanwhile; run this again"
_FEW: Final = 16  # patches; of fewer the spacing says little about their edge


@dataclass(frozen=True)
class DeriveTask:
    """Of which slides of an encoder what is to be derived; `name` is that of the files.

    `patience`: for how many seconds the task waits while others register.
    """

    root: Path
    encoder: str
    slides: Mapping[str, tuple[Derivation, ...]]
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    patience: float = LOCK_SECONDS


@dataclass(frozen=True)
class DeriveDone:
    """How many slides got each derivation, and which slides could not: (reason, slide).

    `n_recovered` arrays had been published by an earlier attempt, whose process died before it could say so.
    """

    done: Mapping[Derivation, int]
    excluded: tuple[tuple[str, str], ...]
    n_recovered: int = 0


class CannotDeriveError(Exception):
    """Why a derivation is not defined for a slide."""


@dataclass(frozen=True)
class Derived:
    """An array, and the patch edges that parents were found with."""

    values: NDArray[Any]
    edges: tuple[float, float] | None = None


@dataclass
class SlideArrays:
    """Computes what can be derived of slides of one encoder; coordinates of a slide are read once.

    `declared` gives, by (slide, scale), the patch edge in level-0 pixels where the source says one above 0.
    """

    root: Path
    encoder: str
    declared: Mapping[tuple[str, int], int]
    readers: Mapping[int, SlideReader]
    _coords: dict[tuple[str, int], NDArray[np.int32] | None] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, encoder: str, slides: Mapping[str, Iterable[Derivation]]) -> SlideArrays:
        """For these derivations of these slides.

        Raises
        ------
        SlideNotFoundError
            A slide has no bag of a scale that is needed.
        """
        needed: dict[int, list[str]] = defaultdict(list)
        for slide_id, wanted in slides.items():
            for scale in {scale for derivation in wanted for scale in derivation.scales}:
                needed[scale].append(slide_id)
        query = "SELECT slide_id, scale, patch_size_level0 FROM bags WHERE encoder = ? AND list_contains(?, slide_id)"
        with catalog.connect(root) as connection:
            rows = connection.execute(query, [encoder, list(slides)]).fetchall()
        readers = {scale: SlideReader(root, encoder, [scale], ids, with_coords=True) for scale, ids in needed.items()}
        declared = {(slide, scale): edge for slide, scale, edge in rows if edge is not None and edge > 0}
        return cls(root, encoder, declared, readers)

    def compute(self, slide_id: str, derivation: Derivation) -> Derived:
        """One array.

        Raises
        ------
        CannotDeriveError
            It is not defined for this slide; the message is the reason.
        """
        scale = derivation.scale
        if derivation.kind == "nearest":
            try:
                return Derived(nearest_patches(self._places(slide_id, scale), derivation.k))
            except ShapeError as error:
                raise CannotDeriveError(str(error)) from error
        if derivation.kind == "similar":
            return Derived(similar_patches(self.readers[scale].read(slide_id).bags[scale], derivation.k))
        if derivation.kind == "parents":
            return self._parents(slide_id, scale, derivation.coarse)
        return Derived(self._mean(slide_id, scale))

    def forget(self, slide_id: str) -> None:
        """Free what was kept of a slide."""
        for key in [key for key in self._coords if key[0] == slide_id]:
            del self._coords[key]

    def _places(self, slide_id: str, scale: int) -> NDArray[np.int32]:
        key = slide_id, scale
        if key not in self._coords:
            self._coords[key] = self.readers[scale].read_coords(slide_id, scale)
        coords = self._coords[key]
        if coords is None:
            raise CannotDeriveError(f"no coordinates at {scale}x")
        return coords

    def _parents(self, slide_id: str, fine: int, coarse: int) -> Derived:
        places = {scale: self._places(slide_id, scale) for scale in (fine, coarse)}
        edges = patch_edges(places, {scale: self.declared.get((slide_id, scale)) for scale in places})
        if edges is None:
            raise CannotDeriveError(f"too few patches at {fine}x and {coarse}x to tell their edges, which no file says")
        if edges[fine] > edges[coarse]:
            raise CannotDeriveError(f"patches at {fine}x are larger than those at {coarse}x")
        found = align(places[fine], edges[fine], places[coarse], edges[coarse])
        return Derived(found.parent.astype(np.int32), (edges[fine], edges[coarse]))

    def _mean(self, slide_id: str, scale: int) -> NDArray[np.float32]:
        total, count = 0.0, 0  # type: Any, int
        for _, bag in blocks(self.readers[scale], slide_id, scale):
            total = total + widened(bag.dequantised().features).sum(axis=0, dtype=np.float64)
            count += bag.n_patches
        mean: NDArray[np.float32] = (total / count).astype(np.float32)
        return mean


def blocks(reader: SlideReader, slide_id: str, scale: int) -> Iterator[tuple[int, Bag]]:
    """The bag of a slide in blocks of rows, BLOCK_BYTES each, and the first row of each."""
    n_patches, row_bytes = reader.shape(slide_id, scale)
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, n_patches, step):
        yield start, reader.read_rows(slide_id, scale, [(start, min(start + step, n_patches))])


def patch_edges(places: Mapping[int, NDArray[np.int32]], declared: Mapping[int, int | None]) -> dict[int, float] | None:
    """Edge of the patches of each scale, in level-0 pixels: as the source says, else from their spacing.

    Where the spacing of a scale cannot say it, it follows from another scale's edge: magnifications are inverse
    to edges. Of few patches the spacing is at least the edge, so the scale where it is least says it for all. None
    where nothing says any edge.
    """
    spaced = {scale: patch_edge(own) for scale, own in places.items() if declared.get(scale) is None}
    sure: dict[int, float] = {scale: float(edge) for scale, edge in declared.items() if edge is not None}
    sure |= {scale: float(edge) for scale, edge in spaced.items() if edge is not None and len(places[scale]) >= _FEW}
    if sure:
        finest = max(sure)
        return {scale: sure.get(scale, sure[finest] * finest / scale) for scale in places}
    at_1x = [float(edge) * scale for scale, edge in spaced.items() if edge is not None]
    return {scale: min(at_1x) / scale for scale in places} if at_1x else None


def sources_of(root: Path, encoder: str, derivation: Derivation, slide_ids: Iterable[str]) -> dict[str, str]:
    """By slide, which bags a derivation of it would be computed from now; slides without them are left out."""
    query = (
        f"SELECT fine.slide_id, {SOURCE} FROM bags AS fine LEFT JOIN bags AS coarse "
        "ON coarse.slide_id = fine.slide_id AND coarse.encoder = fine.encoder AND coarse.scale = ? "
        "WHERE fine.encoder = ? AND fine.scale = ? AND (? = 0 OR coarse.slide_id IS NOT NULL) "
        "AND list_contains(?, fine.slide_id)"
    )
    coarse = derivation.coarse
    with catalog.connect(root) as connection:
        return dict(connection.execute(query, [coarse, encoder, derivation.scale, coarse, list(slide_ids)]).fetchall())


@contextmanager
def new_file(path: Path, root: Path, patience: float = LOCK_SECONDS) -> Iterator[Path]:
    """A temporary file that will be `path`, locked against `sweep` and removed at the end if it is still there.

    No two processes share one, even where they work on the same file.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:16]}{path.suffix}")
    with disk_errors(root):
        held = ExitStack()
        try:
            with write_lock(root, patience):
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.touch()
                held.enter_context(hold(temporary))
            with held:
                yield temporary
        finally:
            discard(temporary)


def rename_into_place(temporary: Path, path: Path, root: Path) -> None:
    """Publish a finished file: flushed, renamed, its folders flushed. Needs the write lock."""
    sync(temporary)
    temporary.rename(path)
    folder = path.parent
    while folder != root:
        sync(folder)
        folder = folder.parent
    sync(root)


def write_derived(task: DeriveTask, tell: Callable[[], None]) -> DeriveDone:
    """Compute, publish and register; `tell` is called after each slide.

    Raises
    ------
    DamagedShardError
        A bag cannot be read.
    StoreWriteError
        The store cannot be written.
    """
    derivations = sorted({derivation for wanted in task.slides.values() for derivation in wanted})
    published = {each: found for each in derivations if (found := _published(task, each)) is not None}
    if published:
        return _recover(task, published, tell)
    before = {derivation: sources_of(task.root, task.encoder, derivation, task.slides) for derivation in derivations}
    arrays = SlideArrays.of(task.root, task.encoder, task.slides)
    excluded: list[tuple[str, str]] = []
    own = uuid.uuid4().hex[:16] if is_staged(task.root) else ""  # objects have names that are used once
    with ExitStack() as stack:
        files: dict[Derivation, tuple[DerivedWriter, Path]] = {}
        for derivation in derivations:
            path = _path(task, derivation, own)
            writer = DerivedWriter(
                stack.enter_context(new_file(path, task.root, task.patience)), task.encoder, derivation
            )
            stack.callback(writer.close)
            files[derivation] = writer, path
        for slide_id, wanted in task.slides.items():
            for derivation in wanted:
                try:
                    made = arrays.compute(slide_id, derivation)
                except CannotDeriveError as reason:
                    excluded.append((str(reason), slide_id))
                    continue
                files[derivation][0].add(slide_id, made.values, before[derivation][slide_id], made.edges)
            arrays.forget(slide_id)
            tell()
        changed = _publish(task, list(files.values()))
    if changed is None:
        return write_derived(task, lambda: None)
    excluded += [(_CHANGED_REASON, slide_id) for slides in changed.values() for slide_id in slides]
    done = {derivation: files[derivation][0].n_entries - len(changed.get(derivation, [])) for derivation in derivations}
    return DeriveDone(done, tuple(excluded))


def _path(task: DeriveTask, derivation: Derivation, own: str = "") -> Path:
    return folder_of(task.root, task.encoder, derivation.name) / f"{task.name}{own}{SUFFIX}"


def _published(task: DeriveTask, derivation: Derivation) -> Mapping[str, str] | None:
    """What an earlier attempt at this very task has published of a derivation: by slide, its source."""
    if is_staged(task.root):
        return registered_sources(task.root, task.encoder, derivation, task.name)
    path = _path(task, derivation)
    if not path.exists():
        return None
    held = read_file(task.root, path.relative_to(task.root).as_posix())
    return {entry.slide_id: entry.source for entry in held.entries} if isinstance(held, DerivedFile) else None


def _recover(
    task: DeriveTask, published: Mapping[Derivation, Mapping[str, str]], tell: Callable[[], None]
) -> DeriveDone:
    """Answer for an earlier attempt, and compute what it had left out: to find out again why."""
    commit(task.root, lambda: catalog.reconcile(task.root), task.patience)
    wanted = {
        slide_id: tuple(each for each in own if slide_id not in published.get(each, ()))
        for slide_id, own in task.slides.items()
    }
    left = {slide_id: own for slide_id, own in wanted.items() if own}
    for _ in range(len(task.slides) - len(left)):
        tell()
    name = f"{(int(task.name, 16) + 1) % (1 << 64):016x}"
    rest = write_derived(replace(task, slides=left, name=name), tell) if left else DeriveDone({}, ())
    done = Counter(rest.done)
    for derivation, sources in published.items():
        done[derivation] += sum(source != CHANGED for source in sources.values())
    changed = [
        (_CHANGED_REASON, slide_id)
        for sources in published.values()
        for slide_id, source in sources.items()
        if source == CHANGED
    ]
    n_recovered = sum(len(sources) for sources in published.values()) - len(changed)
    return DeriveDone(done, (*rest.excluded, *changed), n_recovered + rest.n_recovered)


def _is_taken(task: DeriveTask, writer: DerivedWriter, path: Path) -> bool:
    """Whether another attempt has published the file: under this name, or in a bucket under one of its own."""
    others = set(path.parent.glob(f"{task.name}*{SUFFIX}")) - {path}
    return bool(others) or (path.exists() and writer.path.exists())


def _publish(task: DeriveTask, files: list[tuple[DerivedWriter, Path]]) -> dict[Derivation, list[str]] | None:
    """Gives the slides whose bags became others meanwhile; None where an attempt given up for dead was faster."""
    filled = [(writer, path) for writer, path in files if writer.n_entries]
    changed: dict[Derivation, list[str]] = {}
    if not filled:
        return changed

    def finish() -> bool:
        if any(_is_taken(task, writer, path) for writer, path in filled):
            for _, path in (each for each in filled if not each[0].path.exists()):
                path.unlink(missing_ok=True)  # in place when the commit lost its race; nothing names it
            return False
        for writer, path in filled:
            if writer.path.exists():  # not when this is done again
                now = sources_of(task.root, task.encoder, writer.derivation, task.slides)
                changed[writer.derivation] = writer.finish(now)
                rename_into_place(writer.path, path, task.root)
        catalog.reload_derived(task.root)
        return True

    return changed if commit(task.root, finish, task.patience) else None
