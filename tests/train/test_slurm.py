"""What docs/cluster.md says of SLURM, as far as it goes without one: its commands are stubs, its signals are sent."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranked_runs import ROOT, SETTINGS, assert_same, environment, train

pytestmark = pytest.mark.slow

OPTIONS = ("--set", "train.epochs=4", "--set", "train.accumulate=32")


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


def stubs(folder):
    """`srun`, which starts its words on every node (here: twice) and passes SIGTERM on; `scontrol`; torchrun."""
    folder.mkdir()
    commands = {
        "srun": 'pids=\nfor i in $(seq "$SLURM_NNODES"); do "$@" & pids="$pids $!"; done\n'
        "trap 'kill -TERM $pids' TERM\nwait; wait\n",
        "scontrol": f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$2" >> {folder}/requeued; fi\n',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    return folder


def free_port():
    """Below those that the system gives out, and as the script derives it from the number of a job."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError


def test_the_sbatch_script_trains_on_two_nodes_and_is_queued_again_before_its_time_is_over(alone, demo_store, tmp_path):
    bash, out = shutil.which("bash"), tmp_path / "run"
    here = stubs(tmp_path / "bin")
    job = {
        "PATH": f"{here}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "PET_LOCAL_ADDR": "127.0.0.1",  # torchrun would take the name of the machine
        "GLOO_SOCKET_IFNAME": "lo",
    }
    words = [bash, str(ROOT / "docs" / "slurm_torchrun.sh"), str(out), *options(demo_store)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**environment(), **job})
    until_it_trains(out, process)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=100)
    assert "the checkpoints are written" in said
    assert (here / "requeued").read_text() == f"{job['SLURM_JOB_ID']}\n"
    assert not (out / "summary.json").exists()
    words[3:] = options(demo_store)
    job["SLURM_JOB_ID"] = str(free_port())
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200, env={**environment(), **job})
    assert done.returncode == 0, done.stderr
    assert (here / "requeued").read_text().count("\n") == 1
    assert_same(out, alone)


def test_the_submitit_example_needs_nothing_but_the_extra():
    spec = importlib.util.spec_from_file_location("slurm_submitit", ROOT / "docs" / "slurm_submitit.py")
    pytest.importorskip("submitit")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    again = module.Training("run", ["--cohort", "C"]).checkpoint()
    assert (again.function.out, again.function.options) == ("run", ["--cohort", "C"])
