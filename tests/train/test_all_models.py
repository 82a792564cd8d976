"""Every model by one command, on the same folds, then in one table; and what a run of each can be asked afterwards."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import cfstore
from cftrain.cli import main
from cftrain.heatmap import HeatmapOptions, heatmap_run
from cftrain.prediction import predict_run
from cftrain.zoo import MODELS

SMALL = """
[train]
epochs = 1
accumulate = 4
select_from = 1

[abmil]
hidden_dim = 8
attention_dim = 4
[dsmil]
attention_dim = 4
[transmil]
embed_dim = 8
n_heads = 2
n_landmarks = 4
[deepgraphsurv]
hidden_dim = 8
[patch-gcn]
hidden_dim = 8
[scmil]
filter_dim = 8
attention_dim = 4
[protosurv]
embed_dim = 12
mlp_dim = 8
graph_dim = 8
n_prototypes = 2
n_classes = 2
[zoommil]
hidden_dim = 8
attention_dim = 4
n_zoomed = 3
[mustmil]
embed_dim = 8
attention_dim = 4
[csmil]
embed_dim = 8
hidden_dim = 4
[crossfusion]
embed_dim = 8
n_heads = 2
[crossfusion-concat]
embed_dim = 8
n_heads = 2
[crossfusion-single]
embed_dim = 8
n_heads = 2
"""


@pytest.fixture(scope="module")
def store(demo_store, tmp_path_factory):
    """The demo with two folds."""
    copied = cfstore.open(shutil.copytree(demo_store.path, tmp_path_factory.mktemp("all") / "store"))
    copied.make_splits(2, "DEMO", name="two")
    return copied


@pytest.fixture(scope="module")
def told(store, tmp_path_factory):
    """What one command says and writes: all models, two folds, one epoch."""
    base = tmp_path_factory.mktemp("runs")
    (base / "small.toml").write_text(SMALL)
    arguments = ["run", "--store", store.path, "--cohort", "DEMO", "--splits", "two", "--model", "all"]
    arguments += ["--config", base / "small.toml", "--out", base / "all", "--device", "cpu"]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return base / "all", result


def test_one_command_trains_every_model_and_derives_what_they_need_first(store, told):
    out, result = told
    assert {path.parent.name for path in out.glob("*/summary.json")} == set(MODELS)
    assert "left out" not in result.stderr
    assert "deriving graphs, parents or means that the store lacks: 24 of 24 slides" in result.stderr
    derived = store.sql("SELECT derivation, count(*) AS n FROM derived GROUP BY 1 ORDER BY 1").to_pylist()
    names = ["mean-20x", "nearest8-20x", "parents-10x-5x", "parents-20x-10x", "parents-20x-5x", "similar8-20x"]
    assert derived == [{"derivation": name, "n": 24} for name in names]
    trained_on = (
        "SELECT count(*) AS n_slides FROM slides JOIN splits USING (cohort, patient_id) "
        "WHERE name = 'two' AND part = 'train' GROUP BY fold ORDER BY 1"
    )
    kept = store.sql("SELECT n_slides FROM prototypes ORDER BY 1").to_pylist()
    assert kept == store.sql(trained_on).to_pylist()  # one set of centres for each training fold


def test_all_models_are_measured_on_the_same_patients(told):
    out, _ = told
    summaries = [json.loads(path.read_text()) for path in out.glob("*/summary.json")]
    assert len({(each["n_patients"], each["n_events"], each["splits"]) for each in summaries}) == 1
    assert all(0 <= each["c_index_patient"]["mean"] <= 1 for each in summaries)


def test_one_table_compares_them(told):
    out, _ = told
    result = CliRunner().invoke(main, ["compare", str(out), "--format", "csv", "--replicates", "10"])
    assert result.exit_code == 0, result.output
    assert {line.split(",")[0] for line in result.stdout.splitlines()[1:]} >= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_of_any_model_predicts_what_it_predicted_for_its_own_slides(store, told, tmp_path, name):
    run = told[0] / name
    predict_run(run, store.path, tmp_path / "out", device="cpu", replicates=5, allow_training_patients=True)
    found = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pandas().set_index("slide_id")
    own = pq.read_table(run / "predictions.parquet").to_pandas()
    for fold, rows in own.groupby("fold"):
        expected = rows.set_index("slide_id").risk
        assert (found.loc[expected.index, f"risk_fold_{fold}"] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_slide_is_explained_by_any_model_with_the_maps_it_lists(store, told, tmp_path, name):
    slide = store.sql("SELECT min(slide_id) AS slide FROM slides").to_pylist()[0]["slide"]
    done = heatmap_run(told[0] / name, slide, tmp_path / "map", options=HeatmapOptions(check=True))
    about = json.loads((done.path / "heatmap.json").read_text())
    assert set(about["maps"]) >= set(MODELS[name].maps)
