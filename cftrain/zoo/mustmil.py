"""MuSTMIL: options and facts."""

from __future__ import annotations

from dataclasses import dataclass

from cftrain.zoo.extras import Extra
from cftrain.zoo.options import ModelInfo, Options, check_choice, check_positive
from cftrain.zoo.pyramid import SCALES, ancestors


@dataclass(frozen=True)
class MuSTMILConfig(Options):
    """Options of MuSTMIL; widths are those of its authors' code."""

    scales: str = "5,10,20"
    """The two or three scales that it looks at, coarsest first, of 5, 10 and 20; the authors' are 5,10."""
    embed_dim: int = 128
    """Width of an embedded patch."""
    attention_dim: int = 64
    """Width inside every attention."""

    def __post_init__(self) -> None:
        check_choice(self, "scales", SCALES)
        check_positive(self, "embed_dim", "attention_dim", "n_bins")

    def extras(self) -> tuple[Extra, ...]:
        """The ancestors of the finest patches at each coarser scale."""
        return ancestors(self.scales)


_OWN = (
    "Weight of a {} patch in the means of its own scale, mean over the time bins; a coarse patch counts once for every "
    "patch of the finest scale in it."
)

MUSTMIL = ModelInfo(
    name="mustmil",
    scales=(5, 10, 20),
    reference="Marini et al. 2021, PMLR 156:170-181 (MICCAI COMPAY); ilmaro8/MuSTMIL",
    summary="Three scales; an attention for each, and one over 20x patches with their 10x and 5x ancestors.",
    options=MuSTMILConfig,
    maps={
        "joint": "Weight of a patch of the finest scale, with its ancestors, in the means that represent the slide, "
        "mean over the time bins.",
        "own-5x": _OWN.format("5x"),
        "own-10x": _OWN.format("10x"),
        "own-20x": _OWN.format("20x"),
    },
)
