"""The figures of a report, each a string of SVG."""

from __future__ import annotations

from cftrain.report.figures.calibration import CurvePoint, calibration_figure, deciles_figure
from cftrain.report.figures.concordance import FoldScores, Interval, overview_figure
from cftrain.report.figures.forest import HazardBar, HazardRow, forest_figure
from cftrain.report.figures.over_time import MonthScores, over_time_figure
from cftrain.report.figures.risks import risk_figure
from cftrain.report.figures.survival import kaplan_meier_figure, month_ticks
from cftrain.report.figures.training import Line, Marks, epochs_figure

__all__ = [
    "CurvePoint",
    "FoldScores",
    "HazardBar",
    "HazardRow",
    "Interval",
    "Line",
    "Marks",
    "MonthScores",
    "calibration_figure",
    "deciles_figure",
    "epochs_figure",
    "forest_figure",
    "kaplan_meier_figure",
    "month_ticks",
    "over_time_figure",
    "overview_figure",
    "risk_figure",
]
