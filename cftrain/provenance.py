"""Where a run's numbers come from: versions, device, data, code."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cfkernels import explain
from cftrain.config import ModelConfig, RunConfig
from cftrain.data import RunData
from cftrain.zoo import CrossFusionConfig, model_options

_PACKAGES = ("crossfusion-store", "torch", "triton", "numpy", "zarr", "numcodecs", "duckdb", "lifelines", "pyarrow")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the folder this code was imported from; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments],  # noqa: S607 - the user's own git
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _data_digest(data: RunData) -> str:
    """sha256 over the digests of every bag of the run, by slide and scale."""
    encoder = data.cohort.encoder.replace("'", "''")
    rows = data.store.sql(
        f"SELECT slide_id, scale, digest FROM bags WHERE encoder = '{encoder}' ORDER BY ALL"
    ).to_pylist()
    used = {slide.slide_id for slide in data.cohort.slides}
    lines = [f"{row['slide_id']} {row['scale']} {row['digest']}" for row in rows if row["slide_id"] in used]
    return _sha256(lines)


def _splits_digest(data: RunData) -> str:
    lines = [
        f"{number} {part} {' '.join(sorted(getattr(fold, part)))}"
        for number, fold in sorted(data.splits.folds.items())
        for part in ("train", "val")
    ]
    return _sha256(lines)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"


def _origin(data: RunData, where: str, shards: str) -> dict[str, Any]:
    """The store, or the tars and for each a digest over the records of its bags; and the condition, if any."""
    condition = {"where": where} if where else {}
    if not shards:
        return {"store": data.store.location, "store_uuid": data.store.header.uuid, **condition}
    lines: dict[str, list[str]] = {}
    for row in data.store.sql("SELECT shard, slide_id, scale, digest FROM bags ORDER BY ALL").to_pylist():
        lines.setdefault(row["shard"], []).append(f"{row['slide_id']} {row['scale']} {row['digest']}")
    return {"shards": shards, "tars": {shard: _sha256(held) for shard, held in lines.items()}, **condition}


def _sha256(lines: Sequence[str]) -> str:
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def _kernels(model: ModelConfig, device: torch.device) -> dict[str, dict[str, str]]:
    """Which implementation each op of cfkernels has in training, for the models that use them."""
    options = model_options(model.name, model.options)
    if not isinstance(options, CrossFusionConfig):
        return {}
    head_dim = options.embed_dim // options.n_heads
    found = explain(device, head_dim=head_dim, dropout=options.attention_dropout > 0)
    return {"kernels": {row.op: row.implementation for row in found.rows}}


def this_process(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """When, with which command, versions, commit and on what machine this is computed."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": device_name(device),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }


def digests(data: RunData) -> dict[str, str]:
    """Of all that a run reads: every bag, label and fold."""
    return {"data_digest": _data_digest(data), "splits_digest": _splits_digest(data)}


def collect(
    data: RunData, config: RunConfig, device: torch.device, command: Sequence[str], config_toml: str
) -> dict[str, Any]:
    """Everything a reader needs to repeat or doubt the run."""
    return {
        **this_process(device, command),
        **_kernels(config.model, device),
        **_origin(data, config.data.where, config.data.shards),
        "splits": data.splits.name,
        **digests(data),
        "config_digest": _sha256([config_toml]),
    }
