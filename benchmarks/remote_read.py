"""How much of a bandwidth cap whole slides use when they are read from object storage, at 20 ms per request.

    python benchmarks/remote_read.py --root DIR --out remote_read.json     # about 1.5 GB, 3 minutes
    python benchmarks/remote_read.py --root DIR --slides 4 --dim 64        # a small run

A store of slides of 13,496 patches x 1,024 features in float16, made by slide_data.py (`vit`), uncompressed and with
the default codec, is served by range_server.py in a process of its own, and read as `cftrain` reads: by
`SlideReader.stream` with its number of threads, in a random order, into memory that is used again; with coordinates.
The result is stored bytes of the slides per second over the cap. Goal: 0.8 at 100, 200 and 400 MB/s.

`clients` reads the same ranges (8 MiB each, 16 threads, nothing decoded) with obstore, http.client of the standard
library, and fsspec's http where it is installed: which of them to build on.

Traps, and what is done about them:

- the server's cap: `uncapped` reads the same with no cap and no latency; where that is below a cap, the machine is
  the limit and not the reader. The server's files are in the page cache: they are read once before.
- the mirror, connections, threads and the reader's memory are made by a first stream that is not timed.
- loopback costs CPU that a network card would not: server, client, decoding and digests share the cores.
- one shared machine: each sample says how many cores it used (the server's are among them), and how many others did.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from harness import commit, machine, measure, print_table, quartiles, significant, write_result
from harness import versions as package_versions
from slide_data import DataPlan, Encoder, bag

import cfstore
from cfstore.remote.bucket import Bucket

PATCHES = 13_496
CODECS = ("none", "blosc-zstd")
PIECE = 8 << 20
CLIENT_THREADS = 16


def make_store(root: Path, slides: int, patches: int, dim: int, codec: str) -> Path:
    """A store of the same slides in every codec, made once."""
    import h5py

    path, done = (
        root / f"remote-{codec}-{slides}x{patches}x{dim}",
        root / f"remote-{codec}-{slides}x{patches}x{dim}.done",
    )
    if done.exists():
        return path
    folder = root / f"remote-h5-{slides}x{patches}x{dim}" / "x20" / "h5_files"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(DataPlan(dim=dim))
    for number in range(slides):
        file = folder / f"BENCH-{number:04d}.h5"
        if not file.exists():
            features, cells = bag(encoder, patches, dim, (0, number, 20))
            with h5py.File(file.with_suffix(".part"), "w") as written:
                written["features"], written["coords"] = features.astype(np.float16), cells * 256
            file.with_suffix(".part").rename(file)
    options = cfstore.IngestOptions(encoder="bench", codec=codec)
    cfstore.open(path, create=True).ingest(folder.parents[1], options)
    done.touch()
    return path


@contextmanager
def served(folder: Path, latency_ms: float, cap_mb: float | None) -> Iterator[str]:
    """The address of a server in a process of its own."""
    arguments = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(folder)]
    arguments += ["--latency-ms", str(latency_ms)] + (["--mb-per-s", str(cap_mb)] if cap_mb else [])
    server = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None  # noqa: S101 - a pipe
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.kill()
        server.communicate()


def stored_bytes(store: cfstore.Store) -> int:
    """Bytes that reading every slide once takes from the server: chunks of features and coordinates."""
    query = "SELECT sum(list_sum(sizes))::BIGINT FROM internal.extents"
    from cfstore.catalog import connect

    with connect(store.path) as connection:
        return int(connection.execute(query).fetchone()[0])


def read_all(url: str, repeats: int, threads: int, seed: int) -> dict[str, Any]:
    """Every slide `repeats` times in random orders: seconds and bytes per second of each time."""
    store = cfstore.open(url)
    ids = sorted(row["slide_id"] for row in store.sql("SELECT DISTINCT slide_id FROM bags").to_pylist())
    reader = store.reader("bench", [20], ids, with_coords=True)
    nbytes = stored_bytes(store)
    rng = random.Random(seed)  # noqa: S311

    def once() -> None:
        order = rng.sample(ids, len(ids))
        for expected, slide in zip(order, reader.stream(order, threads=threads), strict=True):
            if slide.slide_id != expected:
                raise ValueError(f"{slide.slide_id} came where {expected} was asked for")

    once()
    samples = [measure(once) for _ in range(repeats)]
    return {
        "bytes": nbytes,
        "mb_per_s": quartiles([nbytes / sample.wall / 1e6 for sample in samples]),
        "own_cores": significant(float(np.median([sample.cpu / sample.wall for sample in samples])), 3),
        "other_cores": significant(float(np.median([sample.other_cores for sample in samples])), 3),
    }


# -- clients -----------------------------------------------------------------------------------------


def with_obstore(url: str) -> Callable[[str, int, int], int]:
    bucket = Bucket(url)
    return lambda key, start, stop: len(bucket.read_range(key, start, stop).data)


def with_http_client(url: str) -> Callable[[str, int, int], int]:
    held, host = threading.local(), urlsplit(url).netloc

    def read(key: str, start: int, stop: int) -> int:
        if not hasattr(held, "connection"):
            held.connection, held.memory = http.client.HTTPConnection(host), bytearray(PIECE)
        held.connection.request("GET", f"/{key}", headers={"Range": f"bytes={start}-{stop - 1}"})
        response, memory, done = held.connection.getresponse(), memoryview(held.memory)[: stop - start], 0
        while done < len(memory):
            done += response.readinto(memory[done:])
        response.read()
        return done

    return read


def with_fsspec(url: str) -> Callable[[str, int, int], int] | None:
    try:
        import aiohttp  # noqa: F401 - what fsspec's http needs
        import fsspec
    except ImportError:
        return None
    files = fsspec.filesystem("http")
    return lambda key, start, stop: len(files.cat_file(f"{url}/{key}", start=start, end=stop))


def read_ranges(read: Callable[[str, int, int], int], folder: Path, repeats: int) -> dict[str, Any]:
    """All features of a store as ranges of 8 MiB."""
    ranges = []
    for path in sorted(folder.rglob("features/c/0/0")):
        size = path.stat().st_size
        key = path.relative_to(folder).as_posix()
        ranges += [(key, start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
    with ThreadPoolExecutor(CLIENT_THREADS) as pool:

        def once() -> int:
            return sum(pool.map(lambda one: read(*one), ranges))

        once()
        samples = [measure(once) for _ in range(repeats)]
    return {
        "mb_per_s": quartiles([sample.result / sample.wall / 1e6 for sample in samples]),
        "own_cores": significant(float(np.median([sample.cpu / sample.wall for sample in samples])), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="where data are made and kept")
    parser.add_argument("--out", type=Path, help="result as JSON; without it on stdout")
    parser.add_argument("--slides", type=int, default=24)
    parser.add_argument("--patches", type=int, default=PATCHES)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--caps", type=float, nargs="*", default=[100, 200, 400], help="MB/s")
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2, help="as data.readers of cftrain")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-clients", action="store_true", help="do not compare clients")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = tempfile.mkdtemp(dir=options.root)  # mirrors of earlier runs are not ours
    stores = {codec: make_store(options.root, options.slides, options.patches, options.dim, codec) for codec in CODECS}
    rows: list[dict[str, Any]] = []
    for codec, path in stores.items():
        for cap in [*options.caps, None]:
            with served(path, options.latency_ms if cap else 0.0, cap) as url:
                started = time.perf_counter()
                found = read_all(url, options.repeats, options.threads, seed=0)
            row = {"codec": codec, "cap_mb_per_s": cap, **found}
            row["of_cap"] = significant(found["mb_per_s"]["median"] / cap, 3) if cap else None
            rows.append(row)
            print(f"{codec}, cap {cap}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    clients = [] if options.no_clients else compare_clients(stores["none"], options)
    shown = [{**row, "mb_per_s": row["mb_per_s"]["median"]} for row in rows + clients]
    print_table(shown, ["codec", "client", "cap_mb_per_s", "mb_per_s", "of_cap", "own_cores", "other_cores"])
    result = {
        "benchmark": "whole slides from a capped range server on loopback",
        "notes": __doc__,
        "latency_ms": options.latency_ms,
        "slides": [options.slides, options.patches, options.dim],
        "threads": options.threads,
        "machine": machine(),
        "load_1_5_15_min": [significant(each, 3) for each in os.getloadavg()],
        "versions": package_versions(["numpy", "obstore", "numcodecs", "fsspec", "aiohttp"]),
        **commit(),
        "results": rows,
        "clients": clients,
    }
    write_result(result, options.out)


def compare_clients(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same ranges through every client, with the cap of 400 MB/s and without any."""
    rows = []
    for cap in (400.0, None):
        with served(folder, options.latency_ms if cap else 0.0, cap) as url:
            made = {"obstore": with_obstore(url), "http.client": with_http_client(url), "fsspec": with_fsspec(url)}
            for name, read in made.items():
                if read is not None:
                    found = read_ranges(read, folder, options.repeats)
                    of_cap = significant(found["mb_per_s"]["median"] / cap, 3) if cap else None
                    rows.append({"client": name, "cap_mb_per_s": cap, **found, "of_cap": of_cap})
    return rows


if __name__ == "__main__":
    main()
