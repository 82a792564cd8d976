"""`cftrain sweep` on one machine: what is missing is done, what fails is named; how it is done changes no number."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from sweeps import contents, two_cohorts, write_plan, written

from cftrain import run_directory
from cftrain.cli import main
from cftrain.cli.sweep_progress import SweepProgress
from cftrain.config import load_config
from cftrain.errors import ConfigError
from cftrain.experiment import cross_validate
from cftrain.run_directory import write_text
from cftrain.sweep.jobs import Outcome, State, state
from cftrain.sweep.plan import check_held, read_plan
from cftrain.sweep.running import jobs_of

DOCS = Path(__file__).resolve().parents[2] / "docs"


def sweep(plan, *words):
    return CliRunner().invoke(main, ["sweep", str(plan), *map(str, words)])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return two_cohorts(tmp_path_factory.mktemp("cohorts"))


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A sweep that one process made; tests leave it as it is."""
    plan = write_plan(tmp_path_factory.mktemp("one") / "plan.toml", store)
    done = sweep(plan)
    assert done.exit_code == 0, done.output
    return plan.parent / "runs", done


# -- plans -------------------------------------------------------------------------------------------


def test_the_plan_in_the_documents_is_read_and_says_what_they_say():
    plan = read_plan(DOCS / "plan.toml")
    assert len(plan.runs) == 2 * 3 * 1 * 3
    assert plan.runs[0].name == "BLCA-uni-abmil-s7"
    assert plan.store == (DOCS / "cfstore-data").resolve()
    by_model = {run.model: run.config for run in plan.runs}
    assert {config.train.epochs for config in by_model.values()} == {30}
    assert by_model["crossfusion"].model.options["embed_dim"] == 128
    assert {run.config.order_seed for run in plan.runs} == {7}
    assert (plan.resources.cpus, plan.resources.gpus, plan.resources.memory) == (2, 0.25, 16 * 10**9)
    assert (DOCS / "plan.toml").read_text() in (DOCS / "sweep.md").read_text()


GOOD = {
    "store": '"s"', "out": '"o"', "cohorts": '["BLCA"]', "models": '["abmil"]', "seeds": "[1]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort": '["BLCA"]'}, r"cohort must be a table, \[cohort\]; names go into `cohorts = \[...\]`"),
        ({"cohrts": '["BLCA"]'}, r"unknown key 'cohrts'; did you mean cohorts"),
        ({"models": '["abmill"]'}, r"models: no 'abmill'; did you mean abmil"),
        ({"models": '"abmil"'}, r"models must be a list of names"),
        ({"models": '["abmil", "abmil"]'}, r"models names 'abmil' twice"),
        ({"models": None}, r"models is missing; docs/sweep.md"),
        ({"seeds": "3"}, r"seeds must be a list of numbers from 0"),
        ({"seeds": "[1, -2]"}, r"seeds must be a list of numbers from 0"),
        ({"folds": '"split"'}, r"folds must be fused or apart, got 'split'"),
        ({"store": "7"}, r"store must be a path, got 7"),
        ({"preset": '"papr"'}, r"preset no preset 'papr'; presets: recommended, demo, paper"),
        ({"[set]": "train.epoch = 3"}, r"\[set\] unknown setting 'train.epoch'; did you mean train.epochs"),
        ({"[set]": "epochs = 3"}, r"\[set\] epochs stands outside the sections"),
        ({"[set]": "train.seed = 3"}, r"\[set\] train.seed is said with `seeds`"),
        ({"[set]": 'train.epochs = "3"'}, r"\[set\] train.epochs must be int, got '3'"),
        ({"[model.abmil]": "hiden_dim = 3"}, r"\[model.abmil\] abmil: no option 'hiden_dim'. Did you mean hidden_dim"),
        ({"[model.abmli]": "hidden_dim = 3"}, r"\[model.NAME\]: no 'abmli'; did you mean abmil"),
        ({"[cohort.BLAC]": "data.folds = 3"}, r"\[cohort.NAME\]: no 'BLAC'; did you mean BLCA"),
        ({"[cohort.BLCA]": 'data.cohort = "X"'}, r"\[cohort.BLCA\] data.cohort is said with `cohorts`"),
        ({"[resources]": "cpu = 3"}, r"\[resources\]: no 'cpu'; did you mean cpus"),
        ({"[resources]": "gpus = 2"}, r"\[resources\] gpus must lie between 0 and 1"),
        ({"[resources]": 'memory = "lots"'}, r"\[resources\] memory: 'lots' is no size"),
        ({"[resources]": "retries = -1"}, r"\[resources\] retries must be a whole number from 0"),
        ({"cohorts": '["A/B", "A_B"]'}, r"two runs would be written to A_B-abmil-s1"),
        ({"seeds": "[1"}, r"not a readable TOML file"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said_with_file_and_key_before_anything_is_done(tmp_path, change, message):
    values = {key: value for key, value in (GOOD | change).items() if value is not None}
    tables = {key: value for key, value in values.items() if key.startswith("[")}
    keys = [f"{key} = {value}" for key, value in values.items() if key not in tables]
    path = tmp_path / "plan.toml"
    path.write_text("\n".join([*keys, *(f"{name}\n{line}" for name, line in tables.items())]))
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: {message}"):
        read_plan(path)
    done = sweep(path)
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert [each.name for each in tmp_path.iterdir()] == ["plan.toml"]


def test_settings_hold_for_all_runs_then_for_a_cohort_then_for_a_model(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        'store = "s"\nout = "o"\ncohorts = ["A", "B"]\nmodels = ["abmil", "dsmil"]\nseeds = [3, 4]\n'
        "[set]\ntrain.epochs = 5\nbins.count = 3\n[cohort.B]\ntrain.epochs = 6\ndata.folds = 3\n"
        "[model.dsmil]\ntrain.epochs = 7\nattention_dim = 4\n"
    )
    runs = {run.name: run for run in read_plan(path).runs}
    assert len(runs) == 8
    assert {name: run.config.train.epochs for name, run in runs.items() if name.endswith("s4")} == {
        "A-abmil-s4": 5, "A-dsmil-s4": 7, "B-abmil-s4": 6, "B-dsmil-s4": 7,
    }  # fmt: skip
    assert (runs["B-dsmil-s4"].config.data.folds, runs["A-dsmil-s4"].config.data.folds) == (3, 5)
    assert runs["A-dsmil-s3"].config.model.options == {"attention_dim": 4}
    assert runs["A-abmil-s4"].config.model.options == {}
    assert {run.config.bins.count for run in runs.values()} == {3}
    assert [runs[f"A-abmil-s{seed}"].config.train.seed for seed in (3, 4)] == [3, 4]


def test_a_store_on_object_storage_is_named_by_its_address(tmp_path):
    path = write_plan(tmp_path / "plan.toml", "s3://bucket/store", models=("abmil",))
    assert read_plan(path).store == "s3://bucket/store"
    assert read_plan(write_plan(path, "store", models=("abmil",))).store == tmp_path / "store"


def test_a_cohort_or_encoder_that_the_store_lacks_is_named_with_near_ones(store, tmp_path):
    plan = read_plan(write_plan(tmp_path / "plan.toml", store, cohorts=("ONE", "TWOO")))
    with pytest.raises(ConfigError, match="cohorts: no 'TWOO'; did you mean TWO"):
        check_held(plan, {"ONE": ["toy"], "TWO": ["toy"]})
    path = write_plan(tmp_path / "other.toml", store)
    path.write_text(path.read_text().replace("[set]", '\nencoders = ["tou"]\n[set]'))
    done = sweep(path)
    assert done.exit_code == 1
    assert "encoders: no 'tou'; did you mean toy" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--jobs", 2, "--engine", "ray"), "--jobs is of --engine local"),
        (("--address", "h:1"), "--address is of --engine ray"),
    ],
)
def test_options_of_the_other_engine_are_refused(store, tmp_path, words, message):
    done = sweep(write_plan(tmp_path / "plan.toml", store), *words)
    assert done.exit_code == 2
    assert message in done.output


# -- one machine -------------------------------------------------------------------------------------


def test_a_sweep_makes_every_run_and_compares_them_per_cohort(finished):
    out, done = finished
    names = {
        f"{cohort}-{model}-s{seed}" for cohort in ("ONE", "TWO") for model in ("abmil", "dsmil") for seed in (7, 8)
    }
    assert {path.parent.name for path in out.glob("*/summary.json")} == names
    assert {path.parent.name for path in out.glob("*/report.html")} == names
    table = (out / "compare.md").read_text().splitlines()
    assert table[0] == "| Model | ONE | TWO | Mean |"
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["abmil (2 seeds)", "dsmil (2 seeds)"]
    page = (out / "compare.html").read_text()
    for name in names:
        assert f'href="{name}/report.html"' in page
    assert re.findall(r"https?://", page) == []
    assert done.stdout.startswith("Model")
    lines = [line for line in done.stderr.splitlines() if line.startswith("done ")]
    assert sorted(line.split()[1] for line in lines) == sorted(names)
    assert lines[-1].endswith("(8 of 8)")


def test_a_run_of_a_sweep_is_the_run_that_the_same_settings_give_alone(finished, store, tmp_path):
    out, _ = finished
    config = load_config(file=out / "TWO-dsmil-s8" / "config.toml")
    cross_validate(config, store, tmp_path / "TWO-dsmil-s8", device="cpu")
    assert contents(tmp_path)["TWO-dsmil-s8"] == contents(out)["TWO-dsmil-s8"]


def test_a_second_sweep_does_only_what_is_missing(finished, store, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "runs", copy_function=shutil.copy2)
    plan = write_plan(tmp_path / "plan.toml", store)
    before = written(out)
    again = sweep(plan)
    assert again.exit_code == 0
    assert "8 done before, 0 to do" in again.stderr
    assert written(out) == before
    shutil.rmtree(out / "ONE-dsmil-s8")
    (out / "TWO-abmil-s7" / "report.html").unlink()
    rows = {row["name"]: row["state"] for row in json.loads(sweep(plan, "--dry-run", "--json").stdout)["jobs"]}
    assert (rows["ONE-dsmil-s8"], rows["TWO-abmil-s7"], rows["ONE-abmil-s7"]) == ("missing", "begun", "done")
    third = sweep(plan)
    assert third.exit_code == 0, third.output
    assert "6 done before, 2 to do" in third.stderr
    changed = {path.relative_to(out).parts[0] for path, when in written(out).items() if before.get(path) != when}
    assert changed == {"ONE-dsmil-s8", "TWO-abmil-s7"}
    kept = {path for path, when in written(out / "TWO-abmil-s7").items() if before.get(path) == when}
    assert out / "TWO-abmil-s7" / "predictions.parquet" in kept or (out / "TWO-abmil-s7/report.html").exists()
    assert contents(out) == contents(finished[0])


def test_a_setting_that_changed_since_is_refused_with_directory_and_key(finished, store, tmp_path):
    shutil.copytree(finished[0], tmp_path / "runs")
    plan = write_plan(tmp_path / "plan.toml", store, epochs=3)
    for words in ((), ("--dry-run",)):
        done = sweep(plan, *words)
        assert done.exit_code == 1
        assert f"{tmp_path}/runs/ONE-abmil-s7: was begun with another train.epochs than {plan} has now" in done.output
        assert "--out" not in done.output  # a sweep has no such option


def test_a_seed_put_before_the_others_is_refused_with_the_key_that_the_plan_does_not_show(finished, store, tmp_path):
    shutil.copytree(finished[0], tmp_path / "runs")
    plan = write_plan(tmp_path / "plan.toml", store, seeds=(6, 7))
    done = sweep(plan)
    assert done.exit_code == 1
    assert "another data.order_seed than" in done.output
    assert "(data.order_seed is the first of `seeds` where [set] does not name it)" in done.output
    plan.write_text(plan.read_text().replace("[set]", "[set]\ndata.order_seed = 7"))
    assert "missing  ONE-abmil-s6" in sweep(plan, "--dry-run").output  # and with it the sweep can be extended


def test_a_second_sweep_of_a_plan_at_the_same_time_is_refused_and_told_what_to_change(store, tmp_path):
    plan = write_plan(tmp_path / "plan.toml", store)
    with run_directory.held(tmp_path / "runs"):
        done = sweep(plan)
    assert done.exit_code == 1
    assert (
        f"{tmp_path}/runs: another sweep is at it; wait until it ends, or name another `out` in {plan}" in done.output
    )
    assert "--out" not in done.output


@pytest.mark.slow
def test_a_plan_is_told_and_nothing_is_written(store, tmp_path):
    plan = write_plan(tmp_path / "plan.toml", store, models=("abmil",), seeds=(7, 8, 9))
    told = sweep(plan, "--dry-run")
    assert told.exit_code == 0, told.output
    assert told.stdout.count("missing  ") == 6
    assert "6 jobs, 0 done; each takes 1 core, no GPU, what memory is free" in told.stdout
    assert "ONE-abmil: 3 runs to do on 20 slides" in told.stdout
    found = json.loads(sweep(plan, "--dry-run", "--json").stdout)["forecasts"]
    assert [(each["cohort"], each["n_runs"], each["passes"]) for each in found] == [("ONE", 3, 9), ("TWO", 3, 9)]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


def test_what_fails_is_named_with_its_error_and_the_others_are_done(store, tmp_path):
    more = '\n[cohort.ONE]\ndata.splits = "none"\n'
    plan = write_plan(tmp_path / "plan.toml", store, models=("abmil",), seeds=(7,), more=more)
    done = sweep(plan, "--json")
    assert done.exit_code == 1
    error = "cohort ONE has no splits named 'none'; it has: splits"
    assert f"  ONE-abmil-s7: {error}" in done.stderr.splitlines()
    rows = {row["name"]: row for row in json.loads(done.stdout)["jobs"]}
    assert {name: row["state"] for name, row in rows.items()} == {"ONE-abmil-s7": "failed", "TWO-abmil-s7": "done"}
    assert rows["ONE-abmil-s7"]["error"] == error
    assert (tmp_path / "runs" / "failed" / "ONE-abmil-s7.txt").read_text().splitlines()[0] == error
    assert "they cannot be made: cohort ONE has no splits" in sweep(plan, "--dry-run").stdout
    plan.write_text(plan.read_text().replace(more, ""))  # what failed is done when its reason is gone
    again = sweep(plan)
    assert again.exit_code == 0, again.output
    assert "1 done before, 1 to do" in again.stderr
    assert not list((tmp_path / "runs" / "failed").iterdir())


def test_an_error_of_the_program_fails_its_job_alone_and_leaves_its_traceback(store, tmp_path, monkeypatch):
    def broken(configs, *given, **named):
        if configs[0].train.seed == 7:
            raise ZeroDivisionError("seven")
        return train_runs(configs, *given, **named)

    from cftrain.sweep.work import train_runs

    monkeypatch.setattr("cftrain.sweep.work.train_runs", broken)
    plan = write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("abmil",))
    done = sweep(plan)
    assert done.exit_code == 1
    assert "  ONE-abmil-s7: ZeroDivisionError: seven" in done.stderr.splitlines()
    assert "Traceback" in (tmp_path / "runs" / "failed" / "ONE-abmil-s7.txt").read_text()
    assert (tmp_path / "runs" / "ONE-abmil-s8" / "summary.json").exists()


def test_a_run_whose_folds_could_not_be_put_together_is_named_and_put_together_by_the_next_sweep(
    store, tmp_path, monkeypatch
):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("abmil",), seeds=(7,), folds="apart")
    with monkeypatch.context() as patched:
        patched.setattr("cftrain.apart.write_results", full)
        done = sweep(plan, "--json")
        assert done.exit_code == 1
        assert "  ONE-abmil-s7-fold_4: OSError: [Errno 28] No space left on device" in done.stderr.splitlines()
        rows = {row["fold"]: row["state"] for row in json.loads(done.stdout)["jobs"]}
        assert rows == {0: "done", 1: "done", 2: "done", 3: "done", 4: "failed"}
        for path in (tmp_path / "runs" / "failed").iterdir():
            path.unlink()  # as if the disk had taken no word of it
        patched.setattr("cftrain.sweep.running.note_error", lambda *given: None)
        again = sweep(plan)
        assert again.exit_code == 1
        assert "  ONE-abmil-s7-fold_4: [Errno 28] No space left on device" in again.stderr.splitlines()
    last = sweep(plan)
    assert last.exit_code == 0, last.output
    assert (tmp_path / "runs" / "ONE-abmil-s7" / "report.html").exists()
    assert not list((tmp_path / "runs" / "failed").iterdir())


def test_where_the_disk_takes_not_even_an_error_it_is_told_and_the_other_jobs_are_done(store, tmp_path, monkeypatch):
    def full(path, text):
        if "ONE" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_text(path, text)

    monkeypatch.setattr(run_directory, "write_text", full)
    plan = write_plan(tmp_path / "plan.toml", store, models=("abmil",), seeds=(7,))
    done = sweep(plan)
    assert done.exit_code == 1
    error = f"{tmp_path}/runs/ONE-abmil-s7: cannot write the run directory (No space left on device)"
    assert f"  ONE-abmil-s7: {error}" in done.stderr.splitlines()
    assert (tmp_path / "runs" / "TWO-abmil-s7" / "report.html").exists()


def test_a_job_that_says_it_is_done_and_leaves_nothing_fails_the_sweep(store, tmp_path, monkeypatch):
    """As on a node whose folder of that name is its own."""
    monkeypatch.setattr("cftrain.sweep.engines.do", lambda job, *given: Outcome(job.name, "done", c_index=0.9))
    plan = write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("abmil",), seeds=(7,))
    done = sweep(plan)
    assert done.exit_code == 1
    assert f"  ONE-abmil-s7: ended, but its results are not in {tmp_path}/runs/ONE-abmil-s7" in done.stderr


@pytest.mark.slow
def test_folds_apart_are_the_jobs_and_give_the_same_runs(finished, store, tmp_path):
    plan = write_plan(tmp_path / "plan.toml", store, folds="apart")
    jobs = jobs_of(read_plan(plan))
    assert [job.name for job in jobs[:6]] == [f"ONE-abmil-s7-fold_{k}" for k in range(5)] + ["ONE-abmil-s8-fold_0"]
    done = sweep(plan)
    assert done.exit_code == 0, done.output
    assert "40 folds of 8 runs" in done.stderr
    assert contents(tmp_path / "runs") == contents(finished[0])
    assert {state(job) for job in jobs} == {State.DONE}


def test_derived_arrays_of_a_cohort_are_made_once_and_its_models_are_trained(store, tmp_path):
    plan = write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("mean-cox",), seeds=(7, 8))
    done = sweep(plan)
    assert done.exit_code == 0, done.output
    assert {path.parent.name for path in (tmp_path / "runs").glob("*/summary.json")} == {
        "ONE-mean-cox-s7", "ONE-mean-cox-s8",
    }  # fmt: skip


# -- processes ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("folds", ["fused", "apart"])
def test_processes_side_by_side_give_the_bits_that_one_gives(finished, store, tmp_path, folds):
    plan = write_plan(tmp_path / "plan.toml", store, folds=folds)
    done = sweep(plan, "--jobs", 2)
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "runs") == contents(finished[0])


def command(plan, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "cftrain", "sweep", str(plan), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_sweep_in_processes_says_what_it_did_and_nothing_of_libraries(store, tmp_path):
    plan = write_plan(tmp_path / "plan.toml", store, models=("abmil",), epochs=1)
    process = command(plan, "--jobs", "2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(err.splitlines()) == 1 + 4, err  # what there is to do, and each job


def when_training(out, seconds=120):
    """Wait for a first checkpoint."""
    deadline = time.monotonic() + seconds
    while not list(Path(out).glob("*/fold_*/checkpoint.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(process):
    """The processes of a sweep that do its jobs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_begun_again_and_ends_the_same(store, tmp_path):
    reference = write_plan(tmp_path / "one" / "plan.toml", store, models=("abmil",), epochs=12)
    assert sweep(reference).exit_code == 0
    plan = write_plan(tmp_path / "two" / "plan.toml", store, models=("abmil",), epochs=12)
    process = command(plan, "--jobs", "2")
    when_training(plan.parent / "runs")
    workers = workers_of(process)
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "its process died; it is begun again from its checkpoint" in err
    assert contents(plan.parent / "runs") == contents(reference.parent / "runs")


@pytest.mark.slow
def test_a_job_that_somebody_else_asks_to_stop_is_begun_again_from_its_checkpoint(store, tmp_path):
    plan = write_plan(tmp_path / "plan.toml", store, models=("abmil",), seeds=(7,), epochs=40)
    process = command(plan, "--jobs", "2")
    when_training(tmp_path / "runs")
    workers = workers_of(process)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "it is begun again from its checkpoint" in err
    assert len(list((tmp_path / "runs").glob("*/report.html"))) == 2


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_heard_by_the_sweep_and_not_by_its_processes(store, tmp_path):
    """It is sent to all of them, and twice by who is impatient; they are asked to stop by the sweep."""
    plan = write_plan(tmp_path / "plan.toml", store, models=("abmil",), seeds=(7,), epochs=40)
    process = command(plan, "--jobs", "2")
    when_training(tmp_path / "runs")
    workers = workers_of(process)
    for pid in workers * 2:
        os.kill(pid, signal.SIGINT)
        time.sleep(0.05)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "begun again" not in err
    assert "Traceback" not in err


def test_ctrl_c_that_nobody_takes_up_ends_with_130(store, tmp_path, monkeypatch):
    def interrupted(job, *given):
        raise KeyboardInterrupt

    monkeypatch.setattr("cftrain.sweep.engines.do", interrupted)
    done = sweep(write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("abmil",), seeds=(7,)))
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "Aborted!"


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_sweep_that_is_asked_to_stop_can_be_gone_on_with(store, tmp_path, jobs, number, code):
    plan = write_plan(tmp_path / "plan.toml", store, models=("abmil",), epochs=60)
    process = command(plan, "--jobs", str(jobs))
    when_training(tmp_path / "runs")
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "run the same sweep again to go on" in err
    assert list((tmp_path / "runs").glob("*/fold_*/checkpoint.safetensors"))
    assert not (tmp_path / "runs" / "failed").exists()


@pytest.mark.parametrize("model", ["abmil", "mean-cox"])
def test_a_signal_that_comes_while_a_job_gets_its_data_ready_stops_it_before_it_trains(tmp_path, monkeypatch, model):
    """SLURM sends it once, and kills two minutes later."""
    from cftrain.sweep import work

    def signalled(loading):
        def load(*given, **named):
            os.kill(os.getpid(), signal.SIGTERM)
            return loading(*given, **named)

        return load

    (tmp_path / "cohorts").mkdir()
    store = two_cohorts(tmp_path / "cohorts")  # of its own: with nothing derived
    place = "cftrain.experiment.load_data" if model == "abmil" else "cftrain.sweep.work.load_data"
    monkeypatch.setattr(place, signalled(work.load_data))
    plan = write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=(model,), epochs=500)
    done = sweep(plan)
    assert done.exit_code == 75, done.output
    assert "stopped by SIGTERM" in done.stderr
    assert not any(path.read_text() for path in (tmp_path / "runs").glob("*/fold_*/metrics.jsonl"))
    assert not (tmp_path / "runs" / "failed").exists()


# -- what a person sees ------------------------------------------------------------------------------


def test_a_terminal_shows_models_of_cohorts_by_seeds_and_how_far_each_is(finished, store, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / "runs")
    shutil.rmtree(out / "TWO-dsmil-s7")
    (out / "TWO-abmil-s8" / "summary.json").unlink()
    (out / "failed").mkdir(exist_ok=True)
    (out / "failed" / "ONE-dsmil-s8.txt").write_text("what went wrong\n")
    (out / "ONE-dsmil-s8" / "report.html").unlink()
    for path in (out / "TWO-abmil-s8").glob("fold_*/metrics.jsonl"):
        path.write_text(path.read_text().splitlines(keepends=True)[0])
    jobs = jobs_of(read_plan(write_plan(tmp_path / "plan.toml", store)))
    told = SweepProgress(live=True)
    told.jobs(jobs)
    values = {
        run: f"{json.loads((out / run / 'summary.json').read_text())['c_index_patient']['mean']:.3f}"
        for run in ("ONE-abmil-s7", "ONE-abmil-s8", "ONE-dsmil-s7", "TWO-abmil-s7", "TWO-dsmil-s8")
    }
    rows = [line.split() for line in told.table()]
    assert rows == [
        ["seed", "7", "seed", "8"],
        ["ONE", "abmil", values["ONE-abmil-s7"], values["ONE-abmil-s8"]],
        ["ONE", "dsmil", values["ONE-dsmil-s7"], "failed"],
        ["TWO", "abmil", values["TWO-abmil-s7"], "50", "%"],
        ["TWO", "dsmil", ".", values["TWO-dsmil-s8"]],
    ]
    assert [line.split()[:2] for line in told.table(4)[1:]] == [["ONE", "dsmil"], ["TWO", "abmil"], ["...", "and"]]
    told.ended(jobs[4], Outcome(jobs[4].name, "done", seconds=3, c_index=0.5))
    told.end()
    shown = capsys.readouterr().err
    assert "8 runs; 5 done before, 3 to do" in shown
    assert "5 of 8 runs" in shown


def test_the_table_fits_the_terminal_that_it_is_drawn_on_wherever_stdout_goes(finished, store, tmp_path, monkeypatch):
    """`--json > jobs.json`: a line that is too long is broken, and the next table is drawn over the wrong lines."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 7, 30, 0, 0))
    monkeypatch.delenv("COLUMNS", raising=False)
    jobs = jobs_of(read_plan(write_plan(tmp_path / "plan.toml", store)))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        told = SweepProgress()
        told.jobs(jobs)
        told.end()
        shown = b""
        while select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 65536)
    os.close(ours)
    drawn = shown.decode().rpartition("\033[J")[2].splitlines()
    assert drawn[-2].startswith("... and")
    assert len(drawn) < 7
    assert max(map(len, drawn)) < 30


@pytest.mark.parametrize(
    ("folds", "order", "begun", "share"),
    [
        ("fused", "shuffled", (0, 1, 2), 0.5),  # three folds in the store's splits, where the settings say five
        ("apart", "shuffled", (0,), 0.1),  # five jobs
        ("fused", "independent", (0,), 0.1),  # one fold after the other
    ],
)
def test_how_far_a_run_is_counts_the_folds_that_it_has(store, tmp_path, folds, order, begun, share):
    told = {"cohorts": ("ONE",), "models": ("abmil",), "seeds": (7,), "epochs": 4, "folds": folds}
    plan = write_plan(tmp_path / "plan.toml", store, **told)
    plan.write_text(plan.read_text().replace("[set]", f'[set]\ndata.order = "{order}"'))
    for fold in begun:
        (tmp_path / "runs" / "ONE-abmil-s7" / f"fold_{fold}").mkdir(parents=True)
        (tmp_path / "runs" / "ONE-abmil-s7" / f"fold_{fold}" / "metrics.jsonl").write_text("{}\n{}\n")
    (tmp_path / "runs" / "ONE-abmil-s7" / "config.toml").touch()
    shown = SweepProgress(live=True)
    shown.jobs(jobs_of(read_plan(plan)))
    assert shown.table()[1].split() == ["ONE", "abmil", f"{100 * share:.0f}", "%"]


def test_a_pipe_hears_a_line_for_every_job(finished, store, tmp_path, capsys):
    jobs = jobs_of(read_plan(write_plan(tmp_path / "plan.toml", store, models=("abmil",), seeds=(7,))))
    told = SweepProgress(live=False)
    told.jobs(jobs)
    told.began(jobs[0])
    told.tick()
    told.ended(jobs[0], Outcome(jobs[0].name, "done", seconds=95, c_index=0.625))
    told.ended(jobs[1], Outcome(jobs[1].name, "failed", "no such thing"))
    told.end()
    assert capsys.readouterr().err.splitlines() == [
        "2 runs; 0 done before, 2 to do",
        "done    ONE-abmil-s7  2 min, C-index 0.625 per patient  (1 of 2)",
        "failed  TWO-abmil-s7: no such thing  (1 of 2)",
    ]
