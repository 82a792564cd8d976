"""Imported tables as Parquet files under `tables/`, each with the file it came from and its digest.

One file per cohort (and split name); importing again replaces it by a rename.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cfstore.catalog import PATIENTS_PREFIX, SKIPPED_PREFIX, SLIDE_LABELS_PREFIX, SPLITS_PREFIX
from cfstore.clinical import ClinicalTable
from cfstore.schema import SKIPPED, TABLES_DIR, check_name
from cfstore.shards import commit
from cfstore.splits import PARTS, SplitSet


def _write(root: Path, name: str, rows: pa.Table, **origin: str) -> None:
    path = root / TABLES_DIR / f"{name}.parquet"
    temporary = path.with_name(f".{path.name}")
    rows = rows.replace_schema_metadata({f"cfstore.{key}": value for key, value in origin.items()})
    pq.write_table(rows, temporary, write_page_checksum=True)
    commit(temporary, path)


def cohorts_of(table: ClinicalTable, fallback_cohort: str) -> list[str]:
    """The cohorts a table speaks of; SourceError where one cannot be a file's name."""
    named = {cohort or fallback_cohort for cohort in table.patients["cohort"].to_pylist()}
    return [check_name("cohort", cohort, "--cohort") for cohort in sorted(named)]


def write_clinical(root: Path, table: ClinicalTable, fallback_cohort: str) -> list[str]:
    """Store patients and slide labels, one pair of files per cohort of the table; returns the cohorts."""
    patients, slides = (
        rows.set_column(
            rows.schema.get_field_index("cohort"),
            "cohort",
            pc.fill_null(rows["cohort"].cast(pa.string()), fallback_cohort),
        )
        for rows in (table.patients, table.slides)
    )
    cohorts = cohorts_of(table, fallback_cohort)
    for cohort in cohorts:
        origin = {"source": str(table.source), "digest": table.digest, "format": table.format}
        for prefix, rows in ((PATIENTS_PREFIX, patients), (SLIDE_LABELS_PREFIX, slides)):
            _write(root, prefix + cohort, rows.filter(pc.equal(rows["cohort"], cohort)), **origin)
    return cohorts


def write_splits(root: Path, cohort: str, splits: SplitSet, source: str) -> None:
    """Store one split set of a cohort."""
    check_name("split", splits.name, "--name")
    rows = [
        {"cohort": cohort, "name": splits.name, "fold": number, "patient_id": patient, "part": part}
        for number, fold in splits.folds.items()
        for part in PARTS
        for patient in sorted(getattr(fold, part))
    ]
    schema = pa.schema(
        [
            ("cohort", pa.string()),
            ("name", pa.string()),
            ("fold", pa.int32()),
            ("patient_id", pa.string()),
            ("part", pa.string()),
        ]
    )
    table = pa.Table.from_pylist(rows, schema=schema)
    digest = hashlib.sha256("\n".join(map(str, rows)).encode()).hexdigest()
    _write(
        root, f"{SPLITS_PREFIX}{quote(cohort, safe='')}@{splits.name}", table, source=source, digest=f"sha256:{digest}"
    )


def write_skipped(root: Path, folder: Path, rows: Sequence[dict[str, str]]) -> None:
    """Remember the slides that the last ingest of `folder` left out (none: forget earlier ones)."""
    name = SKIPPED_PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    if rows:
        schema = pa.schema([(column, pa.string()) for column, _, _ in SKIPPED])
        _write(root, name, pa.Table.from_pylist(list(rows), schema=schema), source=str(folder))
    else:
        (root / TABLES_DIR / f"{name}.parquet").unlink(missing_ok=True)
