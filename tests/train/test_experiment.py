"""A whole run on a tiny cohort: what is written, and that the numbers in it can be recomputed."""

from __future__ import annotations

import json
import shutil
from itertools import zip_longest

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from lifelines.statistics import logrank_test
from lifelines.utils import concordance_index
from safetensors.torch import load_file

import cfstore
from cfstore.runs import read_runs
from cftrain.cli import main
from cftrain.config import load_config
from cftrain.errors import ConfigError, MissingScaleError, RunError
from cftrain.experiment import Watcher, cross_validate, prepare
from cftrain.report import write_report


def configuration(small, **flags):
    return load_config(
        flags={"data.cohort": "DEMO", **{k.replace("_", ".", 1): v for k, v in flags.items()}},
        settings=small,
    )


@pytest.fixture(scope="module")
def finished(demo_store, tmp_path_factory):
    """A CrossFusion run over five folds."""
    settings = ["train.epochs=3", "train.accumulate=4", "train.select_from=2", "model.embed_dim=8", "model.n_heads=2"]
    config = load_config(flags={"data.cohort": "DEMO"}, settings=settings)
    out = tmp_path_factory.mktemp("runs") / "one"
    return cross_validate(config, demo_store.path, out, device="cpu", command=["cftrain", "run"])


@pytest.fixture
def predictions(finished):
    return pq.read_table(finished.path / "predictions.parquet").to_pandas()


def test_the_run_directory_holds_what_the_contract_says(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert {"config.toml", "provenance.json", "predictions.parquet", "summary.json"} <= names
    for fold in range(5):
        held = {path.name for path in (finished.path / f"fold_{fold}").iterdir()}
        assert held == {"metrics.jsonl", "last_epoch.safetensors", "best_epoch.safetensors"}


def test_every_slide_is_predicted_once_by_a_fold_that_did_not_train_on_its_patient(finished, predictions, demo_store):
    splits = demo_store.split_set("DEMO", "splits")
    slides = demo_store.sql("SELECT slide_id, patient_id FROM slides ORDER BY slide_id").to_pylist()
    assert sorted(predictions.slide_id) == [row["slide_id"] for row in slides]
    for row in predictions.itertuples():
        assert row.patient_id in splits.folds[row.fold].val
        assert row.patient_id not in splits.folds[row.fold].train


def test_the_c_indices_of_the_summary_are_lifelines_on_the_predictions(finished, predictions):
    for number, rows in predictions.groupby("fold"):
        fold = finished.summary["folds"][number]
        last = concordance_index(rows.time_months, -rows.risk, rows.event)
        best = concordance_index(rows.time_months, -rows.risk_best_epoch, rows.event)
        people = rows.groupby("patient_id").agg({"time_months": "first", "event": "first", "risk": "mean"})
        per_patient = concordance_index(people.time_months, -people.risk, people.event)
        assert (fold["c_index"], fold["c_index_best_epoch"]) == pytest.approx((last, best))
        assert fold["c_index_patient"] == pytest.approx(per_patient)
    folds = [fold["c_index"] for fold in finished.summary["folds"]]
    assert finished.summary["c_index"]["folds"] == folds
    assert finished.summary["c_index"]["mean"] == pytest.approx(np.mean(folds))
    assert finished.summary["c_index"]["std"] == pytest.approx(np.std(folds, ddof=1))


def test_log_rank_splits_patients_at_the_median_risk_of_their_fold(finished, predictions):
    people = predictions.groupby(["fold", "patient_id"]).agg({"time_months": "first", "event": "first", "risk": "mean"})
    high = people.risk >= people.groupby("fold").risk.transform("median")
    expected = logrank_test(
        people.time_months[high], people.time_months[~high], people.event[high], people.event[~high]
    ).p_value
    assert finished.summary["log_rank_p"] == pytest.approx(expected)


def test_both_selection_rules_are_recorded_with_their_names(finished):
    summary = finished.summary
    assert "fixed beforehand (3 epochs)" in summary["c_index"]["rule"]
    assert "optimistic" in summary["c_index_best_epoch"]["rule"]
    for fold in summary["folds"]:
        log = (finished.path / f"fold_{fold['fold']}" / "metrics.jsonl").read_text().splitlines()
        epochs = [json.loads(line) for line in log]
        assert fold["c_index"] == epochs[-1]["c_index"]
        assert fold["c_index_best_epoch"] == max(epoch["c_index"] for epoch in epochs[1:])  # select_from=2


def test_risk_is_minus_the_sum_of_survival(predictions):
    survival = predictions[[name for name in predictions if name.startswith("survival_")]].to_numpy()
    assert survival.shape[1] == 4
    assert (np.diff(survival, axis=1) <= 0).all()
    np.testing.assert_allclose(predictions.risk, -survival.sum(1), atol=1e-6)


def test_bins_come_from_the_patients_of_the_training_fold(finished, demo_store):
    splits = demo_store.split_set("DEMO", "splits")
    rows = demo_store.sql("SELECT patient_id, time_months, event FROM patients").to_pylist()
    for fold in finished.summary["folds"]:
        train = splits.folds[fold["fold"]].train
        deaths = [row["time_months"] for row in rows if row["patient_id"] in train and row["event"]]
        assert fold["bin_edges"] == pytest.approx(np.quantile(deaths, [0.25, 0.5, 0.75]))


def test_a_synthetic_cohort_is_called_synthetic_and_held_against_its_oracle(finished):
    assert finished.summary["synthetic"] is True
    reference = finished.summary["reference"]
    assert reference["oracle"]["mean"] > reference["best_single_scale"]["mean"] > 0.5


def test_provenance_says_which_data_code_and_settings(finished, demo_store):
    provenance = json.loads((finished.path / "provenance.json").read_text())
    assert provenance["store_uuid"] == demo_store.header.uuid
    assert provenance["versions"]["torch"]
    # on the CPU, with attention dropout
    assert {"attention": "blocked", "ppeg": "merged"}.items() <= provenance["kernels"].items()
    assert provenance["data_digest"].startswith("sha256:")
    assert provenance["command"] == "cftrain run"


def test_saved_weights_have_the_models_shapes(finished):
    weights = load_file(finished.path / "fold_0" / "last_epoch.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == finished.summary["n_parameters"]


def test_the_same_seed_gives_the_same_predictions_and_another_seed_others(demo_store, small, tmp_path):
    risks = []
    for i, seed in enumerate((1, 1, 2)):
        config = configuration([*small, f"train.seed={seed}"])
        cross_validate(config, demo_store.path, tmp_path / str(i), device="cpu")
        risks.append(pq.read_table(tmp_path / str(i) / "predictions.parquet")["risk"].to_numpy())
    np.testing.assert_array_equal(risks[0], risks[1])
    assert np.abs(risks[0] - risks[2]).max() > 0


@pytest.mark.slow
def test_folds_side_by_side_give_the_numbers_of_folds_one_by_one(demo_store, small, tmp_path):
    config = configuration(small)
    told = []
    watch = Watcher(on_epoch=lambda run, fold, epoch: told.append((fold, epoch.epoch)))
    one = cross_validate(config, demo_store.path, tmp_path / "one", device="cpu")
    two = cross_validate(config, demo_store.path, tmp_path / "two", device="cpu", jobs=2, watch=watch)
    np.testing.assert_allclose(two.summary["c_index"]["folds"], one.summary["c_index"]["folds"], atol=1e-9)
    tables = [pq.read_table(run.path / "predictions.parquet") for run in (one, two)]
    assert tables[0]["slide_id"] == tables[1]["slide_id"]
    np.testing.assert_allclose(tables[0]["risk"], tables[1]["risk"], atol=1e-5)
    assert sorted(told) == [(fold, epoch) for fold in range(5) for epoch in (1, 2)]


def test_a_model_whose_scales_the_encoder_lacks_is_refused_naming_what_would_run(tmp_path, demo_store, small):
    store = cfstore.open(tmp_path / "store", create=True)
    h5 = next(iter(demo_store.sql("SELECT source FROM bags WHERE scale = 20").to_pylist()))["source"]
    folder = h5.rsplit("/", 1)[0]
    store.ingest(folder, cfstore.IngestOptions(encoder="fine", scale=20, cohort="DEMO"))
    with pytest.raises(MissingScaleError, match=r"crossfusion needs 5x, 10x, 20x; encoder fine .* has 20x.*abmil"):
        cross_validate(configuration(small), store.path, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_with_files_in_it_is_left_alone(demo_store, small, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="holds files already"):
        cross_validate(configuration(small), demo_store.path, tmp_path, device="cpu")
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_device_that_is_not_here_is_refused(demo_store, small, tmp_path):
    with pytest.raises(ConfigError, match="not available here"):
        cross_validate(configuration(small), demo_store.path, tmp_path / "run", device="cuda:99")


def test_a_fold_whose_c_index_is_undefined_is_printed_as_such_and_left_out_of_the_mean(demo_store, small, tmp_path):
    alive = demo_store.sql("SELECT patient_id FROM patients WHERE NOT event ORDER BY 1").to_pylist()
    folder = tmp_path / "undefined"
    folder.mkdir()
    others = demo_store.sql("SELECT patient_id FROM patients ORDER BY 1").to_pylist()
    parts = [alive[:3], [row for row in others if row not in alive[:3]][:8]]
    for k, val in enumerate(parts):
        train = [row["patient_id"] for row in others if row not in val]
        lines = [
            f"{i},{a},{b}" for i, (a, b) in enumerate(zip_longest(train, [v["patient_id"] for v in val], fillvalue=""))
        ]
        (folder / f"splits_{k}.csv").write_text("\n".join([",train,val", *lines]) + "\n")
    own = cfstore.open(shutil.copytree(demo_store.path, tmp_path / "store"))
    own.import_splits(folder, "DEMO")
    config = configuration(small, data_splits="undefined")
    run = cross_validate(config, own.path, tmp_path / "run", device="cpu")
    first, second = run.summary["c_index"]["folds"]
    assert first is None
    assert run.summary["c_index"]["mean"] == pytest.approx(second)
    assert run.summary["c_index"]["n_undefined"] == 1
    assert "n/a" in write_report(run.path).read_text()


def test_patience_stops_early_and_the_rule_says_so(demo_store, small, tmp_path):
    config = configuration([*small, "train.epochs=30", "train.patience=2", "train.learning_rate=1e-9"])
    run = cross_validate(config, demo_store.path, tmp_path / "run", device="cpu")
    assert all(fold["epochs"] < 30 for fold in run.summary["folds"])
    assert "no fixed schedule" in run.summary["c_index"]["rule"]


# -- the command ---------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_prints_the_table_and_writes_the_report(demo_store, tmp_path):
    out = tmp_path / "run"
    done = invoke(
        "run", "--cohort", "DEMO", "--model", "abmil", "--store", demo_store.path, "--out", out, "--device", "cpu",
        "--set", "train.epochs=2", "--set", "model.hidden_dim=8", "--set", "model.attention_dim=4",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "summary.json").read_text())
    assert f"{summary['c_index']['mean']:.3f} +- {summary['c_index']['std']:.3f}" in done.stdout
    assert "SYNTHETIC DATA" in done.stdout
    assert "optimistic" in done.stdout
    assert (out / "report.html").exists()
    listed = demo_store.sql("SELECT model, c_index FROM runs", read_runs(out)).to_pylist()
    assert listed == [{"model": "abmil", "c_index": pytest.approx(summary["c_index"]["mean"])}]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--cohort", "NOPE"], 1, "cohorts here: DEMO"),
        (["--cohort", "DEMO", "--model", "crosfusion"], 1, "Did you mean crossfusion"),
        (["--cohort", "DEMO", "--encoder", "uni"], 1, "toy"),
        (["--cohort", "DEMO", "--splits", "mine"], 1, "splits"),
        (["--cohort", "DEMO", "--set", "train.epoch=3"], 1, "train.epochs"),
        ([], 2, "--cohort"),
        (["--cohort", "DEMO", "--nonsense"], 2, "nonsense"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line_and_exits_with_a_code(
    arguments, code, message, demo_store, tmp_path
):
    done = invoke("run", "--store", demo_store.path, "--out", tmp_path / "run", *arguments)
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output


def test_models_are_listed_with_scales_and_options():
    done = invoke("models", "crossfusion", "--json")
    (row,) = json.loads(done.output)
    assert row["scales"] == [5, 10, 20]
    assert row["options"]["embed_dim"] == 512
    assert "abmil" in invoke("models").output


def test_memory_beside_a_step_is_that_of_each_learner_by_its_own_size(demo_store, monkeypatch):
    """A wide model beside a narrow one: two folds of each, all in one group; a learner is 16 bytes a parameter."""
    told = {}
    monkeypatch.setattr(
        "cftrain.experiment._fitted",
        lambda config, data, device, free, others: told.setdefault("free", free) and (config, 0),
    )
    monkeypatch.setattr("cftrain.experiment.free_ram", lambda: 10**12)
    wide = ["data.cohort=DEMO", "data.cache=off", "model.name=abmil", "model.hidden_dim=64"]
    narrow = ["data.cohort=DEMO", "data.cache=off", "model.name=abmil", "model.hidden_dim=4"]
    ready = prepare([load_config(settings=wide), load_config(settings=narrow)], demo_store.path)
    n_wide, n_narrow = ready.n_parameters
    n_folds = len(ready.data.folds)
    learners = 16 * (n_folds * n_wide + (n_folds - 1) * n_narrow)
    assert told["free"] == 10**12 - learners - ready.cohort_bytes
