"""What a summary says of the Cox regression: a row per covariate, the finding, and who had no value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cftrain.report.figures import HazardBar, HazardRow
from cftrain.report.wording import bare_p, counted, hazard_ratio, number, p_value

_MISSING = "missing in "


@dataclass(frozen=True)
class CovariateRow:
    """A covariate's row of the table: hazard ratio and p alone, with its patients, and beside the others."""

    covariate: str
    alone: str
    alone_p: str
    patients: str
    together: str
    together_p: str


def covariate_rows(cox: Mapping[str, Any]) -> list[CovariateRow]:
    """The table of both regressions."""
    return [
        CovariateRow(
            name,
            _ratio(alone),
            bare_p(alone["p_value"]) if alone else "–",  # noqa: RUF001
            f"{alone['n']:,} ({alone['n_events']:,})" if alone else "–",  # noqa: RUF001
            _ratio(together),
            bare_p(together["p_value"]) if together else "–",  # noqa: RUF001
        )
        for name, alone, together in _joined(cox)
    ]


def hazard_rows(cox: Mapping[str, Any] | None) -> list[HazardRow]:
    """The rows of the forest plot."""
    return [HazardRow(name, _bar(alone), _bar(together)) for name, alone, together in _joined(cox or {})]


def cox_sentence(cox: Mapping[str, Any], risk: str) -> str:
    """What the predicted risk, the covariate of that name, adds to the clinical columns beside it."""
    together = {row["covariate"]: row for row in cox["multivariable"]}
    if risk not in together:
        return "The predicted risk is the same for all patients of a fold: it has no hazard ratio."
    own, others = together.pop(risk), len(together)
    ratio = hazard_ratio(own["hazard_ratio"], own["lower"], own["upper"])
    beside = f"beside {counted(others, 'clinical coefficient')}" if others else "with no clinical column beside it"
    return f"Hazard ratio of the predicted risk, per standard deviation, {beside}: {ratio}, {p_value(own['p_value'])}."


def missing_values(cox: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Clinical columns that not all patients have, and the fit of all together, as (column, what is missing)."""
    rows = {name: reason for name, reason in cox["left_out"].items() if reason.startswith(_MISSING)}
    for row in cox["univariable"]:
        absent = cox["n"] - row["n"]
        if absent:
            rows.setdefault(row["covariate"].partition(": ")[0], f"{counted(absent, 'patient')} not in its fit")
    return list(rows.items())


def _joined(cox: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    alone, together = (
        {row["covariate"]: row for row in cox.get(part, [])} for part in ("univariable", "multivariable")
    )
    for name in dict.fromkeys([*alone, *together]):
        yield name, alone.get(name), together.get(name)


def _ratio(row: Mapping[str, Any] | None) -> str:
    return hazard_ratio(row["hazard_ratio"], row["lower"], row["upper"]) if row else "–"  # noqa: RUF001


def _bar(row: Mapping[str, Any] | None) -> HazardBar | None:
    return HazardBar(*(number(row[name]) for name in ("hazard_ratio", "lower", "upper"))) if row else None
