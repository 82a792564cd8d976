"""Which slides, by a condition in SQL, and in which order their files hold them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

import duckdb

from cfstore.catalog import AMONG, connect
from cfstore.errors import QueryError, SlideNotFoundError
from cfstore.query import run_query

_ROWS: Final = (
    "(SELECT slides.*, patients.* EXCLUDE (cohort, patient_id) FROM slides LEFT JOIN patients "
    "ON patients.cohort = slides.cohort AND patients.patient_id = slides.patient_id)"
)
_UNKNOWN: Final = re.compile(r'Referenced (?:column|table) "(.*?)" not found')
_N_NEAR: Final = 5


def select_slides(root: Path, where: str | None, cohort: str | None = None) -> list[str]:
    """Slides, sorted by id, of one cohort or of all, for which a condition holds.

    Parameters
    ----------
    root
        The store.
    where
        An SQL condition over slide_id, cohort, patient_id and every column of `patients`, as in
        "cohort = 'GBMLGG' AND age > 40"; subqueries see the tables that `cfstore sql` sees.
    cohort
        Only slides of this cohort.

    Raises
    ------
    QueryError
        Not one condition, an unknown column, or anything that SQL of users may not do.
    SlideNotFoundError
        No slide is left.
    """
    cohorts = _cohorts(root)
    if cohort is not None and cohort not in cohorts:
        message = f"cohort {cohort!r} has no slides in {root}; cohorts here: {', '.join(cohorts) or 'none'}"
        raise SlideNotFoundError(message)
    matching = None if where is None else _matching(root, where)
    known = _known(root, cohort, matching)
    if matching is not None and not matching <= set(known):
        message = f"--where {where!r}: gives other values than slides of this store; write one condition"
        raise QueryError(message)
    chosen = sorted(slide_id for slide_id, of in known.items() if cohort in (None, of))
    if not chosen:
        of = f" of cohort {cohort}" if cohort else ""
        message = f"{root} has no slide{of}" if where is None else f"--where {where!r}: matches no slide{of} in {root}"
        raise SlideNotFoundError(message)
    return chosen


def _cohorts(root: Path) -> list[str]:
    with connect(root) as connection:
        rows = connection.execute("SELECT DISTINCT cohort FROM slides ORDER BY cohort").fetchall()
    return [cohort for (cohort,) in rows]


def _known(root: Path, cohort: str | None, matching: Collection[str] | None) -> dict[str, str]:
    """Cohorts of those slides that match; of those of a cohort, where there is no condition."""
    condition, wanted = "$1::VARCHAR IS NULL OR cohort = $1", cohort  # type: str, object
    if matching is not None:
        condition, wanted = AMONG, list(matching)
    with connect(root) as connection:
        rows = connection.execute(f"SELECT slide_id, cohort FROM slides WHERE {condition}", [wanted]).fetchall()
    return dict(rows)


def _matching(root: Path, where: str) -> set[str]:
    try:
        duckdb.SQLExpression(where)  # takes exactly one expression: nothing gets out of the brackets below
        rows = run_query(root, f"SELECT slide_id FROM {_ROWS} AS slides WHERE (\n{where}\n)")
    except (duckdb.Error, QueryError) as error:
        raise QueryError(_explain(root, where, str(error).strip())) from error
    return set(rows["slide_id"].to_pylist())


def _explain(root: Path, where: str, found: str) -> str:
    unknown = _UNKNOWN.search(found)
    if not unknown:
        return f"--where {where!r}: {found.splitlines()[0] if found else 'no condition'}"
    columns = run_query(root, f"SELECT * FROM {_ROWS} LIMIT 0").column_names
    near = difflib.get_close_matches(unknown[1].lower(), [name.lower() for name in columns], _N_NEAR, 0.5)
    listed = [name for name in columns if name.lower() in near] or columns[:20]
    return (
        f"--where {where!r}: no column {unknown[1]!r}; {'near' if near else 'columns'}: {', '.join(listed)}. "
        "Text goes into single quotes: cohort = 'BLCA'"
    )


def shard_order(root: Path, encoder: str, slide_ids: Iterable[str]) -> list[list[str]]:
    """The slides of each shard, in the order of its file: reading them so is reading sequentially.

    Raises
    ------
    SlideNotFoundError
        A slide has no features of the encoder.
    """
    wanted = set(slide_ids)
    query = (
        f"SELECT shard, slide_id FROM bags WHERE encoder = ? AND {AMONG} "
        "GROUP BY shard, slide_id ORDER BY shard, min(byte_start), slide_id"
    )
    with connect(root) as connection:
        rows = connection.execute(query, [encoder, list(wanted)]).fetchall()
    shards: dict[str, list[str]] = {}
    for shard, slide_id in rows:
        if slide_id in wanted:  # in one shard only, should it be in several
            wanted.discard(slide_id)
            shards.setdefault(shard, []).append(slide_id)
    if wanted:
        message = f"{', '.join(sorted(wanted)[:5])}: no features of encoder {encoder} in {root}"
        raise SlideNotFoundError(message)
    return list(shards.values())
