"""What models read of slides besides features: kept in the store, read slide by slide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfstore import Derivation, SlideBags, Store
from cftrain.errors import MissingExtraError
from cftrain.zoo import Extra

_COORD_BYTES = 8
_ROW_BYTES = 4
_KEPT_NEIGHBOURS = 8
"""As `cfstore derive` keeps them; the first k of 8 are the k nearest."""


def derivation_of(extra: Extra) -> Derivation | None:
    """What the store keeps for an extra; None for coordinates, which lie beside the features."""
    if extra.kind == "nearest":
        return Derivation.nearest(extra.scale, max(extra.k, _KEPT_NEIGHBOURS))
    if extra.kind == "similar":
        return Derivation.similar(extra.scale, max(extra.k, _KEPT_NEIGHBOURS))
    if extra.kind == "parents":
        return Derivation.parents(extra.scale, extra.coarse)
    if extra.kind == "mean":
        return Derivation.mean(extra.scale)
    return None


def extra_bytes(extras: Sequence[Extra], n_patches: Mapping[int, int]) -> int:
    """Bytes of the extras of one slide, as read."""
    sizes = {"coords": _COORD_BYTES, "parents": _ROW_BYTES, "mean": 0}
    return sum(n_patches[extra.scale] * sizes.get(extra.kind, extra.k * _ROW_BYTES) for extra in extras)


def derive_missing(
    store: Store, encoder: str, extras: Sequence[Extra], slide_ids: Sequence[str], progress: Callable[[int, int], None]
) -> None:
    """Let the store derive what these slides lack of it; nothing is done twice.

    Parameters
    ----------
    progress
        Called with what is done and what there is to do.

    Raises
    ------
    StoreError
        The store cannot be written; it says what to do.
    """
    wanted = _derivations(extras)
    missing = store.underived(wanted, encoder, slide_ids) if wanted else {}
    if missing:
        ids = sorted({slide_id for own in missing.values() for slide_id in own})
        store.derive(sorted(missing), encoder=encoder, slide_ids=ids, progress=progress)


def _derivations(extras: Sequence[Extra]) -> list[Derivation]:
    return sorted({found for extra in extras if (found := derivation_of(extra)) is not None})


class ExtraReader:
    """Reads the extras of slides. Safe to use from several threads.

    Parameters
    ----------
    extras
        Which; none: nothing is opened.
    """

    def __init__(self, store: Store, encoder: str, extras: Sequence[Extra], slide_ids: Sequence[str]) -> None:
        self._extras = tuple(extras)
        derivations = _derivations(extras)
        self._derived = store.derived(derivations, encoder, slide_ids) if derivations else None

    @property
    def with_coords(self) -> bool:
        """Whether slides must be read with their coordinates."""
        return any(extra.kind == "coords" for extra in self._extras)

    def read(self, slide: SlideBags) -> dict[Extra, NDArray[Any]]:
        """The extras of a slide that was read, rows counted within it.

        Raises
        ------
        MissingExtraError
            A bag has no coordinates.
        StoreError
            Something was not derived, or cannot be read.
        """
        held = self._derived.read(slide.slide_id) if self._derived else {}
        return {extra: self._one(extra, slide, held) for extra in self._extras}

    def _one(self, extra: Extra, slide: SlideBags, held: Mapping[Derivation, NDArray[Any]]) -> NDArray[Any]:
        derivation = derivation_of(extra)
        if derivation is None:
            coords = slide.bags[extra.scale].coords
            if coords is None:
                raise MissingExtraError(f"{slide.slide_id}: no {extra.label}; its source file gave none")
            return coords
        rows = held[derivation]
        # torch shares memory with arrays that may be written to
        return np.require(rows[:, : extra.k] if rows.ndim == 2 else rows, requirements=["C", "W"])
