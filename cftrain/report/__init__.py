"""One page about a finished run: what was measured, on whom, by which rule. `write_report(run)` writes it.

The data go one way: reading.py reads the run directory, groups.py splits patients by risk, figures.py draws, page.py
puts words and numbers into templates/report.html.
"""

from __future__ import annotations

from cftrain.report.page import write_report

__all__ = ["write_report"]
