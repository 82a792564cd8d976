"""One page about a finished run: what was measured, on whom, by which rule. `write_report(run)` writes it.

The data go one way: reading.py reads the run directory; groups.py, concordance.py, calibrated.py, hazards.py, cost.py
and panels.py make rows and sentences of it; figures/ draws; wording.py prints numbers; page.py puts all of it into
templates/report.html and the templates/report_*.html that it includes.
"""

from __future__ import annotations

from cftrain.report.page import write_report

__all__ = ["write_report"]
