"""A batch of one slide drawn at random: for whoever counts or times a model without a store."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cftrain.errors import MissingScaleError
from cftrain.models import BagBatch, SurvivalModel, made_up_slide


def drawn_batch(
    model: SurvivalModel,
    patches: Mapping[int, int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> BagBatch:
    """One slide with all that the model reads, features normally distributed; in a `FakeTensorMode`, without data.

    Parameters
    ----------
    model
        What to read: its scales, and the width of its features.
    patches
        Scale to patches of the slide; scales that the model does not read are left out.
    device, dtype
        Of the features.

    Raises
    ------
    MissingScaleError
        The model reads a scale of which there is no patch.
    """
    for scale in model.scales:
        if patches.get(scale, 0) < 1:
            raise MissingScaleError(f"{model.name} needs {scale}x, of which there is no patch")
    sizes = {scale: patches[scale] for scale in model.scales}
    return made_up_slide(sizes, model.feature_dim, model.options.extras(), device=device, dtype=dtype)
