"""A SLURM of two nodes on this machine: its own daemons, without authentication, on loopback."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

NODES = ("127.0.0.1", "127.0.0.2")  # names that every machine can resolve

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
GresTypes=gpu
ReturnToService=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=16 Gres=gpu:1
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=16 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Slurm:
    """Its commands."""

    def __init__(self, root: Path) -> None:
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}

    def ask(self, *words: str, **environment: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            words, env={**os.environ, **self.environment, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """What becomes of a job: PENDING, RUNNING, COMPLETED, FAILED."""
        said = self.ask("scontrol", "--oneliner", "show", "job", job)
        return next(word.removeprefix("JobState=") for word in said.split() if word.startswith("JobState="))

    def restarts(self, job: str) -> int:
        """How often a job was queued again."""
        said = self.ask("scontrol", "--oneliner", "show", "job", job)
        return int(next(word.removeprefix("Restarts=") for word in said.split() if word.startswith("Restarts=")))

    def wait(self, job: str, seconds: float = 240.0) -> str:
        """Until a job has ended: its state."""
        until = time.monotonic() + seconds
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < until, f"job {job} is {state} for {seconds:.0f} s"
            time.sleep(0.2)
        return state


@contextmanager
def slurm_cluster(root: Path) -> Iterator[Slurm]:
    """Two nodes with 16 cores and a GPU each, as far as SLURM knows."""
    daemons = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("slurmctld", "slurmd")]
    if None in daemons:
        pytest.skip("needs SLURM: apt-get install slurm-wlm")
    (root / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(root=root, host=host, user=getpass.getuser(), nodes=NODES, ports=free_ports(3))
    (root / "slurm.conf").write_text(text)
    (root / "gres.conf").write_text(f"AutoDetect=off\nNodeName={','.join(NODES)} Name=gpu File=/dev/null\n")
    slurm = Slurm(root)
    environment = {**os.environ, **slurm.environment}
    commands = [[daemons[0], "-D", "-c"], *([daemons[1], "-D", "-N", node] for node in NODES)]
    with (root / "daemons.log").open("w") as log:
        running = [subprocess.Popen(words, env=environment, stdout=log, stderr=log) for words in commands]
    try:
        until = time.monotonic() + 60
        while (
            subprocess.run(
                ["sinfo", "--noheader", "--states=idle", "--format=%D"],
                env=environment,
                capture_output=True,
                check=False,
            ).stdout.strip()
            != b"2"
        ):
            assert time.monotonic() < until, "".join(path.read_text() for path in sorted(root.glob("*.log")))
            time.sleep(0.1)
        yield slurm
        subprocess.run(["scancel", "--full", "--user", getpass.getuser()], env=environment, check=False)
        time.sleep(0.5)
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait()
