"""A comparison as one HTML page that needs no network and no script."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from cftrain.compare.rendering import legend_of, number_text, p_text, printable, seeds_text
from cftrain.compare.table import Comparison

_PLACES: Final = {1: "best", 2: "second"}


def to_html(comparison: Comparison, reports: Mapping[Path, str] = MappingProxyType({})) -> str:
    """The table with its caption and notes: the best on a tinted ground, the second underlined.

    Parameters
    ----------
    reports
        Where the reports of runs are, relative to the page; the page links to those of its runs.
    """
    environment = Environment(
        loader=PackageLoader("cftrain"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number_text,
        p=p_text,
        seeds=seeds_text,
        place=lambda place: _PLACES.get(place, ""),
        defined_number=lambda value: not math.isnan(value),
    )
    return environment.get_template("compare.html").render(
        comparison=comparison,
        several=len(comparison.cohorts) > 1,
        legend=legend_of(comparison, "in bold", "underlined"),
        reports=[(run.name, quote(reports[run])) for run in comparison.runs if run in reports],
    )
