"""What a model may look at before its first step: the training examples of its fold, and no others."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class TrainingFold(Protocol):
    """The training examples of one fold: B of them, with their labels. Nothing of the validated ones is in here."""

    @property
    def time_months(self) -> NDArray[np.float64]:
        """Follow-up: [B]."""

    @property
    def event(self) -> NDArray[np.bool_]:
        """True where death was observed: [B]."""

    @property
    def edges(self) -> tuple[float, ...]:
        """Interior edges of the time bins in months, one fewer than bins."""

    def prototypes(self, scale: int, n: int) -> Tensor:
        """Centres of n k-means clusters of the fold's training patches: [n, D] float32."""

    def means(self, scale: int) -> Tensor:
        """The mean patch of each example: [B, D] float32."""
