"""What the memory that is free allows: whether the largest slide can be trained on, and how many patches in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from cftrain.cache import size_text
from cftrain.errors import ConfigError
from cftrain.footprint import blueprint, training_footprint

BATCH_SHARE: Final = 0.8
"""Of the free memory, for a batch of several slides; the rest is for batches of other proportions of scales."""
MOST_PATCHES: Final = {"cpu": 8192, "cuda": 65536}
"""In one batch, however much memory there is."""
_FEW, _MANY = 4096, 16384
"""Patches of a scale between which the bytes per patch are measured; squares, so that no padding is counted."""


@dataclass(frozen=True)
class StepCost:
    """Bytes of a training step as a line in the patches of each scale: within 2 % of the count.

    Which moment is the worst may change with the patches. Of TransMIL and ZoomMIL the line is within 9 %, too few for
    the largest slides; of CS-MIL and MuSTMIL within 7 %, 5 MB too few for slides of a few patches.
    """

    model_name: str
    device_type: str
    fixed: int
    """Bytes without any patch."""
    per_patch: Mapping[int, float]
    """Scale to bytes for each of its patches; the model's scales only."""

    def nbytes(self, patches: Mapping[int, float]) -> int:
        """Bytes of a step on so many patches of each scale, of one slide or of several together."""
        return self.fixed + round(sum(cost * patches.get(scale, 0) for scale, cost in self.per_patch.items()))


def training_cost(
    model_name: str,
    options: Mapping[str, object],
    feature_dim: int,
    *,
    device_type: str,
    dtype: torch.dtype = torch.float32,
) -> StepCost:
    """Bytes of training steps on any slides, from one count more than the model has scales.

    Parameters and errors are those of `training_footprint`. Ask once in a run: it takes a second for each scale.
    """
    scales = blueprint(model_name, options, feature_dim).scales

    def total(patches: Mapping[int, int]) -> int:
        return training_footprint(model_name, options, feature_dim, patches, device_type=device_type, dtype=dtype).total

    few = dict.fromkeys(scales, _FEW)
    base = total(few)
    per_patch = {scale: (total(few | {scale: _MANY}) - base) / (_MANY - _FEW) for scale in scales}
    return StepCost(model_name, device_type, base - round(sum(per_patch.values()) * _FEW), per_patch)


def largest_fits(cost: StepCost, slides: Mapping[str, Mapping[int, int]], free: int, others: int = 0) -> str:
    """Find the slide that takes most memory, and make sure that it fits; returns its name.

    Parameters
    ----------
    cost
        Of the run's steps.
    slides
        Slide to patches of each scale; at least one slide.
    free
        Bytes free on the device that computes, before the model is there.
    others
        Bytes that are kept for learners which train together with it; named where it does not fit.

    Raises
    ------
    ConfigError
        It does not fit; names the slide, the bytes needed and free, and what to do.
    """
    largest = max(slides, key=lambda slide_id: cost.nbytes(slides[slide_id]))
    needed = cost.nbytes(slides[largest])
    if needed > free:
        sizes = ", ".join(f"{slides[largest].get(scale, 0):,} at {scale}x" for scale in sorted(cost.per_patch))
        where, larger = ("of GPU memory", "GPU") if cost.device_type == "cuda" else ("of RAM", "machine")
        taken = f" beside {size_text(others)} for the folds, models and seeds that share its reading" if others else ""
        apart = "--no-fuse trains them one after the other, or " if others else ""
        message = (
            f"{largest}: training {cost.model_name} on its patches ({sizes}) needs {size_text(needed)} {where}, "
            f"{size_text(free)} are free{taken}; {apart}train fewer models or seeds at once, choose a narrower model "
            f"(`cftrain models {cost.model_name}` lists widths) or another model, or a larger {larger}"
        )
        raise ConfigError(message)
    return largest


def patch_budget(cost: StepCost, slides: Mapping[str, Mapping[int, int]], free: int) -> int:
    """Patches, all scales of the model together, of the slides that pass through it in one batch.

    Counted at the mean proportions of the slides' scales, from `BATCH_SHARE` of the free memory; 1 to `MOST_PATCHES`.
    A slide of more patches than this goes alone: `largest_fits` says whether it can.

    Parameters
    ----------
    cost, slides, free
        As `largest_fits` takes them.
    """
    totals = {scale: sum(patches.get(scale, 0) for patches in slides.values()) for scale in cost.per_patch}
    every = sum(totals.values())
    mean_cost = sum(cost.per_patch[scale] * total for scale, total in totals.items()) / every
    fitting = int((free * BATCH_SHARE - cost.fixed) / mean_cost)
    return max(1, min(fitting, MOST_PATCHES[cost.device_type]))
