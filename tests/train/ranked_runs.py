"""Short runs of several processes, by the command, and whether two runs are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "model.name=abmil",
    "model.hidden_dim=16",
    "model.attention_dim=8",
    "model.dropout=0.25",
    "train.epochs=2",
    "train.accumulate=8",
    "train.select_from=1",
    "train.batch_patches=150",
    "train.checkpoint_minutes=0",
)
TORCHRUN = ("-m", "torch.distributed.run")


def environment():
    """This process's, with the code of this checkout and one thread for each process."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def command(store, out, *more, launch=()):
    """The words of `cftrain run`, below those that `launch` it; more settings, or options."""
    begin = [] if "--resume" in more else ["--cohort", "DEMO", *(word for each in SETTINGS for word in ("--set", each))]
    call = [sys.executable, *launch, "-m", "cftrain", "run", "--store", str(store.path), "--out", str(out)]
    return [*call, *begin, *more] if "--device" in more else [*call, "--device", "cpu", *begin, *more]


def start(words):
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def run(words):
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=environment())


def train(world, store, out, *more):
    """Train in one process, or in `world` of them below torchrun."""
    launch = (*TORCHRUN, "--standalone", "--nproc-per-node", str(world)) if world > 1 else ()
    return run(command(store, out, *more, launch=launch))


def losses(run):
    """Of each fold, the mean training loss of every epoch."""
    lines = {path.parent.name: path.read_text().splitlines() for path in run.glob("fold_*/metrics.jsonl")}
    return {fold: [json.loads(line)["train_loss"] for line in each] for fold, each in lines.items()}


def assert_same(out, other, tolerance=1e-6):
    """Weights, losses and the predictions of every slide; with tolerance 0 bit for bit."""
    found = sorted(other.glob("fold_*/*_epoch.safetensors"))
    assert len(found) == 10
    for path in found:
        one, two = load_file(path), load_file(out / path.relative_to(other))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=0, atol=tolerance)
    assert losses(out).keys() == losses(other).keys() != set()
    for fold, each in losses(other).items():
        torch.testing.assert_close(torch.tensor(losses(out)[fold]), torch.tensor(each), rtol=0, atol=tolerance)
    tables = [pq.read_table(run / "predictions.parquet") for run in (other, out)]
    assert tables[0]["slide_id"] == tables[1]["slide_id"]
    risks = [torch.tensor(table["risk"].to_numpy()) for table in tables]
    torch.testing.assert_close(risks[1], risks[0], rtol=0, atol=tolerance)
