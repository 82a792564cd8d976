"""A run whose folds are trained apart: each by a job of its own, wherever it runs, and put together by the last.

A fold's checkpoint, written when it is finished, holds all that the run's results need of it. So whoever finds the
folds finished can close the run: the job of the last fold does, and where it cannot any later caller of `close`.
Weights and predictions are those of a run whose folds share their readings, bit for bit, for the same
`train.batch_patches` and as many threads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cftrain import run_directory
from cftrain.config import RunConfig, to_toml
from cftrain.data import load_data
from cftrain.errors import ConfigError, RunBusyError, RunError
from cftrain.experiment import FinishedRun, Prepared, Watcher, derive, prepare, write_results
from cftrain.memory import EVERYTHING, Allowance
from cftrain.provenance import collect, this_process
from cftrain.ranks import ALONE
from cftrain.run_directory import fold_directory
from cftrain.stopping import StopRequest, listening
from cftrain.summary import Effort, total_work
from cftrain.teams import Done, Spec, Team, Told, train_teams

PROCESSES: Final = "processes.json"


def fold_numbers(config: RunConfig, store: Path | str) -> list[int]:
    """The folds of a run, in their order; reads labels and no features.

    Raises
    ------
    ConfigError, MissingScaleError, MissingExtraError, LeakageError, StoreError
        See `load_data`.
    """
    name = config.model.name
    extras = {name: config.extras() + config.fit_extras()}
    data = load_data(store, config.data, {name: config.scales()}, config.order_seed, extras)
    return [fold.number for fold in data.folds]


def train_fold(
    config: RunConfig,
    store: Path | str,
    out: Path,
    fold: int,
    *,
    device: str = "auto",
    command: Sequence[str] = (),
    watch: Watcher | None = None,
    allowance: Allowance = EVERYTHING,
) -> FinishedRun | None:
    """Train one fold of a run, from its checkpoint where it has one, and close the run if it was the last.

    Several processes may train folds of one run at once, on machines that share the directory. The first of them
    begins it. `fold_<k>/processes.json` lists the processes that worked on the fold.

    Parameters
    ----------
    config, store, out
        Of the run, as `train_runs` takes them.
    fold
        Its number.
    device, command, watch, allowance
        As `train_runs` takes them.

    Returns
    -------
    FinishedRun, optional
        None while folds are missing, or where another process writes the results.

    Raises
    ------
    RunBusyError
        Another process trains the fold, or the run as a whole.
    RunError
        The run was begun with other settings or data, or its directory cannot be written.
    ConfigError
        The run has no such fold.
    ConfigError, MissingScaleError, LeakageError, StoreError, NonFiniteError, StoppedError
        See `train_runs`.
    """
    watch = watch or Watcher()
    with run_directory.fold_held(out, fold):
        ready = _entered(config, store, out, device, command, allowance)
        numbers = [each.number for each in ready.data.folds]
        if fold not in numbers:
            message = f"{out}: no fold {fold}; splits {ready.data.splits.name} have {', '.join(map(str, numbers))}"
            raise ConfigError(message)
        if not run_directory.fold_finished(out, fold, nested=config.has_inner):
            derive(ready, watch.on_derive)
            watch.on_data(ready.data, ready.n_parameters)
            watch.on_cache(ready.cache)
            _note_process(fold_directory(out, fold), this_process(ready.device, command))
            with listening() as stop:
                _train(ready, out, [fold], stop, watch)
    return _closed(ready, out)


def close(
    config: RunConfig, store: Path | str, out: Path, *, device: str = "auto", allowance: Allowance = EVERYTHING
) -> FinishedRun | None:
    """Write the results of a run whose folds were all trained, if nobody has; None where that cannot be done yet.

    Raises
    ------
    RunError
        The run was begun with other settings or data.
    ConfigError, MissingScaleError, LeakageError, StoreError
        See `prepare`.
    """
    if not run_directory.begun(out):
        return None
    ready = prepare([run_directory.settled(out, config)], store, device=device, allowance=allowance)
    run_directory.check_data(out, _provenance(ready, ()))
    return _closed(ready, out)


def _entered(
    config: RunConfig, store: Path | str, out: Path, device: str, command: Sequence[str], allowance: Allowance
) -> Prepared:
    """The run as this process found it begun, or began it.

    Between finding no run and beginning one another process may have begun it, with more memory or less: then its
    number of patches holds, and all is prepared once more.
    """
    while True:
        ready = prepare([run_directory.settled(out, config)], store, device=device, allowance=allowance)
        (own,) = ready.configs
        with run_directory.waiting(out, "begin"):
            if not run_directory.begun(out):
                run_directory.begin(out, own, _provenance(ready, command))
                return ready
            if run_directory.settled(out, config).train.batch_patches == own.train.batch_patches:
                run_directory.check_data(out, _provenance(ready, command))
                return ready


def _provenance(ready: Prepared, command: Sequence[str]) -> dict[str, Any]:
    (config,) = ready.configs
    return collect(ready.data, config, ready.device, command, to_toml(config))


def _note_process(folder: Path, process: dict[str, Any]) -> None:
    """Folds of one run may have been trained by other versions, on other machines."""
    path = folder / PROCESSES
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        message = f"{path}: not readable as JSON ({error}); remove it"
        raise RunError(message) from error
    folder.mkdir(parents=True, exist_ok=True)
    run_directory.write_text(path, json.dumps([*before, process], indent=2) + "\n")


def _train(ready: Prepared, out: Path, folds: Sequence[int], stop: StopRequest, watch: Watcher) -> list[Done]:
    """Bring the learners of these folds to their end; those that are there already are taken from their checkpoints."""
    groups: list[list[Spec]] = [[spec for spec in team if spec.fold in folds] for team in ready.teams()]
    team = Team(ready.configs, ready.data, (out,), ready.device, ready.cache)
    told = Told(watch.on_epoch, watch.on_inner_epoch, watch.on_beat)
    finished = []
    for done in train_teams(team, [group for group in groups if group], 1, ALONE, stop, told):
        watch.on_fold(done.run, done.result)
        finished.append(done)
    return finished


def _closed(ready: Prepared, out: Path) -> FinishedRun | None:
    """Write the results, where all folds are finished and nobody else is at it.

    Two that find the last folds finished at the same moment both try, and one writes. One that still holds its
    fold then keeps the other out, and tries itself when it has let go.
    """
    (config,) = ready.configs
    numbers = [fold.number for fold in ready.data.folds]
    if not all(run_directory.fold_finished(out, number, nested=config.has_inner) for number in numbers):
        return None
    try:
        with run_directory.held(out), listening() as stop:
            summary = out / "summary.json"
            if summary.exists():
                return FinishedRun(out, json.loads(summary.read_text(encoding="utf-8")))
            done = _train(ready, out, numbers, stop, Watcher())
            return write_results(ready, 0, out, done, _effort(done), ALONE)
    except RunBusyError:
        return None


def _effort(folds: Sequence[Done]) -> Effort:
    """What the jobs took: the sum of their times, and the most memory that this process, or a GPU here, has used."""
    longest: dict[int, float] = {}
    for done in folds:
        number = done.result.examples.number
        longest[number] = max(done.elapsed, longest.get(number, 0.0))
    return Effort(
        seconds=sum(longest.values()),
        peak_bytes=max(done.peak_bytes for done in folds),
        work=total_work([done.result for done in folds]),
    )
