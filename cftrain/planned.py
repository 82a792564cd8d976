"""Which runs a command asks for: new ones by model and seed, or those that were stopped. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cftrain.config import RunConfig, load_config
from cftrain.errors import RunError
from cftrain.run_directory import begun, stored_store, unfinished

_MOST_NAMES = 3
"""In the name of a directory."""


@dataclass(frozen=True)
class Planned:
    """Runs on one cohort, and what each is called beside the others (no names where there is one)."""

    configs: tuple[RunConfig, ...]
    outs: tuple[Path, ...]
    labels: tuple[str, ...]
    store: Path | str


def new_runs(
    out: Path | None,
    runs: Path,
    models: Sequence[str],
    seeds: int,
    store: Path | str,
    *,
    preset: str | None,
    file: Path | None,
    flags: Mapping[str, str | None],
    settings: Sequence[str],
    stamp: str,
) -> Planned:
    """One run per model and seed, in `out` or a directory of `runs` named by the cohort, the models and `stamp`.

    All seeds share the order of the first, so that one reading of the cohort serves them all.

    Raises
    ------
    ConfigError
        See `load_config`.
    """
    configs, labels = [], []
    asked: Sequence[str | None] = models or [None]
    for model in asked:
        base = load_config(preset=preset, file=file, flags={**flags, "model.name": model}, settings=settings)
        for step in range(seeds):
            configs.append(_seeded(base, step) if seeds > 1 else base)
            names = [base.model.name] * (len(models) > 1) + [f"seed_{base.train.seed + step}"] * (seeds > 1)
            labels.append("-".join(names))
    if out is None:
        data = configs[0].data
        what = data.cohort or ("where" if data.where else "shards")
        names = list(dict.fromkeys(config.model.name for config in configs))
        called = "+".join(names) if len(names) <= _MOST_NAMES else f"{len(names)}_models"
        out = runs / f"{what}-{called}-{stamp}"
    outs = tuple(out / label for label in labels)
    return Planned(tuple(configs), outs, tuple(labels) if len(labels) > 1 else (), store)


def _seeded(config: RunConfig, step: int) -> RunConfig:
    """The same run with a later seed, in the same order and folds."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, order_seed=config.order_seed),
        train=dataclasses.replace(config.train, seed=config.train.seed + step),
    )


def resumed(
    out: Path | None, runs: Path, store: Path | str | None, flags: Mapping[str, str | None], settings: Sequence[str]
) -> Planned:
    """The run in `out`, or all runs in it; without `out` the unfinished one of `runs` that was begun last.

    Parameters
    ----------
    store
        Where the store is now; None: where it was.
    flags, settings
        On top of the stored settings; only those that change no number are accepted later.

    Raises
    ------
    RunError
        There is nothing to go on with, or the command was stopped before it began all of its runs.
    """
    found = _begun_in(out) if out else _latest(runs)
    configs = tuple(load_config(file=run / "config.toml", flags=flags, settings=settings) for run in found)
    where = store or stored_store(found[0]) or Path()
    return Planned(configs, tuple(found), tuple(run.name for run in found) if len(found) > 1 else (), where)


def _begun_in(out: Path) -> list[Path]:
    if begun(out):
        return [out]  # folders in it may hold locks of their own
    found = sorted(path.parent for path in out.glob("*/config.toml"))
    if not found:
        message = f"{out}: no run to go on with (no config.toml); begin one with `cftrain run --out {out}`"
        raise RunError(message)
    missed = sorted(path.parent.name for path in out.glob("*/.lock") if not begun(path.parent))
    if missed:
        message = (
            f"{out}: stopped before all of its runs were begun; {', '.join(missed)} would be missing. Remove {out} and "
            f"begin anew, or only those folders to go on without them"
        )
        raise RunError(message)
    return found


def _latest(runs: Path) -> list[Path]:
    left = unfinished(runs)
    if not left:
        message = f"{runs}: no unfinished run here; name its directory with --out"
        raise RunError(message)
    last = left[-1]
    return [last] if last.parent == runs else _begun_in(last.parent)
