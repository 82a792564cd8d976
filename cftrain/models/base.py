"""`SurvivalModel`: what all models share. B slides, N patches, D features, K time bins."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from cftrain.errors import MissingExtraError, MissingScaleError, ShapeError
from cftrain.models.bags import BagBatch
from cftrain.models.fitting import TrainingFold
from cftrain.models.output import SurvivalOutput
from cftrain.models.patch_maps import PatchMap
from cftrain.zoo import Extra, Options


class SurvivalModel(nn.Module):
    """A model from packed bags to discrete-time survival."""

    name: str
    """What `build` calls it."""
    scales: tuple[int, ...]
    """The scales it reads from a batch; others may be there."""
    feature_dim: int
    """D, the width of the features it was built for."""
    options: Options
    """What it was built with; `build(name, feature_dim, **asdict(options))` builds its like."""

    def __init__(self, name: str, scales: tuple[int, ...], feature_dim: int, options: Options) -> None:
        super().__init__()
        self.name, self.scales, self.feature_dim, self.options = name, scales, feature_dim, options

    def forward(self, batch: BagBatch) -> SurvivalOutput:
        """Predict the survival of B slides.

        Parameters
        ----------
        batch
            Bags at least at `scales`, on the device of the parameters, of any floating dtype.

        Raises
        ------
        MissingScaleError
            The batch lacks one of `scales`; names its first slide.
        ShapeError
            The features are not D wide.
        """
        return SurvivalOutput.from_logits(self.logits(batch))

    @abstractmethod
    def logits(self, batch: BagBatch) -> Tensor:
        """Log-odds of the hazards of B slides: [B, K]."""

    def fit(self, fold: TrainingFold) -> None:
        """Take what no optimiser step teaches from the training examples, into buffers; once, before the first step.

        Buffers are kept with the weights, so that predictions need no training data.
        """

    def training_logits(self, batch: BagBatch) -> tuple[tuple[float, Tensor], ...]:
        """What training looks at: weights, and log-odds of the hazards [B, K]; their weighted losses are summed up.

        The first are those of `logits`, which validation and prediction look at alone. A model with more, such as the
        logits of a stream or a scale of its own, gives them all of one forward pass, as many and with the same
        weights for every batch.
        """
        return ((1.0, self.logits(batch)),)

    @abstractmethod
    def logits_and_maps(self, batch: BagBatch) -> tuple[Tensor, dict[str, PatchMap]]:
        """Logits [B, K] of B slides in evaluation mode, and how much attention each patch receives.

        The maps are exact, in memory for the patches alone.

        A model returns the maps that `cftrain.zoo.MODELS[name].maps` lists, no others and in that order, without those
        of scales that its options leave out, all of one forward pass `with self.evaluating(), torch.no_grad()`: the
        same in training and evaluation. Every patch of a map's scale has one score, from 0 to 1, or slightly below 0
        where the model's own attention is an approximation and the map's entry says so; keys that stand for a patch
        besides its own, such as padding, count for it (`patch_maps.on_patches`); what keys that stand for no patch
        receive is `elsewhere`. No table of queries and keys is made (`attention_maps`).

        Parameters
        ----------
        batch
            As for `forward`.

        Raises
        ------
        MissingScaleError
            The batch lacks one of `scales`; names its first slide.
        ShapeError
            The features are not D wide.
        """

    def patch_maps(self, batch: BagBatch) -> dict[str, PatchMap]:
        """The maps of `logits_and_maps`."""
        return self.logits_and_maps(batch)[1]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode in the block; afterwards every layer is in the mode it was in."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self._numbers()).device

    def rows(self, batch: BagBatch, scale: int) -> Tensor:
        """The packed features of one scale, [sum N_b, D], in the dtype the model computes in."""
        if scale not in batch.features:
            found = ", ".join(f"{scale}x" for scale in batch.features)
            raise MissingScaleError(f"{batch.slide_ids[0]}: {self.name} needs {scale}x, the batch has {found}")
        rows = batch.features[scale]
        if rows.shape[1] != self.feature_dim:
            widths = f"{rows.shape[1]} features a patch at {scale}x"
            raise ShapeError(f"{batch.slide_ids[0]}: {widths}, {self.name} was built for {self.feature_dim}")
        return rows.to(self._compute_dtype(rows.device.type))

    def extra(self, batch: BagBatch, extra: Extra) -> Tensor:
        """One of `options.extras()` of a batch: rows of the packed batch int64 (-1: none), coordinates int32.

        Raises
        ------
        MissingExtraError
            The batch lacks it; names its first slide.
        """
        if extra not in batch.extras:
            raise MissingExtraError(f"{batch.slide_ids[0]}: {self.name} needs {extra.label}, which the batch lacks")
        return batch.extras[extra]

    def _compute_dtype(self, device_type: str) -> torch.dtype:
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return next(self._numbers()).dtype

    def _numbers(self) -> Iterator[Tensor]:
        return chain(self.parameters(), self.buffers())
