"""The codec table is of one's own data, and its errors are true."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cfstore import bench
from cfstore.cli import main
from cfstore.codecs import CODECS, DEFAULT_CODEC
from cfstore.convert import DTYPES
from cfstore.errors import DamagedShardError, ShapeError

Make = Callable[..., Any]


@pytest.fixture
def bags(rng: np.random.Generator) -> list[Any]:
    return [rng.normal(size=(n, 16)).astype(np.float32) for n in (70, 1, 333)]


def test_every_dtype_is_measured_with_every_codec(bags):
    found = bench.bench_codecs(bags, repetitions=2, threads=3)
    assert [(row.dtype, row.codec) for row in found.rows] == [(d, c) for d in DTYPES for c in CODECS]
    assert {(row.dtype, row.codec) for row in found.rows if row.default} == set(DEFAULT_CODEC.items())
    assert all(min(row.ratio, row.convert_mb_s, row.encode_mb_s, row.decode_gb_s) > 0 for row in found.rows)
    assert (found.n_bags, found.n_patches, found.dim, found.source_bytes) == (3, 404, 16, 404 * 64)


def test_errors_are_those_of_the_stored_precision(bags):
    found = {row.dtype: row for row in bench.bench_codecs(bags, repetitions=1, codecs=["none"]).rows}
    source = np.concatenate(bags).astype(np.float64)
    error = np.concatenate(bags).astype(np.float16) - source
    assert found["float32"].max_abs_error == 0
    assert found["float16"].max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-6)
    relative = np.sqrt(np.square(error).mean() / np.square(source).mean())
    assert found["float16"].rms_relative_error == pytest.approx(relative, rel=1e-4)
    assert found["float16"].rms_relative_error < found["float16-rounded"].rms_relative_error


def test_a_precision_that_cannot_hold_the_values_is_named(bags):
    found = bench.bench_codecs([bags[0] * 1e6], repetitions=2, codecs=["none"])
    assert {row.dtype for row in found.rows} == {"float32", "int8"}
    assert set(found.refused) == {"float16", "float16-rounded"}


def test_a_codec_that_loses_something_is_found_out(bags, monkeypatch):
    class Lossy:
        def encode(self, chunk: Any) -> bytes:
            return bytes(chunk.nbytes)

        def decode_into(self, stored: Any, out: Any) -> None:
            out[:] = 0

    monkeypatch.setattr(bench, "get_codec", lambda name, dtype: Lossy())
    with pytest.raises(DamagedShardError, match="does not give back"):
        bench.bench_codecs(bags, repetitions=1)


def test_bags_of_two_encoders_are_refused(bags):
    with pytest.raises(ShapeError, match="one encoder"):
        bench.bench_codecs([bags[0], bags[0][:, :8]])
    with pytest.raises(ShapeError):
        bench.bench_codecs([])


def test_rows_come_from_a_folder_or_a_store_up_to_a_limit(tmp_path, make_cohort, store):
    made = make_cohort(tmp_path / "h5")
    whole = bench.rows_of_folder(tmp_path / "h5")
    for rows, slide in zip(whole, ("s1", "s2", "s3"), strict=True):
        np.testing.assert_array_equal(rows, made[slide, 20][0])
    assert sum(len(rows) for rows in bench.rows_of_folder(tmp_path / "h5", max_bytes=10 * 32)) == 10
    store.ingest(tmp_path / "h5")
    stored = bench.rows_of_store(store.path, max_bytes=10 * 16)
    assert [len(rows) for rows in stored] == [6, 4]
    np.testing.assert_array_equal(stored[0], made["s1", 20][0].astype(np.float16))


def test_the_command_prints_a_table_or_json(tmp_path, make_cohort):
    make_cohort(tmp_path / "h5")
    called = CliRunner().invoke(main, ["bench", "codecs", str(tmp_path / "h5"), "--threads", "2"])
    assert called.exit_code == 0, called.output
    assert "blosc-zstd *" in called.stdout
    assert "x2 threads" in called.stdout
    called = CliRunner().invoke(main, ["bench", "codecs", str(tmp_path / "h5"), "--json"])
    found = json.loads(called.stdout)
    assert len(found["rows"]) == len(DTYPES) * len(CODECS)
    assert {"processor", "cores", "numpy", "numcodecs"} <= set(found["machine"])
