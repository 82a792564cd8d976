"""Small figures of all folds on one scale: loss and C-index over epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cftrain.report.figures import Line, Marks, epochs_figure
from cftrain.report.reading import Results, Row
from cftrain.report.svg import padded
from cftrain.report.wording import number


def loss_figures(results: Results) -> list[str]:
    """Training and validation loss over epochs, a figure per fold."""
    lines = {
        fold: [
            Line("validation", "high", _column(rows, "val_loss")),
            Line("training", "plain", _column(rows, "train_loss")),
        ]
        for fold, rows in results.epochs.items()
    }
    marks = {fold["fold"]: Marks(fold["epochs"]) for fold in results.summary["folds"]}
    return _panels("loss", lines, marks)


def score_figures(results: Results) -> list[str]:
    """C-index on the validation fold over epochs, a figure per fold."""
    lines = {
        fold: [
            Line("per slide", "low", _column(rows, "c_index")),
            Line("per patient", "second", _column(rows, "c_index_patient")),
        ]
        for fold, rows in results.epochs.items()
    }
    marks = {
        fold["fold"]: Marks(fold["epochs"], best=fold["best_epoch"], chance=0.5) for fold in results.summary["folds"]
    }
    return _panels("c-index", lines, marks)


def _panels(name: str, lines: Mapping[int, Sequence[Line]], marks: Mapping[int, Marks]) -> list[str]:
    """One panel per fold, all on the same vertical scale, chance within it."""
    values = [value for each in lines.values() for line in each for value in line.values if math.isfinite(value)]
    values += [each.chance for each in marks.values() if each.chance is not None]
    y_range = padded(min(values, default=0.0), max(values, default=1.0))
    return [epochs_figure(f"{name}-{fold}", f"Fold {fold}", lines[fold], y_range, marks[fold]) for fold in lines]


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [number(row[name]) for row in rows]
