"""What is in a store, in numbers and names: cohorts, labels that miss a slide, slides that miss a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from cfstore.catalog import SLIDE_LABELS_PREFIX, connect
from cfstore.derived_tables import derived_now, has_table
from cfstore.errors import SlideNotFoundError
from cfstore.mirrors import remote_of
from cfstore.schema import FEATURES_DIR, TABLES_DIR, read_header

_LABELLED = "patients.time_months IS NOT NULL AND patients.event IS NOT NULL"
_JOINED = "slides LEFT JOIN patients ON patients.cohort = slides.cohort AND patients.patient_id = slides.patient_id"


@dataclass(frozen=True)
class StoreInfo:
    """Counts and lists for `cfstore info`; every list is complete."""

    path: str
    uuid: str
    created: str
    stored_bytes: int
    cohorts: list[dict[str, Any]]
    encoders: list[dict[str, Any]]
    splits: list[dict[str, Any]]
    slides_without_label: list[dict[str, Any]]
    labels_without_slide: list[dict[str, Any]]
    slides_missing_scale: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    derived: list[dict[str, Any]]


def _rows(connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[object] = ()) -> list[dict[str, Any]]:
    result = connection.execute(query, list(parameters))
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _labels_without_slide(connection: duckdb.DuckDBPyConnection, root: Path) -> list[dict[str, Any]]:
    """Slides that a clinical table lists and the store lacks; patients, where a table lists no slides."""
    files = [str(path) for path in (root / TABLES_DIR).glob(f"{SLIDE_LABELS_PREFIX}*.parquet")]
    listed = (
        f"SELECT cohort, patient_id, slide_id FROM read_parquet({files!r})"
        if files
        else "SELECT cohort, patient_id, NULL::VARCHAR AS slide_id FROM patients WHERE false"
    )
    return _rows(
        connection,
        f"""
        WITH listed AS ({listed})
        SELECT cohort, patient_id, slide_id FROM listed WHERE slide_id NOT IN (SELECT slide_id FROM slides)
        UNION ALL
        SELECT cohort, patient_id, NULL FROM patients
        WHERE NOT EXISTS (SELECT 1 FROM listed
                          WHERE listed.cohort = patients.cohort AND listed.patient_id = patients.patient_id)
          AND NOT EXISTS (SELECT 1 FROM slides
                          WHERE slides.cohort = patients.cohort AND slides.patient_id = patients.patient_id)
        ORDER BY ALL""",
    )


def _derived(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """How many slides have which derivations; nothing where the catalog is from before there were any."""
    if not has_table(connection, "derived"):
        return []
    query = (
        "SELECT cohort, encoder, derivation, count(*) AS n_slides, sum(bytes)::BIGINT AS bytes "
        f"FROM ({derived_now()}) JOIN slides USING (slide_id) GROUP BY ALL ORDER BY ALL"
    )
    return _rows(connection, query)


def _bytes_on_disk(connection: duckdb.DuckDBPyConnection, root: Path) -> int:
    files = set((root / FEATURES_DIR).rglob("*"))
    files |= {root / shard for (shard,) in connection.execute("SELECT shard FROM internal.shards").fetchall()}
    return sum(path.stat().st_size for path in files if path.is_file())


def _catalogued_bytes(connection: duckdb.DuckDBPyConnection) -> int:
    """Up to the last byte of every array that the catalog knows: all but indexes and metadata of shards."""
    query = (
        "SELECT coalesce(sum(stop), 0)::BIGINT FROM (SELECT max(byte_start + list_sum(sizes)) AS stop "
        "FROM internal.extents GROUP BY shard, CASE WHEN ends_with(shard, '.tar') THEN '' ELSE array_name END)"
    )
    found = connection.execute(query).fetchone()
    return int(found[0]) if found else 0


def read_info(root: Path) -> StoreInfo:
    """Gather everything `cfstore info` shows."""
    header, remote = read_header(root), remote_of(root)
    with connect(root) as connection:
        return StoreInfo(
            path=remote.url if remote else str(root),
            uuid=header.uuid,
            created=header.created,
            stored_bytes=_catalogued_bytes(connection) if remote else _bytes_on_disk(connection, root),
            cohorts=_rows(
                connection,
                f"""
                SELECT slides.cohort, count(*) AS n_slides, count(DISTINCT slides.patient_id) AS n_patients,
                       count(*) FILTER ({_LABELLED}) AS n_labelled_slides,
                       count(DISTINCT slides.patient_id) FILTER ({_LABELLED}) AS n_labelled_patients,
                       count(DISTINCT slides.patient_id) FILTER ({_LABELLED} AND patients.event) AS n_events
                FROM {_JOINED} GROUP BY slides.cohort ORDER BY slides.cohort""",
            ),
            encoders=_rows(
                connection,
                """
                SELECT cohort, encoder, scale, any_value(dim) AS dim, any_value(dtype) AS dtype, count(*) AS n_slides,
                       sum(n_patches)::BIGINT AS n_patches, max(n_patches) AS largest_bag, sum(bytes)::BIGINT AS bytes,
                       max(max_abs_error) AS max_abs_error, max(rms_relative_error) AS rms_relative_error
                FROM bags JOIN slides USING (slide_id)
                GROUP BY cohort, encoder, scale ORDER BY cohort, encoder, scale""",
            ),
            splits=_rows(
                connection,
                """
                SELECT cohort, name, count(DISTINCT fold) AS n_folds, count(DISTINCT patient_id) AS n_patients
                FROM splits GROUP BY cohort, name ORDER BY cohort, name""",
            ),
            slides_without_label=_rows(
                connection,
                f"""
                SELECT slides.cohort, slide_id, slides.patient_id,
                       CASE WHEN slides.patient_id IS NULL THEN 'no patient known'
                            WHEN patients.patient_id IS NULL AND len(others.cohorts) > 1
                            THEN 'patient in the tables of several cohorts: ' || list_aggregate(
                                list_sort(others.cohorts), 'string_agg', ', ')
                            WHEN patients.patient_id IS NULL THEN 'patient in no clinical table of the cohort'
                            ELSE 'patient has no follow-up' END AS reason
                FROM {_JOINED}
                LEFT JOIN (SELECT patient_id, list(cohort) AS cohorts FROM patients GROUP BY patient_id) AS others
                       ON others.patient_id = slides.patient_id
                WHERE NOT coalesce({_LABELLED}, false) ORDER BY ALL""",
            ),
            labels_without_slide=_labels_without_slide(connection, root),
            slides_missing_scale=_rows(
                connection,
                """
                WITH placed AS (SELECT cohort, encoder, slide_id, scale FROM bags JOIN slides USING (slide_id)),
                     held AS (SELECT cohort, encoder, list_sort(list(DISTINCT scale)) AS scales
                              FROM placed GROUP BY cohort, encoder)
                SELECT cohort, encoder, slide_id,
                       list_filter(any_value(scales), lambda s: NOT list_contains(list(scale), s)) AS missing
                FROM placed JOIN held USING (cohort, encoder) GROUP BY cohort, encoder, slide_id
                HAVING len(missing) > 0 ORDER BY cohort, encoder, slide_id""",
            ),
            skipped=_rows(connection, "SELECT * FROM skipped ORDER BY ALL"),
            derived=_derived(connection),
        )


def read_slide_rows(root: Path, slide_id: str) -> dict[str, Any]:
    """The catalog's rows of one slide; SlideNotFoundError names similar ids."""
    with connect(root) as connection:
        slides = _rows(connection, "SELECT * FROM slides WHERE slide_id = ?", [slide_id])
        if not slides:
            query = (
                "SELECT slide_id FROM slides "
                "ORDER BY starts_with(slide_id, $1) DESC, jaro_winkler_similarity(slide_id, $1) DESC, slide_id LIMIT 3"
            )
            near = [name for (name,) in connection.execute(query, [slide_id]).fetchall()]
            message = f"slide {slide_id!r} is not in {root}" + (f"; near names: {', '.join(near)}" if near else "")
            raise SlideNotFoundError(message)
        query = "SELECT * FROM patients WHERE cohort = ? AND patient_id = ?"
        patients = _rows(connection, query, [slides[0]["cohort"], slides[0]["patient_id"]])
        query = "SELECT * FROM bags WHERE slide_id = ? ORDER BY encoder, scale"
        bags = _rows(connection, query, [slide_id])
    return {"slide": slides[0], "patient": patients[0] if patients else None, "bags": bags}
