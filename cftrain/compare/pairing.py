"""One model tested against others on the same resamples of the same patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cftrain.compare.reading import Run
from cftrain.survival.resampling import (
    PairedBootstrap,
    bootstrap_weights,
    mean_of_defined,
    paired_test,
    weighted_c_index,
)

Floats = NDArray[np.float64]


def against(
    best: Sequence[Run], models: Mapping[str, Sequence[Run]], replicates: int, seed: int
) -> dict[str, PairedBootstrap | str]:
    """Every other model minus `best`, all of one cohort: a paired bootstrap, or why there can be none.

    Patients are drawn from the whole cohort, so that seeds with folds of their own are resampled together. On each
    draw, a model's number is the mean over its runs of the mean over folds of the C-index per patient.

    Parameters
    ----------
    best
        The runs, one per seed, of the model to test against.
    models
        The runs of all models by name; those of `best` are passed over.
    replicates, seed
        Resamples, and the seed of their draws.
    """
    order = {patient: i for i, patient in enumerate(sorted(best[0].labels))}
    as_they_are = np.ones((1, len(order)))
    weights = np.concatenate([as_they_are, bootstrap_weights(len(order), replicates, seed)])
    found: dict[str, PairedBootstrap | str] = {}
    top: Floats | None = None
    for name, runs in models.items():
        if runs is best:
            continue
        reason = _apart(best, runs)
        if reason:
            found[name] = reason
            continue
        top = _resampled(best, order, weights) if top is None else top
        less = _resampled(runs, order, weights) - top
        found[name] = paired_test(float(less[0]), less[1:])
    return found


def _apart(a: Sequence[Run], b: Sequence[Run]) -> str:
    """Why the runs of two models cannot be paired; nothing if they can."""
    people = [run.labels for run in (*a, *b)]
    if any(labels.keys() != people[0].keys() for labels in people):
        counts = ", ".join(str(n) for n in sorted({len(labels) for labels in people}))
        return f"their runs are not all on the same patients ({counts})"
    if any(labels != people[0] for labels in people):
        return "their runs do not agree on the follow-up of every patient"
    if {run.partition for run in a} != {run.partition for run in b}:
        return "their runs are on different folds"
    return ""


def _resampled(runs: Sequence[Run], order: dict[str, int], weights: Floats) -> Floats:
    """Mean over runs of the mean over folds of the C-index per patient, for every row of weights."""
    per_run = []
    for run in runs:
        folds = []
        for fold in run.patients.values():
            own = weights[:, [order[patient] for patient in fold.patient_id.tolist()]]
            folds.append(weighted_c_index(fold.time_months, fold.event, fold.risk[None], own)[0])
        per_run.append(mean_of_defined(np.stack(folds)))
    return np.asarray(np.mean(per_run, axis=0))
