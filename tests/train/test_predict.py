"""A trained run on other slides: against models loaded and shown the bags by hand, and numbers from lifelines."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lifelines.statistics import logrank_test
from lifelines.utils import concordance_index
from sksurv.metrics import integrated_brier_score

import cfstore
from cfstore.synth import synthesize
from cftrain.checkpoints import load_model
from cftrain.config import load_config
from cftrain.errors import ConfigError, LeakageError, MissingScaleError, RunError, ShapeError
from cftrain.experiment import cross_validate
from cftrain.models import BagBatch
from cftrain.prediction import PredictionWatcher, predict_run

SMALL = ["train.epochs=2", "train.accumulate=4", "train.select_from=1", "train.learning_rate=0.01"]
SMALL.append("train.batch_patches=400")  # several slides in a forward pass, not all
CROSSFUSION = ("model.embed_dim=8", "model.n_heads=2", "train.epochs=1", "train.learning_rate=1e-3")
ABMIL = ("model.name=abmil", "model.hidden_dim=8", "model.attention_dim=4")


@pytest.fixture(scope="module")
def trained_on(demo_store, tmp_path_factory):
    """The demo's store with two folds."""
    store = cfstore.open(shutil.copytree(demo_store.path, tmp_path_factory.mktemp("own") / "store"))
    store.make_splits(2, "DEMO", name="two")
    return store


@pytest.fixture(scope="module")
def train(trained_on, tmp_path_factory):
    """A run of two folds and two epochs with these settings, made once."""
    made = {}

    def run(*settings):
        if settings not in made:
            flags = {"data.cohort": "DEMO", "data.splits": "two"}
            config = load_config(flags=flags, settings=[*SMALL, *settings])
            out = tmp_path_factory.mktemp("runs") / "run"
            made[settings] = cross_validate(config, trained_on.path, out, device="cpu").path
        return made[settings]

    return run


@pytest.fixture(scope="module")
def run(train):
    """A model of one scale, the quicker one."""
    return train(*ABMIL)


@pytest.fixture(scope="module")
def fusion(train):
    """A model of three scales."""
    return train(*CROSSFUSION)


def feature_files(folder, name="HOSP", *, slides=12, dim=8, seed=11):
    """A synthetic cohort of other people, called `name` in place of DEMO."""
    synthesize(folder, slides=slides, patches=40, dim=dim, seed=seed)
    for path in list(folder.rglob("*.h5")):
        path.rename(path.with_name(path.name.replace("DEMO", name)))
    for path in folder.rglob("*.csv"):
        path.write_text(path.read_text().replace("DEMO", name))
    return folder


def without_labels(folder):
    (folder / "clinical.csv").unlink()
    shutil.rmtree(folder / "splits")
    return folder


def ingested(folder, encoder="toy", **options):
    store = cfstore.open(folder.with_name(f"{folder.name}-store"), create=True)
    store.ingest(folder, cfstore.IngestOptions(encoder=encoder, **options))
    return store


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """26 slides of 24 patients whom no run has seen, with labels."""
    return ingested(feature_files(tmp_path_factory.mktemp("hospital") / "h5", slides=26))


@pytest.fixture(scope="module")
def predicted(run, hospital, tmp_path_factory):
    """The run on the hospital, with 40 resamples."""
    return predict_run(run, hospital.path, tmp_path_factory.mktemp("out") / "a", device="cpu", replicates=40)


def rows_of(done):
    return pq.read_table(done.path / "predictions.parquet").to_pandas()


def by_hand(run, fold, store, slide_id, epoch="last"):
    """The output of one fold's model for one slide, shown alone."""
    model = load_model(run / f"fold_{fold}" / f"{epoch}_epoch.safetensors")
    bags = store.slide(slide_id).bags
    batch = BagBatch.pack([slide_id], [{s: torch.from_numpy(bags[s].features) for s in model.scales}])
    with torch.no_grad():
        return model(batch)


def curve(survival, edges, months):
    """Straight lines of log survival between 0 and the edges."""
    log = np.log([1, *survival[: len(edges)]])
    return np.exp(np.interp(months, [0, *edges], log))


def edges_of(run):
    return [fold["bin_edges"] for fold in json.loads((run / "summary.json").read_text())["folds"]]


# -- what is predicted -----------------------------------------------------------------------------


def test_every_slide_is_predicted_by_the_model_of_each_fold_as_if_it_were_shown_alone(
    run, fusion, hospital, predicted, tmp_path
):
    held = hospital.sql("SELECT slide_id, patient_id FROM slides ORDER BY 1").to_pydict()
    of_fusion = predict_run(fusion, hospital.path, tmp_path / "out", device="cpu", replicates=5)
    for own, done in ((run, predicted), (fusion, of_fusion)):
        rows = rows_of(done)
        assert rows.slide_id.tolist() == held["slide_id"]
        assert rows.patient_id.tolist() == held["patient_id"]
        for fold in (0, 1):
            expected = [float(by_hand(own, fold, hospital, slide).risk) for slide in rows.slide_id]
            assert np.ptp(expected) > 1e-4
            np.testing.assert_allclose(rows[f"risk_fold_{fold}"], expected, atol=np.ptp(expected) / 100)


def test_the_risk_is_the_mean_of_the_folds_risks_on_the_scale_of_their_own_validated_slides(run, predicted):
    rows = rows_of(predicted)
    own = pq.read_table(run / "predictions.parquet").to_pandas().groupby("fold").risk.agg(["mean", "std"])
    z = [(rows[f"risk_fold_{fold}"] - own["mean"][fold]) / own["std"][fold] for fold in (0, 1)]
    np.testing.assert_allclose(rows.risk, (z[0] + z[1]) / 2, rtol=1e-9)


def test_survival_is_the_mean_of_the_folds_curves_up_to_the_first_end_of_one(run, hospital, predicted):
    rows, edges = rows_of(predicted), edges_of(run)
    months = predicted.summary["survival_months"]
    end = min(own[-1] for own in edges)
    assert months == [6.0 * step for step in range(1, int(end // 6) + 1)]
    for row in rows.head(4).to_dict("records"):
        survival = [by_hand(run, fold, hospital, row["slide_id"]).survival[0].numpy() for fold in (0, 1)]
        expected = np.mean([curve(own, at, months) for own, at in zip(survival, edges, strict=True)], axis=0)
        np.testing.assert_allclose([row[f"survival_{month:g}"] for month in months], expected, atol=1e-5)


def test_on_its_own_slides_a_folds_risk_is_that_of_the_run(run, trained_on, tmp_path):
    before = pq.read_table(run / "predictions.parquet").to_pandas().set_index("slide_id")
    for weights, column in (("last", "risk"), ("best", "risk_best_epoch")):
        out = tmp_path / weights
        done = predict_run(run, trained_on.path, out, weights=weights, device="cpu", allow_training_patients=True)
        rows = rows_of(done).set_index("slide_id").loc[before.index]
        own = np.where(before.fold == 0, rows.risk_fold_0, rows.risk_fold_1)
        np.testing.assert_allclose(own, before[column], atol=1e-5)
        assert done.summary["weights"] == f"{weights} epoch"
    assert "optimistic" in done.summary["rule"]


def test_a_cox_model_predicts_risks_alone(train, hospital, tmp_path):
    run = train(*ABMIL, "train.loss=cox")
    done = predict_run(run, hospital.path, tmp_path / "out", device="cpu", replicates=5)
    rows = rows_of(done)
    assert not [name for name in rows if name.startswith("survival")]
    assert done.summary["survival_months"] == []
    assert done.summary["brier"] is done.summary["calibration"] is done.summary["survival"] is None
    expected = [float(by_hand(run, 1, hospital, slide).logits) for slide in rows.slide_id]
    np.testing.assert_allclose(rows.risk_fold_1, expected, atol=1e-5)


def test_a_run_on_patients_shows_its_models_all_slides_of_a_patient_as_one_bag(train, hospital, tmp_path):
    run = train(*ABMIL, "data.unit=patient")
    done = predict_run(run, hospital.path, tmp_path / "out", device="cpu", replicates=5)
    rows = rows_of(done)
    assert len(rows) == 26
    twice = rows[rows.patient_id.duplicated(keep=False)]
    assert len(twice) == 4
    model = load_model(run / "fold_0" / "last_epoch.safetensors")
    for patient, own in twice.groupby("patient_id"):
        bags = [hospital.slide(slide).bags for slide in own.slide_id]
        joined = {s: torch.from_numpy(np.concatenate([bag[s].features for bag in bags])) for s in model.scales}
        with torch.no_grad():
            expected = float(model(BagBatch.pack([patient], [joined])).risk)
        np.testing.assert_allclose(own.risk_fold_0, [expected] * 2, atol=1e-5)


def test_tars_are_predicted_as_the_store_they_came_from(run, hospital, predicted, tmp_path):
    hospital.export(tmp_path / "tars", shard_slides=10)
    done = predict_run(run, None, tmp_path / "out", shards=str(tmp_path / "tars"), device="cpu", replicates=5)
    one, other = rows_of(predicted), rows_of(done)
    assert one.drop(columns=["time_months"]).columns.tolist() == other.drop(columns=["time_months"]).columns.tolist()
    assert one.slide_id.tolist() == other.slide_id.tolist()
    np.testing.assert_allclose(one.risk, other.risk, atol=1e-4)
    assert done.summary["provenance"]["tars"]


# -- with labels -----------------------------------------------------------------------------------


def people_of(rows):
    """Patients in the order of their first slide."""
    means = {name: "mean" for name in rows if name.startswith(("risk", "survival"))}
    return rows.groupby("patient_id", sort=False).agg({"time_months": "first", "event": "first", **means})


def test_labels_are_the_clinical_tables(hospital, predicted):
    rows = rows_of(predicted)
    clinical = {row["patient_id"]: row for row in hospital.sql("SELECT * FROM patients").to_pylist()}
    assert rows.time_months.tolist() == [clinical[patient]["time_months"] for patient in rows.patient_id]
    assert rows.event.tolist() == [clinical[patient]["event"] for patient in rows.patient_id]
    assert predicted.summary["n_events"] == sum(row["event"] for row in clinical.values())


def test_c_indices_are_those_of_lifelines(predicted):
    rows, summary = rows_of(predicted), predicted.summary
    people = people_of(rows)
    assert summary["c_index"]["value"] == pytest.approx(concordance_index(rows.time_months, -rows.risk, rows.event))
    assert summary["c_index_patient"]["value"] == pytest.approx(
        concordance_index(people.time_months, -people.risk, people.event)
    )
    for fold in summary["folds"]:
        risk = people[f"risk_fold_{fold['fold']}"]
        assert fold["c_index_patient"] == pytest.approx(concordance_index(people.time_months, -risk, people.event))


def test_intervals_are_those_of_patients_copied_with_all_their_slides(predicted):
    rows, summary = rows_of(predicted), predicted.summary
    people = people_of(rows)
    drawn = np.random.default_rng(0).integers(0, len(people), size=(40, len(people)))  # as bootstrap_weights draws
    per_patient, per_slide = [], []
    for chosen in drawn:
        own = people.iloc[chosen]
        per_patient.append(concordance_index(own.time_months, -own.risk, own.event))
        slides = [rows[rows.patient_id == patient] for patient in own.index]
        columns = {name: np.concatenate([part[name] for part in slides]) for name in ("time_months", "risk", "event")}
        per_slide.append(concordance_index(columns["time_months"], -columns["risk"], columns["event"].astype(bool)))
    for metric, found in (("c_index_patient", per_patient), ("c_index", per_slide)):
        expected = np.quantile(found, [0.025, 0.975])
        assert [summary[metric][limit] for limit in ("lower", "upper")] == pytest.approx(expected)


def test_log_rank_splits_the_patients_at_their_median_risk(predicted):
    people = people_of(rows_of(predicted))
    high = people.risk >= people.risk.median()
    parts = [people[high], people[~high]]
    expected = logrank_test(*(part.time_months for part in parts), *(part.event for part in parts))
    assert predicted.summary["log_rank"]["p"] == pytest.approx(expected.p_value)


def survival_by_hand(run, store, rows, months):
    """Mean over folds and a patient's slides of the curves at these months: [P, T]."""
    edges = edges_of(run)
    found = []
    for slide in rows.slide_id:
        outputs = [by_hand(run, fold, store, slide).survival[0].numpy() for fold in (0, 1)]
        found.append(np.mean([curve(own, at, months) for own, at in zip(outputs, edges, strict=True)], axis=0))
    patients = people_of(rows).index
    return np.array([np.mean(np.array(found)[(rows.patient_id == patient).to_numpy()], axis=0) for patient in patients])


def test_the_brier_score_is_that_of_scikit_survival(run, hospital, predicted):
    rows, brier = rows_of(predicted), predicted.summary["brier"]
    people = people_of(rows)
    deaths = people.time_months[people.event]
    last = min(*(own[-1] for own in edges_of(run)), np.quantile(deaths, 0.8))
    months = np.linspace(people.time_months.min(), last, 100)
    assert (brier["from_months"], brier["to_months"]) == pytest.approx((months[0], months[-1]))
    labels = np.array(
        list(zip(people.event, people.time_months, strict=True)), dtype=[("event", bool), ("time", float)]
    )
    expected = integrated_brier_score(labels, labels, survival_by_hand(run, hospital, rows, months), months)
    assert brier["value"] == pytest.approx(expected, abs=1e-5)


def test_calibration_compares_the_predicted_with_the_observed_deaths(predicted):
    rows, calibration = rows_of(predicted), predicted.summary["calibration"]
    people = people_of(rows)
    horizon = calibration["horizon_months"]
    assert horizon == max(month for month in (12, 24, 36, 60) if f"survival_{month}" in rows)
    points = calibration["points"]
    assert sum(point["n"] for point in points) == len(people)
    mean = sum(point["n"] * point["predicted"] for point in points) / len(people)
    assert mean == pytest.approx(1 - people[f"survival_{horizon:g}"].mean())


def test_d_calibration_counts_patients_by_the_survival_at_the_end_of_their_follow_up_or_of_the_curves(
    run, hospital, predicted
):
    rows = rows_of(predicted)
    people = people_of(rows)
    reach = min(own[-1] for own in edges_of(run))
    expected = np.zeros(10)
    for row, (time, event) in enumerate(zip(people.time_months, people.event, strict=True)):
        reached = survival_by_hand(run, hospital, rows[rows.patient_id == people.index[row]], min(time, reach))[0]
        if event and time <= reach:
            expected[int(10 * reached)] += 1
        else:  # uniform below
            edges = np.minimum(np.arange(11) / 10, reached)
            expected += np.diff(edges) / reached
    assert (people.event & (people.time_months > reach)).any()
    np.testing.assert_allclose(predicted.summary["calibration"]["d_calibration"]["counts"], expected, atol=1e-3)


def test_the_same_prediction_gives_the_same_numbers(run, hospital, predicted, tmp_path):
    again = predict_run(run, hospital.path, tmp_path / "out", device="cpu", replicates=40)
    left_out = ("seconds", "provenance")
    assert {k: v for k, v in again.summary.items() if k not in left_out} == {
        k: v for k, v in predicted.summary.items() if k not in left_out
    }


# -- without labels --------------------------------------------------------------------------------


def test_a_store_without_any_clinical_table_is_predicted(run, tmp_path):
    store = ingested(without_labels(feature_files(tmp_path / "plain")))
    done = predict_run(run, store.path, tmp_path / "out", device="cpu")
    table = pq.read_table(done.path / "predictions.parquet")
    assert table.num_rows == 12
    for name in ("patient_id", "time_months", "event"):
        assert table[name].null_count == 12
    slide = table["slide_id"][5].as_py()
    assert table["risk_fold_0"][5].as_py() == pytest.approx(float(by_hand(run, 0, store, slide).risk), abs=1e-5)
    summary = done.summary
    assert summary["c_index"] == {"value": None, "lower": None, "upper": None}
    assert summary["log_rank"] is summary["brier"] is summary["calibration"] is None
    assert (summary["n_slides"], summary["n_labelled_slides"], summary["n_patients"]) == (12, 0, 0)
    assert summary["n_slides_of_unknown_patients"] == 12
    assert summary["survival_months"]


def test_slides_without_a_label_are_predicted_beside_those_with_one(run, hospital, predicted, tmp_path):
    folder = feature_files(tmp_path / "h5", slides=26)
    rows = list(csv.reader((folder / "clinical.csv").read_text().splitlines()))
    with (folder / "clinical.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows[:15])  # 14 slides
    shutil.rmtree(folder / "splits")
    done = predict_run(run, ingested(folder, cohort="HOSP").path, tmp_path / "out", device="cpu", replicates=5)
    one, other = rows_of(predicted), rows_of(done)
    assert one.slide_id.tolist() == other.slide_id.tolist()
    np.testing.assert_allclose(one.risk, other.risk, atol=1e-5)
    known = other.slide_id.isin([row[2].removesuffix(".svs") for row in rows[1:15]])
    assert known.sum() == done.summary["n_labelled_slides"] == 14
    assert other.event.notna().tolist() == other.time_months.notna().tolist() == known.tolist()
    labelled = other[known]
    expected = concordance_index(labelled.time_months, -labelled.risk, labelled.event.astype(bool))
    assert done.summary["c_index"]["value"] == pytest.approx(expected)


def test_a_patient_without_follow_up_is_known_by_a_barcode_and_apart_from_others(train, tmp_path):
    run = train(*ABMIL, "data.unit=patient")
    store = ingested(without_labels(feature_files(tmp_path / "plain", "TCGA-HO")))
    done = predict_run(run, store.path, tmp_path / "out", device="cpu")
    rows = rows_of(done)
    assert rows.patient_id.tolist() == [slide.rsplit("-", 1)[0] for slide in rows.slide_id]
    assert (rows.groupby("patient_id").risk.nunique() == 1).all()
    assert rows.risk.nunique() == rows.patient_id.nunique() == done.summary["n_patients"]


def test_patients_of_one_id_in_two_cohorts_are_two_persons(run, make_cohort, store, tmp_path):
    for cohort in ("A", "B"):
        slides = tuple(f"{cohort}{number}" for number in (1, 2))
        make_cohort(tmp_path / cohort, slides, dim=8)
        table = [f"{cohort},P{number},{cohort}{number}.svs,," for number in (1, 2)]
        table.append(f"{cohort},Q,{cohort}9.svs,10,0")
        head = "cohort,case_id,slide_id,survival_months,censorship"
        (tmp_path / cohort / "clinical.csv").write_text("\n".join([head, *table]) + "\n")
        store.ingest(tmp_path / cohort, cfstore.IngestOptions(encoder="toy"))
    done = predict_run(run, store.path, tmp_path / "out", where="cohort IN ('A', 'B')", device="cpu")
    assert rows_of(done).patient_id.tolist() == ["A/P1", "A/P2", "B/P1", "B/P2"]
    alone = predict_run(run, store.path, tmp_path / "alone", cohort="A", device="cpu")
    assert rows_of(alone).patient_id.tolist() == ["P1", "P2"]
    with pytest.raises(cfstore.SlideNotFoundError, match="cohorts A, B"):
        predict_run(run, store.path, tmp_path / "none", device="cpu")


def test_a_condition_chooses_the_slides(run, hospital, tmp_path):
    where = "patient_id < 'HOSP-0006'"
    done = predict_run(run, hospital.path, tmp_path / "out", where=where, device="cpu", replicates=5)
    expected = hospital.sql(f"SELECT slide_id FROM slides WHERE {where} ORDER BY 1").to_pydict()["slide_id"]
    assert rows_of(done).slide_id.tolist() == expected
    assert done.summary["where"] == done.summary["provenance"]["where"] == where


# -- what is refused or left out -------------------------------------------------------------------


def test_slides_without_a_scale_are_left_out_and_named_labelled_or_not(fusion, tmp_path):
    folder = without_labels(feature_files(tmp_path / "plain"))
    (folder / "x5" / "h5_files" / "HOSP-0002-01.h5").unlink()
    done = predict_run(fusion, ingested(folder).path, tmp_path / "out", device="cpu")
    assert done.summary["excluded"] == {"no 5x": 1}
    assert done.summary["excluded_slides"] == {"no 5x": ["HOSP-0002-01"]}
    assert "HOSP-0002-01" not in rows_of(done).slide_id.tolist()

    folder = feature_files(tmp_path / "labelled")
    (folder / "x5" / "h5_files" / "HOSP-0003-01.h5").unlink()
    done = predict_run(fusion, ingested(folder).path, tmp_path / "other", device="cpu", replicates=5)
    assert done.summary["excluded_slides"] == {"no 5x": ["HOSP-0003-01"]}


def test_an_encoder_without_a_scale_of_the_model_is_refused(fusion, tmp_path):
    folder = without_labels(feature_files(tmp_path / "plain"))
    shutil.rmtree(folder / "x5")
    with pytest.raises(MissingScaleError, match=r"crossfusion needs 5x, 10x, 20x; encoder toy .* has 10x, 20x"):
        predict_run(fusion, ingested(folder).path, tmp_path / "out", device="cpu")


def test_a_model_of_one_scale_asks_for_no_other(run, tmp_path):
    folder = without_labels(feature_files(tmp_path / "plain"))
    shutil.rmtree(folder / "x5")
    assert predict_run(run, ingested(folder).path, tmp_path / "out", device="cpu").summary["scales"] == [20]


def test_another_encoder_is_refused_unless_it_is_named(run, tmp_path):
    store = ingested(without_labels(feature_files(tmp_path / "plain")), encoder="uni")
    with pytest.raises(
        ConfigError, match=r"trained on encoder toy; .* has no encoder toy, it has uni \(5x, 10x, 20x\)"
    ):
        predict_run(run, store.path, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    done = predict_run(run, store.path, tmp_path / "out", encoder="uni", device="cpu")
    assert (done.summary["encoder"], done.summary["trained_on"]["encoder"]) == ("uni", "toy")
    assert done.summary["encoder_is_the_runs"] is False
    with pytest.raises(ConfigError, match="has no encoder conch"):
        predict_run(run, store.path, tmp_path / "other", encoder="conch", device="cpu")


def test_features_of_another_width_are_refused_with_both_widths(run, tmp_path):
    store = ingested(without_labels(feature_files(tmp_path / "plain", dim=16)))
    with pytest.raises(ShapeError, match=r"trained on toy with D=8; toy in .* has D=16"):
        predict_run(run, store.path, tmp_path / "out", device="cpu")


def test_patients_that_the_run_was_trained_on_are_refused_unless_allowed(run, tmp_path):
    store = ingested(feature_files(tmp_path / "h5", "DEMO", seed=12))
    known = store.sql("SELECT DISTINCT patient_id FROM slides ORDER BY 1").to_pydict()["patient_id"]
    message = rf"trained on {len(known)} of the {len(known)} patients of cohort DEMO \({known[0]}, {known[1]}, "
    with pytest.raises(LeakageError, match=message):
        predict_run(run, store.path, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    done = predict_run(run, store.path, tmp_path / "out", device="cpu", allow_training_patients=True, replicates=5)
    assert done.summary["training_patients"] == known
    assert done.summary["n_training_patients"] == len(known)


def test_slides_of_the_run_are_known_again_where_nobody_says_whose_they_are(run, tmp_path):
    store = ingested(without_labels(feature_files(tmp_path / "plain", "DEMO", seed=12)))
    with pytest.raises(LeakageError, match="DEMO-0001-01"):
        predict_run(run, store.path, tmp_path / "out", device="cpu")


def test_new_patients_are_no_leak(predicted):
    assert predicted.summary["n_training_patients"] == 0


def test_a_directory_that_is_there_is_left_alone(run, hospital, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match=f"{tmp_path}: is there already"):
        predict_run(run, hospital.path, tmp_path, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("summary.json", "no summary.json: not a finished run"),
        ("config.toml", "no config.toml: not a finished run"),
        ("fold_1/last_epoch.safetensors", "fold_1/last_epoch.safetensors: no such weights"),
    ],
)
def test_an_unfinished_run_is_refused_naming_what_it_lacks(run, hospital, tmp_path, gone, message):
    own = shutil.copytree(run, tmp_path / "run")
    (own / gone).unlink()
    with pytest.raises(RunError, match=message):
        predict_run(own, hospital.path, tmp_path / "out", device="cpu")


def test_a_fold_whose_risks_do_not_vary_has_no_scale_and_is_named(run, hospital, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    rows = pq.read_table(own / "predictions.parquet").to_pandas()
    rows.loc[rows.fold == 1, "risk"] = -2.0
    pq.write_table(pa.Table.from_pandas(rows), own / "predictions.parquet")
    with pytest.raises(RunError, match="fold 1's 13 validated slides do not vary"):
        predict_run(own, hospital.path, tmp_path / "out", device="cpu")


# -- what is written -------------------------------------------------------------------------------


def test_the_summary_says_what_was_applied_to_what(run, hospital, trained_on, predicted):
    summary = json.loads((predicted.path / "prediction.json").read_text())
    assert summary == predicted.summary
    assert (summary["run"], summary["source"], summary["cohort"]) == (str(run), str(hospital.path), "HOSP")
    provenance = summary["provenance"]
    assert provenance["store_uuid"] == hospital.header.uuid
    assert provenance["run"]["store_uuid"] == trained_on.header.uuid
    assert provenance["versions"]["torch"]
    for fold in summary["folds"]:
        digest = hashlib.sha256((run / fold["weights"]).read_bytes()).hexdigest()
        assert fold["digest"] == f"sha256:{digest}"
    assert {path.name for path in predicted.path.parent.iterdir()} == {"a"}  # nothing else is left behind


def test_predictions_lie_in_the_run_unless_told_otherwise_and_are_told_of(run, hospital, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    told = []
    watch = PredictionWatcher(
        lambda trained, target: told.append((len(trained.members), len(target.data.examples))),
        lambda done, total: told.append((done, total)),
    )
    done = predict_run(run, hospital.path, device="cpu", replicates=5, watch=watch)
    assert done.path == run / "predictions" / "h5-store-HOSP"
    assert told[0] == (2, 26)
    assert told[-1] == (26, 26)
    best = predict_run(run, hospital.path, device="cpu", replicates=5, weights="best")
    assert best.path.name == "h5-store-HOSP-best"
