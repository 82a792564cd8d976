"""How long a training step would take, by taking one on numbers drawn at random."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from cftrain.drawn import drawn_batch
from cftrain.models import BagBatch, SurvivalModel


def seconds_per_patch(
    model: SurvivalModel, patches: Mapping[int, int], device: torch.device, budget_seconds: float = 2.0
) -> float:
    """Seconds of forward and backward for each patch of one slide: the fastest of the repeats that fit a budget.

    Reading, copying to the device and the optimiser are not in it. Attention takes time for pairs of patches, so give
    a slide of the size that is meant, such as the cohort's mean. The first repeat also loads and compiles, and counts
    only where it took the whole budget. The model's weights, gradients and mode, and the state of the random
    generators, are afterwards what they were.

    Parameters
    ----------
    model
        On `device`.
    patches
        Scale to patches of the slide, at least at the model's scales; only those count.
    device
        CUDA computes under autocast to bfloat16, as training does.
    budget_seconds
        No repeat begins after so many; there is always one.

    Raises
    ------
    MissingScaleError
        The model reads a scale of which there is no patch.
    """
    before, training = {name: p.grad for name, p in model.named_parameters()}, model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        batch = drawn_batch(model, patches, device=device)
        model.train()
        try:
            taken = _repeats(model, batch, device, budget_seconds)
        finally:
            model.train(training)
            for name, parameter in model.named_parameters():
                parameter.grad = before[name]
    return min(taken[1:] or taken) / sum(patches[scale] for scale in model.scales)


def _repeats(model: SurvivalModel, batch: BagBatch, device: torch.device, budget_seconds: float) -> list[float]:
    taken: list[float] = []
    started = time.perf_counter()
    while not taken or time.perf_counter() - started < budget_seconds:
        begun = time.perf_counter()
        model.zero_grad(set_to_none=True)
        with _autocast(device):
            parts = model.training_logits(batch)
        torch.autograd.backward([logits.sum() for _, logits in parts if logits.requires_grad])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return taken


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
