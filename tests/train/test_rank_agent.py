"""An agent and its process: what is heard, how it ended, and that it never outlives the agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from ranked_runs import environment

from cfstore import EngineError, code_version
from cftrain.cli import main
from cftrain.errors import RankError
from cftrain.rank_agent import Ended, RankAgent
from cftrain.ray_ranks import _cause, _End, _failure

RANK = {"RANK": "0", "WORLD_SIZE": "1"}


def end_of(agent):
    """All that it said, and how it ended."""
    out, err = b"", b""
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, f"it goes on; so far it said {out!r}, {err!r}"
        news = agent.news(60)
        out, err = out + news.out, err + news.err
        if news.ended:
            return out.decode(), err.decode(), news.ended


def started(folder, *arguments, speaks=True):
    agent = RankAgent()
    agent.start(arguments, str(folder), {**RANK, "PYTHONPATH": environment()["PYTHONPATH"]}, "127.0.0.1", speaks=speaks)
    return agent


def test_what_the_first_rank_prints_is_heard_and_what_others_print_is_not(tmp_path):
    for speaks in (True, False):
        out, err, ended = end_of(started(tmp_path, "models", speaks=speaks))
        assert ("crossfusion" in out) == speaks
        assert err == ""
        assert (ended.how, ended.code, ended.why) == ("well", 0, "")


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("run", "--resume", "--out", "nowhere"), 1, "no run to go on with"),
        (("run", "--jobs", "none"), 2, "'none' is not a valid integer"),
    ],
)
def test_an_error_raised_on_purpose_is_reported_and_not_printed(tmp_path, arguments, code, why):
    out, err, ended = end_of(started(tmp_path, *arguments))
    assert (out, err) == ("", "")
    assert (ended.how, ended.code) == ("said", code)
    assert why in ended.why


def test_any_other_exception_is_reported_with_its_place_and_traceback(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import cftrain.cli.model_zoo as zoo\ndef broken(**a): raise ZeroDivisionError('as asked')\n"
        "zoo.models.callback = broken\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, err, ended = end_of(started(tmp_path, "models"))
    assert (err, ended.how, ended.code) == ("", "crashed", 1)
    assert ended.why.startswith("ZeroDivisionError: as asked (")
    assert "sitecustomize.py:2" in ended.why
    assert ended.trace.startswith("Traceback (most recent call last)")


def test_a_folder_that_a_node_does_not_have_and_code_that_it_does_not_share_are_refused(tmp_path):
    with pytest.raises(EngineError, match=r"node \S+ has no folder \S+/none: start in a folder that all nodes share"):
        started(tmp_path / "none", "models")
    assert RankAgent().gpu(code_version()) == os.environ.get("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EngineError, match=r"the command runs 0\.0"):
        RankAgent().gpu("0.0")


def test_a_process_ends_with_its_agent_however_that_ends(tmp_path):
    """The process waits for ever: what it would read is a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "settings.toml")
    script = (
        "import sys, time; from cftrain.rank_agent import RankAgent; agent = RankAgent()\n"
        "words = ['run', '--cohort', 'C', '--config', 'settings.toml']\n"
        "agent.start(words, sys.argv[1], {}, '127.0.0.1', speaks=True)\n"
        "print(agent._process.pid, flush=True); time.sleep(600)\n"
    )
    above = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    pid = int(above.stdout.readline())
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 60
    while b"cftrain.cli.rank" not in Path(f"/proc/{pid}/cmdline").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert stat.exists()
    above.send_signal(signal.SIGKILL)
    above.communicate()
    while stat.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stat.exists()


def test_a_process_that_is_killed_and_one_that_is_asked_to_stop_are_told_apart(tmp_path):
    os.mkfifo(tmp_path / "settings.toml")
    agent = started(tmp_path, "run", "--cohort", "C", "--config", "settings.toml")
    os.kill(agent._process.pid, signal.SIGKILL)
    *_, ended = end_of(agent)
    assert (ended.how, ended.code, ended.why) == ("died", -9, "was killed by SIGKILL")
    agent.signal(signal.SIGTERM)  # nobody is there any more
    agent.end()
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        agent = started(tmp_path, "run", "--cohort", "C", "--config", "settings.toml")
        agent.signal(number)
        *_, ended = end_of(agent)
        assert (ended.how, ended.code, ended.why) == ("stopped", code, "")


def test_a_process_started_in_the_background_of_a_shell_can_be_asked_to_stop(tmp_path):
    """What a script starts with & ignores SIGINT, and so do its children."""
    os.mkfifo(tmp_path / "settings.toml")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        agent = started(tmp_path, "run", "--cohort", "C", "--config", "settings.toml")
    finally:
        signal.signal(signal.SIGINT, before)
    agent.signal(signal.SIGINT)
    *_, ended = end_of(agent)
    assert (ended.how, ended.code, ended.why) == ("stopped", 130, "")


def ended(how, when, code=1, why="why"):
    return Ended(how, code, why, "trace", when)


@pytest.mark.parametrize(
    ("ends", "cause"),
    [
        ([ended("well", 1, 0), ended("well", 2, 0)], None),
        ([ended("stopped", 1, 75), ended("stopped", 2, 130)], None),
        ([ended("crashed", 2), ended("crashed", 1)], 1),  # gloo fails where another rank has gone
        ([ended("crashed", 1), ended("died", 2, -9)], 1),
        ([ended("crashed", 1), ended("died", 2, -6)], 0),  # NCCL aborts
        ([ended("died", 1, -9), ended("said", 2)], 1),
        ([ended("said", 1), ended("said", 2)], 0),
    ],
)
def test_of_ranks_that_fail_together_the_cause_is_named(ends, cause):
    named = [_End(f"rank {rank}", end) for rank, end in enumerate(ends)]
    found = _cause(named)
    assert found is (None if cause is None else named[cause])
    if found is not None:
        told = []
        error = _failure(found, type("Heard", (), {"err": staticmethod(told.append)}))
        assert isinstance(error, RankError)
        assert str(error).startswith(f"rank {cause}")
        assert told == ([] if found.ended.how == "said" else [b"trace"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "2"), "--workers is of --engine ray"),
        (("--address", "auto"), "--address is of --engine ray"),
        (("--engine", "ray"), "needs --workers"),
        (("--engine", "ray", "--workers", "2", "--jobs", "2"), "leave it out with --engine ray"),
        (("--engine", "ray", "--workers", "2", "--device", "cuda:1"), "a GPU of its own"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(click.UsageError, match=message):
        main(["run", "--cohort", "C", *words], standalone_mode=False)


def test_ranks_are_given_the_options_of_the_command_and_those_of_a_restart_go_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("cftrain.ray_ranks.train_on_ray", lambda what, address, heard: asked.append((what, address)))
    out = tmp_path / "run"
    words = ["--cohort", "C", "--model", "abmil", "--model", "csmil", "--seeds", "2", "--set", "train.epochs=3"]
    words += ["--set", "train.loss=ce", "--no-fuse", "--nested", "--json", "--store", "s", "--out", str(out)]
    main(
        ["run", *words, "--engine=ray", "--workers", "3", "--address=h:1", "--worker-cpus", "2"], standalone_mode=False
    )
    ((what, address),) = asked
    assert (what.workers, what.cpus, what.gpu, address) == (3, 2, None, "h:1")
    first = what.arguments("cpu")
    assert first[0] == "run"
    given = main.commands["run"].make_context("run", first[1:]).params
    alone = main.commands["run"].make_context("run", [*words]).params
    assert given == {**alone, "device": "cpu"}
    (out / "abmil-seed_7").mkdir(parents=True)
    (out / "abmil-seed_7" / "config.toml").touch()
    later = what.arguments("cuda")
    given = main.commands["run"].make_context("run", later[1:]).params
    fresh = main.commands["run"].make_context("run", []).params
    assert given == {
        **fresh, "resume": True, "out": out, "store": Path("s"), "fuse": False, "as_json": True, "device": "cuda",
    }  # fmt: skip
    main(["run", *words, "--engine", "ray", "--workers", "3"], standalone_mode=False)
    assert "--resume" not in asked[1][0].arguments("cpu")  # somebody else's run is not gone on with unasked
