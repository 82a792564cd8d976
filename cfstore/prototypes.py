"""Prototypes: k-means centroids of the patches of a training set, and of nothing else.

Fitted on slides that a model is tested on they would carry these slides' features into training. So a set is found
again by a digest of exactly the slides it was fitted to, and of their bags: no other training set can get it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from cfstore import catalog
from cfstore.catalog import connect
from cfstore.clusters import Clusters, k_means
from cfstore.cohort import read_cohort, read_split_set, split_names
from cfstore.derive_job import blocks, new_file, rename_into_place
from cfstore.derived_files import (
    SUFFIX,
    PrototypesFile,
    damaged,
    digest_of,
    folder_of,
    now,
    read_centroids,
    read_file,
    write_prototypes,
)
from cfstore.derived_tables import PROTOTYPES_VERSION
from cfstore.errors import (
    DerivationError,
    SlideNotFoundError,
    SplitsError,
    StoreBusyError,
    StoreFormatError,
    StoreWriteError,
)
from cfstore.halves import widened
from cfstore.locks import write_lock
from cfstore.mirrors import bring, remote_of
from cfstore.reader import SlideReader
from cfstore.render import some
from cfstore.types import SCALES

MOST_PATCHES: Final = 100_000
"""That centroids are fitted to; of more slides than that, one patch each."""


@dataclass(frozen=True)
class PrototypeSet:
    """Which centroids: of which slides, each with the digest of its bag, sorted."""

    root: Path
    encoder: str
    scale: int
    n: int
    seed: int
    slides: Mapping[str, str]

    @classmethod
    def of(cls, root: Path, encoder: str, scale: int, slide_ids: Iterable[str], n: int, seed: int) -> PrototypeSet:
        """Look up the slides' bags.

        Raises
        ------
        SlideNotFoundError
            A slide has no such bag, or none is named.
        DerivationError
            There are no such prototypes.
        """
        if n < 1 or seed < 0 or scale not in SCALES:
            scales = ", ".join(f"{known}x" for known in SCALES)
            raise DerivationError(
                f"{n} prototypes at {scale}x, seed {seed}: name 1 or more, at {scales}, no seed below 0"
            )
        wanted = sorted(set(slide_ids))
        if not wanted:
            raise SlideNotFoundError("prototypes of no slide; name the slides of a training fold")
        query = "SELECT slide_id, digest FROM bags WHERE encoder = ? AND scale = ? AND list_contains(?, slide_id)"
        with connect(root) as connection:
            held = dict(connection.execute(query, [encoder, scale, wanted]).fetchall())
        missing = [slide_id for slide_id in wanted if slide_id not in held]
        if missing:
            raise SlideNotFoundError(f"{some(missing)}: no {scale}x bag from encoder {encoder} in {root}")
        return cls(root, encoder, scale, n, seed, {slide_id: held[slide_id] for slide_id in wanted})

    @property
    def key(self) -> str:
        """A digest of all that the centroids depend on."""
        known: list[Any] = [PROTOTYPES_VERSION, MOST_PATCHES, self.n, self.seed, self.encoder, self.scale]
        return xxhash.xxh3_128_hexdigest(json.dumps([*known, list(self.slides.items())]).encode())

    @property
    def path(self) -> Path:
        """Where they are kept."""
        return folder_of(self.root, self.encoder, f"prototypes{self.n}-{self.scale}x") / f"{self.key}{SUFFIX}"

    def about(self) -> PrototypesFile | None:
        """What is kept; None where there is nothing.

        Raises
        ------
        StoreFormatError
            The file is damaged.
        """
        try:
            file = self.path.relative_to(self.root).as_posix()
            bring(self.root, file)
            found = read_file(self.root, file)
        except FileNotFoundError:
            return None
        if not isinstance(found, PrototypesFile) or found.key != self.key:
            raise damaged(self.path, "its name is not that of its content")
        return found

    def read(self) -> NDArray[np.float32]:
        """The centroids, fitted and kept where they are not yet; see `Store.prototypes`."""
        kept = self.about()
        if kept:
            return read_centroids(self.path, kept.digest)
        rng = np.random.default_rng(self.seed)
        rows = sample_patches(self.root, self.encoder, self.scale, list(self.slides), rng)
        now = PrototypeSet.of(self.root, self.encoder, self.scale, self.slides, self.n, self.seed)
        if now != self:
            changed = [slide_id for slide_id, digest in self.slides.items() if now.slides[slide_id] != digest]
            raise DerivationError(
                f"{some(changed)}: ingested with other values while patches were read; run this again"
            )
        if len(rows) < self.n:
            of = f"{len(rows)} patches at {self.scale}x of {len(self.slides)} slides"
            raise DerivationError(f"{self.n} prototypes of {of}: name fewer prototypes or more slides")
        found = k_means(rows, self.n, rng)
        with suppress(StoreWriteError, StoreBusyError, StoreFormatError):  # what cannot be kept is still right
            self._keep(found, len(rows))
        return found.centroids

    def _keep(self, found: Clusters, n_sampled: int) -> None:
        about = PrototypesFile(
            file="",
            encoder=self.encoder,
            scale=self.scale,
            n=self.n,
            seed=self.seed,
            version=PROTOTYPES_VERSION,
            key=self.key,
            slides=self.slides,
            slides_digest=f"xxh3-128:{xxhash.xxh3_128_hexdigest(json.dumps(list(self.slides)).encode())}",
            n_sampled=n_sampled,
            inertia=found.inertia,
            digest=digest_of(found.centroids),
            created=now(),
        )
        if remote_of(self.root):
            return  # read only
        with new_file(self.path, self.root) as temporary:
            write_prototypes(temporary, about, found.centroids, found.sizes.tolist())
            with write_lock(self.root):
                if self.path.exists():
                    return  # somebody else fitted the same meanwhile
                catalog.reconcile(self.root)  # forgets a file of that name that was deleted
                rename_into_place(temporary, self.path, self.root)
                catalog.reload_derived(self.root)


def fit_folds(
    root: Path,
    n: int,
    splits: str | None,
    *,
    scale: int,
    seed: int,
    cohort: str | None,
    encoder: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """See `Store.fold_prototypes`."""
    slides = read_cohort(root, cohort, encoder, [scale])
    names = split_names(root, slides.name)
    if splits is None and len(names) != 1:
        listed = ", ".join(names) or "none; make them with `cfstore splits`"
        raise SplitsError(f"cohort {slides.name} has the splits {listed}: name one with --splits")
    folds = read_split_set(root, slides.name, splits or names[0]).folds
    rows = []
    for done, (number, fold) in enumerate(folds.items(), 1):
        training = [slide.slide_id for slide in slides.slides if slide.patient_id in fold.train]
        chosen = PrototypeSet.of(root, slides.encoder, scale, training, n, seed)
        chosen.read()
        rows.append({"fold": number, **_row(chosen)})
        if progress:
            progress(done, len(folds))
    return rows


def _row(chosen: PrototypeSet) -> dict[str, Any]:
    """A row for reports; what only the file says is None where it could not be kept."""
    kept = chosen.about()
    return {
        "n": chosen.n,
        "scale": chosen.scale,
        "seed": chosen.seed,
        "key": chosen.key,
        "n_slides": len(chosen.slides),
        "n_sampled": kept.n_sampled if kept else None,
        "inertia": kept.inertia if kept else None,
        "file": kept.file if kept else None,
    }


def sample_patches(
    root: Path, encoder: str, scale: int, slide_ids: list[str], rng: np.random.Generator
) -> NDArray[np.float32]:
    """As many patches of each slide, all of a smaller one, MOST_PATCHES in all: [P, D] float32.

    Slides are taken in the given order, patches in that of their bags.
    """
    reader = SlideReader(root, encoder, [scale], slide_ids)
    each = max(1, MOST_PATCHES // len(slide_ids))
    sampled = []
    for slide_id in slide_ids:
        n_patches, _ = reader.shape(slide_id, scale)
        rows = np.sort(rng.permutation(n_patches)[:each])
        for start, bag in blocks(reader, slide_id, scale):
            here = rows[(rows >= start) & (rows < start + bag.n_patches)] - start
            if len(here):
                sampled.append(widened(bag.dequantised().features[here]).astype(np.float32))
    return np.concatenate(sampled)
