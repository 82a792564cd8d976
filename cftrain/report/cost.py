"""What a run cost, what limited it, and which of its steps were left out."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cftrain.report.reading import Row
from cftrain.report.wording import NOTHING, count, defined, duration, percent, rate, size

MOSTLY_WAITING = 0.5
HARDLY_WAITING = 0.1


@dataclass(frozen=True)
class Skipped:
    """A training step that was left out."""

    fold: int
    epoch: int
    why: str


def cost_rows(summary: Mapping[str, Any], config: str) -> list[tuple[str, str]]:
    """Time, rates, bytes and memory, as far as the run has counted them."""
    seconds = summary["seconds"]
    rows = [
        ("Time taken", duration(seconds)),
        ("Slides per second", rate(summary["slides_per_second"])),
        ("Patches per second", rate(summary.get("patches_per_second"))),
        ("Waiting for data", _with_share(summary.get("data_wait_seconds"), summary.get("data_wait_share"))),
        ("Computing", duration(summary.get("compute_seconds"))),
        ("Read from the store", _read(summary.get("bytes_read"), seconds)),
        ("Most memory of one process", size(summary.get("peak_memory_bytes"))),
        ("Patches per batch", count(_batch_patches(config))),
    ]
    return [(name, value) for name, value in rows if value != NOTHING]


def limit_sentence(summary: Mapping[str, Any]) -> str:
    """Whether reading or computing was the limit."""
    waiting = summary.get("data_wait_share")
    if not defined(waiting):
        return "How long this run waited for its data is not in it."
    told = f"{percent(waiting)} of the time in steps was spent waiting for data"
    if waiting >= MOSTLY_WAITING:
        return f"Reading was the limit: {told}."
    if waiting < HARDLY_WAITING:
        return f"Computing was the limit: {told}."
    return f"Computing was the larger part: {told}, which faster reading could save."


def skipped_steps(epochs: Mapping[int, Sequence[Row]]) -> list[Skipped]:
    """Every step that was left out, with the fold, the epoch and the reason."""
    return [
        Skipped(fold, row["epoch"], why)
        for fold, rows in epochs.items()
        for row in rows
        for why in row.get("skipped") or []
    ]


def n_skipped(summary: Mapping[str, Any], listed: Sequence[Skipped]) -> int:
    """How many steps were left out."""
    return max(sum(fold.get("skipped_steps") or 0 for fold in summary["folds"]), len(listed))


def _with_share(seconds: float | None, share: float | None) -> str:
    return f"{duration(seconds)} ({percent(share)} of waiting and computing)" if defined(seconds) else NOTHING


def _read(n_bytes: float | None, seconds: float | None) -> str:
    if not defined(n_bytes):
        return NOTHING
    pace = f", {size(n_bytes / seconds)} per second" if defined(seconds) and seconds > 0 else ""
    return f"{size(n_bytes)}{pace} (decoded; what a cache held is not counted)"


def _batch_patches(config: str) -> int | None:
    """train.batch_patches of config.toml; None where it has none."""
    try:
        found = tomllib.loads(config).get("train", {}).get("batch_patches")
    except (tomllib.TOMLDecodeError, AttributeError):
        return None
    return found if isinstance(found, int) else None
