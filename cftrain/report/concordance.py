"""What a summary says of discrimination and error, as rows for the figures and sentences for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cftrain.report.figures import FoldScores, Interval, MonthScores
from cftrain.report.wording import NOTHING, defined, number, score

Summary = Mapping[str, Any]


def fold_scores(summary: Summary) -> list[FoldScores]:
    """The rows of the overview: the honest rules, the paper's, and what the planted risk reaches."""
    named = [
        ("Last epoch, patient", "low", summary["c_index_patient"]),
        ("Last epoch, slide", "low", summary["c_index"]),
        *(
            [
                ("Nested, patient", "low", summary["c_index_patient_nested"]),
                ("Nested, slide", "low", summary["c_index_nested"]),
            ]
            if "c_index_nested" in summary
            else []
        ),
        ("Best epoch, patient", "plain", summary["c_index_patient_best_epoch"]),
        ("Best epoch, slide", "plain", summary["c_index_best_epoch"]),
    ]
    reference = summary["reference"]
    if reference:
        one = reference["best_single_scale"]
        named += [
            ("Planted risk", "second", reference["oracle"]),
            (f"Planted risk, {one['scale']}x only", "second", one),
        ]
    return [
        FoldScores(label, kind, number(metric["mean"]), number(metric["std"]), [*map(number, metric["folds"])])
        for label, kind, metric in named
    ]


def fold_intervals(assessment: Summary | None) -> list[Interval]:
    """Every fold's C-index per patient with its interval, then their mean with its own."""
    if not assessment:
        return []
    rows = [
        _interval(f"Fold {fold['fold']}", fold["c_index"]["value"], fold["c_index"]) for fold in assessment["folds"]
    ]
    mean = assessment["c_index"]
    return [*rows, _interval("Mean", mean["mean"], mean, strong=True)]


def _interval(label: str, value: float | None, entry: Summary, *, strong: bool = False) -> Interval:
    return Interval(label, number(value), number(entry["lower"]), number(entry["upper"]), strong)


def month_scores(assessment: Summary | None) -> list[MonthScores]:
    """AUC over folds at each month that they support."""
    return [
        MonthScores(row["time_months"], number(row["mean"]), number(row["std"]), [*map(number, row["folds"])])
        for row in (assessment["auc"] if assessment else [])
    ]


def fewest(assessment: Summary) -> dict[float, str]:
    """By month, the smallest numbers of dead and living patients that an AUC of a fold compares."""
    entries = [entry for fold in assessment["folds"] for entry in fold["auc"] if defined(entry["value"])]
    found = {}
    for month in (row["time_months"] for row in assessment["auc"]):
        own = [entry for entry in entries if entry["time_months"] == month]
        sides = [[entry[side] for entry in own if side in entry] for side in ("n_dead", "n_alive")]
        found[month] = " / ".join(str(min(side)) if side else NOTHING for side in sides)
    return found


def brier_sentence(assessment: Summary) -> str:
    """The integrated Brier score beside that of a curve that knows nothing of the patient."""
    model, reference = assessment["ibs"]["mean"], assessment["ibs"]["kaplan_meier"]
    if not (defined(model) and defined(reference)):
        return "There is no Brier score: it needs predicted probabilities and follow-up that reaches them."
    verdict = "better than" if model < reference else "no better than"
    return (
        f"Integrated Brier score (0 is perfect): {score(model)}, {verdict} the {score(reference)} of the training "
        "patients' Kaplan–Meier curve, which treats all patients alike."  # noqa: RUF001
    )


def notes_of(assessment: Summary) -> list[tuple[str, str]]:
    """Every fold's notes and those of all folds, as (whose, notes) without the empty ones."""
    named = [("All folds", assessment["notes"])]
    named += [(f"Fold {fold['fold']}", fold["notes"]) for fold in assessment["folds"]]
    return [(whose, "; ".join(notes)) for whose, notes in named if notes]
