"""Finished runs side by side, as a paper's first table: models down, cohorts across, mean ± deviation over folds.

reading.py finds and reads the run directories, table.py sums them up, pairing.py tests the best
model of each cohort against the others, rendering.py writes the table as Markdown, CSV, LaTeX, text or JSON,
page.py as an HTML page.
"""

from __future__ import annotations

from cftrain.compare.page import to_html
from cftrain.compare.reading import METRICS
from cftrain.compare.rendering import to_csv, to_dict, to_latex, to_markdown, to_text
from cftrain.compare.table import Cell, Comparison, Row, compare

__all__ = [
    "METRICS",
    "Cell",
    "Comparison",
    "Row",
    "compare",
    "to_csv",
    "to_dict",
    "to_html",
    "to_latex",
    "to_markdown",
    "to_text",
]
