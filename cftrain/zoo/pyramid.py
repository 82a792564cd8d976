"""Options of models that read rows of a pyramid: patches of the finest scale with the coarser patches around them."""

from __future__ import annotations

from cftrain.zoo.extras import Extra, parents

SCALES = ("5,10,20", "10,20", "5,20", "5,10")
"""What the option `scales` of such a model may be."""


def scales_of(option: str) -> tuple[int, ...]:
    """The scales that one of `SCALES` names, coarsest first."""
    return tuple(int(each) for each in option.split(","))


def ancestors(option: str) -> tuple[Extra, ...]:
    """The parents at each coarser scale of the patches of the finest, finer parents first."""
    *coarser, finest = scales_of(option)
    return tuple(parents(finest, coarse) for coarse in reversed(coarser))
