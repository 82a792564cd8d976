"""The one door to Ray: loaded when it is asked for, joined or started, and left as it was found.

Ray listens on the network and runs code for whoever it believes, so its token authentication is on, and what is started
here has no dashboard. It reports its use to nobody.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cfstore.errors import EngineError

PACKAGES: Final = ("cfstore", "cftrain", "cfkernels")
_CONNECT_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 2.0
ROOM_SECONDS: Final = 60.0
"""For how long work waits for a node that is lost to be replaced, where no other is left that it fits on."""
_ENVIRONMENT: Final = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "3",  # without it, a task that is too large for every node is tried for ever
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what later versions of Ray do anyway; without it every start warns
}
"""Set where the environment does not say otherwise, before Ray is loaded: it reads them once."""


@contextmanager
def ray_cluster(address: str | None = None, *, need: str = "this") -> Iterator[Any]:
    """Ray, connected while the context lasts; gives the module `ray`.

    A Ray that this process has connected to already is used and left alone. Otherwise what was started or joined
    here is shut down or left at the end.

    Parameters
    ----------
    address
        "HOST:PORT" of a running cluster, or "auto" for the one that RAY_ADDRESS or this machine names. None starts
        Ray on this machine alone, with as many CPUs as this process may use, whatever else runs here.
    need
        What Ray is for, as in "cfstore ingest --engine ray": begins the messages.

    Raises
    ------
    EngineError
        Ray is not installed; no token to join the cluster with; nothing answers at `address`, or what answers runs
        another version of Ray or Python.
    """
    ray = load_ray(need)
    if ray.is_initialized():
        _check_same(ray, address, need)
        yield ray
        return
    if address is None:
        _make_token()
        where, chosen = "on this machine", {"address": "local", "num_cpus": n_cpus()}
    else:
        _check_token(address, need)
        _check_answers(address, need)
        where, chosen = f"at {address}", {"address": address}
    try:
        ray.init(**chosen, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many classes, and none of them says what to do
        ray.shutdown()
        raise EngineError(f"{need}: no connection to Ray {where} ({_one_line(error)}); {_REMEDY}") from error
    with _silent(ray):
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _silent(ray: Any) -> Iterator[None]:
    """Ray prints deaths of workers and nodes to stdout, whatever `log_to_driver` says: into the JSON of commands."""
    worker = ray._private.worker
    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


_REMEDY: Final = (
    "all nodes need the same versions of Ray and Python and the same token (~/.ray/auth_token); see docs/cluster.md"
)


def load_ray(need: str) -> Any:
    """The module `ray`, as safe as it can be configured; EngineError where it is not installed."""
    loaded: Any = sys.modules.get("ray")
    if loaded and loaded.is_initialized():
        return loaded
    unset = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(unset)
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        message = f"{need}: Ray is not installed; run `pip install 'crossfusion-store[ray]'`"
        raise EngineError(message) from error
    if loaded and unset:
        ray._raylet.Config.initialize("")  # it has read the environment already: again, as it does itself for tokens
    return ray


def n_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


@cache
def code_version() -> str:
    """Version and digest of the installed source of cfstore, cftrain and cfkernels, as "0.1.0+1f0c77a2b3d4"."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in sorted((spec.submodule_search_locations or []) if spec else []):
            root = Path(folder)
            for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
                content = path.read_bytes()
                digest.update(f"{package}/{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    try:
        version = metadata.version("crossfusion-store")
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        version = "0"
    return f"{version}+{digest.hexdigest()[:12]}"


@dataclass
class RoomWatch:
    """Looks whether a cluster still has a node that work fits on: Ray itself waits for one for ever, and in silence.

    Parameters
    ----------
    check
        Raises EngineError where there is none now.
    seconds
        For how long a lost node may be replaced.
    """

    check: Callable[[], object]
    seconds: float = field(default_factory=lambda: ROOM_SECONDS)
    _since: float | None = None
    _looked: float = 0.0

    def look(self) -> None:
        """To be called often.

        Raises
        ------
        EngineError
            There has been none for `seconds`.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        try:
            self.check()
        except EngineError as error:
            self._since = now if self._since is None else self._since
            if now - self._since >= self.seconds:
                message = f"{error}. Nodes were lost; what was finished is kept: run this again when there are some"
                raise EngineError(message) from error
        else:
            self._since = None


def node_name() -> str:
    """This machine, as messages name it."""
    return socket.gethostname()


def check_code(expected: str) -> None:
    """Called first by every task, on its node, with the `code_version()` of the process that sent it.

    Raises
    ------
    EngineError
        This node has other code; the message names the node and both versions.
    """
    found = code_version()
    if found != expected:
        message = (
            f"node {node_name()} has crossfusion-store {found}, the command runs {expected}; "
            "install the same version on every node and start its Ray again"
        )
        raise EngineError(message)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:300]}" if lines else type(error).__name__


def _check_same(ray: Any, address: str | None, need: str) -> None:
    """An address that was asked for by name is not silently replaced by the one that is connected."""
    if address in (None, "auto"):
        return
    joined = ray.get_runtime_context().gcs_address
    if _resolved(address, ray) != _resolved(joined, ray):
        message = (
            f"{need}: this process is connected to Ray at {joined}, not {address}; call ray.shutdown() or leave it out"
        )
        raise EngineError(message)


def _parts(address: str) -> tuple[str, int] | None:
    """Host and port; None where an address is of another form ("auto", "local")."""
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _resolved(address: str, ray: Any) -> object:
    """By number, where that can be told; Ray calls this machine by its number in the network."""
    parts = _parts(address)
    if parts is None:
        return address
    host, port = parts
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return (ray.util.get_node_ip_address() if host.startswith("127.") else host), port


def _check_answers(address: str, need: str) -> None:
    """Ray itself would try for a minute, and then say something else."""
    parts = _parts(address)
    if address == "auto":
        return
    if "://" in address:
        message = f"{need}: --address {address}: run this on a node of the cluster, and name its HOST:PORT without //"
        raise EngineError(message)
    if parts is None:
        raise EngineError(f"{need}: --address {address!r} is not HOST:PORT; `ray start --head` prints it (port 6379)")
    try:
        socket.create_connection(parts, _CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # the latter of what can be no host name, such as 10..0.5
        why = getattr(error, "strerror", None) or error
        message = (
            f"{need}: nothing answers at {address} ({why}); "
            "start Ray there with `ray start --head`, or leave --address out to use this machine alone"
        )
        raise EngineError(message) from error


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _has_token() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or _token_file().is_file()


def _needs_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _check_token(address: str, need: str) -> None:
    if _needs_token() and not _has_token():
        message = (
            f"{need}: no token to join Ray at {address} with: copy the head node's ~/.ray/auth_token "
            f"(`ray get-auth-token --generate` makes it there) to {_token_file()}"
        )
        raise EngineError(message)


def _make_token() -> None:
    """Ray would make the file itself, but readable for every user of the machine."""
    path = _token_file()
    if not _needs_token() or _has_token():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another process was faster
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
    except OSError as error:
        message = f"{path}: Ray's token cannot be written ({error.strerror}); name another place in RAY_AUTH_TOKEN_PATH"
        raise EngineError(message) from error
