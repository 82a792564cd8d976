"""What `cftrain compare` and `cftrain predict` print, write and refuse."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import cfstore
from cfstore.synth import synthesize
from cftrain.cli import main
from cftrain.cli.results import METRICS
from cftrain.compare import METRICS as KNOWN
from cftrain.config import load_config
from cftrain.experiment import cross_validate


@pytest.fixture(scope="module")
def run(demo_store, tmp_path_factory):
    """A small ABMIL run of five folds, in a folder of runs."""
    settings = ["train.epochs=1", "train.accumulate=4", "train.batch_patches=400", "model.name=abmil"]
    settings += ["model.hidden_dim=8", "model.attention_dim=4"]
    config = load_config(flags={"data.cohort": "DEMO"}, settings=settings)
    return cross_validate(config, demo_store.path, tmp_path_factory.mktemp("runs") / "one", device="cpu").path


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """12 slides of other people."""
    folder = tmp_path_factory.mktemp("hospital") / "h5"
    synthesize(folder, slides=12, patches=30, dim=8, seed=21)
    for path in list(folder.rglob("*.h5")):
        path.rename(path.with_name(path.name.replace("DEMO", "HOSP")))
    for path in folder.rglob("*.csv"):
        path.write_text(path.read_text().replace("DEMO", "HOSP"))
    store = cfstore.open(folder.parent / "store", create=True)
    store.ingest(folder, cfstore.IngestOptions(encoder="toy"))
    return store


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# -- compare ---------------------------------------------------------------------------------------


def test_the_metrics_to_choose_from_are_those_of_compare():
    assert set(METRICS) == set(KNOWN)


def test_compare_prints_the_runs_mean_and_deviation(run):
    summary = json.loads((run / "summary.json").read_text())
    for metric in ("c_index_patient", "c_index_best_epoch"):
        done = invoke("compare", run.parent, "--metric", metric)
        assert done.exit_code == 0, done.output
        assert f"abmil  {summary[metric]['mean']:.3f} ± {summary[metric]['std']:.3f}" in done.stdout
        assert f"Rule: {summary[metric]['rule']}." in done.stdout
        assert "DEMO is synthetic." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "begins"),
    [
        (["--format", "text"], "Model  DEMO"),
        (["--format", "markdown"], "| Model | DEMO |"),
        (["--format", "latex"], "\\begin{table}"),
        (["--format", "csv"], "model,encoder,preset,settings,cohort"),
        (["--format", "json"], "{"),
        (["--json"], "{"),
    ],
)
def test_compare_prints_in_the_asked_format(run, arguments, begins):
    assert invoke("compare", run, *arguments).stdout.startswith(begins)


@pytest.mark.parametrize(
    ("name", "begins"),
    [("t.md", "| Model"), ("t.tex", "\\begin"), ("t.csv", "model,"), ("t.json", "{"), ("t", "Model")],
)
def test_compare_writes_the_format_that_the_files_name_says(run, tmp_path, name, begins):
    done = invoke("compare", run, "-o", tmp_path / name)
    assert (done.exit_code, done.stdout) == (0, "")
    assert (tmp_path / name).read_text().startswith(begins)


def test_compare_reads_folders_of_runs_also_where_they_hold_predictions(run, hospital, tmp_path):
    folder = tmp_path / "runs"
    shutil.copytree(run, folder / "one")
    shutil.copytree(run, folder / "two")
    assert invoke("predict", folder / "one", "--store", hospital.path, "--device", "cpu").exit_code == 0
    rows = list(csv.DictReader(io.StringIO(invoke("compare", folder, "--format", "csv").stdout)))
    assert [row["n"] for row in rows] == ["10"]  # folds of two runs


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "RUNS"),
        (["nowhere"], 2, "does not exist"),
        (["{run}", "--metric", "auc"], 2, "c_index_patient_best_epoch"),
        (["{run}", "--json", "--format", "csv"], 2, "give one of them"),
        (["{empty}"], 1, "no finished run in it"),
        (["{run}", "-o", "{empty}/no/such/folder.md"], 1, "cannot be written"),
    ],
)
def test_compare_says_what_is_wrong(run, tmp_path, arguments, code, message):
    done = invoke("compare", *[argument.format(run=run, empty=tmp_path) for argument in arguments])
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output


# -- predict ---------------------------------------------------------------------------------------


def test_predict_prints_a_table_and_writes_the_files(run, hospital, tmp_path):
    out = tmp_path / "out"
    done = invoke("predict", run, "--store", hospital.path, "--out", out, "--device", "cpu", "--replicates", 20)
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "prediction.json").read_text())
    found = summary["c_index_patient"]
    assert f"{found['value']:.3f}  ({found['lower']:.3f} to {found['upper']:.3f})" in done.stdout
    assert f"predicted   12 slides of {summary['n_patients']} patients; last epoch of 5 folds" in done.stdout
    for fold in summary["folds"]:
        assert f"fold {fold['fold']} " in done.stdout
    assert "SYNTHETIC DATA" in done.stdout
    assert str(out / "predictions.parquet") in done.stdout
    assert "12 of 12 slides" in done.stderr
    assert "cohort HOSP" in done.stderr
    assert pq.read_table(out / "predictions.parquet").num_rows == 12
    assert "\033" not in done.output


def test_predict_prints_the_summary_as_json_alone(run, hospital, tmp_path):
    done = invoke("predict", run, "--store", hospital.path, "--out", tmp_path / "out", "--device", "cpu", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "prediction.json").read_text())


def test_predict_says_where_it_is_no_validation_or_another_encoder_or_without_labels(run, demo_store, tmp_path):
    own = cfstore.open(tmp_path / "store", create=True)
    source = demo_store.sql("SELECT source FROM bags WHERE scale = 20 LIMIT 1").to_pylist()[0]["source"]
    own.ingest(source.rsplit("/", 1)[0], cfstore.IngestOptions(encoder="uni", scale=20, cohort="DEMO"))
    arguments = ["predict", run, "--store", own.path, "--out", tmp_path / "out", "--device", "cpu"]
    assert "name it with --encoder" in invoke(*arguments).output
    arguments += ["--encoder", "uni"]
    refused = invoke(*arguments)
    assert refused.exit_code == 1
    assert "trained on 24 of the 24 patients (or slides of unknown patients)" in refused.output
    assert "--allow-training-patients" in refused.output
    done = invoke(*arguments, "--allow-training-patients")
    assert done.exit_code == 0, done.output
    assert "NO VALIDATION" in done.stdout
    assert "encoder     uni, where the run was trained on toy" in done.stdout
    assert "unknown     the patients of 24 slides" in done.stdout
    assert "labels      none" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--store or with --shards"),
        (["--store", "{store}", "--shards", "x.tar"], 2, "one of them"),
        (["--store", "nowhere"], 1, "no store here"),
        (["--shards", "nowhere.tar"], 1, "no tar file there"),
        (["--store", "{store}", "--cohort", "NOPE"], 1, "cohorts here: HOSP"),
        (["--store", "{store}", "--where", "nonsense > 1"], 1, "no column 'nonsense'"),
        (["--store", "{store}", "--device", "cuda:99"], 1, "not available here"),
        (["--store", "{store}", "--out", "{run}"], 1, "is there already"),
    ],
)
def test_predict_says_what_is_wrong(run, hospital, arguments, code, message):
    named = [argument.format(run=run, store=hospital.path) for argument in arguments]
    done = invoke("predict", run, *named)
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["compare", "predict"])
def test_help_loads_no_torch_and_shows_examples(command):
    code = f"import sys\ntry:\n    from cftrain.cli import main; main(['{command}', '--help'])\n"
    code += "except SystemExit:\n    pass\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch was imported"
    assert f"cftrain {command} runs/" in done.stdout
