"""Beside a training process, on its node: starts it, hears what it says, knows how it ended. So do torchrun's agents.

The process is one of its own, so that it has a main thread for signals, dies alone, and runs the same command as under
torchrun. It ends with its agent: its standard input is a pipe that the agent holds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from typing import Any, Final, Literal

from cfstore import EngineError, check_code

_TAIL_BYTES: Final = 4000
_READ_BYTES: Final = 1 << 16
_LAST_WORDS_SECONDS: Final = 5.0
_SIOCGIFADDR: Final = 0x8915

How = Literal["well", "stopped", "said", "crashed", "died"]
"""Done; asked to stop, and did; an error raised on purpose; any other exception; killed, or gone with its node."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Parameters
    ----------
    code
        Its exit code.
    why
        In one line; empty where it ended well or was stopped.
    trace
        The traceback of an exception that nobody raised on purpose, or the last that a killed process said.
    when
        Seconds since 1970 on its node: of several that crash, the first is the cause.
    """

    how: How
    code: int
    why: str = ""
    trace: str = ""
    when: float = 0.0


@dataclass(frozen=True)
class News:
    """What a process said since it was last asked for it, and how it ended, once it has."""

    out: bytes = b""
    err: bytes = b""
    ended: Ended | None = None


class RankAgent:
    """Starts one process and looks after it."""

    def __init__(self) -> None:
        self._told = threading.Condition()
        self._said = {"out": bytearray(), "err": bytearray()}
        self._tail = b""
        self._ended: Ended | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sent: int | None = None

    def gpu(self, code: str) -> str:
        """The GPU that Ray gave, as CUDA_VISIBLE_DEVICES names it, or "".

        Raises
        ------
        EngineError
            This node's code is not the one that `code` is the version of.
        """
        check_code(code)
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def free_port(self) -> int:
        """A port that nobody listens on at this moment."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def start(
        self, arguments: Sequence[str], folder: str, environment: Mapping[str, str], address: str, *, speaks: bool
    ) -> None:
        """Start `cftrain ARGUMENTS` in `folder`.

        Parameters
        ----------
        environment
            On top of this process's.
        address
            Where others reach the process: gloo listens on that interface.
        speaks
            Whether what it says is passed on; an agent keeps only the end of what others say.

        Raises
        ------
        EngineError
            This node has no such folder.
        """
        if not Path(folder).is_dir():
            message = f"node {socket.gethostname()} has no folder {folder}: start in a folder that all nodes share"
            raise EngineError(message)
        interface = _interface(address)
        gloo = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
        path = os.pathsep.join(entry for entry in sys.path if entry)  # the code that was checked, and no other
        report, write = os.pipe()
        # Kept for it until it listens; where SIGINT is ignored, as below a shell's `&`, it would be lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cftrain.cli.rank", str(write), *arguments],
                cwd=folder,
                env={**gloo, **os.environ, **environment, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(write,),
                start_new_session=True,  # Ctrl-C in a terminal would reach it twice, and the second kills
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(write)
        streams = {"out": self._process.stdout, "err": self._process.stderr}
        readers = [
            threading.Thread(target=self._hear, args=(name, stream, speaks), daemon=True)
            for name, stream in streams.items()
        ]
        for reader in readers:
            reader.start()
        threading.Thread(target=self._attend, args=(self._process, readers, report), daemon=True).start()

    def _hear(self, name: str, stream: Any, speaks: bool) -> None:
        with stream:
            while piece := os.read(stream.fileno(), _READ_BYTES):
                with self._told:
                    if speaks:
                        self._said[name] += piece
                        self._told.notify_all()
                    if name == "err":
                        self._tail = (self._tail + piece)[-_TAIL_BYTES:]

    def _attend(self, process: subprocess.Popen[bytes], readers: Sequence[threading.Thread], report: int) -> None:
        code = process.wait()
        when = time.time()
        for reader in readers:
            reader.join(_LAST_WORDS_SECONDS)  # a child of its own may hold the pipe
        if process.stdin is not None:
            process.stdin.close()
        os.set_blocking(report, False)
        with open(report, "rb") as file:
            text = file.read() or b""
        with self._told:
            self._ended = _ended(code, text, self._tail.decode(errors="replace"), when, self._sent)
            self._told.notify_all()

    def news(self, seconds: float) -> News:
        """What is new; waits for it, at most so long."""
        with self._told:
            self._told.wait_for(lambda: self._ended or self._said["out"] or self._said["err"], seconds)
            found = News(bytes(self._said["out"]), bytes(self._said["err"]), self._ended)
            for words in self._said.values():
                words.clear()
            return found

    def signal(self, number: int) -> None:
        """Send the process a signal, if it is still there."""
        if self._process is not None and self._ended is None:
            self._sent = number
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def end(self) -> None:
        """Kill the process; returns when it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _ended(code: int, report: bytes, tail: str, when: float, sent: int | None) -> Ended:
    """From the exit code, what `cftrain.cli.rank` reported, and the signal that it was sent."""
    if report:
        told = json.loads(report)
        return Ended(told["how"], code, told["why"], told["trace"], when)
    if sent is not None and code not in (0, 75, 130):
        return Ended("stopped", 130 if sent == signal.SIGINT else 75)  # before it listened: there was nothing to keep
    if code < 0:
        return Ended("died", code, f"was killed by {_signal_name(-code)}", tail, when)
    if code in (0, 75, 130):
        return Ended("stopped" if code else "well", code)
    return Ended("crashed", code, f"ended with exit code {code}", tail, when)


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _interface(address: str) -> str | None:
    """The network interface with this IPv4 address; None where none has it, or the system does not say."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
