"""What can be derived from the bags of a slide, and how each of it is called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

from cfstore.errors import DerivationError
from cfstore.types import SCALES

Kind = Literal["nearest", "similar", "parents", "mean"]

VERSIONS: Final[dict[Kind, int]] = {"nearest": 1, "similar": 2, "parents": 2, "mean": 1}
"""Of the algorithms: raised where one gives other values than before, so that all of its kind is computed anew."""
MOST_NEIGHBOURS: Final = 1000
_FORMS: Final = "nearest8-20x, similar8-20x, parents-20x-10x, mean-20x (any scale and number of neighbours)"
_NAME: Final = re.compile(
    r"^(?:(?P<listed>nearest|similar)(?P<k>\d{1,9})|(?P<plain>mean|parents))-(?P<scale>\d{1,3})x(?:-(?P<coarse>\d{1,3})x)?$"
)


@dataclass(frozen=True, order=True)
class Derivation:
    """What can be derived from the bags of a slide.

    Parameters
    ----------
    kind
        nearest: the nearest other patches by place; similar: by features; parents: the patch of a
        coarser scale that each lies in; mean: the mean of the features.
    scale
        Whose patches get a row each (the finer one of parents).
    coarse
        Scale of the parents; 0 for the other kinds.
    k
        Neighbours of nearest and similar; 0 for the other kinds, whatever is given.

    Raises
    ------
    DerivationError
        There is no such derivation.
    """

    kind: Kind
    scale: int
    coarse: int = 0
    k: int = 8

    def __post_init__(self) -> None:
        if self.kind in ("parents", "mean"):
            object.__setattr__(self, "k", 0)
        elif not 1 <= self.k <= MOST_NEIGHBOURS:
            raise _unknown(self.name, f"{self.k} neighbours; from 1 to {MOST_NEIGHBOURS} can be asked for")
        if self.kind not in VERSIONS:
            raise _unknown(str(self.kind), "no such kind")
        scales = (self.scale, self.coarse) if self.kind == "parents" else (self.scale,)
        odd = [scale for scale in scales if scale not in SCALES]
        if odd or (self.kind != "parents" and self.coarse):
            raise _unknown(self.name, f"scales are {', '.join(f'{scale}x' for scale in SCALES)}, two for parents alone")
        if self.coarse >= self.scale:
            raise _unknown(self.name, "the finer scale comes first")

    @classmethod
    def nearest(cls, scale: int, k: int = 8) -> Derivation:
        """The `k` other patches whose places are nearest: int32 [N, k]."""
        return cls("nearest", scale, k=k)

    @classmethod
    def similar(cls, scale: int, k: int = 8) -> Derivation:
        """The `k` other patches whose features are nearest: int32 [N, k]."""
        return cls("similar", scale, k=k)

    @classmethod
    def parents(cls, fine: int, coarse: int) -> Derivation:
        """For each patch of `fine` the one of `coarse` that it lies in: int32 [N]."""
        return cls("parents", fine, coarse)

    @classmethod
    def mean(cls, scale: int) -> Derivation:
        """The mean of the bag's features: float32 [D]."""
        return cls("mean", scale)

    @property
    def name(self) -> str:
        """As on the command line, in SQL and on disk: "nearest8-20x", "parents-20x-10x"."""
        number = str(self.k) if self.kind in ("nearest", "similar") else ""
        coarse = f"-{self.coarse}x" if self.coarse else ""
        return f"{self.kind}{number}-{self.scale}x{coarse}"

    @classmethod
    def parse(cls, name: str) -> Derivation:
        """What `name` stands for.

        Raises
        ------
        DerivationError
            It names no derivation; the message lists the forms.
        """
        found = _NAME.match(name)
        if not found:
            raise _unknown(name, "not understood")
        kind: Any = found["listed"] or found["plain"]
        coarse = int(found["coarse"] or 0)
        if kind == "parents" and not coarse:
            raise _unknown(name, "parents need two scales")
        return cls(kind, int(found["scale"]), coarse, int(found["k"] or 0))

    @property
    def scales(self) -> tuple[int, ...]:
        """The bags that it is computed from."""
        return (self.scale, self.coarse) if self.coarse else (self.scale,)

    @property
    def version(self) -> int:
        """Of the algorithm, as this code computes it."""
        return VERSIONS[self.kind]


def _unknown(name: str, why: str) -> DerivationError:
    return DerivationError(f"derivation {name!r}: {why}; there are {_FORMS}")
