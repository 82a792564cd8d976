"""What the steps of reading and writing a slide cost: the numbers behind docs/log.md, "what decoding costs".

    python benchmarks/primitives.py --out benchmarks/results/primitives.json

One 20x bag of each kind of synthetic features as float16, in chunks of 512 rows; repetitions interleaved, medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import google_crc32c
import harness
import numpy as np
import torch
import xxhash
from numcodecs import blosc, zstd
from numpy.typing import NDArray
from slide_data import DataPlan, Encoder, bag

from cfstore.codecs import get_codec

ROWS, CHUNK, REPETITIONS = 12_288, 512, 9


def rate(work: dict[str, Callable[[], Any]], nbytes: int) -> dict[str, Any]:
    """GB/s of `nbytes` per call, quartiles over interleaved repetitions."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(REPETITIONS):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            found[name].append(nbytes / (time.perf_counter() - started) / 1e9)
    return {name: harness.quartiles(values) for name, values in found.items()}


def decoding(half: NDArray[np.float16], threads: int) -> dict[str, Any]:
    """Our Blosc frames against c-blosc's, decoded by numcodecs; and zstd alone on each byte plane."""
    chunks = [half[at : at + CHUNK] for at in range(0, len(half), CHUNK)]
    codec = get_codec("blosc-zstd", "float16")
    frames = {
        "cfstore": [codec.encode(chunk)[:-4] for chunk in chunks],  # without its crc32c
        "c-blosc": [blosc.compress(chunk, b"zstd", 1, blosc.SHUFFLE, 1 << 20, typesize=2) for chunk in chunks],
    }
    outs = [harness.page_buffer(half.nbytes) for _ in range(threads)]
    size = chunks[0].nbytes
    pool = ThreadPoolExecutor(threads)

    def decode(name: str, out: NDArray[np.uint8]) -> None:
        for at, frame in enumerate(frames[name]):
            blosc.decompress(frame, out[at * size : (at + 1) * size])

    for name in frames:
        decode(name, outs[0])
        if not np.array_equal(outs[0][: half.nbytes].view(np.uint16), half.view(np.uint16).ravel()):
            message = f"{name}: wrong values"
            raise ValueError(message)
    one = rate({name: lambda name=name: decode(name, outs[0]) for name in frames}, half.nbytes)
    many = rate(
        {name: lambda name=name: list(pool.map(lambda out: decode(name, out), outs)) for name in frames},
        half.nbytes * threads,
    )
    plane = (half.view(np.uint16).ravel() >> 8).astype(np.uint8)
    streams = [zstd.compress(plane[at : at + (1 << 19)], 1) for at in range(0, len(plane), 1 << 19)]
    room = np.empty(1 << 19, np.uint8)
    return {
        "ratio": {name: harness.significant(half.nbytes / sum(map(len, held))) for name, held in frames.items()},
        "decode 1 thread": one,
        f"decode {threads} threads": many,
        "zstd on the high plane": rate({"numcodecs": lambda: [zstd.decompress(s, room) for s in streams]}, len(plane)),
    }


def steps(features: NDArray[np.float32]) -> dict[str, Any]:
    """Digests, float32 to float16 and back; GB/s of bytes digested, and of float32."""
    torch.set_num_threads(1)
    block = features[:64].copy()
    half, wide = np.empty(block.shape, np.float16), np.empty_like(block)
    stored = np.random.default_rng(0).integers(0, 256, 900_000, dtype=np.uint8)
    digests = {"xxh3-64": lambda: xxhash.xxh3_64_intdigest(stored), "crc32c": lambda: google_crc32c.value(stored)}
    halves: dict[str, Callable[[], Any]] = {
        "numpy to float16": lambda: np.copyto(half, block, casting="same_kind"),
        "numpy to float32": lambda: np.copyto(wide, half),
        "torch to float16": lambda: torch.from_numpy(half).copy_(torch.from_numpy(block)),
        "torch to float32": lambda: torch.from_numpy(wide).copy_(torch.from_numpy(half)),
    }
    return {"digests": rate(digests, stored.nbytes), "halves": rate(halves, block.nbytes)}


def duckdb_ms() -> dict[str, Any]:
    """Milliseconds to start an instance, and to take a cursor of one that runs."""
    kept = duckdb.connect(":memory:")
    calls = {"start": lambda: duckdb.connect(":memory:").close(), "cursor": lambda: kept.cursor().close()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPETITIONS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name].append(1e3 * (time.perf_counter() - started))
    return {name: harness.quartiles(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=4)
    told = parser.parse_args()
    found: dict[str, Any] = {
        "unit": "GB/s, duckdb in ms",
        "machine": harness.machine(),
        "versions": harness.versions(("numpy", "numcodecs", "torch", "xxhash", "google-crc32c", "duckdb")),
        **harness.commit(),
    }
    for kind in ("vit", "resnet"):
        plan = DataPlan(kind)
        features, _ = bag(Encoder(plan), ROWS, plan.dim, (plan.seed,))
        found[kind] = decoding(features.astype(np.float16), told.threads)
    found |= {"steps": steps(features), "duckdb": duckdb_ms()}
    text = json.dumps(found, indent=1) + "\n"
    if told.out:
        told.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
