"""Several processes training together (gloo, on the CPU): the weights of one, whatever their number and their stops."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from ranked_runs import SETTINGS, assert_same, train


@pytest.fixture(scope="module")
def alone(demo_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "one"
    done = train(1, demo_store, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_two_and_four_processes_give_the_weights_of_one(alone, demo_store, tmp_path, world):
    done = train(world, demo_store, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", alone)
    assert done.stdout.count("report     ") == 1  # one speaks for all


@pytest.mark.slow
def test_two_processes_share_a_cox_step_as_well(demo_store, tmp_path):
    for world in (1, 2):
        done = train(world, demo_store, tmp_path / str(world), "--set", "train.loss=cox", "--set", "train.epochs=1")
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("later", [1, 4])
def test_a_run_stopped_on_two_processes_goes_on_with_one_or_four(alone, demo_store, tmp_path, later):
    out = tmp_path / "run"
    stopper = (
        "import os, signal, sys, cftrain.passes as p\n"
        "done, take = [0], p._take\n"
        "def counted(*a):\n"
        "    done[0] += 1\n"
        "    if done[0] == 17 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return take(*a)\n"
        "p._take = counted\n"
        "from cftrain.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    script = tmp_path / "stopper.py"
    script.write_text(stopper)
    words = [word for each in SETTINGS for word in ("--set", each)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)),
            *("run", "--cohort", "DEMO", "--store", str(demo_store.path), "--out", str(out), "--device", "cpu", *words),
        ],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "stopped by" in done.stderr
    assert not (out / "summary.json").exists()
    assert list(out.glob("fold_*/checkpoint.safetensors"))
    gone_on = train(later, demo_store, out, "--resume")
    assert gone_on.returncode == 0, gone_on.stderr
    assert_same(out, alone)
    assert json.loads((out / "provenance.json").read_text())["resumed"]
