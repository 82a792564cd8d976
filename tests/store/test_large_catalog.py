"""A catalog of a million slides: questions are answered by DuckDB, not by loading it into Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

import cfstore

SLIDES = 1_000_000
ROOT = Path(__file__).resolve().parents[2]
SHARD = "'features/uni/' || lpad((i // 64)::VARCHAR, 6, '0') || '-0.zarr'"
FILL = f"""
INSERT INTO slides SELECT 'TCGA-' || i, 'patient-' || (i // 2), 'COHORT' || (i % 4) FROM range({SLIDES}) t(i);
INSERT INTO patients BY NAME
    SELECT 'COHORT' || (i % 4) AS cohort, 'patient-' || (i // 2) AS patient_id, (i % 97)::DOUBLE AS time_months,
           i % 3 = 0 AS event, (30 + i % 50)::DOUBLE AS age
    FROM range({SLIDES}) t(i);
INSERT INTO internal.shards SELECT {SHARD}, 512, [] FROM range(0, {SLIDES}, 64) t(i);
INSERT INTO bags BY NAME
    SELECT 'TCGA-' || i AS slide_id, scale, 'uni' AS encoder, 100 + i % 900 AS n_patches, 1024 AS dim,
           'float16' AS dtype, 'none' AS codec, 1 AS bytes, {SHARD} AS shard, 0 AS row_start, 'd' AS digest,
           true AS has_coords
    FROM range({SLIDES}) t(i), (VALUES (5), (10), (20)) s(scale);
INSERT INTO internal.extents
    SELECT {SHARD}, 'TCGA-' || i, scale, 'features', (i % 64) * 22020096 + scale * 1048576, [524288, 524288], 0, []
    FROM range({SLIDES}) t(i), (VALUES (5), (10), (20)) s(scale);
"""
OPEN = """
import json, resource, sys, time
import cfstore
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
store = cfstore.open(sys.argv[1])
opened = time.perf_counter() - started
count = store.sql("SELECT count(*) AS n FROM slides")["n"][0].as_py()
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps({"opened": opened, "count": count, "grown_mib": grown}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> cfstore.Store:
    """A store whose catalog lists a million slides of four cohorts, three bags and a patient each."""
    store = cfstore.open(tmp_path_factory.mktemp("large") / "store", create=True)
    with duckdb.connect(store.path / "catalog.duckdb") as connection:
        connection.execute(FILL)
    return store


@pytest.mark.slow
def test_a_grouped_count_over_a_million_slides_takes_well_under_a_second(large: cfstore.Store) -> None:
    queries = {
        "SELECT cohort, count(*) AS n FROM slides GROUP BY cohort ORDER BY cohort": SLIDES // 4,
        "SELECT scale, count(*) AS n FROM bags GROUP BY scale ORDER BY scale": SLIDES,
    }
    for query, expected in queries.items():
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            rows = large.sql(query)
            seconds.append(time.perf_counter() - started)
        assert set(rows["n"].to_pylist()) == {expected}
        assert min(seconds) < 0.5


@pytest.mark.slow
def test_opening_a_store_of_a_million_slides_does_not_load_it(large: cfstore.Store) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(large.path)], capture_output=True, text=True, check=True, env=environment
    )
    found = json.loads(done.stdout)
    assert found["count"] == SLIDES
    assert found["opened"] < 0.1
    assert found["grown_mib"] < 200  # a million ids as Python strings alone are more than that


@pytest.mark.slow
def test_one_slide_of_a_million_is_found_at_once(large: cfstore.Store) -> None:
    started = time.perf_counter()
    reader = large.reader("uni", (5, 10, 20), ["TCGA-777777"])
    assert time.perf_counter() - started < 1
    assert reader.buffer_bytes("TCGA-777777") == 3 * 2 * 524_288
