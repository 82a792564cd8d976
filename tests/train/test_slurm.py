"""What docs/cluster.md says of SLURM, on one: its daemons on this machine as two nodes. Without it, visibly skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranked_runs import ROOT, SETTINGS, assert_same, environment, train
from slurm_cluster import slurm_cluster

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

OPTIONS = ("--set", "train.epochs=8", "--set", "train.accumulate=32")


@pytest.fixture(scope="module")
def alone(demo_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("slurm") / "run"
    done = train(1, demo_store, out, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return out


def options(store):
    settings = [word for each in SETTINGS for word in ("--set", each)]
    return ["--cohort", "DEMO", "--store", str(store.path), "--device", "cpu", *settings, *OPTIONS]


def until_it_trains(out, process):
    deadline = time.monotonic() + 100
    while not list(out.glob("fold_*/checkpoint.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def child_of(pid, part):
    """A process below `pid` whose command line holds `part`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and part in (path / "cmdline").read_text():
                return int(path.name)
        except OSError:
            continue
    return None


def test_a_submitit_job_goes_on_where_it_was_interrupted_and_its_result_is_that_of_the_run(alone, demo_store, tmp_path):
    pytest.importorskip("submitit")
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "docs" / "slurm_submitit.py"), str(out), *options(demo_store)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment(), "CLUSTER": "local"},
    )  # fmt: skip
    until_it_trains(out, process)
    controller = child_of(process.pid, "submitit.local._local")
    os.kill(child_of(controller, "submitit.core._submit"), signal.SIGUSR2)  # what SLURM sends before a job's end
    printed, said = process.communicate(timeout=200)
    log = "".join(path.read_text() for path in tmp_path.glob("run.jobs/*.err"))
    assert process.returncode == 0, said + log
    assert "stopped by SIGUSR1; the checkpoints are written" in log
    summary = json.loads((out / "summary.json").read_text())
    assert json.loads(printed) == summary["c_index_patient"]
    assert len(json.loads((out / "provenance.json").read_text())["resumed"]) == 1
    assert_same(out, alone, tolerance=0)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def here():
    """Commands of this environment come first, and processes find each other on loopback."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**environment(), "PATH": path, "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def until_it_trains_in(slurm, job, out):
    deadline = time.monotonic() + 100
    while not list(out.glob("fold_*/checkpoint.safetensors")):
        assert slurm.state(job) in ("PENDING", "RUNNING")
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_sbatch_script_trains_on_two_nodes_and_is_queued_again_before_its_time_is_over(
    alone, demo_store, slurm, tmp_path
):
    out, log = tmp_path / "run", tmp_path / "log"
    flags = ("--parsable", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={log}")
    words = ("sbatch", *flags, str(ROOT / "docs" / "slurm_torchrun.sh"), str(out), *options(demo_store))
    job = slurm.ask(*words, **here())
    until_it_trains_in(slurm, job, out)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)  # as SLURM does by `#SBATCH --signal=B:USR1@120`
    assert slurm.wait(job) == "COMPLETED", log.read_text()
    assert slurm.restarts(job) == 1
    assert "stopped by SIGTERM; the checkpoints are written" in log.read_text()
    provenance = json.loads((out / "provenance.json").read_text())
    assert len(provenance["resumed"]) == 1
    assert_same(out, alone)


def test_a_failed_run_of_the_sbatch_script_is_not_queued_again(demo_store, slurm, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    flags = ("--parsable", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={log}")
    words = ("sbatch", *flags, str(ROOT / "docs" / "slurm_torchrun.sh"), str(out), "--cohort", "NONE")
    job = slurm.ask(*words, "--store", str(demo_store.path), **here())
    assert slurm.wait(job) == "FAILED"
    assert slurm.restarts(job) == 0
    assert "NONE" in log.read_text()


def test_the_batch_script_of_the_page_goes_on_where_it_was_warned(alone, demo_store, slurm, tmp_path):
    page, out, log = (ROOT / "docs" / "cluster.md").read_text(), tmp_path / "run", tmp_path / "log"
    (block,) = (each for each in page.split("```") if "-eq 75" in each)
    begin = "--cohort GBMLGG"
    assert block.count("runs/gbmlgg") == 2
    assert block.count(begin) == 1
    script = tmp_path / "script.sh"
    text = block.replace("runs/gbmlgg", str(out)).replace(begin, " ".join(options(demo_store)))
    script.write_text(f"#!/bin/bash{text}")
    job = slurm.ask("sbatch", "--parsable", "--cpus-per-task=1", f"--output={log}", str(script), **here())
    until_it_trains_in(slurm, job, out)
    slurm.ask("scancel", "--signal=USR1", job)  # as SLURM does by `#SBATCH --signal=USR1@120`
    assert slurm.wait(job) == "COMPLETED", log.read_text()
    assert slurm.restarts(job) == 1
    assert "stopped by SIGUSR1; the checkpoints are written" in log.read_text()
    assert_same(out, alone, tolerance=0)


def test_a_submitit_job_on_slurm_goes_on_where_it_was_warned(alone, demo_store, slurm, tmp_path):
    pytest.importorskip("submitit")
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "docs" / "slurm_submitit.py"), str(out), *options(demo_store)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**here(), **slurm.environment},
    )  # fmt: skip
    until_it_trains(out, process)
    job = slurm.ask("squeue", "--noheader", "--format=%i", "--name=submitit")
    slurm.ask("scancel", "--signal=USR2", job)  # as SLURM does by the `--signal=USR2@120` of submitit
    printed, said = process.communicate(timeout=240)
    log = "".join(path.read_text() for path in tmp_path.glob("run.jobs/*.err"))
    assert process.returncode == 0, said + log
    assert slurm.restarts(job) == 1
    # SLURM's goes to every process of the step, and `checkpoint` sends its own: whichever the run sees first
    assert re.search("stopped by SIGUSR[12]; the checkpoints are written", log)
    last = printed.splitlines()[-1]  # before it, submitit's warnings that this SLURM keeps no accounts
    assert json.loads(last) == json.loads((out / "summary.json").read_text())["c_index_patient"]
    assert_same(out, alone, tolerance=0)


def test_the_submitit_example_needs_nothing_but_the_extra():
    spec = importlib.util.spec_from_file_location("slurm_submitit", ROOT / "docs" / "slurm_submitit.py")
    pytest.importorskip("submitit")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    again = module.Training("run", ["--cohort", "C"]).checkpoint()
    assert (again.function.out, again.function.options) == ("run", ["--cohort", "C"])
