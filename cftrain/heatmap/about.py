"""What heatmap.json says of a heatmap: plain values, nothing that JSON has not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from cftrain.heatmap.deletion import Deletion
from cftrain.heatmap.layers import FILE_ORDER, Grid
from cftrain.heatmap.places import IN_SOURCE
from cftrain.heatmap.subject import Subject, honesty
from cftrain.prediction.trained import Member, TrainedRun

NORMALISATION: Final = {
    "attention": "colours show the percentile of a patch's score among the slide's patches of its scale",
    "attribution": "colours show the score, 0 in the middle, the ends at the 99th percentile of its size",
}
RISK: Final = "standard deviations from the mean risk of the slides that the fold was validated on; mean over folds"
_EVEN: Final = 1.1
_MISSED: Final = 0.05
CHECK: Final = (
    "the risk without the patches of highest score, the others left in their order, beside the risk without as many "
    "patches chosen at random"
)


def of_subject(trained: TrainedRun, source: str, subject: Subject, members: Sequence[Member]) -> dict[str, Any]:
    """Which slide, by which models of which run."""
    of_run = trained.summary
    return {
        "slide_id": subject.slide_id,
        "patient_id": subject.patient_id,
        "cohort": subject.cohort,
        "time_months": subject.example.time_months,
        "event": None if math.isnan(subject.example.time_months) else subject.example.event,
        "bag": list(subject.example.slide_ids),
        "run": str(trained.path),
        "model": of_run["model"],
        "trained_on": of_run.get("cohort"),
        "source": source,
        "encoder": subject.encoder,
        "weights": trained.rule,
        "folds": [member.fold for member in members],
        "folds_trained_on_patient": sorted(subject.seen_by),
        "digests": {str(member.fold): member.digest for member in members},
        "synthetic": subject.synthetic or bool(of_run.get("synthetic")),
        "synthetic_slide": subject.synthetic,
        "honesty": honesty(members, subject),
    }


def of_risk(trained: TrainedRun, risk: float) -> dict[str, Any]:
    """The risk and its rank among those that the run gave to slides that its models were not trained on."""
    others = np.array([each for own in trained.slides.values() for each in own.values()])
    return {"risk": risk, "risk_unit": RISK, "risk_percentile": float(100 * np.mean(others < risk))}


def of_grids(grids: Mapping[int, Grid]) -> list[dict[str, Any]]:
    """Patches of each scale, and how their places are known."""
    return [
        {
            "scale": grid.scale,
            "n_patches": len(grid),
            "patch_size_level0": None if grid.unit == FILE_ORDER else grid.edge,
            "unit": grid.unit,
            "note": grid.note,
            "parents": grid.parents_note or None,
        }
        for grid in grids.values()
    ]


def of_check(found: Mapping[str, Deletion]) -> list[dict[str, Any]]:
    """The deletion check of each map that has one."""
    return [
        {
            "map": name,
            "n_dropped": each.n_dropped,
            "n_patches": each.n_patches,
            "risk": each.risk,
            "without_top": each.without_top,
            "without_random": list(each.without_random),
            "without_random_mean": float(np.mean(each.without_random)),
            "without_random_sd": float(np.std(each.without_random, ddof=1)) if len(each.without_random) > 1 else None,
            "more_than_random": each.more_than_random,
        }
        for name, each in found.items()
    ]


def place_notes(grids: Mapping[int, Grid]) -> list[str]:
    """Where the places of patches are from, unless the source says all of it; with the scales where these differ."""
    found = []
    for note in dict.fromkeys(grid.note for grid in grids.values() if grid.note != IN_SOURCE):
        of = [f"{scale}x" for scale, grid in grids.items() if grid.note == note]
        found.append(note if len(of) == len(grids) else f"{', '.join(of)}: {note}")
    return found


def notes(
    members: Sequence[Member], subject: Subject, grids: Mapping[int, Grid], facts: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What a reader has to know before believing a map, one sentence each."""
    found = [honesty(members, subject)]
    n_slides = len(subject.example.slide_ids)
    if n_slides > 1:
        found.append(
            f"the model sees all {n_slides} slides of the patient at once; shown are this slide's shares of the whole"
        )
    found += place_notes(grids)
    found += [
        grid.parents_note
        for grid in grids.values()
        if grid.parents_note and not grid.parents_note.startswith("the grids nest: every")
    ]
    flat = [name for name, own in facts.items() if own.get("highest_to_mean", _EVEN) < _EVEN]
    if flat:
        found.append(
            f"{', '.join(flat)}: nearly even, no patch receives {_EVEN:g} times the mean: colours show tiny differences"
        )
    found += [
        f"{name}: its scores miss {100 * own['completeness_gap']:.0f} % of what they should add up to, at all scales"
        for name, own in facts.items()
        if own.get("completeness_gap", 0) > _MISSED
    ]
    found += [
        f"{name}: {100 * own['attention_elsewhere']:.1f} % of its attention is for the class token or padding, no patch"
        for name, own in facts.items()
        if own.get("attention_elsewhere", 0) > 0
    ]
    return found
