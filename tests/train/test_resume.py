"""Stopped anywhere, a run goes on and ends with the weights, metrics and predictions of one that was never stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cftrain.checkpoints import read_tensors, write_tensors
from cftrain.config import load_config
from cftrain.errors import RunError, StoppedError
from cftrain.experiment import Watcher, cross_validate
from cftrain.run_directory import held
from cftrain.teams import _let_end, train_teams

SETTINGS = [
    "train.epochs=3",
    "train.accumulate=4",
    "train.select_from=1",
    "train.batch_patches=200",
    "train.checkpoint_minutes=0",
]
MODELS = {
    "abmil": ["model.name=abmil", "model.hidden_dim=8", "model.attention_dim=4", "model.dropout=0.3"],
    "crossfusion": ["model.embed_dim=8", "model.n_heads=2"],
    "dsmil": ["model.name=dsmil", "model.attention_dim=4", "model.variant=faithful"],
}


def config(*more, model="abmil"):
    return load_config(flags={"data.cohort": "DEMO"}, settings=[*SETTINGS, *MODELS[model], *more])


def everything(run):
    """Weights, metrics but for their times, and predictions of a run."""
    weights = {path.relative_to(run): load_file(path) for path in sorted(run.glob("fold_*/*_epoch.safetensors"))}
    metrics = {
        path.relative_to(run): [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
        for path in sorted(run.glob("fold_*/metrics.jsonl"))
    }
    return weights, metrics, pq.read_table(run / "predictions.parquet")


def assert_equal_runs(one, other):
    (weights, metrics, predictions), (weights2, metrics2, predictions2) = everything(one), everything(other)
    assert weights.keys() == weights2.keys()
    for name, held_weights in weights.items():
        assert len(held_weights) > 5
        assert all(torch.equal(value, weights2[name][key]) for key, value in held_weights.items()), name
    assert metrics == metrics2
    assert predictions.equals(predictions2)


@pytest.fixture(scope="module")
def uninterrupted(demo_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return cross_validate(config(), demo_store.path, out, device="cpu").path


class _StopError(Exception):
    """Ends a run from within, as abruptly as the interpreter allows."""


def cut_at(n_beats, monkeypatch):
    """A watcher that ends the run at the n-th thing it is told."""
    left = [n_beats]
    monkeypatch.setattr("cftrain.passes.BEAT_SECONDS", 0.0)

    def count(*told):
        left[0] -= 1
        if left[0] == 0:
            raise _StopError

    return Watcher(on_beat=count, on_epoch=count)


@pytest.mark.parametrize("at", [1, 2, 13, 24, 25, 26, 27, 28, 29, 30, 31, 55, 80, 108, 112])
def test_a_run_cut_at_any_step_goes_on_to_the_same_end(uninterrupted, demo_store, tmp_path, monkeypatch, at):
    out = tmp_path / "run"
    with pytest.raises(_StopError):
        cross_validate(config(), demo_store.path, out, device="cpu", watch=cut_at(at, monkeypatch))
    assert not (out / "summary.json").exists()
    cross_validate(config(), demo_store.path, out, device="cpu", resume=True)
    assert_equal_runs(uninterrupted, out)
    assert not list(out.glob("fold_*/checkpoint*"))


@pytest.mark.parametrize("model", ["crossfusion", "dsmil"])
def test_another_model_goes_on_in_the_middle_of_an_epoch(demo_store, tmp_path, monkeypatch, model):
    """DSMIL here has weights that are never trained, of which the optimiser holds nothing."""
    chosen = config("train.epochs=2", model=model)
    cross_validate(chosen, demo_store.path, tmp_path / "whole", device="cpu")
    with pytest.raises(_StopError):
        cross_validate(chosen, demo_store.path, tmp_path / "run", device="cpu", watch=cut_at(40, monkeypatch))
    cross_validate(chosen, demo_store.path, tmp_path / "run", device="cpu", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_run_cut_again_and_again_goes_on_in_other_groups_and_ends_the_same(
    uninterrupted, demo_store, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    for fuse, at in ((True, 20), (False, 7), (True, 11), (False, 30), (True, 40)):
        watch = cut_at(at, monkeypatch)
        with pytest.raises(_StopError):
            cross_validate(config(), demo_store.path, out, device="cpu", fuse=fuse, resume=True, watch=watch)
    done = cross_validate(config(), demo_store.path, out, device="cpu", resume=True)
    assert_equal_runs(uninterrupted, out)
    assert len(json.loads((out / "provenance.json").read_text())["resumed"]) == 5
    assert done.summary["seconds"] > 0


def test_folds_one_by_one_give_the_numbers_of_folds_together(uninterrupted, demo_store, tmp_path):
    apart = cross_validate(config(), demo_store.path, tmp_path / "apart", device="cpu", fuse=False)
    assert_equal_runs(uninterrupted, apart.path)
    together = json.loads((uninterrupted / "summary.json").read_text())
    fused, own = together["bytes_read"], apart.summary["bytes_read"]
    assert fused == own  # all in the cache after the first pass


def test_without_a_cache_folds_together_read_the_cohort_once_a_pass(demo_store, tmp_path):
    settings = ("data.cache=off", "train.epochs=2", "train.sampling=uniform")
    fused = cross_validate(config(*settings), demo_store.path, tmp_path / "one", device="cpu").summary
    apart = cross_validate(config(*settings), demo_store.path, tmp_path / "two", device="cpu", fuse=False).summary
    stored = demo_store.sql("SELECT sum(n_patches * dim * 2)::BIGINT AS n FROM bags WHERE scale = 20").to_pylist()
    cohort = stored[0]["n"]
    # two epochs and the validation of the second; a fold alone reads its 4/5, then all, then its 1/5
    assert fused["bytes_read"] == 3 * cohort
    assert apart["bytes_read"] == (4 + 5 + 1) * cohort


def test_other_settings_data_or_folds_are_not_gone_on_with(demo_store, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(_StopError):
        cross_validate(config(), demo_store.path, out, device="cpu", watch=cut_at(5, monkeypatch))
    with pytest.raises(RunError, match=r"another train\.epochs, train\.seed;"):
        cross_validate(config("train.seed=8", "train.epochs=4"), demo_store.path, out, device="cpu", resume=True)
    with pytest.raises(RunError, match="holds files already; go on with --resume"):
        cross_validate(config(), demo_store.path, out, device="cpu")
    provenance = json.loads((out / "provenance.json").read_text())
    (out / "provenance.json").write_text(json.dumps({**provenance, "data_digest": "sha256:0"}))
    with pytest.raises(RunError, match="data_digest differ"):
        cross_validate(config(), demo_store.path, out, device="cpu", resume=True)


@pytest.mark.parametrize("damage", ["cut short", "of another fold", "no checkpoint"])
def test_a_damaged_checkpoint_is_named_and_never_guessed_at(demo_store, tmp_path, monkeypatch, damage):
    out = tmp_path / "run"
    with pytest.raises(_StopError):
        cross_validate(config(), demo_store.path, out, device="cpu", watch=cut_at(40, monkeypatch))
    path = out / "fold_1" / "checkpoint.safetensors"
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "of another fold":
        (folds,) = ({f: len(s) for f, s in _val_sizes(demo_store).items()},)
        other = next(f for f, n in folds.items() if n != folds[1])
        path.write_bytes((out / f"fold_{other}" / "checkpoint.safetensors").read_bytes())
    else:
        path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(RunError, match=r"fold_1/checkpoint\.safetensors: .*remove it"):
        cross_validate(config(), demo_store.path, out, device="cpu", resume=True)


def _val_sizes(store):
    slides = store.sql("SELECT patient_id FROM slides").to_pylist()
    folds = store.split_set("DEMO", "splits").folds
    return {k: [row for row in slides if row["patient_id"] in fold.val] for k, fold in folds.items()}


def test_two_processes_do_not_train_in_one_directory(demo_store, tmp_path):
    with held(tmp_path / "run"), pytest.raises(RunError, match="another process trains here"):
        cross_validate(config(), demo_store.path, tmp_path / "run", device="cpu")


def test_a_finished_run_is_left_as_it_is(uninterrupted, demo_store):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.glob("fold_*/*")}
    again = cross_validate(config(), demo_store.path, uninterrupted, device="cpu", resume=True)
    assert again.summary == json.loads((uninterrupted / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.glob("fold_*/*")} == before


def test_a_signal_writes_the_checkpoints_and_ends_the_run(uninterrupted, demo_store, tmp_path):
    def ask(run, fold, epoch):
        os.kill(os.getpid(), signal.SIGUSR1)

    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGUSR1)
    slow = config("train.checkpoint_minutes=1000")
    with pytest.raises(StoppedError, match=r"SIGUSR1.*--resume") as caught:
        cross_validate(slow, demo_store.path, out, device="cpu", watch=Watcher(on_epoch=ask))
    assert caught.value.signal_number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before
    cross_validate(config(), demo_store.path, out, device="cpu", resume=True)  # another checkpoint_minutes is no matter
    assert_equal_runs(uninterrupted, out)


# -- what a run took ---------------------------------------------------------------------------------


def heard(monkeypatch, change=lambda done: done):
    """Every learner that a run is told of from now on, after `change`."""
    told = []

    def train(*given):
        for done in train_teams(*given):
            told.append(change(done))
            yield told[-1]

    monkeypatch.setattr("cftrain.experiment.train_teams", train)
    return told


def test_a_run_took_as_long_as_its_latest_fold_and_as_much_memory_as_its_largest_process(
    demo_store, tmp_path, monkeypatch
):
    seconds, peaks = (20.0, 50.0, 10.0, 40.0, 30.0), (5, 3, 9, 4, 1)

    def change(done):
        fold = done.result.examples.number
        return replace(done, elapsed=seconds[fold], peak_bytes=peaks[fold])

    heard(monkeypatch, change)
    summary = cross_validate(config(), demo_store.path, tmp_path / "run", device="cpu").summary
    assert (summary["seconds"], summary["peak_memory_bytes"]) == (50.0, 9)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_time_before_a_stop_counts_for_every_fold_that_is_trained_after_it(demo_store, tmp_path, monkeypatch, jobs):
    out = tmp_path / "run"
    with pytest.raises(_StopError):
        cross_validate(config(), demo_store.path, out, device="cpu", fuse=False, watch=cut_at(30, monkeypatch))
    tensors, text = read_tensors(out / "fold_0" / "checkpoint.safetensors")
    write_tensors(out / "fold_0" / "checkpoint.safetensors", tensors, json.dumps({**json.loads(text), "elapsed": 1000}))
    assert json.loads(text)["finished"]
    told = heard(monkeypatch)
    started = time.monotonic()
    summary = cross_validate(config(), demo_store.path, out, device="cpu", fuse=False, jobs=jobs, resume=True).summary
    session = time.monotonic() - started
    elapsed = {done.result.examples.number: done.elapsed for done in told}
    assert elapsed.pop(0) == 1000
    assert len(elapsed) == 4
    assert all(1000 < each < 1000 + session for each in elapsed.values())
    assert summary["seconds"] == max(elapsed.values())


@pytest.mark.slow
def test_folds_side_by_side_end_with_checkpoints_when_nobody_listens_any_more(demo_store, tmp_path):
    """Whoever is told of an epoch raises; the other processes would train for hours."""

    def leave(run, fold, epoch):
        raise _StopError

    out, long = tmp_path / "run", config("train.epochs=5000")
    with pytest.raises(_StopError):
        cross_validate(long, demo_store.path, out, device="cpu", jobs=2, watch=Watcher(on_epoch=leave))
    assert not multiprocessing.active_children()
    states = [json.loads(read_tensors(path)[1]) for path in list_checkpoints(out)]
    assert states
    assert not any(state["finished"] for state in states)


def test_a_worker_whose_words_nobody_takes_is_not_waited_for_in_vain():
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    busy, waits = Future(), Future()
    busy.set_running_or_notify_cancel()

    def work():
        for _ in range(1000):
            queue.put(b"." * 1000)  # a pipe holds 64 KiB
        busy.set_result([])

    ending = threading.Thread(target=_let_end, args=({busy, waits}, queue), daemon=True)
    threading.Thread(target=work, daemon=True).start()
    ending.start()
    ending.join(timeout=60)
    assert not ending.is_alive()
    assert busy.result(timeout=0) == []
    assert waits.cancelled()


# -- the command, killed for real --------------------------------------------------------------------


def command(demo_store, out, *more):
    settings = [word for setting in [*SETTINGS, *MODELS["abmil"]] for word in ("--set", setting)]
    start = [sys.executable, "-m", "cftrain", "run"]
    if "--resume" in more:
        settings = []
    else:
        start += ["--cohort", "DEMO"]
    return [*start, "--store", str(demo_store.path), "--out", str(out), "--device", "cpu", *settings, *more]


def killed(words, seconds, number=signal.SIGKILL):
    """Start, wait for the first checkpoint and then some, and send a signal; returns the exit code."""
    out = next(words[i + 1] for i, word in enumerate(words) if word == "--out")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list_checkpoints(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


def list_checkpoints(out):
    return list(Path(out).glob("fold_*/checkpoint.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_killed_at_random_times_ends_as_if_nothing_had_happened(demo_store, tmp_path, jobs):
    rng = np.random.default_rng(jobs)
    reference, out = tmp_path / "whole", tmp_path / "run"
    subprocess.run(command(demo_store, reference, "--jobs", str(jobs)), check=True, capture_output=True)
    codes = [killed(command(demo_store, out, "--jobs", str(jobs)), rng.uniform(0, 1))]
    for _ in range(4):
        if codes[-1] == 0:
            break
        codes.append(killed(command(demo_store, out, "--jobs", str(jobs), "--resume"), rng.uniform(0, 1.5)))
    assert codes[0] == -signal.SIGKILL
    if codes[-1] != 0:
        subprocess.run(command(demo_store, out, "--jobs", str(jobs), "--resume"), check=True, capture_output=True)
    assert_equal_runs(reference, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_command_exits_with_75_when_asked_to_stop_and_130_on_ctrl_c(demo_store, tmp_path, number, code, jobs):
    out = tmp_path / "run"
    words = command(demo_store, out, "--jobs", str(jobs), "--set", "train.epochs=40")
    assert killed(words, 0.3, number) == code
    assert list_checkpoints(out)


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(demo_store, tmp_path):
    out = tmp_path / "run"
    words = command(demo_store, out, "--jobs", "2", "--set", "train.epochs=200")
    assert killed(words, 0.5) == -signal.SIGKILL
    time.sleep(2)
    before = {path: path.stat().st_mtime_ns for path in out.glob("fold_*/*")}
    time.sleep(1.5)
    assert {path: path.stat().st_mtime_ns for path in out.glob("fold_*/*")} == before
