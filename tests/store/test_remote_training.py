"""`cftrain` on a store on object storage: the numbers of a local one, and resumed from its address."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from buckets import upload
from click.testing import CliRunner
from faulty_proxy import Fault

import cfstore
from cfstore.synth import synthesize

pytest.importorskip("torch")


def train(store, out, *more):
    from cftrain.cli import main

    settings = ["train.epochs=2", "train.accumulate=4", "train.select_from=1", "model.embed_dim=8", "model.n_heads=2"]
    arguments = ["run", "--store", str(store), "--out", str(out), "--device", "cpu", *more]
    done = CliRunner().invoke(main, [*arguments, *(word for each in settings for word in ("--set", each))])
    assert done.exit_code == 0, done.output
    return json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_a_run_has_the_same_numbers_from_a_bucket_and_reads_it_once_with_a_cache(tmp_path, bucket_url, s3):
    synthesize(tmp_path / "h5", slides=24, patches=48, dim=8, seed=3)
    local = cfstore.open(tmp_path / "store", create=True)
    local.ingest(tmp_path / "h5", cfstore.IngestOptions(encoder="toy"), jobs=1)
    upload(local.path, bucket_url)
    (cohort,) = (row["cohort"] for row in local.info().cohorts)
    s3.faults.append(Fault("cut", "c/0/0", times=3, skip=5))
    disk = f"disk:{tmp_path / 'cache'}:100MB"
    here = train(local.path, tmp_path / "here", "--cohort", cohort, "--cache", "off")
    there = train(bucket_url, tmp_path / "there", "--cohort", cohort, "--cache", "off", "--cache", disk)
    assert s3.count("GET .*features/c/0/0") <= 24 + 3
    assert pq.read_table(tmp_path / "there" / "predictions.parquet") == pq.read_table(
        tmp_path / "here" / "predictions.parquet"
    )
    timed = ("seconds", "data_wait_seconds")
    assert [{key: value for key, value in fold.items() if key not in timed} for fold in there["folds"]] == [
        {key: value for key, value in fold.items() if key not in timed} for fold in here["folds"]
    ]
    provenance = json.loads((tmp_path / "there" / "provenance.json").read_text())
    assert provenance["store"] == bucket_url


def test_two_disks_are_refused(tmp_path):
    from cftrain.cli import main

    done = CliRunner().invoke(main, ["run", "--cohort", "C", "--cache", "disk:/a:1GB", "--cache", "disk:/b:1GB"])
    assert done.exit_code == 2
    assert "one disk:DIR:SIZE at most" in done.output
