"""A run directory: begun once, held by one process at a time or by one per fold, gone on with after a stop."""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from cfstore import is_url
from cftrain.config import RESUMABLE, RunConfig, differences, load_config, to_toml
from cftrain.errors import OtherSettingsError, RunBusyError, RunError

CHECKPOINT: Final = "checkpoint.safetensors"
"""Of a learner, in the directory of its fold."""
_LENGTH: Final = 8
_LONGEST_HEADER: Final = 100_000_000
"""Bytes of a safetensors file's header: the format's own limit."""
_SAME_DATA = ("data_digest", "splits_digest")
_LOCK: Final = ".lock"
_UNFINISHED: Final = (".config.toml", ".provenance.json", "provenance.json")
"""What `begin` may leave where it dies; config.toml is its last word."""


def check_new(out: Path) -> None:
    """RunError where a directory holds files already, other than those of a process that died while it began a run."""
    if out.exists() and (not out.is_dir() or begun(out) or any(not _left_over(path.name) for path in out.iterdir())):
        message = f"{out}: holds files already; go on with --resume, or name another run directory with --out"
        raise RunError(message)


def _left_over(name: str) -> bool:
    return name.startswith(_LOCK) or name in _UNFINISHED


def begin(out: Path, config: RunConfig, provenance: Mapping[str, Any]) -> None:
    """Write what a run is made with into a new directory.

    Raises
    ------
    RunError
        It holds files already, or cannot be written.
    """
    check_new(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "provenance.json", json.dumps(provenance, indent=2) + "\n")
        write_text(out / "config.toml", to_toml(config))
    except OSError as error:
        message = f"{out}: cannot write the run directory ({error.strerror})"
        raise RunError(message) from error


def begun(out: Path) -> bool:
    """Whether a run was begun there."""
    return (out / "config.toml").exists()


def settled(out: Path, config: RunConfig) -> RunConfig:
    """The settings that a run goes on with: those asked for, and its own number of patches where that is left to it.

    Where no run was begun they are those asked for.

    Raises
    ------
    OtherSettingsError
        It was begun with other settings; names them.
    ConfigError
        config.toml cannot be read.
    """
    if not begun(out):
        return config
    stored = load_config(file=out / "config.toml")
    if not config.train.batch_patches:
        train = dataclasses.replace(config.train, batch_patches=stored.train.batch_patches)
        config = dataclasses.replace(config, train=train)
    differing = [key for key in differences(stored, config) if key not in RESUMABLE]
    if differing:
        message = f"{out}: was begun with another {', '.join(differing)}; leave that out, or begin a run with --out"
        raise OtherSettingsError(message, tuple(differing))
    return config


def check_data(out: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Check that a run was begun on these data; returns its provenance.json.

    Raises
    ------
    RunError
        Labels, folds or features differ from those it was begun with, or provenance.json cannot be read.
    """
    before = stored_provenance(out)
    changed = [key for key in _SAME_DATA if before.get(key) != provenance[key]]
    if changed:
        message = f"{out}: {' and '.join(changed)} differ: labels, folds or features changed since; begin a new run"
        raise RunError(message)
    return before


def go_on(out: Path, config: RunConfig, provenance: Mapping[str, Any]) -> None:
    """Check that a run that was stopped can go on with these settings and data, and note that it does.

    Raises
    ------
    RunError, ConfigError
        See `settled` and `check_data`.
    """
    settled(out, config)
    before = check_data(out, provenance)
    resumed = {key: provenance[key] for key in ("started", "command", "device", "git_commit", "versions")}
    write_text(
        out / "provenance.json",
        json.dumps({**before, "resumed": [*before.get("resumed", []), resumed]}, indent=2) + "\n",
    )


def stored_provenance(out: Path) -> dict[str, Any]:
    """provenance.json.

    Raises
    ------
    RunError
        It cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{out}: provenance.json cannot be read ({error}); begin a new run"
        raise RunError(message) from error
    return found


def stored_store(out: Path) -> Path | str | None:
    """The store that a run was begun on, a folder or an address; None where it was tars. Raises as above."""
    place = stored_provenance(out).get("store")
    return place if place is None or is_url(place) else Path(place)


def fold_directory(out: Path, fold: int, *, inner: bool = False) -> Path:
    """Where the files of a fold are, or of its inner learner."""
    return out / f"fold_{fold}" / "inner" if inner else out / f"fold_{fold}"


def fold_finished(out: Path, fold: int, *, nested: bool) -> bool:
    """Whether a fold of the run in `out` was trained to its end.

    Parameters
    ----------
    nested
        Whether it has an inner learner, which must be finished too (`RunConfig.has_inner`).
    """
    if (out / "summary.json").exists():
        return True
    kinds = (False, True) if nested else (False,)
    return all(_finished(fold_directory(out, fold, inner=inner) / CHECKPOINT) for inner in kinds)


def _finished(checkpoint: Path) -> bool:
    """What a checkpoint says of itself, in the header of the file: no tensor is read."""
    try:
        with checkpoint.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if not 0 < length <= _LONGEST_HEADER:
                return False
            about = json.loads(file.read(length))["__metadata__"]
        return bool(json.loads(about["state"])["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # a job that trains the fold will say what is wrong with it


def unfinished(folder: Path) -> list[Path]:
    """Runs in `folder` that were begun and not finished, the latest begun last."""
    found = [path.parent for path in (*folder.glob("*/config.toml"), *folder.glob("*/*/config.toml"))]
    left = [run for run in found if not (run / "summary.json").exists()]
    return sorted(left, key=lambda run: (run / "config.toml").stat().st_mtime)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes from training in the same directory.

    Raises
    ------
    RunBusyError
        One does.
    RunError
        The directory cannot be locked.
    """
    with _locked(out, _LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


@contextmanager
def fold_held(out: Path, fold: int) -> Iterator[None]:
    """Keep other processes from training the same fold, or the run as a whole; other folds may be trained beside it.

    Raises
    ------
    RunBusyError
        One does.
    RunError
        The directory cannot be locked.
    """
    with (
        _locked(out, f"{_LOCK}.fold_{fold}", fcntl.LOCK_EX | fcntl.LOCK_NB),
        _locked(out, _LOCK, fcntl.LOCK_SH | fcntl.LOCK_NB),
    ):
        yield


@contextmanager
def waiting(folder: Path, what: str) -> Iterator[None]:
    """One process at a time for what has this name in the folder; the others wait.

    Raises
    ------
    RunError
        The folder cannot be locked.
    """
    with _locked(folder, f"{_LOCK}.{what}", fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(out: Path, name: str, how: int) -> Iterator[None]:
    """The lock is the process's: the kernel drops it when the process dies, however it does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / name).open(
            "a+"
        )  # NFS gives shared locks on what is open to be read, others on what to be written
    except OSError as error:
        message = f"{out}: cannot write the run directory ({error.strerror})"
        raise RunError(message) from error
    with lock:
        try:
            fcntl.flock(lock, how)
        except BlockingIOError as error:
            message = f"{out}: another process trains here; wait for it, or name another directory with --out"
            raise RunBusyError(message) from error
        except OSError as error:
            message = f"{out}: cannot be locked ({error.strerror}); name a directory on another file system with --out"
            raise RunError(message) from error
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or absent."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
