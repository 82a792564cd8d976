"""`Family`: what is known of the state dict of one released model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

State = Mapping[str, Tensor]
Sizes = tuple[int, dict[str, int | str]]
"""The model's feature_dim, and the options that its tensors tell."""


@dataclass(frozen=True)
class Family:
    """How to recognise a released state dict, and where its tensors live in our model."""

    models: tuple[str, ...]
    """Names of our models that it may be."""
    marks: frozenset[str]
    """Keys that are all there in its state dicts, and in no other family's."""
    renamed: tuple[tuple[str, str], ...]
    """Patterns of released names and what to put there, applied one after the other."""
    sizes: Callable[[State, int], Sizes]
    """Of a state dict, given the number of heads where the tensors do not tell it."""
    which: Callable[[State], str] | None = None
    """Which of `models` a state dict is; None where there is one."""
    left_out: tuple[str, ...] = ()
    """What keys begin with that are no part of our model: the network that makes the features, weights never read."""

    def name_of(self, state: State) -> str:
        """Which of `models` it is."""
        return self.which(state) if self.which else self.models[0]
