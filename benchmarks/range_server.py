"""A web server on loopback as slow as one wants: latency per request, a bandwidth shared by all connections.

    python benchmarks/range_server.py FOLDER --latency-ms 20 --mb-per-s 200     # prints its port

Answers GET and HEAD, with and without one range, from files below FOLDER; lists nothing and takes nothing. Bytes go
out by sendfile in small pieces, each when the bucket of tokens has refilled: what it can send beyond the cap in a
moment is 5 ms worth of it, so that the cap is one over any time that matters.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_PIECE = 128 << 10
_BURST_SECONDS = 0.005
_RANGE = re.compile(r"^bytes=(\d+)-(\d*)$")


class Bandwidth:
    """A token bucket: `take` waits until so many bytes may go."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._paid_until = 0.0

    def take(self, nbytes: int) -> None:
        if not self._rate:
            return
        with self._lock:
            now = time.perf_counter()
            self._paid_until = max(self._paid_until, now - _BURST_SECONDS) + nbytes / self._rate
            wait = self._paid_until - now
        if wait > 0:
            time.sleep(wait)


class RangeServer(ThreadingHTTPServer):
    """Files below `folder` on a port of 127.0.0.1 that the system chooses.

    Parameters
    ----------
    latency
        Seconds before the first byte of every answer.
    bytes_per_second
        Of all connections together; None: as fast as it goes.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, folder: Path, latency: float = 0.0, bytes_per_second: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency, self.bandwidth = folder.resolve(), latency, Bandwidth(bytes_per_second)
        self.n_requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> RangeServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none of its business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RangeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.server.n_requests += 1
        time.sleep(self.server.latency)
        path = (self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        if not path.is_relative_to(self.server.folder) or not path.is_file():
            return self._head(404, 0)
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            etag = f'"{info.st_mtime_ns:x}-{info.st_size:x}"'
            if self.headers.get("If-None-Match") == etag:
                return self._head(304, None, ETag=etag)
            found = _RANGE.match(self.headers.get("Range", ""))
            start, stop, status, more = 0, info.st_size, 200, {"ETag": etag, "Accept-Ranges": "bytes"}
            if found:
                start, stop = int(found[1]), min(int(found[2] or info.st_size) + 1, info.st_size)
                if start >= info.st_size:
                    return self._head(416, 0, **{"Content-Range": f"bytes */{info.st_size}"})
                status, more["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{info.st_size}"
            self._head(status, stop - start, **more)
            if with_body:
                self._send(file.fileno(), start, stop)
        return None

    def _head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.flush()

    def _send(self, file: int, start: int, stop: int) -> None:
        connection = self.connection
        while start < stop:
            size = min(_PIECE, stop - start)
            self.server.bandwidth.take(size)
            sent = os.sendfile(connection.fileno(), file, start, size)
            if not sent:
                raise ConnectionError
            start += sent

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--mb-per-s", type=float, help="cap, 10^6 bytes per second; without it there is none")
    options = parser.parse_args()
    cap = options.mb_per_s * 1e6 if options.mb_per_s else None
    with RangeServer(options.folder, options.latency_ms / 1e3, cap) as server:
        print(server.server_address[1], flush=True)
        sys.stdin.read()  # until whoever started it is gone


if __name__ == "__main__":
    main()
