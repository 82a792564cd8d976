"""A run as a SLURM job, from Python: warned of its time limit it writes its checkpoints, is queued again and goes on.

    pip install 'crossfusion-store[slurm]'
    python slurm_submitit.py runs/gbmlgg --cohort GBMLGG --model abmil

Everything after the run directory is for `cftrain run`. Folder, time limit and resources are at the end: they are the
site's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import submitit


class Training:
    """A job for submitit, which calls `checkpoint` where SLURM takes the node away."""

    def __init__(self, out: str, options: list[str]) -> None:
        self.out, self.options = out, options
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> dict[str, Any]:
        """Begin the run, or go on with it; returns summary.json."""
        options = ["--resume"] if Path(self.out, "config.toml").exists() else self.options
        self._process = subprocess.Popen([sys.executable, "-m", "cftrain", "run", "--out", self.out, *options])
        _wait(self._process)
        if code := self._process.wait():
            raise RuntimeError(f"{self.out}: cftrain ended with exit code {code}; see the log of the job")
        return json.loads(Path(self.out, "summary.json").read_text())

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let the run write its checkpoints; returns what is to be done in the next job."""
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR1)
            _wait(self._process)
        return submitit.helpers.DelayedSubmission(Training(self.out, self.options))


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Not `process.wait()`: `checkpoint` comes by a signal in the midst of it, and would wait for its lock for ever."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


if __name__ == "__main__":
    out, *options = sys.argv[1:]
    executor = submitit.AutoExecutor(
        folder=f"{out}.jobs",
        cluster=os.environ.get("CLUSTER"),  # None: SLURM where there is one; "local": a process on this machine
        slurm_max_num_timeout=20,
        local_max_num_timeout=20,
    )
    executor.update_parameters(timeout_min=240, slurm_signal_delay_s=120, cpus_per_task=8, gpus_per_node=1)
    job = executor.submit(Training(out, options))
    print(f"job {job.job_id}, log {job.paths.stderr}", file=sys.stderr)
    print(json.dumps(job.result()["c_index_patient"]))
