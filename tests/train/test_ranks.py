"""Several processes training together (gloo, on the CPU): the weights of one, whatever their number and their stops."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from ranked_runs import SETTINGS, TORCHRUN, assert_same, command, run, start, train

import cfstore
from cfstore.synth import synthesize
from cftrain.config import load_config


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


def changed_in_rank_one(tmp_path, change):
    """A script that is `cftrain`, but that one of the processes is changed."""
    script = tmp_path / "changed.py"
    script.write_text(
        f"import os, sys\nif os.environ['RANK'] == '1':\n{change}\nfrom cftrain.cli import main\nmain(sys.argv[1:])\n"
    )
    return (*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(script))


def below(launch, words):
    """The same words below another launcher."""
    return [words[0], *launch, *words[words.index("cftrain") + 1 :]]


@pytest.mark.slow
def test_processes_with_less_memory_decide_how_many_patches_go_together(demo_store, tmp_path):
    """Packs would differ otherwise, and with them what each process thinks the others do."""
    launch = changed_in_rank_one(tmp_path, "    import cftrain.budget as b\n    b.MOST_PATCHES['cpu'] = 90")
    words = [*command(demo_store, tmp_path / "run", "--set", "train.batch_patches=0", "--set", "train.epochs=1")]
    done = run(below(launch, words))
    assert done.returncode == 0, done.stderr
    assert load_config(file=tmp_path / "run" / "config.toml").train.batch_patches == 90
    alone = train(1, demo_store, tmp_path / "one", "--set", "train.batch_patches=90", "--set", "train.epochs=1")
    assert alone.returncode == 0, alone.stderr
    assert_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_processes_that_do_not_see_the_same_store_or_run_are_refused(demo_store, tmp_path):
    out, other = tmp_path / "run", tmp_path / "other"
    synthesize(tmp_path / "h5", slides=24, patches=48, dim=8, seed=4)
    cfstore.open(tmp_path / "store", create=True).ingest(tmp_path / "h5", cfstore.IngestOptions(encoder="toy"))
    stores = f"    sys.argv[sys.argv.index('--store') + 1] = {str(tmp_path / 'store')!r}"
    done = run(below(changed_in_rank_one(tmp_path, stores), command(demo_store, out)))
    assert done.returncode == 1
    assert "the processes do not see the same slides, labels and folds" in done.stderr
    assert not (out / "config.toml").exists()
    process = start(command(demo_store, out, "--set", "train.epochs=2000"))
    while not list(out.glob("fold_*/checkpoint.safetensors")):
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=100)
    shutil.copytree(out, other, ignore=shutil.ignore_patterns("fold_*"))
    runs = f"    sys.argv[sys.argv.index('--out') + 1] = {str(other)!r}"
    done = run(below(changed_in_rank_one(tmp_path, runs), command(demo_store, out, "--resume")))
    assert done.returncode == 1
    assert "not all processes see the same checkpoints" in done.stderr
