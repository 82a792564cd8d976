"""plan.toml: which runs a sweep is made of, and what each may take of a machine. Loads no torch.

store = "cfstore-data"              # paths are relative to the plan
out = "sweep"
cohorts = ["BLCA", "GBMLGG"]
encoders = ["uni"]                  # left out: each cohort's only one
models = ["abmil", "crossfusion"]
seeds = [7, 8, 9]
folds = "fused"                     # or "apart": each fold is a job
preset = "paper"                    # left out: the recommended one

[set]                               # of all runs
train.epochs = 30

[model.crossfusion]                 # of that model's: its options, and any other setting
embed_dim = 128
train.learning_rate = 2e-4

[cohort.BLCA]                       # of that cohort's
data.splits = "five"

[resources]                         # of each job
cpus = 2
gpus = 0.25
memory = "16GB"
retries = 2
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from cfstore import is_url
from cftrain.cache import parse_size
from cftrain.config import RunConfig, load_config
from cftrain.errors import ConfigError
from cftrain.zoo import MODELS

_KEYS: Final = ("store", "out", "cohorts", "encoders", "models", "seeds", "folds", "preset")
_TABLES: Final = ("set", "model", "cohort", "resources")
_SECTIONS: Final = ("data", "bins", "train", "model")
_FOLDS: Final = ("fused", "apart")
_OWN: Final = {
    "data.cohort": "cohorts",
    "data.encoder": "encoders",
    "data.shards": "store",
    "model.name": "models",
    "train.seed": "seeds",
}
"""Settings that the plan says with keys of its own."""


@dataclass(frozen=True)
class Resources:
    """What a job takes.

    Parameters
    ----------
    cpus
        Cores that are kept for it, and its threads; None: as many as the engine has for each. The number of threads
        changes the rounding of sums, so runs that are to be equal bit for bit name it.
    gpus
        The part of a GPU that it shares, up to 1; 0: it computes on the CPU; None: on a GPU where one is found.
    memory
        Bytes of RAM, at most; None: what is free.
    retries
        How often a job whose process died is begun again, from its checkpoint.
    """

    cpus: int | None = None
    gpus: float | None = None
    memory: int | None = None
    retries: int = 2

    @property
    def device(self) -> str:
        """As `train_runs` takes it."""
        return "auto" if self.gpus is None else "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class Run:
    """One run of a sweep: a model with a seed on a cohort's features, cross-validated.

    `encoder` is empty where the cohort has only one; `out` is its run directory.
    """

    cohort: str
    encoder: str
    model: str
    seed: int
    config: RunConfig
    out: Path

    @property
    def name(self) -> str:
        """What it is called beside the others: the name of its directory."""
        return self.out.name


@dataclass(frozen=True)
class Plan:
    """A sweep: its runs, in the order in which they are made, and what each job takes.

    `store` is a folder, or the address of a store on object storage.
    """

    path: Path
    store: Path | str
    out: Path
    runs: tuple[Run, ...]
    apart: bool
    resources: Resources


def read_plan(path: Path) -> Plan:
    """Read a plan and resolve the settings of its runs.

    All seeds of a sweep share the order and the made folds of the first, as `cftrain run --seeds` has it, so that
    they can be compared on the same folds.

    Raises
    ------
    ConfigError
        The file cannot be read, or something in it cannot be used; names the file and the key, with near names.
    """
    content = _read(path)
    _check_keys(path, content)
    cohorts, models = _texts(path, content, "cohorts"), _texts(path, content, "models")
    encoders = _texts(path, content, "encoders") if "encoders" in content else [""]
    _check_known(path, "models", models, MODELS)
    seeds = _seeds(path, content)
    of_all = _flat(path, "set", content.get("set", {}))
    of_models = _tables(path, content, "model", models, bare="model")
    of_cohorts = _tables(path, content, "cohort", cohorts)
    _check_own(path, {"set": of_all, **of_models, **of_cohorts})
    store, out = _store(path, content), _path(path, content, "out")
    runs = []
    for cohort, encoder, model, seed in product(cohorts, encoders, models, seeds):
        parts = {"set": of_all, f"cohort.{cohort}": of_cohorts.get(f"cohort.{cohort}", {})}
        parts[f"model.{model}"] = of_models.get(f"model.{model}", {})
        fixed = {"data.cohort": cohort, "data.encoder": encoder, "model.name": model, "train.seed": seed}
        config = _config(path, content.get("preset"), parts, fixed, seeds[0])
        name = "-".join(part for part in (cohort, encoder, model, f"s{seed}") if part)
        runs.append(Run(cohort, encoder, model, seed, config, out / re.sub(r"[^\w.+-]", "_", name)))
    _check_apart(path, runs)
    return Plan(
        path=path,
        store=store,
        out=out,
        runs=tuple(runs),
        apart=_folds(path, content) == "apart",
        resources=_resources(path, content.get("resources", {})),
    )


def check_held(plan: Plan, held: Mapping[str, Iterable[str]]) -> None:
    """Compare the plan's cohorts and encoders with those of the store.

    Parameters
    ----------
    held
        The encoders of each cohort in the store.

    Raises
    ------
    ConfigError
        The store has no such cohort, or the cohort no such encoder; near names are listed.
    """
    for run in plan.runs:
        _check_known(plan.path, "cohorts", [run.cohort], held, f"store {plan.store} has")
        if run.encoder:
            _check_known(plan.path, "encoders", [run.encoder], list(held[run.cohort]), f"cohort {run.cohort} has")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        message = f"{path}: not a readable TOML file ({error})"
        raise ConfigError(message) from error


def _check_keys(path: Path, content: Mapping[str, Any]) -> None:
    _check_known(path, "", content, [*_KEYS, *_TABLES])
    for key in (key for key in ("store", "out", "cohorts", "models", "seeds") if key not in content):
        raise ConfigError(f"{path}: {key} is missing; docs/sweep.md shows a whole plan")
    for key in (key for key in _TABLES if not isinstance(content.get(key, {}), dict)):
        hint = f"; names go into `{key}s = [...]`" if key in ("model", "cohort") else ""
        raise ConfigError(f"{path}: {key} must be a table, [{key}]{hint}")
    preset = content.get("preset")
    if preset is not None and not isinstance(preset, str):
        raise ConfigError(f"{path}: preset must be a name, got {preset!r}")


def _check_known(path: Path, key: str, names: Iterable[str], known: Iterable[str], has: str = "known are") -> None:
    """ConfigError for the first name that is none of the known."""
    listed = list(known)
    for name in (name for name in names if name not in listed):
        near = difflib.get_close_matches(name, listed, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"{has} {', '.join(listed) or 'none'}"
        what = f"{key}: no {name!r}" if key else f"unknown key {name!r}"
        raise ConfigError(f"{path}: {what}; {hint}")


def _texts(path: Path, content: Mapping[str, Any], key: str) -> list[str]:
    found = content[key]
    if not isinstance(found, list) or not found or not all(isinstance(each, str) and each for each in found):
        hint = f"; settings of one go into [{key[:-1]}.NAME]" if isinstance(found, dict) else ""
        raise ConfigError(f'{path}: {key} must be a list of names, e.g. {key} = ["..."], got {found!r}{hint}')
    _check_once(path, key, found)
    return found


def _seeds(path: Path, content: Mapping[str, Any]) -> list[int]:
    found = content["seeds"]
    if not isinstance(found, list) or not found or not all(type(each) is int and each >= 0 for each in found):
        raise ConfigError(f"{path}: seeds must be a list of numbers from 0, e.g. seeds = [7, 8], got {found!r}")
    _check_once(path, "seeds", found)
    return found


def _check_once(path: Path, key: str, found: Sequence[object]) -> None:
    for each in (each for place, each in enumerate(found) if each in found[:place]):
        raise ConfigError(f"{path}: {key} names {each!r} twice")


def _folds(path: Path, content: Mapping[str, Any]) -> str:
    found = content.get("folds", _FOLDS[0])
    if found not in _FOLDS:
        raise ConfigError(f"{path}: folds must be {' or '.join(_FOLDS)}, got {found!r}")
    return str(found)


def _store(path: Path, content: Mapping[str, Any]) -> Path | str:
    found = content["store"]
    return str(found) if is_url(found) else _path(path, content, "store")


def _path(path: Path, content: Mapping[str, Any], key: str) -> Path:
    found = content[key]
    if not isinstance(found, str) or not found:
        raise ConfigError(f"{path}: {key} must be a path, got {found!r}")
    return (path.parent / Path(found).expanduser()).resolve()


def _tables(
    path: Path, content: Mapping[str, Any], kind: str, names: Sequence[str], bare: str = ""
) -> dict[str, dict[str, Any]]:
    """[kind.NAME] by "kind.NAME"; keys outside sections belong to section `bare`."""
    found = content.get(kind, {})
    _check_known(path, f"[{kind}.NAME]", found, names, f"{kind}s are")
    return {f"{kind}.{name}": _flat(path, f"{kind}.{name}", values, bare) for name, values in found.items()}


def _flat(path: Path, table: str, values: object, bare: str = "") -> dict[str, Any]:
    """Settings by their dotted names; TOML reads `train.epochs = 30` as a table in a table."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {table} must be a table, [{table}], got {values!r}")
    return dict(_pairs(path, table, values, bare))


def _pairs(path: Path, table: str, values: Mapping[str, Any], bare: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", one) for name, one in value.items())
        elif "." in key or bare:
            yield (key if "." in key else f"{bare}.{key}"), value
        else:
            sections = ", ".join(_SECTIONS)
            raise ConfigError(
                f"{path}: [{table}] {key} stands outside the sections {sections}; write it as train.{key}"
            )


def _check_own(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    for table, values in tables.items():
        for key in (key for key in values if key in _OWN):
            raise ConfigError(f"{path}: [{table}] {key} is said with `{_OWN[key]}`, for all runs; leave it out here")


def _config(
    path: Path, preset: str | None, parts: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Any], first_seed: int
) -> RunConfig:
    """The settings of one run: those of all, then of its cohort, then of its model."""
    shared = [f"data.order_seed={first_seed}"]
    ours = [_text(key, value) for key, value in fixed.items() if value != ""]
    settings: list[str] = []
    for table, values in parts.items():
        settings += [_text(key, value) for key, value in values.items()]
        try:
            config = load_config(preset=preset, settings=[*shared, *settings, *ours])
        except ConfigError as error:
            where = "preset" if preset and f"no preset {preset!r}" in str(error) else f"[{table}]"
            raise ConfigError(f"{path}: {where} {error}") from error
    return config


def _text(key: str, value: object) -> str:
    return f"{key}={json.dumps(value, default=str)}"


def _check_apart(path: Path, runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    for name in (name for place, name in enumerate(names) if name in names[:place]):
        raise ConfigError(f"{path}: two runs would be written to {name}; their cohorts or encoders are too much alike")


def _resources(path: Path, values: Mapping[str, Any]) -> Resources:
    _check_known(path, "[resources]", values, Resources.__dataclass_fields__)
    cpus, gpus, memory = (values.get(key) for key in ("cpus", "gpus", "memory"))
    retries = values.get("retries", Resources.retries)
    if cpus is not None and (type(cpus) is not int or cpus < 1):
        raise ConfigError(f"{path}: [resources] cpus must be a whole number from 1, got {cpus!r}")
    if gpus is not None and (type(gpus) not in (int, float) or not 0 <= gpus <= 1):
        raise ConfigError(f"{path}: [resources] gpus must lie between 0 and 1, a job's part of a GPU, got {gpus!r}")
    if type(retries) is not int or retries < 0:
        raise ConfigError(f"{path}: [resources] retries must be a whole number from 0, got {retries!r}")
    if memory is not None and not isinstance(memory, str):
        raise ConfigError(f'{path}: [resources] memory must be a size such as "16GB", got {memory!r}')
    nbytes = None if memory is None else parse_size(memory, f"{path}: [resources] memory")
    return Resources(cpus, None if gpus is None else float(gpus), nbytes, retries)
