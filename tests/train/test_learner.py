"""What a learner does with a step that is not finite, and when it stops early."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import cfstore
from cftrain.config import load_config
from cftrain.errors import ConfigError, NonFiniteError
from cftrain.experiment import Watcher, cross_validate
from cftrain.models.abmil import ABMIL

SETTINGS = ["train.epochs=2", "train.accumulate=4", "train.select_from=1", "train.sampling=uniform"]
SMALL = ["model.name=abmil", "model.hidden_dim=8", "model.attention_dim=4"]


def config(*more):
    return load_config(flags={"data.cohort": "DEMO"}, settings=[*SETTINGS, *SMALL, *more])


@pytest.fixture
def poison(demo_store, monkeypatch):
    """One slide whose loss is NaN while it is trained on; returns its name."""
    name = demo_store.sql("SELECT slide_id FROM slides ORDER BY slide_id LIMIT 1 OFFSET 6").to_pylist()[0]["slide_id"]
    plain = ABMIL.logits

    def logits(self, batch):
        found = plain(self, batch)
        if not self.training or name not in batch.slide_ids:
            return found
        row = torch.tensor([[each == name] for each in batch.slide_ids])
        return torch.where(row, found * torch.nan, found)

    monkeypatch.setattr(ABMIL, "logits", logits)
    return name


def test_a_loss_that_is_nan_stops_the_run_and_names_fold_epoch_slide_and_setting(demo_store, poison, tmp_path):
    with pytest.raises(NonFiniteError, match=rf"fold \d, epoch 1: .*slides {poison};.*train\.on_nan=skip"):
        cross_validate(config(), demo_store.path, tmp_path / "run", device="cpu")


def test_a_stopped_run_can_go_on_leaving_such_steps_out(demo_store, poison, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError):
        cross_validate(config(), demo_store.path, out, device="cpu")
    done = cross_validate(config("train.on_nan=skip"), demo_store.path, out, device="cpu", resume=True)
    holders = [
        fold["fold"]
        for fold in done.summary["folds"]
        if poison not in {row["slide_id"] for row in _validated(out) if row["fold"] == fold["fold"]}
    ]
    for fold in done.summary["folds"]:
        trains_on_it = fold["fold"] in holders
        assert fold["skipped_steps"] == (2 if trains_on_it else 0)  # once in each epoch
        lines = (out / f"fold_{fold['fold']}" / "metrics.jsonl").read_text().splitlines()
        for line in lines:
            assert [poison in why for why in json.loads(line)["skipped"]] == [True] * trains_on_it


def _validated(out):
    return pq.read_table(out / "predictions.parquet").to_pylist()


def test_a_skipped_step_leaves_the_weights_of_a_run_without_it(demo_store, poison, tmp_path):
    told = []
    watch = Watcher(on_epoch=lambda run, fold, epoch: told.append(epoch))
    cross_validate(config("train.on_nan=skip"), demo_store.path, tmp_path / "run", device="cpu", watch=watch)
    assert all(np.isfinite([epoch.train_loss, epoch.val_loss]).all() for epoch in told)


def test_a_slide_that_cannot_be_predicted_stops_the_run_whatever_the_setting(demo_store, tmp_path, monkeypatch):
    name = demo_store.sql("SELECT slide_id FROM slides ORDER BY slide_id LIMIT 1").to_pylist()[0]["slide_id"]
    plain = ABMIL.logits

    def logits(self, batch):
        found = plain(self, batch)
        row = torch.tensor([[each == name] for each in batch.slide_ids])
        return found if self.training else torch.where(row, found * torch.inf, found)

    monkeypatch.setattr(ABMIL, "logits", logits)
    with pytest.raises(NonFiniteError, match=f"slide {name}: the model predicts NaN or Inf"):
        cross_validate(config("train.on_nan=skip"), demo_store.path, tmp_path / "run", device="cpu")


def test_early_stopping_reports_the_epoch_at_which_patience_ran_out(demo_store, tmp_path):
    stopped = config("train.epochs=30", "train.patience=2", "train.learning_rate=1e-9")
    run = cross_validate(stopped, demo_store.path, tmp_path / "run", device="cpu")
    for fold in run.summary["folds"]:
        assert fold["epochs"] == fold["best_epoch"] + 2 < 30
        lines = (run.path / f"fold_{fold['fold']}" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["epoch"] == fold["epochs"]
        assert fold["c_index"] == json.loads(lines[-1])["c_index"]


@pytest.mark.parametrize("loss", ["ce", "cox"])
def test_other_losses_train_and_a_cox_model_predicts_no_survival(demo_store, tmp_path, loss):
    run = cross_validate(config(f"train.loss={loss}"), demo_store.path, tmp_path / "run", device="cpu")
    columns = set(_validated(run.path)[0])
    assert ("survival_1" in columns) == (loss == "ce")
    assert (run.summary["assessment"]["calibration"] is None) == (loss == "cox")
    assert run.summary["c_index_patient"]["mean"] is not None


def test_patients_as_the_unit_get_one_risk_for_all_their_slides(demo_store, tmp_path):
    run = cross_validate(config("data.unit=patient"), demo_store.path, tmp_path / "run", device="cpu")
    rows = _validated(run.path)
    by_patient = {
        row["patient_id"]: {other["risk"] for other in rows if other["patient_id"] == row["patient_id"]} for row in rows
    }
    assert len(rows) > len(by_patient)
    assert all(len(risks) == 1 for risks in by_patient.values())
    assert run.summary["unit"] == "patient"


def test_a_slide_too_large_for_the_memory_is_refused_by_name_with_the_bytes_it_needs(demo_store, tmp_path, monkeypatch):
    monkeypatch.setattr("cftrain.experiment.free_ram", lambda: 1 << 20)
    with pytest.raises(ConfigError, match=r"DEMO-\d+-\d+: training abmil .*needs .* MB of RAM, 1\.0 MB are free"):
        cross_validate(config("data.cache=off"), demo_store.path, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_features_that_are_not_finite_never_reach_a_run(tmp_path):
    """The store refuses them, so what is not finite in training came from training."""
    (tmp_path / "h5").mkdir()
    with h5py.File(tmp_path / "h5" / "s1.h5", "w") as file:
        file["features"] = np.full((3, 4), np.nan, dtype=np.float32)
        file["coords"] = np.zeros((3, 2), dtype=np.int32)
    store = cfstore.open(tmp_path / "store", create=True)
    with pytest.raises(cfstore.NonFiniteError, match="s1"):
        store.ingest(tmp_path / "h5", cfstore.IngestOptions(encoder="e", scale=20))
