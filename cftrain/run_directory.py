"""A run directory: begun once, held by one process at a time, gone on with after a stop."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cftrain.config import RESUMABLE, RunConfig, differences, load_config, to_toml
from cftrain.errors import RunError

_SAME_DATA = ("data_digest", "splits_digest")


def check_new(out: Path) -> None:
    """RunError where a directory holds files already."""
    if out.exists() and (not out.is_dir() or any(path.name != ".lock" for path in out.iterdir())):
        message = f"{out}: holds files already; go on with --resume, or name another run directory with --out"
        raise RunError(message)


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
        _write(out / "provenance.json", json.dumps(provenance, indent=2) + "\n")
        _write(out / "config.toml", to_toml(config))
    except OSError as error:
        message = f"{out}: cannot write the run directory ({error.strerror})"
        raise RunError(message) from error


def begun(out: Path) -> bool:
    """Whether a run was begun there."""
    return (out / "config.toml").exists()


def go_on(out: Path, config: RunConfig, provenance: Mapping[str, Any]) -> None:
    """Check that a run that was stopped can go on with these settings and data, and note that it does.

    Raises
    ------
    RunError
        Settings or data differ from those it was begun with, or provenance.json cannot be read.
    ConfigError
        config.toml cannot be read.
    """
    differing = [key for key in differences(load_config(file=out / "config.toml"), config) if key not in RESUMABLE]
    if differing:
        message = f"{out}: was begun with another {', '.join(differing)}; leave that out, or begin a run with --out"
        raise RunError(message)
    before = stored_provenance(out)
    changed = [key for key in _SAME_DATA if before.get(key) != provenance[key]]
    if changed:
        message = f"{out}: {' and '.join(changed)} differ: labels, folds or features changed since; begin a new run"
        raise RunError(message)
    resumed = {key: provenance[key] for key in ("started", "command", "device", "git_commit", "versions")}
    _write(
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
    RunError
        One does.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{out}: another process trains here; wait for it, or name another directory with --out"
            raise RunError(message) from error
        except OSError as error:
            message = f"{out}: cannot be locked ({error.strerror}); name a directory on another file system with --out"
            raise RunError(message) from error
        yield


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
