"""What was derived, out of the store; and what was not derived yet."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cfstore import derived_files
from cfstore.catalog import connect
from cfstore.derivation import Derivation
from cfstore.derived_tables import derived_now, has_table
from cfstore.errors import (
    DamagedShardError,
    NotDerivedError,
    RemoteError,
    SlideNotFoundError,
    StoreError,
    StoreFormatError,
)
from cfstore.mirrors import refreshed, remote_of
from cfstore.remote_parquet import open_row_group, read_footer
from cfstore.remote_parts import RemoteParts
from cfstore.render import some


@dataclass(frozen=True)
class _Place:
    """Where the array of one slide lies."""

    file: str
    row_group: int
    nbytes: int
    digest: str
    source: str


Places = dict[Derivation, dict[str, _Place]]


def find_derived(root: Path, derivations: Iterable[Derivation], encoder: str, slide_ids: Iterable[str]) -> Places:
    """Where derived arrays are, by derivation and slide; those that were not derived are left out."""
    wanted, some_slides = set(slide_ids), list(dict.fromkeys(slide_ids))
    if len(some_slides) > 1000:
        some_slides = []
    named = {derivation.name: derivation for derivation in derivations}
    query = (
        f"SELECT derivation, slide_id, file, row_group, bytes, digest, source FROM ({derived_now()}) "
        "WHERE encoder = ? AND list_contains(?, derivation) AND (? OR list_contains(?, slide_id))"
    )
    with connect(root) as connection:
        if not has_table(connection, "derived"):
            rows = []
        else:
            rows = connection.execute(query, [encoder, list(named), not some_slides, some_slides]).fetchall()
    found: Places = {derivation: {} for derivation in named.values()}
    for name, slide_id, *place in rows:
        if slide_id in wanted:
            found[named[name]][slide_id] = _Place(*place)
    return found


def find_underived(
    root: Path, derivations: Iterable[Derivation], encoder: str, slide_ids: Sequence[str]
) -> dict[Derivation, list[str]]:
    """Slides of which each derivation is missing, in the given order; derivations that miss none are left out."""
    found = find_derived(root, derivations, encoder, slide_ids)
    missing = {
        derivation: [slide_id for slide_id in dict.fromkeys(slide_ids) if slide_id not in held]
        for derivation, held in found.items()
    }
    return {derivation: slides for derivation, slides in missing.items() if slides}


def command(root: Path, encoder: str, derivations: Iterable[Derivation]) -> str:
    """The command that computes derivations of an encoder's bags."""
    names = " ".join(derivation.name for derivation in sorted(derivations))
    return f"cfstore derive {names} --encoder {shlex.quote(encoder)} --store {shlex.quote(str(root))}"


class DerivedReader:
    """Reads what was derived of slides of one encoder. Safe to use from several threads.

    Parameters
    ----------
    root
        The store.
    derivations
        What to read of each slide.
    encoder
        Of the bags.
    slide_ids
        The slides that will be asked for.

    Raises
    ------
    NotDerivedError
        Something is missing; the message names a slide, the derivation, and the command that computes it.
    """

    def __init__(self, root: Path, derivations: Iterable[Derivation], encoder: str, slide_ids: Sequence[str]) -> None:
        self._root, self._encoder = root, encoder
        self._derivations = tuple(sorted(set(derivations)))
        self._places = find_derived(root, self._derivations, encoder, slide_ids)
        self._slides = frozenset(slide_ids)
        self._footers: dict[str, pq.FileMetaData] = {}
        self._sizes: dict[str, int] = {}
        remote = remote_of(root)
        self._remote = RemoteParts(remote) if remote else None
        self._lock = threading.Lock()
        self._check_complete()

    def _check_complete(self) -> None:
        missing = {
            derivation: sorted(self._slides - set(held))
            for derivation, held in self._places.items()
            if self._slides - set(held)
        }
        if missing:
            derivation, slides = next(iter(missing.items()))
            message = (
                f"slide {slides[0]}: {derivation.name} of encoder {self._encoder} has not been derived"
                f"{f' ({len(slides)} such slides)' if len(slides) > 1 else ''}; "
                f"run `{command(self._root, self._encoder, missing)}`"
            )
            raise NotDerivedError(message)

    def nbytes(self, slide_id: str) -> int:
        """Bytes of all arrays that `read` gives for a slide."""
        self._check_known(slide_id)
        return sum(held[slide_id].nbytes for held in self._places.values())

    def read(self, slide_id: str) -> dict[Derivation, NDArray[Any]]:
        """The arrays of one slide: nearest and similar int32 [N, k], parents int32 [N], mean float32 [D].

        Rows are those of the bag as it was when the reader was made, as with a `SlideReader`; -1 stands for none.

        Raises
        ------
        SlideNotFoundError
            The reader was made for other slides.
        NotDerivedError
            The arrays are gone: deleted, or the slide was ingested with other values since; the message says which.
        StoreFormatError
            A file is not what was written.
        """
        self._check_known(slide_id)
        return {derivation: self._read(derivation, slide_id) for derivation in self._derivations}

    def _check_known(self, slide_id: str) -> None:
        if slide_id not in self._slides:
            others = some(sorted(self._slides))
            raise SlideNotFoundError(f"slide {slide_id!r}: this reader was made for other slides: {others or 'none'}")

    def _read(self, derivation: Derivation, slide_id: str) -> NDArray[Any]:
        place = self._places[derivation][slide_id]
        path = self._root / place.file
        try:
            return self._values(derivation, path, place, slide_id)
        except FileNotFoundError as error:  # a copy of it may be elsewhere
            if self._remote:
                try:
                    with self._lock:
                        self._root = refreshed(self._root)
                except StoreError as failed:
                    raise type(failed)(f"slide {slide_id}: {error}; looking where it is now: {failed}") from error
            found = find_derived(self._root, [derivation], self._encoder, [slide_id])[derivation].get(slide_id)
            if found is not None and found.source != place.source:
                message = (
                    f"slide {slide_id} was ingested with other values since this reader was made; "
                    "start again with a new one"
                )
                raise NotDerivedError(message) from error
            if found is None or found == place:
                message = (
                    f"slide {slide_id}: {path} is gone with {derivation.name}; "
                    f"run `{command(self._root, self._encoder, [derivation])}`"
                )
                raise NotDerivedError(message) from error
            with self._lock:
                self._places[derivation][slide_id] = found
            return self._read(derivation, slide_id)

    def _values(self, derivation: Derivation, path: Path, place: _Place, slide_id: str) -> NDArray[Any]:
        """The array of a place, as it was written; what is something else is fetched from a server once more."""
        try:
            try:
                return self._checked(derivation, path, place, slide_id, afresh=False)
            except StoreFormatError:
                if self._remote is None:
                    raise
                self._footers.pop(place.file, None)
                return self._checked(derivation, path, place, slide_id, afresh=True)
        except StoreFormatError as error:
            raise StoreFormatError(f"slide {slide_id}: {error}") from error

    def _checked(
        self, derivation: Derivation, path: Path, place: _Place, slide_id: str, *, afresh: bool
    ) -> NDArray[Any]:
        with self._opened(path, place, slide_id, afresh=afresh) as opened:
            self._footers.setdefault(place.file, opened.metadata)  # parsed once
            values = derived_files.read_values(path, opened, derivation, place.row_group)
        if derived_files.digest_of(values) != place.digest:
            raise derived_files.damaged(path, "not what was written")
        return values

    def _opened(self, path: Path, place: _Place, slide_id: str, *, afresh: bool) -> pq.ParquetFile:
        """The file of a place; FileNotFoundError where it is gone. `afresh`: not from a cache."""
        footer = self._footers.get(place.file)
        if self._remote is None:
            return derived_files.open_file(path, footer)
        remote = self._remote

        def fetch(start: int, stop: int) -> memoryview:
            return remote.fetch(place.file, start, stop, (self._encoder, slide_id), afresh=afresh)

        try:
            if footer is None:
                with self._lock:
                    self._sizes[place.file] = remote.size(place.file)
                footer = read_footer(self._sizes[place.file], fetch)
                self._footers[place.file] = footer
            return open_row_group(self._sizes[place.file], fetch, footer, place.row_group)
        except RemoteError as error:
            raise type(error)(f"slide {slide_id}: {error}") from error
        except DamagedShardError as error:
            raise FileNotFoundError(str(error)) from error
        except (ValueError, IndexError, pa.ArrowException) as error:
            raise derived_files.damaged(path, error) from error
