"""One model trained by two processes on two Ray nodes: as by one, whoever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from ranked_runs import assert_same, command, run, start, train
from ray_nodes import two_nodes

from cfstore import EngineError
from cftrain.ray_ranks import Asked, Heard, train_on_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]  # one cluster at a time, for all

STEPS = ("--set", "train.epochs=6", "--set", "train.accumulate=32")
"""An epoch is one step: so the loss of every step is in metrics.jsonl."""


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each: two ranks are never on the same."""
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def by_torchrun(demo_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("torchrun") / "run"
    done = train(2, demo_store, out, *STEPS)
    assert done.returncode == 0, done.stderr
    return out


def on_ray(cluster, store, out, *more):
    return command(store, out, "--engine", "ray", "--address", cluster.address, "--workers", "2", *more)


def until(found, process, seconds=100.0):
    """Wait until `found` is true, while the process runs."""
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks(out):
    """The processes that train in `out`: rank to process and to that of its agent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"cftrain.cli.rank" in words and str(out).encode() in words:
                variables = dict(line.split(b"=", 1) for line in (path / "environ").read_bytes().split(b"\0") if line)
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(variables[b"RANK"])] = (int(path.name), parent)
        except (OSError, KeyError):
            continue
    return found


def checkpoints(out):
    """Those that are there, and when they were written."""
    found = {}
    for path in out.glob("fold_*/checkpoint.safetensors"):
        try:
            found[path] = path.stat().st_mtime_ns
        except OSError:
            continue
    return found


def test_two_processes_on_ray_are_those_of_torchrun_bit_for_bit_and_one_process_to_1e_6(
    cluster, by_torchrun, demo_store, tmp_path
):
    cluster.second()
    alone = train(1, demo_store, tmp_path / "one", *STEPS)
    assert alone.returncode == 0, alone.stderr
    done = run(on_ray(cluster, demo_store, tmp_path / "ray", *STEPS))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "ray", by_torchrun, tolerance=0)
    assert_same(tmp_path / "ray", tmp_path / "one")
    assert done.stdout.count("report     ") == 1  # one speaks for all
    assert "fold 4  epoch 6/6" in done.stderr
    assert ranks(tmp_path / "ray") == {}


def test_a_rank_and_then_a_node_are_killed_and_the_run_goes_on_to_the_end_of_the_unbroken_one(
    cluster, by_torchrun, demo_store, tmp_path
):
    doomed = cluster.second()
    out = tmp_path / "run"
    process = start(on_ray(cluster, demo_store, out, *STEPS))
    until(lambda: len(checkpoints(out)) == 5, process)
    first = ranks(out)
    os.kill(first[1][0], signal.SIGKILL)
    until(lambda: ranks(out).get(0, first[0]) != first[0], process)
    before = checkpoints(out)
    until(lambda: len(ranks(out)) == 2 and checkpoints(out) != before, process)
    doomed.kill()
    cluster.second()  # another takes its place
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "rank 1 of 2 on node" in said
    assert "was killed by SIGKILL; going on from the checkpoints, restart 1 of 3" in said
    assert "died with its Ray worker or node; going on from the checkpoints, restart 2 of 3" in said
    assert printed.count("report     ") == 1
    assert_same(out, by_torchrun, tolerance=0)


def test_ctrl_c_writes_the_checkpoints_and_one_process_goes_on(cluster, by_torchrun, demo_store, tmp_path):
    cluster.second()
    out = tmp_path / "run"
    process = start(on_ray(cluster, demo_store, out, *STEPS))
    until(lambda: checkpoints(out), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "the checkpoints are written" in said
    assert "Traceback" not in said
    assert ranks(out) == {}
    assert not (out / "summary.json").exists()
    done = train(1, demo_store, out, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same(out, by_torchrun)


def test_what_two_ranks_find_wrong_is_said_once_with_the_rank_and_its_node(cluster, demo_store, tmp_path):
    cluster.second()
    out = tmp_path / "run"
    done = run(on_ray(cluster, demo_store, out, "--encoder", "nosuch"))
    assert done.returncode == 1
    assert done.stderr.count("nosuch") == 1
    assert done.stderr.startswith("Error: rank ")
    assert " of 2 on node " in done.stderr
    assert "restart" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_is_too_small_is_said_at_once_and_one_that_is_busy_after_a_while(cluster, demo_store, tmp_path):
    cluster.second()
    started = time.monotonic()
    done = run(on_ray(cluster, demo_store, tmp_path / "run", "--workers", "3"))
    assert done.returncode == 1
    assert "3 workers of 1 CPU each do not fit the Ray cluster" in done.stderr
    assert ": 1 CPUs, 0 GPUs; " in done.stderr
    done = run(on_ray(cluster, demo_store, tmp_path / "run", "--device", "cuda"))
    assert "2 workers of 1 CPU and a GPU each do not fit" in done.stderr
    assert time.monotonic() - started < 60
    taken = start(on_ray(cluster, demo_store, tmp_path / "other", *STEPS, "--set", "train.epochs=1000"))
    try:
        until(lambda: checkpoints(tmp_path / "other"), taken)
        asked = Asked(lambda device: ["run"], workers=1, gpu=False, place_seconds=1)
        with pytest.raises(EngineError, match=r"1 workers of 1 CPU each found no room .* 1 s: 0 CPUs and 0 GPUs"):
            train_on_ray(asked, cluster.address, Heard(*[lambda words: None] * 3))
    finally:
        taken.send_signal(signal.SIGTERM)
        taken.communicate(timeout=100)
    assert taken.returncode == 75
