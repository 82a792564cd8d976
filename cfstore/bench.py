"""What each precision and codec does to somebody's own features: size, speed and error, measured.

Rows are cut into the chunks that a store would make of them. Everything runs in worker threads,
because Blosc starts threads of its own in the main one.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cfstore.catalog import connect
from cfstore.codecs import CODECS, DEFAULT_CODEC, Codec, get_codec
from cfstore.convert import ARRAY_DTYPE, DTYPES, BagConverter, RangeMeter
from cfstore.errors import DamagedShardError, PrecisionError, ShapeError, SlideNotFoundError
from cfstore.parsers import discover, open_bag
from cfstore.reader import SlideReader
from cfstore.shards.zarr_shard import chunk_rows

BENCH_BYTES: Final = 64 << 20
REPETITIONS: Final = 5
_BLOCK_BYTES: Final = 8 << 20  # as ingest reads


@dataclass(frozen=True)
class CodecRow:
    """One precision with one codec.

    Parameters
    ----------
    default
        Whether `cfstore ingest --dtype` takes this codec where none is named.
    ratio
        Stored bytes / source bytes.
    convert_mb_s, encode_mb_s
        Source rows to stored precision (digest and error included), and those to stored chunks:
        1e6 source bytes per second, one thread.
    decode_gb_s, decode_gb_s_threads
        1e9 decoded bytes per second, by one thread and by `threads` of them; nothing is read from disk.
    max_abs_error, rms_relative_error
        Largest |stored - source|; rms(stored - source) / rms(source).
    """

    dtype: str
    codec: str
    default: bool
    ratio: float
    convert_mb_s: float
    encode_mb_s: float
    decode_gb_s: float
    decode_gb_s_threads: float
    max_abs_error: float
    rms_relative_error: float


@dataclass(frozen=True)
class CodecBench:
    """The table, what it was measured on, and precisions that cannot hold the values, with the reason."""

    rows: tuple[CodecRow, ...]
    refused: Mapping[str, str]
    n_bags: int
    n_patches: int
    dim: int
    source_dtype: str
    source_bytes: int
    threads: int
    repetitions: int
    machine: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class _Stored:
    """All bags in one precision."""

    bags: list[NDArray[Any]]
    seconds: float
    max_abs_error: float
    rms_relative_error: float


def bench_codecs(
    rows: Sequence[NDArray[np.floating]],
    *,
    dtypes: Sequence[str] = DTYPES,
    codecs: Sequence[str] = CODECS,
    threads: int | None = None,
    repetitions: int = REPETITIONS,
    progress: Callable[[int, int], None] | None = None,
) -> CodecBench:
    """Measure every dtype with every codec; times are medians of interleaved repetitions.

    Parameters
    ----------
    rows : each [N, D] float16, float32 or float64
        Bags, taken for slides of their own.
    dtypes, codecs
        What to measure.
    threads
        For the second column of decoding; None: one per core.

    Raises
    ------
    DamagedShardError
        A codec did not give back what it was given.
    SourceError
        No rows, of different dimensions, or values that are not finite.
    """
    if not rows or len({bag.shape[1] for bag in rows}) != 1:
        message = f"bags of {len({bag.shape[1] for bag in rows})} dimensions; a bench needs bags of one encoder"
        raise ShapeError(message)
    threads = threads or os.cpu_count() or 1
    source_bytes = sum(bag.nbytes for bag in rows)
    measured: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    refused: dict[str, str] = {}
    done, total = 0, repetitions * len(dtypes) * len(codecs)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(threads) as many:
        for _ in range(repetitions):
            for dtype in dtypes:
                stored = one.submit(_convert, rows, dtype).result()
                if isinstance(stored, str):
                    refused[dtype] = stored
                for codec in codecs:
                    if isinstance(stored, _Stored):
                        times = measured[dtype, codec]
                        times["convert_mb_s"].append(source_bytes / stored.seconds / 1e6)
                        times["max_abs_error"].append(stored.max_abs_error)
                        times["rms_relative_error"].append(stored.rms_relative_error)
                        _measure(times, stored, source_bytes, dtype, codec, one, many, threads)
                    done += 1
                    if progress:
                        progress(done, total)
    return CodecBench(
        rows=tuple(
            CodecRow(dtype, codec, DEFAULT_CODEC[dtype] == codec, **{k: statistics.median(v) for k, v in times.items()})
            for (dtype, codec), times in measured.items()
        ),
        refused=refused,
        n_bags=len(rows),
        n_patches=sum(len(bag) for bag in rows),
        dim=int(rows[0].shape[1]),
        source_dtype=", ".join(sorted({bag.dtype.name for bag in rows})),
        source_bytes=source_bytes,
        threads=threads,
        repetitions=repetitions,
        machine=describe_machine(),
    )


def _convert(rows: Sequence[NDArray[np.floating]], dtype: str) -> _Stored | str:
    """The bags in a precision, or why it cannot hold them."""
    bags, seconds = [], 0.0
    worst = squared_error = squared = 0.0
    for number, bag in enumerate(rows):
        path = Path(f"bag {number + 1}")
        step = max(1, _BLOCK_BYTES // (bag.shape[1] * bag.itemsize))
        blocks = [bag[at : at + step] for at in range(0, len(bag), step)]
        stored = np.empty(bag.shape, ARRAY_DTYPE[dtype])
        started = time.perf_counter()
        try:
            affine = None
            if dtype == "int8":
                meter = RangeMeter(bag.shape[1])
                for block in blocks:
                    meter.add(path, block)
                affine = meter.affine()
            converter = BagConverter(path, dtype, bag.shape[1], affine)
            for number_of_block, block in enumerate(blocks):
                stored[number_of_block * step : number_of_block * step + len(block)] = converter.convert(block)
        except PrecisionError as error:
            return str(error)
        seconds += time.perf_counter() - started
        bags.append(stored)
        found = converter.finish(None)
        size = float(np.square(bag, dtype=np.float64).sum())
        worst, squared = max(worst, found.max_abs_error), squared + size
        squared_error += found.rms_relative_error**2 * size
    return _Stored(bags, seconds, worst, math.sqrt(squared_error / squared) if squared else 0.0)


def _measure(
    times: Mapping[str, list[float]],
    stored: _Stored,
    source_bytes: int,
    dtype: str,
    codec: str,
    one: ThreadPoolExecutor,
    many: ThreadPoolExecutor,
    threads: int,
) -> None:
    """One repetition of one row: encode, then decode twice."""
    chosen = get_codec(codec, ARRAY_DTYPE[dtype])
    chunks = _chunks(stored.bags, codec)
    frames, seconds = one.submit(_encode, chosen, chunks).result()
    times["ratio"].append(sum(map(len, frames)) / source_bytes)
    times["encode_mb_s"].append(source_bytes / seconds / 1e6)
    decoded = sum(chunk.nbytes for chunk in chunks)
    out = [np.zeros(chunk.nbytes, np.uint8) for chunk in chunks]  # its pages are there before the clock starts
    for name, pool, workers in (("decode_gb_s", one, 1), ("decode_gb_s_threads", many, threads)):
        shares = [(frames[start::workers], out[start::workers]) for start in range(workers)]
        started = time.perf_counter()
        list(pool.map(lambda share: _decode(chosen, *share), shares))
        times[name].append(decoded / (time.perf_counter() - started) / 1e9)
        if not all(np.array_equal(back, chunk.view(np.uint8).ravel()) for back, chunk in zip(out, chunks, strict=True)):
            message = f"codec {codec} of {dtype} does not give back what it was given; report this with your versions"
            raise DamagedShardError(message)
        for back in out:
            back[:] = 0xAA


def _chunks(bags: Sequence[NDArray[Any]], codec: str) -> list[NDArray[Any]]:
    """The bags in chunks as a store cuts them, the last of each bag padded with zeros."""
    n_rows = chunk_rows(bags[0].shape[1] * bags[0].itemsize, [len(bag) for bag in bags], codec)
    chunks = []
    for bag in bags:
        for start in range(0, len(bag), n_rows):
            chunk = bag[start : start + n_rows]
            chunks.append(chunk if len(chunk) == n_rows else np.pad(chunk, ((0, n_rows - len(chunk)), (0, 0))))
    return chunks


def _encode(codec: Codec, chunks: Sequence[NDArray[Any]]) -> tuple[list[bytes], float]:
    started = time.perf_counter()
    frames = [codec.encode(chunk) for chunk in chunks]
    return frames, time.perf_counter() - started


def _decode(codec: Codec, frames: Sequence[bytes], out: Sequence[NDArray[np.uint8]]) -> None:
    for frame, back in zip(frames, out, strict=True):
        codec.decode_into(frame, back)


# -- rows and machine ----------------------------------------------------------------------------


def rows_of_folder(
    folder: Path, *, scale: int | None = None, encoder: str | None = None, max_bytes: int = BENCH_BYTES
) -> list[NDArray[np.floating]]:
    """Bags of feature files of the finest scale there is, up to `max_bytes`; the last one is cut."""
    sources = discover(folder, encoder=encoder, scale=scale).sources
    first = sources[0].encoder
    finest = max(source.scale for source in sources if source.encoder == first)
    taken: list[NDArray[np.floating]] = []
    left = max_bytes
    for source in (source for source in sources if (source.scale, source.encoder) == (finest, first)):
        with open_bag(source) as bag:
            for rows in bag.blocks(left) if left else ():
                taken.append(np.array(rows))
                left = max(0, left - rows.nbytes)
                break
    return taken


def rows_of_store(
    root: Path, *, encoder: str | None = None, max_bytes: int = BENCH_BYTES
) -> list[NDArray[np.floating]]:
    """Bags of a store's first slides at its finest scale, as numbers, up to `max_bytes`; the last one is cut.

    Raises
    ------
    SlideNotFoundError
        The store has no slide of the encoder.
    """
    query = (
        "SELECT encoder, scale, slide_id FROM bags WHERE encoder = coalesce(?, encoder) "
        "ORDER BY encoder, scale DESC, slide_id"
    )
    with connect(root) as connection:
        found = connection.execute(query, [encoder]).fetchall()
    if not found:
        message = (
            f"{root}: no slide{f' of encoder {encoder}' if encoder else ''}; ingest some, or name a folder of files"
        )
        raise SlideNotFoundError(message)
    name, finest = found[0][:2]
    ids = [slide_id for held, scale, slide_id in found if (held, scale) == (name, finest)]
    reader = SlideReader(root, name, [finest], ids)
    taken: list[NDArray[np.floating]] = []
    left = max_bytes
    for slide_id in ids:
        features = reader.read(slide_id).dequantised().bags[finest].features
        rows = features[: max(1, left // (features.shape[1] * features.itemsize))]
        taken.append(rows)  # type: ignore[arg-type]
        left -= rows.nbytes
        if left <= 0:
            break
    return taken


def describe_machine() -> dict[str, str]:
    """Processor, cores and versions: what times depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    versions = {name: metadata.version(name) for name in ("crossfusion-store", "numpy", "numcodecs", "google-crc32c")}
    return {"processor": model, "cores": str(os.cpu_count()), "python": platform.python_version(), **versions}
