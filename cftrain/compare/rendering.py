"""A comparison as Markdown, CSV, LaTeX, plain text, or what JSON can hold."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

from cftrain.compare.table import Cell, Comparison, Row

CSV_COLUMNS: Final = (
    "model", "encoder", "preset", "settings", "cohort", "metric", "mean", "std", "n", "n_undefined", "seeds",
    "n_patients", "n_events", "place", "p_value", "difference",
)  # fmt: skip
_LATEX: Final = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$",
}  # fmt: skip

Mark = Callable[[str, int], str]


def to_markdown(comparison: Comparison) -> str:
    """A table in GitHub's Markdown: the best in bold, the second underlined, notes beneath."""

    def mark(number: str, place: int) -> str:
        return {1: f"**{number}**", 2: f"<ins>{number}</ins>"}.get(place, number)

    header, rows = _grid(comparison, mark, _markdown, "±")
    lines = [_pipes(header), _pipes(["---"] * len(header)), *map(_pipes, rows), ""]
    lines += [_markdown(" ".join([*comparison.caption, *legend_of(comparison, "in bold", "underlined")]))]
    lines += ["", *(f"- {_markdown(note)}" for note in comparison.notes)] if comparison.notes else []
    return "\n".join(lines) + "\n"


def to_latex(comparison: Comparison) -> str:
    r"""A LaTeX table for the booktabs package: the best \textbf, the second \underline; notes in the caption."""

    def mark(number: str, place: int) -> str:
        return {1: rf"\textbf{{{number}}}", 2: rf"\underline{{{number}}}"}.get(place, number)

    header, rows = _grid(comparison, mark, _latex, r"$\pm$")
    legend = legend_of(comparison, "in bold", "underlined")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(' '.join([*comparison.caption, *legend, *comparison.notes]))}}}",
        rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_text(comparison: Comparison) -> str:
    """A table for a terminal: * the best, + the second; caption and notes beneath."""

    def mark(number: str, place: int) -> str:
        return number + {1: " *", 2: " +"}.get(place, "")

    header, rows = _grid(comparison, mark, printable, "±")
    legend = legend_of(comparison, "marked *", "marked +")
    beneath = [printable(line) for line in (*comparison.caption, *legend, *comparison.notes)]
    return "\n".join([*_padded([header, *rows]), "", *beneath]) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line per model and cohort, with a header; undefined numbers are empty, several seeds joined by spaces."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in comparison.rows:
        for cohort, cell in zip(comparison.cohorts, row.cells, strict=True):
            if cell is not None:
                writer.writerow(_csv_line(comparison, row, cohort, cell))
    return file.getvalue()


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """All of the comparison for JSON; undefined numbers are None, and cells are by cohort."""
    rows = []
    for row in comparison.rows:
        cells = {
            cohort: asdict(cell)
            for cohort, cell in zip(comparison.cohorts, row.cells, strict=True)
            if cell is not None
        }  # fmt: skip
        rows.append(asdict(row) | {"cells": cells})
    return dict(_defined(asdict(comparison) | {"rows": rows, "runs": [str(run) for run in comparison.runs]}))


def _grid(
    comparison: Comparison, mark: Mark, escape: Callable[[str], str], plus_minus: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows as finished text; a column of means where there are several cohorts."""
    several = len(comparison.cohorts) > 1
    header = ["Model", *(escape(cohort) for cohort in comparison.cohorts), *(["Mean"] if several else [])]
    rows = []
    for row in comparison.rows:
        cells = [_cell(cell, mark, escape, plus_minus) for cell in row.cells]
        rows.append(
            [escape(row.name) + seeds_text(row), *cells, *([mark(number_text(row.mean), row.place)] if several else [])]
        )
    return header, rows


def _cell(cell: Cell | None, mark: Mark, escape: Callable[[str], str], plus_minus: str) -> str:
    if cell is None:
        return "-"
    number = mark(f"{number_text(cell.mean)} {plus_minus} {number_text(cell.std)}", cell.place)
    return number if math.isnan(cell.p_value) else f"{number} ({escape(p_text(cell.p_value))})"


def seeds_text(row: Row) -> str:
    """How many seeds its cells are of, where that is not one."""
    counts = sorted({len(cell.seeds) for cell in row.cells if cell is not None})
    if counts == [1]:
        return ""
    return f" ({counts[0]} seeds)" if len(counts) == 1 else f" ({counts[0]} to {counts[-1]} seeds)"


def number_text(value: float) -> str:
    """Three decimals, or n/a."""
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def p_text(value: float) -> str:
    """A p-value with its name."""
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def legend_of(comparison: Comparison, best: str, second: str) -> list[str]:
    """What the marks mean, where there are any."""
    places = [cell.place for row in comparison.rows for cell in row.cells if cell is not None]
    return [f"The best of a cohort is {best}, the second {second}."] if any(places) else []


def _csv_line(comparison: Comparison, row: Row, cohort: str, cell: Cell) -> dict[str, Any]:
    values = asdict(row) | asdict(cell) | {"cohort": cohort, "metric": comparison.metric}
    values["seeds"] = " ".join("" if seed is None else str(seed) for seed in cell.seeds)
    return {
        name: "" if isinstance(values[name], float) and math.isnan(values[name]) else values[name]
        for name in CSV_COLUMNS
    }


def _defined(value: Any) -> Any:
    """JSON has no NaN: undefined numbers become None, at any depth."""
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _padded(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns as wide as their widest cell, with a rule beneath the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in ruled]


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def printable(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", printable(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text))
