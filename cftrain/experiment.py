"""Cross-validation: every fold trained and evaluated, one run directory written.

Both selection rules are recorded for every fold: the last epoch of a schedule that was fixed
beforehand (honest), and the epoch that scored best on the very fold that is reported (the
paper's rule, which even random predictions pass with flattering numbers).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cftrain.cache import CachePlan, plan_cache
from cftrain.config import RunConfig, to_toml
from cftrain.data import RunData, load_data
from cftrain.device import free_gpu
from cftrain.errors import ConfigError, RunError
from cftrain.feed import Feed, cohort_bytes
from cftrain.fold_training import make_model, train_fold
from cftrain.folds import FoldSlides
from cftrain.memory import free_ram
from cftrain.provenance import collect
from cftrain.results import Epoch, FoldResult, write_predictions, write_summary


@dataclass(frozen=True)
class Watcher:
    """What the caller wants to hear while a run goes on; all may stay silent."""

    on_data: Callable[[RunData, int], None] = lambda data, n_parameters: None
    on_cache: Callable[[CachePlan], None] = lambda plan: None
    on_epoch: Callable[[FoldSlides, Epoch], None] = lambda fold, epoch: None
    on_fold: Callable[[FoldResult], None] = lambda result: None


@dataclass(frozen=True)
class FinishedRun:
    """Where a run was written, and its summary.json."""

    path: Path
    summary: Mapping[str, Any]


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one.

    Raises
    ------
    ConfigError
        No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"--device {name}: not available here ({str(error).splitlines()[0]}); use cpu, cuda or auto"
        raise ConfigError(message) from error
    return device


def cross_validate(
    config: RunConfig,
    store: Path,
    out: Path,
    *,
    device: str = "auto",
    jobs: int = 1,
    command: Sequence[str] = (),
    watch: Watcher | None = None,
) -> FinishedRun:
    """Train and evaluate every fold and write the run directory `out`.

    Parameters
    ----------
    config, store, out
        What to do, on which data, and where to write; with `config.data.shards` the store is not opened.
    device
        "auto", "cpu", "cuda", "cuda:1".
    jobs
        Folds trained side by side, each in a process with its share of the CPU's threads.
    command
        Kept in provenance.json.
    watch
        What to call while the run goes on.

    Raises
    ------
    RunError
        `out` holds files already.
    ConfigError, MissingScaleError, LeakageError, StoreError
        The data do not allow this run; raised before any feature is read.
    NonFiniteError
        Training diverged; names the slides.
    """
    watch = watch or Watcher()
    chosen = choose_device(device)
    scales = make_model(config, feature_dim=2).scales
    data = load_data(store, config.data, config.model.name, scales, config.train.seed)
    toml = to_toml(config)
    n_parameters = sum(weight.numel() for weight in make_model(config, data.cohort.dim).parameters())
    jobs = min(jobs, len(data.folds))
    cache = plan_cache(
        config.data.cache,
        cohort_bytes=cohort_bytes(data),
        ram_free=free_ram(),
        gpu_free=free_gpu(chosen),
        jobs=jobs,
    )
    _begin(out, toml, collect(data, config, chosen, command, toml))
    watch.on_data(data, n_parameters)
    watch.on_cache(cache)
    started = time.perf_counter()
    if jobs == 1:
        trained = _one_by_one(config, data, chosen, cache, out, watch)
    else:
        trained = _side_by_side(config, data, chosen, cache, out, watch, jobs)
    results = []
    for result in trained:
        results.append(result)
        watch.on_fold(result)
    results.sort(key=lambda result: result.slides.number)
    seconds = time.perf_counter() - started
    write_predictions(out, results)
    return FinishedRun(out, write_summary(out, config, data, results, seconds, n_parameters, chosen))


def _fold_directory(out: Path, fold: FoldSlides) -> Path:
    return out / f"fold_{fold.number}"


def _one_by_one(
    config: RunConfig, data: RunData, device: torch.device, cache: CachePlan, out: Path, watch: Watcher
) -> Iterator[FoldResult]:
    feed = Feed(data, data.cohort.scales, config.data, device, cache)
    for fold in data.folds:
        yield train_fold(config, data, feed, fold, _fold_directory(out, fold), watch.on_epoch)


def _side_by_side(
    config: RunConfig, data: RunData, device: torch.device, cache: CachePlan, out: Path, watch: Watcher, jobs: int
) -> Iterator[FoldResult]:
    """Folds in processes of their own; epochs are told through a queue. Yields folds as they finish."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        epochs = manager.Queue()
        threads = max(1, (os.cpu_count() or 1) // jobs)
        pending = {
            pool.submit(_in_process, config, data, fold, device, cache, threads, out, epochs.put) for fold in data.folds
        }
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                while not epochs.empty():
                    watch.on_epoch(*epochs.get())
                for future in done:
                    yield future.result()
        finally:
            for future in pending:
                future.cancel()


def _in_process(
    config: RunConfig,
    data: RunData,
    fold: FoldSlides,
    device: torch.device,
    cache: CachePlan,
    threads: int,
    out: Path,
    tell: Callable[[tuple[FoldSlides, Epoch]], None],
) -> FoldResult:
    torch.set_num_threads(threads)
    feed = Feed(data, data.cohort.scales, config.data, device, cache)
    return train_fold(config, data, feed, fold, _fold_directory(out, fold), lambda *epoch: tell(epoch))


def _begin(out: Path, toml: str, provenance: Mapping[str, Any]) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        message = f"{out}: holds files already; name another run directory with --out"
        raise RunError(message)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.toml").write_text(toml)
        (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    except OSError as error:
        message = f"{out}: cannot write the run directory ({error.strerror})"
        raise RunError(message) from error
