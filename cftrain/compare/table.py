"""Runs summed up as a table: seeds of one model are one cell; the best of a cohort is tested against the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from cftrain.compare.pairing import against
from cftrain.compare.reading import METRICS, Run, find_runs, read_run, unfinished_runs, with_metric
from cftrain.errors import ConfigError
from cftrain.survival.resampling import mean_of_defined

Key = tuple[str, str, str, str]  # model, encoder, preset, settings that differ

_SEEDS: Final = (
    "Several seeds of a model on a cohort are one cell: the mean over seeds of the means over folds, and the standard "
    "deviation over the folds of all seeds together."
)


@dataclass(frozen=True)
class Cell:
    """One model on one cohort.

    Parameters
    ----------
    mean
        Over seeds, of the means over the folds that define the metric; NaN without one.
    std
        Standard deviation (ddof=1) over the defined folds of all seeds together; NaN with fewer than two.
    n
        Defined folds of all seeds.
    n_undefined
        Folds without a comparable pair.
    seeds
        Of its runs, in the order given.
    n_patients, n_events
        Validated patients, and deaths among them.
    place
        1 for the best of the cohort, 2 for the second, else 0; also 0 where only one model has a number.
    p_value
        Two-sided, against the best of the cohort; NaN for the best itself, and where the two are not comparable.
    difference
        C-index per patient minus that of the best, as the p-value tests it; NaN as for `p_value`.
    """

    mean: float
    std: float
    n: int
    n_undefined: int
    seeds: tuple[int | None, ...]
    n_patients: int
    n_events: int
    place: int = 0
    p_value: float = math.nan
    difference: float = math.nan


@dataclass(frozen=True)
class Row:
    """One model.

    Parameters
    ----------
    name
        The model, with encoder, preset and settings where the compared runs differ in them.
    settings
        Those in which runs of this model, encoder and preset differ, with this row's values.
    cells
        One per cohort; None where the model was not run.
    mean
        Of the cells' means, NaN unless the model has a number in every cohort.
    place
        Of that mean, as in `Cell`.
    """

    name: str
    model: str
    encoder: str
    preset: str
    settings: str
    cells: tuple[Cell | None, ...]
    mean: float
    place: int = 0


@dataclass(frozen=True)
class Comparison:
    """Models by cohorts; `caption` says how every number came about, `notes` what to beware of."""

    metric: str
    cohorts: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: tuple[str, ...]
    notes: tuple[str, ...]
    runs: tuple[Path, ...]


def compare(
    runs: Sequence[Path], *, metric: str = "c_index_patient", replicates: int = 1000, seed: int = 0
) -> Comparison:
    """Compare finished runs: rows are models, columns cohorts, cells the mean ± deviation over folds of one metric.

    Each model is tested against the best of its cohort by a paired bootstrap: patients are drawn with replacement
    from the whole cohort, every run's C-index per patient is taken within its folds on the same draws, and averaged
    over folds and seeds. It needs the same patients with the same labels, and the same folds; seeds may have folds
    of their own, if both models have those. Otherwise p is NaN, with a note.

    Parameters
    ----------
    runs
        Run directories, or folders that hold some, one or two levels down.
    metric
        One of `METRICS`: `c_index_patient`, `c_index`, or either with `_best_epoch` or `_nested`. The p-values are of
        C-indices per patient in any case, as slides of a patient are not independent, and of the same epoch's risks.
        Runs without nested validation are left out of its metrics, with a note.
    replicates
        Resamples behind a p-value.
    seed
        Of the draws.

    Raises
    ------
    ConfigError
        There is no such metric, or `replicates` is below 1.
    RunError
        A folder is no finished run, and holds none; or no run has the metric.
    """
    if metric not in METRICS:
        msg = f"metric is {metric!r}; give one of {', '.join(METRICS)}"
        raise ConfigError(msg)
    folders, lacking = with_metric(find_runs(runs), metric)
    read = [read_run(folder, metric) for folder in folders]
    cohorts = list(dict.fromkeys(run.cohort for run in read))
    of = _keys(read)
    names = _names(list(dict.fromkeys(of.values())))
    notes = _notes(read) + [f"{'/'.join(each.parts[-2:])}: left out, it has no {metric}." for each in lacking]
    notes += [f"{'/'.join(each.parts[-2:])}: left out, it is not finished." for each in unfinished_runs(runs)]
    columns = []
    for cohort in cohorts:
        members: dict[str, list[Run]] = {}
        for run in read:
            if run.cohort == cohort:
                members.setdefault(names[of[run.folder]], []).append(run)
        columns.append(_column(cohort, members, replicates, seed, notes))
    return Comparison(
        metric=metric,
        cohorts=tuple(cohorts),
        rows=_rows(names, columns),
        caption=_caption(metric, read, columns, replicates),
        notes=tuple(notes),
        runs=tuple(folders),
    )


def _keys(runs: Sequence[Run]) -> dict[Path, Key]:
    """What makes runs one row, by folder: seeds of an experiment, never different experiments."""
    alike: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.model, run.encoder, run.preset), []).append(run)
    keys = {}
    for key, members in alike.items():
        known = dict.fromkeys(name for run in members for name in run.settings)
        differing = [name for name in known if len({run.settings.get(name) for run in members}) > 1]
        for run in members:
            own = ", ".join(f"{name}={run.settings[name]}" for name in differing if name in run.settings)
            keys[run.folder] = (*key, own)
    return {run.folder: keys[run.folder] for run in runs}


def _names(keys: Sequence[Key]) -> dict[Key, str]:
    """A row's name: the model, and what else tells the rows apart."""
    told = [True, *(len({key[i] for key in keys}) > 1 for i in (1, 2, 3))]
    return {key: ", ".join(part for part, needed in zip(key, told, strict=True) if needed and part) for key in keys}


def _column(
    cohort: str, members: dict[str, list[Run]], replicates: int, seed: int, notes: list[str]
) -> dict[str, Cell]:
    """The cells of one cohort by row name; what is odd about them is noted."""
    cells = {name: _cell(runs) for name, runs in members.items()}
    for name, cell in cells.items():
        notes += _cell_notes(f"{name} on {cohort}", cell)
    places = _places({name: cell.mean for name, cell in cells.items()})
    best = next((name for name, place in places.items() if place == 1), None)
    if best is None:
        return cells
    cells = {name: replace(cell, place=places[name]) for name, cell in cells.items()}
    for name, found in against(members[best], members, replicates, seed).items():
        if isinstance(found, str):
            notes.append(f"{cohort}: no p-value for {name} against {best}: {found}.")
        else:
            cells[name] = replace(cells[name], p_value=found.p_value, difference=found.difference)
    return cells


def _cell(runs: Sequence[Run]) -> Cell:
    folds = np.array([value for run in runs for value in run.folds])
    defined = folds[~np.isnan(folds)]
    means = np.stack([mean_of_defined(np.asarray(run.folds)) for run in runs])
    labels = {patient: event for run in runs for patient, (_, event) in run.labels.items()}
    return Cell(
        mean=float(mean_of_defined(means)),
        std=float(defined.std(ddof=1)) if defined.size > 1 else math.nan,
        n=int(defined.size),
        n_undefined=int(folds.size - defined.size),
        seeds=tuple(run.seed for run in runs),
        n_patients=len(labels),
        n_events=sum(labels.values()),
    )


def _places(means: dict[str, float]) -> dict[str, int]:
    """1 for the highest number, 2 for the second, else 0; all 0 unless two have one."""
    ranked = sorted((name for name, mean in means.items() if not math.isnan(mean)), key=lambda name: -means[name])
    first = ranked[:2] if len(ranked) > 1 else []
    return {name: first.index(name) + 1 if name in first else 0 for name in means}


def _rows(names: dict[Key, str], columns: Sequence[dict[str, Cell]]) -> tuple[Row, ...]:
    means = {
        name: float(np.mean([column[name].mean if name in column else math.nan for column in columns]))
        for name in names.values()
    }
    places = _places(means)
    return tuple(
        Row(name, *key, tuple(column.get(name) for column in columns), means[name], places[name])
        for key, name in names.items()
    )


def _cell_notes(what: str, cell: Cell) -> list[str]:
    notes = []
    repeated = [seed for seed, times in Counter(cell.seeds).items() if times > 1]
    if repeated:
        listed = ", ".join("none" if seed is None else str(seed) for seed in repeated)
        notes.append(f"{what}: several runs with the same seed ({listed}); they are counted as if they were seeds.")
    if cell.n_undefined:
        folds = cell.n + cell.n_undefined
        notes.append(f"{what}: {cell.n_undefined} of {folds} folds have no comparable pair and do not count.")
    return notes


def _notes(runs: Sequence[Run]) -> list[str]:
    """What to beware of before any number is computed."""
    invented = dict.fromkeys(run.cohort for run in runs if run.synthetic)
    notes = [f"{cohort} is synthetic." for cohort in invented]
    rules: dict[str, list[str]] = {}
    for run in runs:
        rules.setdefault(run.rule, []).append("/".join(run.folder.parts[-2:]))
    if len(rules) > 1:
        listed = "; ".join(f"{rule}: {', '.join(names)}" for rule, names in rules.items())
        notes.append(f"The rule differs between runs. {listed}.")
    return notes


def _caption(metric: str, runs: Sequence[Run], columns: Sequence[dict[str, Cell]], replicates: int) -> tuple[str, ...]:
    cells = [cell for column in columns for cell in column.values()]
    caption = [f"{METRICS[metric][0]}, mean ± standard deviation (n - 1) over folds."]
    if any(len(cell.seeds) > 1 for cell in cells):
        caption.append(_SEEDS)
    rules = list(dict.fromkeys(run.rule for run in runs))
    caption.append(f"Rule: {rules[0]}." if len(rules) == 1 else "Rule: differs between runs, see the notes.")
    if any(not math.isnan(cell.p_value) for cell in cells):
        caption.append(
            f"p: against the best of the cohort; two-sided paired bootstrap of the C-index per patient, {replicates} "
            "resamples of the patients; not corrected for choosing the best or for several comparisons."
        )
    return tuple(caption)
