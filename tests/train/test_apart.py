"""Folds trained by jobs of their own give the run that shares its readings gives; whoever is last closes it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Barrier

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cftrain import apart, run_directory
from cftrain.apart import close, fold_numbers, train_fold
from cftrain.config import load_config
from cftrain.errors import ConfigError, RunBusyError, RunError
from cftrain.experiment import Watcher, cross_validate
from cftrain.report import write_report
from cftrain.run_directory import fold_finished

SETTINGS = [
    "train.epochs=3", "train.accumulate=4", "train.select_from=1", "train.batch_patches=200",
    "train.checkpoint_minutes=0", "model.name=abmil", "model.hidden_dim=8", "model.attention_dim=4",
    "model.dropout=0.3",
]  # fmt: skip


def config(*more):
    return load_config(flags={"data.cohort": "DEMO"}, settings=[*SETTINGS, *more])


def one_fold(store, out, fold, *more, **told):
    return train_fold(config(*more), store.path, out, fold, device="cpu", **told)


def weights(run):
    """The bytes of every tensor; safetensors orders the header of a file at random."""
    return {
        path.relative_to(run): {name: value.numpy().tobytes() for name, value in load_file(path).items()}
        for path in sorted(run.glob("fold_*/*_epoch.safetensors"))
    }


def metrics(run):
    """All lines but for their times."""
    return {
        path.relative_to(run): [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
        for path in sorted(run.rglob("metrics.jsonl"))
    }


def numbers(summary):
    """What a summary says of the patients, not of the machine."""
    spent = {"seconds", "slides_per_second", "patches_per_second", "bytes_read", "data_wait_seconds"}
    spent |= {"compute_seconds", "data_wait_share", "peak_memory_bytes"}
    folds = [{key: value for key, value in fold.items() if key not in spent} for fold in summary["folds"]]
    return {key: value for key, value in summary.items() if key not in spent} | {"folds": folds}


def assert_same(one, other):
    assert len(weights(one)) == 10
    assert weights(one) == weights(other)
    assert metrics(one) == metrics(other)
    assert pq.read_table(one / "predictions.parquet").equals(pq.read_table(other / "predictions.parquet"))
    first, second = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    assert numbers(first) == numbers(second)


@pytest.fixture(scope="module")
def fused(demo_store, tmp_path_factory):
    return cross_validate(config(), demo_store.path, tmp_path_factory.mktemp("fused") / "run", device="cpu").path


def test_folds_apart_in_any_order_give_the_bytes_of_the_fused_run(demo_store, fused, tmp_path):
    out = tmp_path / "run"
    assert fold_numbers(config(), demo_store.path) == [0, 1, 2, 3, 4]
    for fold in (3, 0, 4, 1):
        assert one_fold(demo_store, out, fold) is None
        assert not (out / "summary.json").exists()
        assert fold_finished(out, fold, nested=False)
    assert not fold_finished(out, 2, nested=False)
    done = one_fold(demo_store, out, 2, command=["cftrain", "sweep"])
    assert done is not None
    assert_same(fused, out)
    assert not list(out.glob("fold_*/checkpoint*"))
    seconds = json.loads((out / "summary.json").read_text())["seconds"]
    assert seconds >= sum(fold["seconds"] for fold in done.summary["folds"])
    processes = json.loads((out / "fold_2" / "processes.json").read_text())
    assert [each["command"] for each in processes] == ["cftrain sweep"]
    assert write_report(out).exists()


def test_folds_with_inner_learners_choose_the_same_epochs_apart(demo_store, tmp_path):
    more = ("train.nested=0.3", "train.epochs=2")
    cross_validate(config(*more), demo_store.path, tmp_path / "fused", device="cpu")
    for fold in range(5):
        one_fold(demo_store, tmp_path / "apart", fold, *more)
    assert_same(tmp_path / "fused", tmp_path / "apart")
    assert len(list((tmp_path / "apart").glob("fold_*/inner/metrics.jsonl"))) == 5


class _StopError(Exception):
    """Ends a fold from within."""


def test_a_fold_that_was_cut_goes_on_from_its_own_checkpoint(demo_store, fused, tmp_path):
    def leave(run, fold, epoch):
        if epoch.epoch == 2:
            raise _StopError

    out = tmp_path / "run"
    with pytest.raises(_StopError):
        one_fold(demo_store, out, 1, watch=Watcher(on_epoch=leave))
    assert (out / "fold_1" / "checkpoint.safetensors").exists()
    assert not fold_finished(out, 1, nested=False)
    measured = []
    one_fold(demo_store, out, 1, watch=Watcher(on_epoch=lambda run, fold, epoch: measured.append(epoch.epoch)))
    assert measured[-2:] == [2, 3]
    assert 1 not in measured
    for fold in (0, 2, 3, 4):
        one_fold(demo_store, out, fold)
    assert_same(fused, out)


def test_a_finished_fold_is_not_trained_again(demo_store, tmp_path):
    one_fold(demo_store, tmp_path, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "fold_0").iterdir()}
    trained = []
    assert one_fold(demo_store, tmp_path, 0, watch=Watcher(on_beat=trained.append)) is None
    assert not trained
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "fold_0").iterdir()} == before


def test_a_fold_and_a_run_each_have_one_trainer_and_other_folds_are_free(demo_store, tmp_path):
    busy = "another process trains here"
    with run_directory.fold_held(tmp_path, 0):
        with pytest.raises(RunBusyError, match=busy):
            one_fold(demo_store, tmp_path, 0)
        with pytest.raises(RunBusyError, match=busy):
            cross_validate(config(), demo_store.path, tmp_path, device="cpu", resume=True)
        one_fold(demo_store, tmp_path, 1)
    with run_directory.held(tmp_path), pytest.raises(RunBusyError, match=busy):
        one_fold(demo_store, tmp_path, 0)


def test_other_settings_or_folds_than_the_runs_are_refused_by_name(demo_store, tmp_path):
    one_fold(demo_store, tmp_path, 0)
    with pytest.raises(RunError, match=r"was begun with another train\.epochs"):
        one_fold(demo_store, tmp_path, 1, "train.epochs=4")
    with pytest.raises(ConfigError, match=r"no fold 7; splits splits have 0, 1, 2, 3, 4"):
        one_fold(demo_store, tmp_path, 7)


def test_all_folds_take_the_number_of_patches_that_the_first_found(demo_store, tmp_path, monkeypatch):
    one_fold(demo_store, tmp_path, 0, "train.batch_patches=0")
    begun_with = load_config(file=tmp_path / "config.toml").train.batch_patches
    monkeypatch.setattr("cftrain.experiment.patch_budget", lambda *given: 100)
    one_fold(demo_store, tmp_path, 1, "train.batch_patches=0")
    assert load_config(file=tmp_path / "config.toml").train.batch_patches == begun_with != 100


def test_a_run_that_another_began_meanwhile_is_prepared_again_with_its_number_of_patches(
    demo_store, tmp_path, monkeypatch
):
    """The other process is the first call of `prepare` here: it begins the run, with other memory."""
    prepare, prepared = apart.prepare, []

    def slow(configs, *given, **named):
        ready = prepare(configs, *given, **named)
        if not prepared:
            train = replace(ready.configs[0].train, batch_patches=123)
            other = replace(ready, configs=(replace(ready.configs[0], train=train),))
            run_directory.begin(tmp_path, other.configs[0], apart._provenance(other, ()))
        prepared.append(ready.configs[0].train.batch_patches)
        return ready

    monkeypatch.setattr("cftrain.apart.prepare", slow)
    one_fold(demo_store, tmp_path, 0, "train.batch_patches=0")
    assert prepared[1:] == [123]
    assert prepared[0] != 123


def test_a_run_is_closed_by_whoever_comes_by_once_its_last_job_could_not(demo_store, fused, tmp_path, monkeypatch):
    assert close(config(), demo_store.path, tmp_path, device="cpu") is None
    with monkeypatch.context() as patched:
        patched.setattr("cftrain.apart._closed", lambda ready, out: None)
        for fold in range(5):
            one_fold(demo_store, tmp_path, fold)
    assert not (tmp_path / "summary.json").exists()
    with run_directory.fold_held(tmp_path, 3):
        assert close(config(), demo_store.path, tmp_path, device="cpu") is None
    assert close(config(), demo_store.path, tmp_path, device="cpu") is not None
    assert_same(fused, tmp_path)


def test_a_checkpoint_that_is_cut_short_or_foreign_is_not_taken_for_a_finished_fold(tmp_path):
    path = tmp_path / "fold_0" / "checkpoint.safetensors"
    path.parent.mkdir()
    for damaged in (b"", b"\x08\x00", b"\xff" * 30, b"\x02" + bytes(7) + b"{}", b"\x05" + bytes(7) + b"{}"):
        path.write_bytes(damaged)
        assert not fold_finished(tmp_path, 0, nested=False)


def test_a_directory_where_a_process_died_while_it_began_is_begun_again(demo_store, tmp_path):
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / ".config.toml").write_text("half")
    one_fold(demo_store, tmp_path, 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files already"):
        one_fold(demo_store, tmp_path / "other", 0)


# -- processes ---------------------------------------------------------------------------------------


def _in_process(path, out, folds, ready):
    torch.set_num_threads(1)
    ready.wait()
    for fold in folds:
        train_fold(config(), path, out, fold, device="cpu")


@pytest.mark.slow
def test_folds_side_by_side_in_processes_give_the_same_and_one_of_them_closes_the_run(demo_store, fused, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    shares = ([0, 1], [2, 3, 4])
    processes = [
        context.Process(target=_in_process, args=(demo_store.path, tmp_path, share, barrier)) for share in shares
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same(fused, tmp_path)


@pytest.mark.slow
def test_a_killed_job_blocks_nobody(demo_store, fused, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(1)  # named, else it is gone before the process has it
    process = context.Process(target=_in_process, args=(demo_store.path, tmp_path, [2], barrier))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "fold_2" / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for fold in range(5):
        one_fold(demo_store, tmp_path, fold)
    assert_same(fused, tmp_path)


def test_two_that_find_the_last_fold_finished_write_the_results_once(demo_store, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("cftrain.apart._closed", lambda ready, out: None)
        for fold in range(5):
            one_fold(demo_store, tmp_path, fold)
    ready = apart.prepare([run_directory.settled(tmp_path, config())], demo_store.path, device="cpu")
    written, barrier = [], Barrier(2)

    def write(*given):
        written.append(1)
        time.sleep(0.2)
        return write_results(*given)

    write_results = apart.write_results
    monkeypatch.setattr("cftrain.apart.write_results", write)
    monkeypatch.setattr("cftrain.apart.listening", lambda: without_signals())

    def both(_):
        barrier.wait()
        return apart._closed(ready, tmp_path)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(both, range(2)))
    assert written == [1]
    assert any(found)


def without_signals():
    """Signals are the main thread's; these two are none."""
    return nullcontext(apart.StopRequest())
