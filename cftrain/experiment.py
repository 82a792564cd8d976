"""Cross-validation: every fold of every model and seed trained and evaluated, a run directory written for each.

Learners (a model on a fold, with a seed) are trained in groups. A group reads the cohort once per epoch for all
its learners; groups run one after the other, or side by side in processes. Which learners share a group, how
many processes there are, and where a run was stopped change no number.

Two selection rules are recorded for every fold: the last epoch of a schedule that was fixed
beforehand (honest), and the epoch that scored best on the very fold that is reported (the
paper's rule, which even random predictions pass with flattering numbers). With `train.nested` there is a third:
the epoch that an inner learner of the fold chose, which sees training patients alone (`cftrain.nested`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cftrain import run_directory
from cftrain.budget import StepCost, largest_fits, patch_budget, training_cost
from cftrain.cache import CachePlan, plan_cache
from cftrain.config import ModelOption, RunConfig, to_toml
from cftrain.data import RunData, load_data
from cftrain.device import choose_device, free_gpu
from cftrain.errors import ConfigError, RunError
from cftrain.extras import derive_missing
from cftrain.feed import cohort_bytes
from cftrain.folds import FoldExamples, inner_fold
from cftrain.footprint import blueprint
from cftrain.learner import bins_of, build_options
from cftrain.memory import EVERYTHING, Allowance, free_ram
from cftrain.models import SurvivalModel
from cftrain.nested import with_choice
from cftrain.passes import Beat
from cftrain.provenance import collect, digests
from cftrain.ranks import Ranks, process_group, processes_here
from cftrain.results import Epoch, FoldResult, write_predictions
from cftrain.run_directory import CHECKPOINT, fold_directory
from cftrain.stopping import StopRequest, listening
from cftrain.summary import Effort, total_work, write_summary
from cftrain.teams import Done, Spec, Team, Told, train_teams

_LEARNER_BYTES = 16
"""Of each parameter: the weight, Adam's two moments, and the weight under validation."""
_HELD_STEPS = 2
"""Steps' worth of slides that a pass holds, at most about: one that fills up, and what other folds left over."""


@dataclass(frozen=True)
class Watcher:
    """What the caller wants to hear while runs go on; all may stay silent. A run is known by its place in the list.

    `on_epoch` hears of the folds' own learners, `on_inner_epoch` of the inner ones; `on_fold` of all, when done.
    """

    on_data: Callable[[RunData, Sequence[int]], None] = lambda data, n_parameters: None
    on_cache: Callable[[CachePlan], None] = lambda plan: None
    on_derive: Callable[[int, int], None] = lambda done, total: None
    on_epoch: Callable[[int, int, Epoch], None] = lambda run, fold, epoch: None
    on_beat: Callable[[Beat], None] = lambda beat: None
    on_fold: Callable[[int, FoldResult], None] = lambda run, result: None
    on_inner_epoch: Callable[[int, int, Epoch], None] = lambda run, fold, epoch: None


@dataclass(frozen=True)
class FinishedRun:
    """Where a run was written, and its summary.json."""

    path: Path
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """Runs on one cohort, checked and ready: nothing was read but labels, and nothing written.

    Parameters
    ----------
    configs
        With every setting resolved.
    n_parameters
        Of each run's model; as `scales`.
    cohort_bytes, step_bytes
        Of all decoded bags; and of memory that the largest training step of each run needs.
    jobs
        Groups that train side by side.
    fused
        Whether learners train in groups that share their readings.
    """

    configs: tuple[RunConfig, ...]
    data: RunData
    device: torch.device
    cache: CachePlan
    n_parameters: tuple[int, ...]
    scales: tuple[tuple[int, ...], ...]
    cohort_bytes: int
    step_bytes: tuple[int, ...]
    jobs: int
    fused: bool

    def teams(self) -> list[list[Spec]]:
        """Which learners train together, group by group."""
        return _teams(self.configs, self.data, self.jobs, self.fused)


def _teams(configs: Sequence[RunConfig], data: RunData, jobs: int, fused: bool) -> list[list[Spec]]:
    specs = [spec for run, config in enumerate(configs) for spec in _specs(run, config, data)]
    if not fused:
        return [[spec] for spec in specs]
    return [team for team in (specs[job::jobs] for job in range(jobs)) if team]


def _specs(run: int, config: RunConfig, data: RunData) -> list[Spec]:
    """The learners of a run: one for each fold, then the inner ones, so that groups get some of both."""
    kinds = (False, True) if config.has_inner else (False,)
    return [Spec(run, fold.number, inner) for inner in kinds for fold in data.folds]


def prepare(
    configs: Sequence[RunConfig],
    store: Path | str,
    *,
    device: str = "auto",
    jobs: int = 1,
    fuse: bool = True,
    allowance: Allowance = EVERYTHING,
) -> Prepared:
    """Check that the runs can be made, and decide where bags are kept and how many patches go together.

    `allowance` is what they may take of the machine, all jobs together.

    Raises
    ------
    ConfigError, MissingScaleError, LeakageError, StoreError
        The data do not allow these runs, or their largest slide does not fit the device.
    """
    first = configs[0]
    chosen = choose_device(device)
    if any(config.data != first.data or config.order_seed != first.order_seed for config in configs):
        message = "runs that share their readings need the same [data] settings and data.order_seed; run them apart"
        raise ConfigError(message)
    scales = {config.model.name: config.scales() for config in configs}
    extras = {config.model.name: config.extras() + config.fit_extras() for config in configs}
    data = load_data(store, first.data, scales, first.order_seed, extras)
    nbytes = cohort_bytes(data, sorted(set().union(*(config.extras() for config in configs))))
    fused = fuse and first.data.order != "independent"
    _check_folds(configs, data)
    jobs = min(jobs, _n_learners(configs, data))
    sharers = jobs * processes_here()
    gpu, ram = free_gpu(chosen, allowance.gpu_share), allowance.of_ram(free_ram())
    plan = plan_cache(first.data.cache, cohort_bytes=nbytes, ram_free=ram, gpu_free=gpu, jobs=sharers)
    n_parameters = tuple(
        sum(weight.numel() for weight in _blueprint(config, data.cohort.dim).parameters()) for config in configs
    )
    free = ram // sharers - plan.ram_bytes if gpu is None else gpu // jobs - plan.gpu_bytes
    others = _beside_a_step(configs, data, n_parameters, nbytes, jobs, fused)
    fitted = [_fitted(config, data, chosen, max(0, free - others), others) for config in configs]
    resolved, step_bytes = tuple(config for config, _ in fitted), tuple(nbytes for _, nbytes in fitted)
    of_runs = tuple(tuple(scales[config.model.name]) for config in configs)
    return Prepared(resolved, data, chosen, plan, n_parameters, of_runs, nbytes, step_bytes, jobs, fused)


def derive(ready: Prepared, on_derive: Callable[[int, int], None]) -> None:
    """Let the store derive what the runs' models read of their slides and it lacks.

    Raises
    ------
    StoreError
        The store cannot be written.
    """
    extras = sorted({extra for config in ready.configs for extra in config.extras() + config.fit_extras()})
    slide_ids = [slide.slide_id for slide in ready.data.cohort.slides]
    derive_missing(ready.data.store, ready.data.cohort.encoder, extras, slide_ids, on_derive)


def _n_learners(configs: Sequence[RunConfig], data: RunData) -> int:
    return sum(len(_specs(run, config, data)) for run, config in enumerate(configs))


def _check_folds(configs: Sequence[RunConfig], data: RunData) -> None:
    """Refuse folds, and inner folds, that no model can be trained on, before anything is.

    Raises
    ------
    ConfigError
        There are too few training patients or deaths.
    """
    for config, fold in ((config, fold) for config in configs for fold in data.folds):
        _check_bins(config, data, fold, "")
        if config.has_inner:
            inner = inner_fold(fold, config.train.nested, config.train.seed)
            _check_bins(config, data, inner, "; or leave nested validation out (train.nested=0)")


def _check_bins(config: RunConfig, data: RunData, fold: FoldExamples, remedy: str) -> None:
    try:
        bins_of(config, data, fold)
    except ConfigError as error:
        raise ConfigError(f"{fold.name}: {error}{remedy}") from error


def _blueprint(config: RunConfig, feature_dim: int) -> SurvivalModel:
    return blueprint(config.model.name, build_options(config), feature_dim)


def _fitted(config: RunConfig, data: RunData, device: torch.device, free: int, others: int) -> tuple[RunConfig, int]:
    """`train.batch_patches` as a number, if it is left to us, and the bytes of the largest step.

    Raises
    ------
    ConfigError
        The largest slide does not fit into `free` bytes.
    """
    options = tuple(sorted(build_options(config).items()))
    cost = _cost(config.model.name, options, data.cohort.dim, device.type)
    patches = {example.name: example.n_patches for example in data.examples}
    largest = largest_fits(cost, patches, free, others)
    found = config.train.batch_patches or patch_budget(cost, patches, free)
    train = dataclasses.replace(config.train, batch_patches=found)
    return dataclasses.replace(config, train=train), cost.nbytes(patches[largest])


def _beside_a_step(
    configs: Sequence[RunConfig], data: RunData, n_parameters: Sequence[int], nbytes: int, jobs: int, fused: bool
) -> int:
    """Bytes that a group needs besides those of one step: its other learners, and the slides that steps hold."""
    teams = [[_LEARNER_BYTES * n_parameters[spec.run] for spec in team] for team in _teams(configs, data, jobs, fused)]
    others = max(sum(team) - min(team) for team in teams)
    slides = _HELD_STEPS * max(config.train.accumulate for config in configs)
    return others + min(nbytes, int(slides * nbytes / len(data.examples)))


@cache
def _cost(model: str, options: tuple[tuple[str, ModelOption], ...], dim: int, device_type: str) -> StepCost:
    """What a training step costs; counted once for each model of a process, which takes seconds."""
    return training_cost(model, dict(options), dim, device_type=device_type)


def cross_validate(
    config: RunConfig,
    store: Path | str,
    out: Path,
    *,
    device: str = "auto",
    jobs: int = 1,
    fuse: bool = True,
    resume: bool = False,
    command: Sequence[str] = (),
    watch: Watcher | None = None,
) -> FinishedRun:
    """Train and evaluate every fold and write the run directory `out`; see `train_runs`."""
    (done,) = train_runs(
        [config], store, [out], device=device, jobs=jobs, fuse=fuse, resume=resume, command=command, watch=watch
    )
    return done


def train_runs(
    configs: Sequence[RunConfig],
    store: Path | str,
    outs: Sequence[Path],
    *,
    device: str = "auto",
    jobs: int = 1,
    fuse: bool = True,
    resume: bool = False,
    command: Sequence[str] = (),
    watch: Watcher | None = None,
    allowance: Allowance = EVERYTHING,
) -> list[FinishedRun]:
    """Cross-validate several models or seeds on one cohort, and write a run directory for each.

    Parameters
    ----------
    configs, store, outs
        What to do, on which data, and where to write; with `data.shards` the store is not opened.
    device
        "auto", "cpu", "cuda", "cuda:1".
    jobs
        Groups of folds trained side by side, each in a process with its share of the CPU's threads.
    fuse
        Whether the folds of a group (and models, and seeds) share one reading of the cohort per epoch.
    resume
        Go on with directories that were begun; those that were finished are left alone.
    command
        Kept in provenance.json.
    watch
        What to call while the runs go on.
    allowance
        What they may take of the machine, all jobs together.

    Raises
    ------
    RunError
        A directory holds files already, or cannot be gone on with.
    ConfigError, MissingScaleError, LeakageError, StoreError
        The data do not allow these runs; raised before any feature is read.
    NonFiniteError
        Training diverged; names the slides.
    StoppedError
        A signal asked for it; what was done is kept for `resume`.
    """
    watch = watch or Watcher()
    with ExitStack() as stack:
        ranks = stack.enter_context(process_group(choose_device(device)))
        jobs = 1 if ranks.world > 1 else jobs
        ready = prepare(configs, store, device=device, jobs=jobs, fuse=fuse, allowance=allowance)
        ready = _agreed(ready, ranks)
        if ranks.first:
            for out in outs:
                stack.enter_context(run_directory.held(out))
                if not resume:
                    run_directory.check_new(out)
            derive(ready, watch.on_derive)
            for config, out in zip(ready.configs, outs, strict=True):
                _enter(out, config, ready, command, resume=resume)
        ranks.barrier()
        if ranks.first:
            watch.on_data(ready.data, ready.n_parameters)
            watch.on_cache(ready.cache)
        stop = stack.enter_context(listening())
        return _trained(ready, outs, ranks, stop, watch)


def _agreed(ready: Prepared, ranks: Ranks) -> Prepared:
    """With as many patches in a batch as fit the fullest device of all: packs are the same in every process.

    Raises
    ------
    RunError
        The processes do not see the same slides, labels and folds.
    """
    if ranks.world == 1:
        return ready
    if not ranks.agree(digests(ready.data)):
        message = (
            "the processes do not see the same slides, labels and folds: the store must be one that all nodes share"
        )
        raise RunError(message)
    budgets = zip(*ranks.gather([config.train.batch_patches for config in ready.configs]), strict=True)
    agreed = [
        dataclasses.replace(config, train=dataclasses.replace(config.train, batch_patches=min(each)))
        for config, each in zip(ready.configs, budgets, strict=True)
    ]
    return dataclasses.replace(ready, configs=tuple(agreed))


def _enter(out: Path, config: RunConfig, ready: Prepared, command: Sequence[str], *, resume: bool) -> None:
    if resume and (out / "summary.json").exists():
        return
    provenance = collect(ready.data, config, ready.device, command, to_toml(config))
    if resume and run_directory.begun(out):
        run_directory.go_on(out, config, provenance)
    else:
        run_directory.begin(out, config, provenance)


def _trained(
    ready: Prepared, outs: Sequence[Path], ranks: Ranks, stop: StopRequest, watch: Watcher
) -> list[FinishedRun]:
    """Train what is not finished, and write each run's results as soon as its last fold is there."""
    finished = {
        run: FinishedRun(out, json.loads((out / "summary.json").read_text()))
        for run, out in enumerate(outs)
        if (out / "summary.json").exists()
    }
    folds: dict[int, list[Done]] = {run: [] for run in range(len(outs))}
    teams = [[spec for spec in team if spec.run not in finished] for team in ready.teams()]
    shared = Team(ready.configs, ready.data, tuple(outs), ready.device, ready.cache)
    heard = watch if ranks.first else Watcher()
    told = Told(heard.on_epoch, heard.on_inner_epoch, heard.on_beat)
    trained = train_teams(shared, [team for team in teams if team], ready.jobs, ranks, stop, told)
    with closing(trained):
        for done in trained:
            folds[done.run].append(done)
            heard.on_fold(done.run, done.result)
            if len(folds[done.run]) == len(_specs(done.run, ready.configs[done.run], ready.data)):
                effort = _effort(folds[done.run])
                finished[done.run] = write_results(ready, done.run, outs[done.run], folds[done.run], effort, ranks)
    return [finished[run] for run in range(len(outs))]


def _effort(folds: Sequence[Done]) -> Effort:
    """What a run took, of all its folds: they finish in any order, and in several processes."""
    return Effort(
        seconds=max(done.elapsed for done in folds),
        peak_bytes=max(done.peak_bytes for done in folds),
        work=total_work([done.result for done in folds]),
    )


def write_results(
    ready: Prepared, run: int, out: Path, folds: Sequence[Done], effort: Effort, ranks: Ranks
) -> FinishedRun:
    """The results of a run from all its learners; its checkpoints are not needed any more."""
    config = ready.configs[run]
    ordered = _in_order([done.result for done in folds], config)
    summary: Mapping[str, Any] = {}
    if ranks.first:
        write_predictions(out, ordered)
        summary = write_summary(
            out,
            config,
            ready.data,
            ordered,
            effort,
            ready.n_parameters[run],
            ready.scales[run],
            ready.device,
        )
        for spec in _specs(run, config, ready.data):
            (fold_directory(out, spec.fold, inner=spec.inner) / CHECKPOINT).unlink(missing_ok=True)
    return FinishedRun(out, summary)


def _in_order(results: Sequence[FoldResult], config: RunConfig) -> list[FoldResult]:
    """The folds by their number, each with the epoch that was chosen for it, if one was."""
    own, inner = (
        {result.examples.number: result for result in results if result.examples.inner == kind}
        for kind in (False, True)
    )
    ordered = [own[number] for number in sorted(own)]
    if not config.train.nested:
        return ordered
    return [with_choice(result, inner.get(result.examples.number), config) for result in ordered]
