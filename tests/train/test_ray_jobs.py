"""`cftrain sweep --engine ray`: two nodes, a worker or a node killed, and the bits that one process gives."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from ray_nodes import ROOT, opened_by, two_nodes
from sweeps import contents, two_cohorts, write_plan, written

import cfstore
from cfstore import EngineError, ray_connection
from cftrain import ray_jobs, run_directory
from cftrain.cli import main
from cftrain.sweep.plan import Resources, read_plan
from cftrain.sweep.running import jobs_of

on_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]  # one cluster at a time, for all


def test_what_ray_keeps_for_a_job_is_what_the_plan_says():
    asked = ray_jobs._asked(Resources(cpus=4, gpus=0.25, memory=2 * 10**9))
    assert asked == {"num_cpus": 4, "num_gpus": 0.25, "memory": 2 * 10**9}
    assert ray_jobs._asked(Resources()) == {"num_cpus": 1, "num_gpus": 0}
    place = ray_jobs._place(Resources(cpus=4, gpus=0.25, memory=2 * 10**9))
    assert (place.device, place.threads) == ("cuda", 4)
    assert (place.allowance.ram_bytes, place.allowance.gpu_share) == (2 * 10**9, 0.25)
    assert (ray_jobs._place(Resources()).device, ray_jobs._place(Resources()).threads) == ("cpu", 1)


@pytest.mark.parametrize(
    ("nodes", "fits"),
    [
        ([{"CPU": 4, "GPU": 1, "memory": 1e9}, {"CPU": 8}], True),
        ([{"CPU": 1, "GPU": 1, "memory": 1e9}, {"CPU": 8}], False),
        ([{"CPU": 4, "memory": 1e9}], False),
    ],
)
def test_a_job_that_fits_on_no_node_is_refused_before_ray_waits_for_one(nodes, fits):
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes])
    needed = Resources(cpus=2, gpus=0.5, memory=10**9)
    if fits:
        ray_jobs._check_fits(ray, needed)
    else:
        with pytest.raises(EngineError, match=r"no node of the Ray cluster has what a job takes \(CPU 2, GPU 0.5"):
            ray_jobs._check_fits(ray, needed)


def test_a_node_that_does_not_see_the_sweeps_directory_is_named(tmp_path):
    with pytest.raises(EngineError, match=rf"node .* does not see the sweep's directory {tmp_path}"):
        ray_jobs._check_sees(tmp_path)


def test_a_node_that_lacks_the_store_or_has_another_in_its_place_is_named_and_trains_nothing(store, tmp_path):
    (tmp_path / "own").mkdir()
    own = shutil.copytree(store, tmp_path / "own" / "store")
    plan = read_plan(write_plan(tmp_path / "plan.toml", own, cohorts=("ONE",), models=("abmil",), seeds=(7,)))
    (job,) = jobs_of(plan)
    uuid = cfstore.open(own).header.uuid
    packed = pickle.dumps((job, ray_jobs._place(plan.resources), (), uuid))
    with run_directory.held(plan.out):
        own.rename(tmp_path / "elsewhere")
        with pytest.raises(
            EngineError, match=rf"^node \S+ does not see the store {own} .*; it must be on storage that"
        ):
            ray_jobs._do(cfstore.code_version(), packed)
        cfstore.open(own, create=True)
        with pytest.raises(EngineError, match=rf"^node \S+ has another store at {own} \(\S+, not {uuid}\)"):
            ray_jobs._do(cfstore.code_version(), packed)
    assert not job.run.out.exists()
    assert not job.error_file.exists()


def test_only_jobs_that_have_begun_nothing_are_taken_back_the_next_one_last_and_the_others_see_a_file(store, tmp_path):
    """What `ray.cancel` is not for: a job that may end at this very moment."""
    plan = read_plan(write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("abmil",), seeds=range(4)))
    jobs = jobs_of(plan)
    for job, names in zip(jobs, (["config.toml"], ["summary.json", "report.html"]), strict=False):  # begun, done
        job.run.out.mkdir(parents=True)
        for name in names:
            (job.run.out / name).touch()
    pending, taken_back = {f"task {number}": job for number, job in enumerate(jobs)}, []
    ray = SimpleNamespace(cancel=taken_back.append)
    ray_jobs._stop(ray, pending, plan.out / ".stop")
    assert taken_back == ["task 3", "task 2"]
    assert (plan.out / ".stop").exists()
    taken_back.clear()
    ray_jobs._stop(ray, pending, plan.out / "no folder" / ".stop")  # as on a full disk
    assert taken_back == ["task 3", "task 2", "task 1", "task 0"]


def test_a_job_whose_interrupt_gets_lost_is_stopped_by_the_file_of_the_sweep(store, tmp_path):
    plan = read_plan(
        write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("abmil",), seeds=(7,), epochs=200)
    )
    (job,) = jobs_of(plan)
    packed = pickle.dumps((job, ray_jobs._place(plan.resources), (), cfstore.open(store).header.uuid))

    def stop_when_it_trains():
        until(lambda: list(job.run.out.glob("fold_*/checkpoint.safetensors")))
        (plan.out / ".stop").touch()

    thread = threading.Thread(target=stop_when_it_trains)
    with run_directory.held(plan.out):
        thread.start()
        outcome = ray_jobs._do(cfstore.code_version(), packed)
        thread.join()
        assert outcome.state == "stopped"
        assert not (job.run.out / "summary.json").exists()
        assert ray_jobs._do(cfstore.code_version(), packed).state == "stopped"  # the file is there still


def until(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- two nodes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serving():
    """Gives the cluster of all tests, and another where it died: Ray gives up nodes that a busy machine starves."""
    made = []
    with ExitStack() as stack:

        def get():
            if not made or not made[-1].head.is_alive():
                made.append(stack.enter_context(two_nodes()))
            return made[-1]

        yield get


@pytest.fixture
def cluster(serving):
    return serving()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return two_cohorts(tmp_path_factory.mktemp("cohorts"))


def sweep(plan, *words):
    return CliRunner().invoke(main, ["sweep", str(plan), *map(str, words)])


def killing(out, nodes, what):
    """A thread that waits for a checkpoint, and then kills what has the run's lock; returns it and whom it killed."""
    killed = []

    def look():
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not killed:
            for path in out.glob("*/fold_*/checkpoint.safetensors"):
                run = path.parents[1]
                for node in nodes():
                    holders = [pid for pid in node.processes if opened_by({pid}, f"{run}/.lock")]
                    if holders:
                        killed.append(run.name)
                        what(node, holders[0])
                        return
            time.sleep(0.01)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread, killed


class TestTwoNodes:
    """One cluster for all."""

    pytestmark = on_ray

    def test_a_sweep_with_a_worker_killed_gives_the_bits_of_the_sweep_of_one_process(self, cluster, store, tmp_path):
        models = ("abmil", "dsmil", "crossfusion")
        plan = write_plan(tmp_path / "ray" / "plan.toml", store, models=models)
        cluster.second()
        nodes = lambda: [cluster.head, *(node for node in cluster.others if node.is_alive())]  # noqa: E731
        thread, killed = killing(plan.parent / "runs", nodes, lambda node, pid: os.kill(pid, signal.SIGKILL))
        done = sweep(plan, "--engine", "ray", "--address", cluster.address)
        thread.join(1)
        assert done.exit_code == 0, done.output
        assert len(killed) == 1
        resumed = {
            path.parent.name: len(json.loads(path.read_text()).get("resumed", ()))
            for path in (plan.parent / "runs").glob("*/provenance.json")
        }
        assert resumed == dict.fromkeys(resumed, 0) | {killed[0]: 1}
        assert sum(line.startswith("done ") for line in done.stderr.splitlines()) == 12
        alone = write_plan(tmp_path / "alone" / "plan.toml", store, models=models)
        assert sweep(alone).exit_code == 0
        found = contents(plan.parent / "runs")
        assert len(found) == 12
        assert found == contents(alone.parent / "runs")
        before = written(plan.parent / "runs")
        again = sweep(plan, "--engine", "ray", "--address", cluster.address)
        assert "12 done before, 0 to do" in again.stderr
        assert written(plan.parent / "runs") == before

    def test_a_job_that_somebody_else_asks_to_stop_is_begun_again_from_its_checkpoint(self, cluster, store, tmp_path):
        told = {"cohorts": ("ONE",), "models": ("abmil",), "seeds": (7,), "epochs": 20}
        plan = write_plan(tmp_path / "plan.toml", store, **told)
        nodes = lambda: [cluster.head, *(node for node in cluster.others if node.is_alive())]  # noqa: E731
        thread, asked = killing(tmp_path / "runs", nodes, lambda node, pid: os.kill(pid, signal.SIGTERM))
        done = sweep(plan, "--engine", "ray", "--address", cluster.address)
        thread.join(1)
        assert asked == ["ONE-abmil-s7"]
        assert done.exit_code == 0, done.output
        assert "ONE-abmil-s7: it was asked to stop; it is begun again from its checkpoint" in done.stderr
        assert len(json.loads((tmp_path / "runs/ONE-abmil-s7/provenance.json").read_text())["resumed"]) == 1

    def test_folds_apart_with_a_node_killed_give_the_runs_of_one_process(self, cluster, store, tmp_path):
        told = {"cohorts": ("ONE",), "models": ("abmil",), "seeds": (7,), "epochs": 6, "folds": "apart"}
        plan = write_plan(tmp_path / "ray" / "plan.toml", store, **told)
        second = cluster.second()
        thread, killed = killing(plan.parent / "runs", lambda: [second], lambda node, pid: node.kill())
        done = sweep(plan, "--engine", "ray", "--address", cluster.address)
        thread.join(1)
        assert done.exit_code == 0, done.output
        assert len(killed) == 1
        alone = write_plan(tmp_path / "alone" / "plan.toml", store, **(told | {"folds": "fused"}))
        assert sweep(alone).exit_code == 0
        assert contents(plan.parent / "runs") == contents(alone.parent / "runs") != {}

    def test_what_fails_on_a_node_is_named_and_the_others_are_done(self, cluster, store, tmp_path):
        more = '\n[cohort.ONE]\ndata.splits = "none"\n'
        plan = write_plan(tmp_path / "plan.toml", store, models=("abmil",), seeds=(7,), more=more)
        done = sweep(plan, "--engine", "ray", "--address", cluster.address)
        assert done.exit_code == 1
        assert "  ONE-abmil-s7: cohort ONE has no splits named 'none'; it has: splits" in done.stderr.splitlines()
        assert (tmp_path / "runs" / "TWO-abmil-s7" / "summary.json").exists()

    def test_a_sweep_on_nodes_that_is_asked_to_stop_can_be_gone_on_with(self, cluster, store, tmp_path):
        plan = write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("abmil",), epochs=200)
        words = [str(plan), "--engine", "ray", "--address", cluster.address]
        process = subprocess.Popen(
            [sys.executable, "-m", "cftrain", "sweep", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not list((tmp_path / "runs").glob("*/fold_*/checkpoint.safetensors")):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 75, err
        assert "run the same sweep again to go on" in err
        assert not (tmp_path / "runs" / "failed").exists()
        time.sleep(1)
        before = written(tmp_path / "runs")
        time.sleep(1)
        assert written(tmp_path / "runs") == before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_sweep_whose_last_node_for_its_jobs_is_lost_ends_and_says_so(store, tmp_path, monkeypatch):
    """Ray would wait for another, for ever and in silence."""
    monkeypatch.setattr(ray_connection, "ROOM_SECONDS", 3.0)
    plan = write_plan(tmp_path / "plan.toml", store, cohorts=("ONE",), models=("abmil",), seeds=(7,), epochs=200)
    with two_nodes(num_cpus=0) as bare:
        only = bare.add(num_cpus=1)
        thread, killed = killing(tmp_path / "runs", lambda: [only], lambda node, pid: node.kill())
        done = sweep(plan, "--engine", "ray", "--address", bare.address)
        thread.join(10)
    assert killed == ["ONE-abmil-s7"]
    assert done.exit_code == 1
    assert "no node of the Ray cluster has what a job takes (CPU 1; the nodes have: CPU 0, " in done.stderr
    assert "Nodes were lost; what was finished is kept" in done.stderr
