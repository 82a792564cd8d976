"""A loopback HTTP proxy in front of a server, that does wrong what networks and servers do wrong."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

INJECTED = b"<Error>injected</Error>"
Kind = Literal["status", "reset", "cut", "short", "lost", "gone", "slow", "hang", "sips"]


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD path" matches `where`.

    status: answers `status` instead. reset: connection reset before any answer. cut: the body ends half-way, then
    the connection. short: half of the body, announced as if it were all. lost: the server is asked, but its answer
    never arrives. gone: 404. slow: `seconds` later. hang: no answer for `seconds`, then a reset. sips: takes what is
    sent at a MiB in `seconds`.
    """

    kind: Kind
    where: str = ""
    times: int = 1
    status: int = 503
    seconds: float = 0.05
    skip: int = 0
    """So many matching requests pass first."""
    hits: int = field(default=0, init=False)


class FaultyProxy:
    """Forwards to `upstream`, "host:port"; `faults` may be changed at any time; `log` has "METHOD path range".

    Headers named in `dropped` do not reach the server. `asked` is called when the server has answered, before the
    client hears of it.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.dropped: set[str] = set()
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, pattern: str) -> int:
        """Requests so far whose line in `log` matches."""
        return sum(bool(re.search(pattern, line)) for line in list(self.log))

    def fault_for(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    fault.hits += 1
                    return fault
        return None

    def enter(self, line: str) -> None:
        with self._lock:
            self.log.append(line)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)

    def asked(self, line: str) -> None:
        """The server has done what `line`, "METHOD path", asks for."""

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def log_message(self, *_: object) -> None:
        pass

    def _forward(self) -> None:
        line = f"{self.command} {self.path}"
        self.proxy.enter(f"{line} {self.headers.get('Range', '')}".strip())
        try:
            fault = self.proxy.fault_for(line)
            self._answer(fault, self._body(fault.seconds if fault and fault.kind == "sips" else 0))
        finally:
            self.proxy.leave()

    def _body(self, pause: float) -> bytes:
        length, body = int(self.headers.get("Content-Length") or 0), bytearray()
        while len(body) < length and (piece := self.rfile.read(min(1 << 20, length - len(body)))):
            body += piece
            time.sleep(pause)
        return bytes(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815 - names of the standard library

    def _answer(self, fault: Fault | None, body: bytes) -> None:
        kind = fault.kind if fault else None
        if fault and kind in ("slow", "hang"):
            time.sleep(fault.seconds)
        if kind in ("reset", "hang"):
            return self._reset()
        if fault and kind in ("status", "gone"):
            return self._send(404 if kind == "gone" else fault.status, {}, INJECTED)
        status, headers, answer = self._ask(body)
        self.proxy.asked(f"{self.command} {self.path}")
        if kind == "lost":
            return self._reset()
        if kind == "short":
            answer = answer[: len(answer) // 2]
        half = len(answer) // 2 if kind == "cut" else None
        return self._send(status, headers, answer, half)

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        try:
            sent = {name: value for name, value in self.headers.items() if name not in self.proxy.dropped}
            connection.request(self.command, self.path, body or None, sent)
            response = connection.getresponse()
            answer = response.read()
            headers = dict(response.getheaders())
            if self.command == "HEAD":
                return response.status, headers, b""
            headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
            return response.status, headers, answer
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], answer: bytes, cut_at: int | None = None) -> None:
        dropped = ("transfer-encoding", "connection", "date", "server")
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in dropped:
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name in headers) and status not in (204, 304):
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer[:cut_at])
        if cut_at is not None:
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
