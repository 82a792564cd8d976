"""A store of any number of slides without their features: the real catalog, tables and folders, made in minutes.

Bags have the sizes, chunks and digests that an ingest of CLAM files of D = 1,024 as float16 would write: log-normal
numbers of patches with the published mean of 895, 3,449 and 13,496, 512 rows to a chunk, 64 slides to a shard. Two
slides a patient, cohorts of a few thousand slides, a clinical table and five folds each. Nothing can be read from such
a store, and `cfstore verify` would rightly complain.

    python benchmarks/synthetic_catalog.py /scratch/million --slides 1000000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Final

import duckdb

import cfstore
from cfstore import catalog
from cfstore.locks import write_lock
from cfstore.schema import CATALOG_FILE, FEATURES_DIR, TABLES_DIR

ENCODER: Final = "uni"
SLIDES_PER_COHORT: Final = 5_000
SLIDES_PER_SHARD: Final = 64
SPREAD: Final = 0.7  # of the logarithm of a slide's size
FOLDS: Final = 5

_SHARD: Final = "format('{:06d}-{:08x}.zarr', i // 64 + 1, hash(i // 64) % 4294967296)"
# Numbers of the slide i, and its bags: `n` rows at each scale, from chunk `first` on
_SLIDES: Final = f"""
    SELECT i, format('TCGA-{{}}-{{:04X}}-01Z-00-DX{{}}', chr(65 + (i // 262144)::INTEGER) ||
                     chr(65 + (i // 131072 % 2)::INTEGER), i // 2 % 65536, i % 2 + 1) AS slide_id,
           format('TCGA-{{}}-{{:04X}}', chr(65 + (i // 262144)::INTEGER) ||
                  chr(65 + (i // 131072 % 2)::INTEGER), i // 2 % 65536) AS patient_id,
           format('C{{:03d}}', i // $cohort) AS cohort,
           '{FEATURES_DIR}/{ENCODER}/' || {_SHARD} AS shard,
           exp({SPREAD} * sqrt(-2 * ln((hash(i) % 1000000 + 1) / 1000001.0))
               * cos(2 * pi() * (hash(-i) % 1000000) / 1000000.0) - {SPREAD} * {SPREAD} / 2) AS size
    FROM range($slides) AS t(i)
"""
_BAGS: Final = """
    SELECT *, greatest(16, CASE scale WHEN 5 THEN 895 WHEN 10 THEN 3449 ELSE 13496 END * size)::BIGINT AS n,
           n * 2048 AS bytes, n // 512 + 2 AS chunks
    FROM numbered, (VALUES (5), (10), (20)) AS s(scale)
"""
_FILL: Final = f"""
CREATE TEMP TABLE numbered AS {_SLIDES};
CREATE TEMP TABLE sized AS {_BAGS} ORDER BY i, scale;
INSERT INTO internal.shards SELECT DISTINCT shard, 512, []::VARCHAR[] FROM numbered ORDER BY shard;
INSERT INTO internal.shard_slides SELECT slide_id, NULL, 'h5', shard FROM numbered ORDER BY i;
INSERT INTO bags BY NAME
    SELECT slide_id, scale, '{ENCODER}' AS encoder, n AS n_patches, 1024 AS dim, 'float16' AS dtype,
           'blosc-zstd' AS codec, bytes, shard, i % 64 * 20000 AS row_start, i % 64 * 36500000 + scale AS byte_start,
           (bytes * 0.866)::BIGINT AS byte_length, 'xxh3-128:' || md5(slide_id || scale) AS digest, true AS has_coords,
           '/data/features/h5/x' || scale || '/' || slide_id || '.h5' AS source, bytes * 2 AS source_bytes,
           1700000000000000000 + hash(i) % 1000000000000 AS source_mtime_ns, 'float32' AS source_dtype,
           (hash(i + 1) % 1000000) / 1e8 AS max_abs_error, (hash(i + 2) % 1000000) / 1e10 AS rms_relative_error,
           256 AS patch_size
    FROM sized ORDER BY i, scale;
INSERT INTO internal.extents
    SELECT shard, slide_id, scale, name, i % 64 * 36500000 + scale,
           list_transform(range(chunks), lambda x: CASE name WHEN 'features' THEN 900000 ELSE 900 END
                          + (hash(i, scale, name, x) % 16384)::BIGINT),
           0, list_transform(range(chunks), lambda x: hash(x, name, scale, i))
    FROM sized, (VALUES ('features'), ('coords')) AS a(name) ORDER BY i, scale;
"""
_TABLES: Final = {
    "patients-": "SELECT DISTINCT cohort, patient_id, (hash(patient_id) % 1200) / 10.0 AS time_months, "
    "hash(patient_id, 1) % 3 = 0 AS event, (30 + hash(patient_id, 2) % 50)::DOUBLE AS age "
    "FROM numbered WHERE cohort = $cohort ORDER BY patient_id",
    "slides-": "SELECT cohort, slide_id, patient_id FROM numbered WHERE cohort = $cohort ORDER BY slide_id",
    "splits-": "SELECT DISTINCT cohort, '5foldcv' AS name, fold::INTEGER AS fold, patient_id, "
    f"CASE WHEN hash(patient_id, 3) % {FOLDS} = fold THEN 'val' ELSE 'train' END AS part "
    f"FROM numbered, range({FOLDS}) AS f(fold) WHERE cohort = $cohort ORDER BY fold, patient_id",
}


def make(root: Path, slides: int, *, per_cohort: int = SLIDES_PER_COHORT) -> cfstore.Store:
    """A new store at `root` that lists `slides` slides; their shards are empty folders."""
    store = cfstore.open(root, create=True)
    with write_lock(root):
        with duckdb.connect(root / CATALOG_FILE) as connection:
            filled = _FILL.replace("$slides", str(slides)).replace("$cohort", str(per_cohort))
            for statement in filled.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            cohorts = connection.execute("SELECT DISTINCT cohort FROM numbered ORDER BY cohort").fetchall()
            for (cohort,) in cohorts:
                for prefix, query in _TABLES.items():
                    suffix = "@5foldcv" if prefix == "splits-" else ""
                    target = root / TABLES_DIR / f"{prefix}{cohort}{suffix}.parquet"
                    query = query.replace("$cohort", f"'{cohort}'")
                    connection.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet)")
            shards = connection.execute("SELECT shard FROM internal.shards").fetchall()
        for (shard,) in shards:
            (root / shard).mkdir(parents=True)
        catalog.reload_tables(root)
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path, help="a new folder")
    parser.add_argument("--slides", type=int, required=True)
    parser.add_argument("--per-cohort", type=int, default=SLIDES_PER_COHORT)
    told = parser.parse_args()
    started = time.perf_counter()
    make(told.root, told.slides, per_cohort=told.per_cohort)
    print(f"{told.slides:,} slides in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
