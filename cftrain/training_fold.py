"""The training examples of one fold, as a model's `fit` sees them: nothing of the validated ones can come in."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfstore import Derivation
from cftrain.data import RunData
from cftrain.examples import Example
from cftrain.folds import FoldExamples
from cftrain.survival import TimeBins


class FoldData:
    """See `cftrain.models.TrainingFold`.

    Parameters
    ----------
    bins
        The fold's time bins.
    """

    def __init__(self, data: RunData, fold: FoldExamples, bins: TimeBins) -> None:
        self._data, self._train, self._bins = data, fold.train, bins

    @property
    def time_months(self) -> NDArray[np.float64]:
        return np.array([example.time_months for example in self._train])

    @property
    def event(self) -> NDArray[np.bool_]:
        return np.array([example.event for example in self._train])

    @property
    def edges(self) -> tuple[float, ...]:
        return self._bins.edges

    def prototypes(self, scale: int, n: int) -> Tensor:
        slide_ids = [slide_id for example in self._train for slide_id in example.slide_ids]
        return torch.from_numpy(self._data.store.prototypes(self._data.cohort.encoder, scale, slide_ids, n))

    def means(self, scale: int) -> Tensor:
        slide_ids = [slide_id for example in self._train for slide_id in example.slide_ids]
        kept = Derivation.mean(scale)
        reader = self._data.store.derived([kept], self._data.cohort.encoder, slide_ids)
        patches = {slide.slide_id: slide.n_patches[scale] for slide in self._data.cohort.slides}

        def mean_of(example: Example) -> NDArray[np.float32]:
            own = np.stack([reader.read(slide_id)[kept] for slide_id in example.slide_ids])
            counts = [patches[slide_id] for slide_id in example.slide_ids]
            return np.average(own, axis=0, weights=counts).astype(np.float32)

        return torch.from_numpy(np.stack([mean_of(example) for example in self._train]))
