"""What a store looks like on disk and in SQL; the one place that knows names of files and columns.

<store>/
  store.json                           format version, uuid, created
  catalog.duckdb                       the index: disposable, rebuilt from what lies beside it
  catalog.parquet                      one row per bag with its patient: the snapshot other tools read
  features/<encoder>/<shard>.zarr/     immutable Zarr v3 shards
  features/<encoder>/<shard>.tar       or WebDataset shards
  tables/*.parquet                     patients, slide labels, splits, as imported; skipped and removed slides
  derived/<encoder>/<what>/*.parquet   what `cfstore derive` computed of the bags: disposable, too
"""

from __future__ import annotations

import json
import os
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cfstore.errors import SourceError, StoreFormatError, StoreNotFoundError

FORMAT_VERSION: Final = 2

STORE_FILE: Final = "store.json"
CATALOG_FILE: Final = "catalog.duckdb"
SNAPSHOT_FILE: Final = "catalog.parquet"
LOCK_FILE: Final = ".lock"
FEATURES_DIR: Final = "features"
TABLES_DIR: Final = "tables"
DERIVED_DIR: Final = "derived"
REMOVED_FILE: Final = "removed.parquet"
STAGED_FILE: Final = ".staged.json"
"""In a folder that stands for a store in a bucket while it is written to."""

Columns = tuple[tuple[str, str, str], ...]

BAGS: Final[Columns] = (
    ("slide_id", "VARCHAR", "the slide"),
    ("scale", "INTEGER", "nominal magnification: 5, 10 or 20"),
    ("encoder", "VARCHAR", "the patch network that made the features"),
    ("n_patches", "BIGINT", "patches in the bag (rows)"),
    ("dim", "INTEGER", "feature dimension D"),
    ("dtype", "VARCHAR", "stored precision: float16, float16-rounded (to bfloat16's), float32 or int8"),
    ("codec", "VARCHAR", "compression of the features"),
    ("bytes", "BIGINT", "decoded feature bytes: n_patches x dim x item size"),
    ("shard", "VARCHAR", "shard, relative to the store: a Zarr group (.zarr) or a WebDataset tar (.tar)"),
    ("row_start", "BIGINT", "first row of the bag in the shard's arrays; null in a tar"),
    ("byte_start", "BIGINT", "where the stored features of the bag begin, in their file"),
    ("byte_length", "BIGINT", "stored bytes of its features (a compressed chunk shared by two scales counts for both)"),
    ("digest", "VARCHAR", "xxh3-128 of the stored rows: features, then coords (int8: scale and zero first)"),
    ("has_coords", "BOOLEAN", "whether the source gave coordinates"),
    ("source", "VARCHAR", "file the bag was read from"),
    ("source_bytes", "BIGINT", "size of that file"),
    ("source_mtime_ns", "BIGINT", "modification time of that file, nanoseconds since 1970"),
    ("source_dtype", "VARCHAR", "precision in the source"),
    ("max_abs_error", "DOUBLE", "largest |stored - source| of the bag"),
    ("rms_relative_error", "DOUBLE", "rms(stored - source) / rms(source)"),
    ("mpp", "DOUBLE", "microns per level-0 pixel, where the source says"),
    ("level0_magnification", "DOUBLE", "magnification of level 0, where the source says"),
    ("patch_size", "INTEGER", "patch edge in pixels at its own scale, where the source says"),
    ("patch_size_level0", "INTEGER", "patch edge in level-0 pixels, where the source says"),
)
SLIDES: Final[Columns] = (
    ("slide_id", "VARCHAR", "the slide; file name without known suffixes"),
    ("patient_id", "VARCHAR", "the person; null where neither a clinical table nor a TCGA barcode says"),
    ("cohort", "VARCHAR", "the cohort the slide belongs to"),
)
PATIENTS: Final[Columns] = (
    ("cohort", "VARCHAR", "cohort of the clinical table"),
    ("patient_id", "VARCHAR", "the person"),
    ("time_months", "DOUBLE", "follow-up in months (days / 30.44)"),
    ("event", "BOOLEAN", "true: death observed; false: censored"),
    ("age", "DOUBLE", "years at diagnosis"),
    ("sex", "VARCHAR", "female or male"),
    ("site", "VARCHAR", "tissue source site"),
    ("oncotree_code", "VARCHAR", "diagnosis"),
)
SPLITS: Final[Columns] = (
    ("cohort", "VARCHAR", "the cohort"),
    ("name", "VARCHAR", "name of the split set"),
    ("fold", "INTEGER", "fold number, from 0"),
    ("patient_id", "VARCHAR", "the person"),
    ("part", "VARCHAR", "train or val"),
)
SKIPPED: Final[Columns] = (
    ("slide_id", "VARCHAR", "slide left out by `ingest --on-error skip`"),
    ("encoder", "VARCHAR", "encoder of the file"),
    ("source", "VARCHAR", "the file that could not be used"),
    ("error", "VARCHAR", "error class"),
    ("message", "VARCHAR", "what was found and what to do"),
)
DERIVED: Final[Columns] = (
    ("slide_id", "VARCHAR", "the slide"),
    ("encoder", "VARCHAR", "encoder of the bags it was computed from"),
    ("derivation", "VARCHAR", "what it is, as `cfstore derive` calls it: nearest8-20x, parents-20x-10x, ..."),
    ("scale", "INTEGER", "scale of the bag; the finer one of parents"),
    ("coarse", "INTEGER", "scale of the parents; null for other kinds"),
    ("k", "INTEGER", "neighbours of each patch; null for other kinds"),
    ("version", "INTEGER", "version of the algorithm"),
    ("n_rows", "BIGINT", "rows: one per patch; of a mean 1"),
    ("bytes", "BIGINT", "bytes of the array"),
    ("file", "VARCHAR", "Parquet file, relative to the store"),
    ("row_group", "INTEGER", "row group of the file that holds the slide"),
    ("digest", "VARCHAR", "xxh3-128 of the array, in C order"),
    ("source", "VARCHAR", "digest of the bag; of parents, of both, each with the patch edge that its source says"),
    ("fine_edge", "DOUBLE", "parents: patch edge at `scale` that was used, level-0 pixels"),
    ("coarse_edge", "DOUBLE", "parents: patch edge at `coarse` that was used, level-0 pixels"),
    ("created", "VARCHAR", "when the file was begun, UTC"),
)
PROTOTYPES: Final[Columns] = (
    ("encoder", "VARCHAR", "encoder of the bags"),
    ("scale", "INTEGER", "scale of the bags"),
    ("n", "INTEGER", "centroids"),
    ("seed", "BIGINT", "seed of the sample and of k-means"),
    ("version", "INTEGER", "version of the algorithm"),
    ("key", "VARCHAR", "digest of all this, the slides and their bags: another training set has another key"),
    ("n_slides", "BIGINT", "slides of the training set"),
    ("slides_digest", "VARCHAR", "xxh3-128 of the sorted slide ids"),
    ("n_sampled", "BIGINT", "patches that the centroids were fitted to"),
    ("inertia", "DOUBLE", "mean squared distance of these to their centroids"),
    ("file", "VARCHAR", "Parquet file, relative to the store"),
    ("created", "VARCHAR", "when they were fitted, UTC"),
)
TABLES: Final = {
    "patients": PATIENTS,
    "slides": SLIDES,
    "bags": BAGS,
    "splits": SPLITS,
    "skipped": SKIPPED,
    "derived": DERIVED,
    "prototypes": PROTOTYPES,
}

_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")


def ddl(table: str) -> str:
    """The CREATE TABLE statement of one catalog table."""
    columns = ", ".join(f'"{name}" {kind}' for name, kind, _ in TABLES[table])
    return f"CREATE OR REPLACE TABLE {table} ({columns})"


def check_name(kind: str, name: str, option: str) -> str:
    """`name` if it can be a folder on every file system, else SourceError naming the option."""
    if not _NAME.match(name):
        message = (
            f"{kind} {name!r}: use letters, digits, '.', '_', '+' and '-', starting with a letter or digit; "
            f"name it yourself with {option}"
        )
        raise SourceError(message)
    return name


def check_version(what: str, version: object) -> None:
    """Raise StoreFormatError unless `version` is the format this code reads."""
    if not isinstance(version, int):
        message = f"{what}: not of a store (format_version {version!r}); restore it or use a new --store"
        raise StoreFormatError(message)
    if version > FORMAT_VERSION:
        message = f"{what}: store format {version}, this version reads {FORMAT_VERSION}; upgrade crossfusion-store"
        raise StoreFormatError(message)
    if version < FORMAT_VERSION:
        message = f"{what}: store format {version}, this version reads {FORMAT_VERSION}; ingest into a new --store"
        raise StoreFormatError(message)


@dataclass(frozen=True)
class StoreHeader:
    """What store.json says."""

    uuid: str
    created: str
    format_version: int = FORMAT_VERSION


def create_header(root: Path) -> StoreHeader:
    """Make `root` a store: its folders and store.json (written aside, then renamed)."""
    header = StoreHeader(uuid=str(uuid.uuid4()), created=datetime.now(UTC).isoformat(timespec="seconds"))
    for folder in (FEATURES_DIR, TABLES_DIR):
        (root / folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            "format": "cfstore",
            "format_version": header.format_version,
            "uuid": header.uuid,
            "created": header.created,
        }
    )
    temporary = root / f".{STORE_FILE}.{header.uuid}"
    with temporary.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, root / STORE_FILE)  # fails if another process created the store first
    except FileExistsError:
        return read_header(root)
    finally:
        temporary.unlink()
        handle = os.open(root, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return header


def read_header(root: Path) -> StoreHeader:
    """Read store.json.

    Raises
    ------
    StoreNotFoundError
        There is no store.json at `root`.
    StoreFormatError
        store.json is not ours, or of a newer format version.
    """
    path = root / STORE_FILE
    if not path.is_file():
        message = (
            f"{root}: no store here (no {STORE_FILE}); make one with `cfstore ingest H5DIR`, or name one with --store"
        )
        raise StoreNotFoundError(message)
    return parse_header(path.read_bytes(), str(root))


def parse_header(content: bytes, place: str) -> StoreHeader:
    """What store.json says, of the store at `place`; raises StoreFormatError as `read_header`."""
    try:
        said = json.loads(content)
        version, store_uuid, created = said["format_version"], said["uuid"], said["created"]
    except (ValueError, KeyError, TypeError) as error:
        message = f"{place}/{STORE_FILE}: not a store header ({error}); restore the file or ingest into a new --store"
        raise StoreFormatError(message) from error
    check_version(place, version)
    return StoreHeader(uuid=store_uuid, created=created, format_version=version)
