"""How fast whole slides come out of a warm cache: our reader, what people use now, other libraries, and the limit.

    python benchmarks/read.py --root DIR --out read.json            # everything: about 36 GB, 15 minutes
    python benchmarks/read.py --root DIR --slides 6 --dim 64        # a small run
    python benchmarks/read.py --root DIR --only 'limit*,paper,h5py*'  # without our store

Data are synthetic (slide_data.py) and kept below --root. In every round all competitors read the same randomly
chosen slides, in a random order of competitors: once to warm the page cache, once to see how long it takes, then
as often as fills --seconds, timed. Ratios are taken within a round; medians and quartiles are over rounds. The rate
is in average slides: rows read per second / 17,840. A name ends in how it reads:

- x4: four threads, each reading whole slides into a ring of four buffers. x1: one thread. zarr-python, zarrs and
  tensorstore may use four threads of their own in both, and the goals compare with the better of the two.
- `limit`: `preadv` of the same float16 bytes into the same buffers; `vs_limit` is over the one with as many threads.
- `paper`: a DataLoader of four processes, an item being `torch.load` of a slide's three float32 files; then a copy
  of each tensor to memory that stands for pinned memory (with CUDA: real pinning).

Traps, and what is done about them:

- page cache: one round's slides, in all formats, must fit in memory; `device_gb` of a sample should be 0.
- alignment and first touch: buffers are page-aligned and touched before (harness.page_buffer). Libraries that can
  write to given memory do so; those that cannot (torch.load, WebDataset) are spared the copy, but for `paper`.
- fork after threads: tensorstore aborts and zarrs hangs in forked children, so workers are spawned, and persist.
- threads inside: torch copies large tensors with all cores; here it has one thread, as in a pinning thread.
- a pipeline has to fill: `paper` reads each round's slides at least four times over in one epoch.
- a wrong answer is fast: before it is timed, every competitor's rows are compared, bit by bit (int8: to half a step).
- one shared machine: each sample says how many cores others used.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import file_readers
import numpy as np
import torch
from file_readers import Buffer, Competitor, Rows, shaped
from harness import (
    Ring,
    Sample,
    commit,
    folder_bytes,
    machine,
    measure,
    peak_bytes,
    print_table,
    quartiles,
    reset_peak,
    significant,
    version_of,
    versions,
)
from numpy.typing import NDArray
from slide_data import AVERAGE_ROWS, SCALES, DataPlan, SlideSet, slide_set

PLAIN, DEFAULT, SMALL = "float16/none", "float16/blosc-zstd", "int8/none"
CODECS = ("blosc-zstd-bitshuffle", "blosc-lz4", "blosc-lz4-bitshuffle", "zstd")
PROFILES = (PLAIN, DEFAULT, SMALL, *(f"float16/{codec}" for codec in CODECS))
COMPARED = (PLAIN, DEFAULT, SMALL)
"""The profiles that have goals, and that other Zarr readers are tried on."""
MEMORY_MB = 4
"""What counts as no extra memory: Python itself grows by this much; the slide is 371 MB."""
PACKAGES = ("numpy", "torch", "h5py", "numcodecs", "safetensors", "zarr", "zarrs", "tensorstore", "webdataset")


# -- our store, and others on the same bytes ---------------------------------------------------------


class BenchStore:
    """One profile of our store, ingested from the h5 files once."""

    def __init__(self, data: SlideSet, profile: str) -> None:
        import cfstore

        self.data, self.dtype = data, "uint8" if profile.startswith("int8") else "float16"
        self.path = data.folder / "stores" / profile.replace("/", "-")
        dtype, codec = profile.split("/")
        done = self.path.with_suffix(".done")
        if not done.is_file():
            shutil.rmtree(self.path, ignore_errors=True)
            options = cfstore.IngestOptions(encoder="bench", dtype=dtype, codec=codec)
            sample = measure(lambda: cfstore.open(self.path, create=True).ingest(data.folder / "h5", options))
            print(f"{profile}: ingested in {sample.wall:.0f} s", file=sys.stderr)
            done.write_text(f"{sample.wall:.1f}\n")
        self.store = cfstore.open(self.path)
        self.reader = self.store.reader("bench", SCALES, data.ids)

    def ranges(self) -> list[list[tuple[Path, int, int]]]:
        """Per slide the features array and row ranges of its bags, coarse to fine."""
        query = "SELECT slide_id, scale, shard, row_start, n_patches FROM bags ORDER BY slide_id, scale"
        found: dict[str, list[tuple[Path, int, int]]] = {slide_id: [] for slide_id in self.data.ids}
        for row in self.store.sql(query).to_pylist():
            start = row["row_start"]
            found[row["slide_id"]].append((self.path / row["shard"] / "features", start, start + row["n_patches"]))
        return list(found.values())


@cache
def bench_store(data_folder: Path, plan: DataPlan, profile: str) -> BenchStore:
    """The store of a profile; competitors share it."""
    return BenchStore(SlideSet(data_folder, plan), profile)


class OnStore(Competitor):
    """Reads one of our stores."""

    def open(self) -> None:
        self.bench = bench_store(self.data.folder, self.data.plan, self.profile)

    def files(self) -> Path:
        return self.bench.path / "features"

    def compare(self, i: int, bags: Rows) -> None:
        if self.bench.dtype == "float16":
            return super().compare(i, bags)
        with self.ring.buffer() as buffer:
            found = self.bench.reader.read_into(self.data.ids[i], buffer).bags
        for scale, rows, truth in zip(SCALES, bags, self.data.half(i), strict=True):
            affine = found[scale].affine
            error = np.abs(rows.astype(np.float32) * affine.scale + affine.zero - truth)
            if rows.shape != truth.shape or np.any(error > 0.51 * affine.scale + 1e-3 * np.abs(truth)):
                message = f"{self.name}: wrong rows of slide {i} at {scale}x"
                raise ValueError(message)
        return None


class Ours(OnStore):
    """read_into of our reader."""

    label = "cfstore"

    def read(self, i: int, buffer: Buffer) -> Rows:
        reader, slide_id = self.bench.reader, self.data.ids[i]
        slide = reader.read_into(slide_id, buffer[: reader.buffer_bytes(slide_id)])
        return [slide.bags[scale].features for scale in SCALES]


class Library(OnStore):
    """Another reader of Zarr arrays; rows of a slide that lie back to back are one request."""

    def open(self) -> None:
        super().open()
        self.prepare()
        self.places = self.bench.ranges()
        self.arrays = {path: self.open_array(path) for bags in self.places for path, _, _ in bags}

    def open_array(self, path: Path) -> Any:
        raise NotImplementedError

    def fetch(self, array: Any, start: int, stop: int, rows: NDArray[Any]) -> None:
        """Rows of the array into `rows`."""
        raise NotImplementedError

    def read(self, i: int, buffer: Buffer) -> Rows:
        bags, done, places = shaped(buffer, self.data, i, self.bench.dtype), 0, self.places[i]
        flat = buffer[: sum(map(np.size, bags)) * bags[0].itemsize].view(bags[0].dtype).reshape(-1, self.data.plan.dim)
        while places:
            (path, start, stop), *places = places
            while places and places[0][:2] == (path, stop):
                (_, _, stop), *places = places
            self.fetch(self.arrays[path], start, stop, flat[done : done + stop - start])
            done += stop - start
        return bags


class ZarrPython(Library):
    """zarr-python, and with another pipeline zarrs."""

    label, needs = "zarr-python", "zarr"
    pipeline = "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def prepare(self) -> None:
        import zarr

        zarr.config.set({"codec_pipeline.path": self.pipeline, "threading.max_workers": 4})

    def open_array(self, path: Path) -> Any:
        import zarr

        return zarr.open_array(path, mode="r")

    def fetch(self, array: Any, start: int, stop: int, rows: NDArray[Any]) -> None:
        from zarr.buffer.cpu import NDBuffer

        array.get_basic_selection((slice(start, stop), slice(None)), out=NDBuffer(rows))


class Zarrs(ZarrPython):
    label, needs = "zarrs", "zarrs"
    pipeline = "zarrs.ZarrsCodecPipeline"


class Tensorstore(Library):
    label, needs = "tensorstore", "tensorstore"

    def open_array(self, path: Path) -> Any:
        import tensorstore

        limits = {"data_copy_concurrency": {"limit": 4}, "file_io_concurrency": {"limit": 4}}
        self.context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}, **limits})
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        return tensorstore.open(spec, context=self.context, read=True, open=True).result()

    def fetch(self, array: Any, start: int, stop: int, rows: NDArray[Any]) -> None:
        import tensorstore

        target = tensorstore.array(rows, context=self.context, copy=False, write=True)
        target.write(array[start:stop].translate_to[0, 0]).result()


# -- rounds ------------------------------------------------------------------------------------------


def competitors(data: SlideSet, ring: Ring, profiles: Sequence[str]) -> Iterator[Competitor]:
    """Everyone, in no order that matters."""
    for kind in (
        file_readers.Limit,
        file_readers.H5,
        file_readers.TorchLoad,
        file_readers.Safetensors,
        file_readers.WebDataset,
    ):
        yield from (kind(data, ring, threads) for threads in (1, 4))
    yield file_readers.Paper(data, ring, 4)
    for profile in profiles:
        kinds = (Ours, ZarrPython, Zarrs, Tensorstore) if profile in COMPARED else (Ours,)
        yield from (kind(data, ring, threads, profile) for kind in kinds for threads in (1, 4))


def enter(everyone: Sequence[Competitor], slides: Sequence[int]) -> tuple[list[Competitor], dict[str, str]]:
    """Those that open and deliver these slides correctly; what became of the others."""
    ready, states = [], {}
    for one in everyone:
        if version_of(one.needs) == "not installed":
            states[one.name] = f"{one.needs}: not installed"
            continue
        try:
            one.open()
            for i in slides:
                one.prepare()
                one.check(i)
        except Exception as error:  # a competitor that cannot run is reported, and the others go on
            told = f"{type(error).__name__}: {error}".replace(str(one.data.folder), "<data>")
            states[one.name] = f"failed: {told}"[:300]
            continue
        ready.append(one)
        states[one.name] = "ok"
    for name, state in states.items():
        if state != "ok":
            print(f"{name}: {state}", file=sys.stderr)
    return ready, states


def timed(one: Competitor, slides: Sequence[int], seconds: float) -> dict[str, Any]:
    """One sample: warm, estimate, then as many passes over `slides` as fill `seconds`."""
    one.prepare()
    one.run(slides)
    once = measure(lambda: one.run(slides)).wall
    passes = min(40, max(one.least_passes, math.ceil(seconds / once)))
    sample: Sample = measure(lambda: one.run(list(slides) * passes))
    average_slides = passes * sum(sum(one.data.sizes[i]) for i in slides) / AVERAGE_ROWS
    return {
        "slides_per_s": average_slides / sample.wall,
        "cpu_ms_per_slide": 1e3 * sample.cpu / average_slides,
        "wall_s": significant(sample.wall),
        "cpu_s": significant(sample.cpu),
        "other_cores": significant(sample.other_cores, 2),
        "device_gb": significant(sample.device_bytes / 1e9, 3),
    }


def rounds(ready: Sequence[Competitor], told: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Samples by competitor, one per round."""
    rng = random.Random(told.seed)  # noqa: S311 - an order, not a secret
    samples: dict[str, list[dict[str, Any]]] = {one.name: [] for one in ready}
    for number in range(told.rounds):
        slides = rng.sample(range(told.slides), min(told.subset, told.slides))
        for one in rng.sample(list(ready), len(ready)):
            print(f"\rround {number + 1} of {told.rounds}: {one.name:<50}", end="", file=sys.stderr, flush=True)
            samples[one.name].append(timed(one, slides, told.seconds))
    print(file=sys.stderr)
    return samples


# -- memory ------------------------------------------------------------------------------------------


def memory_of(one: Competitor) -> dict[str, float]:
    """In a fresh process: what reading the big slide needs beyond a ring that holds it, and how long it takes."""
    one.open()
    one.prepare()
    small = min(range(one.data.big), key=lambda i: sum(one.data.sizes[i]))
    with one.ring.buffer() as buffer:
        one.read(small, buffer)
        one.read(small, buffer)
        reset_peak()
        before = peak_bytes()
        one.read(one.data.big, buffer)
        extra = peak_bytes() - before
        wall = measure(lambda: one.read(one.data.big, buffer)).wall
    return {"big_slide_extra_mb": round(extra / 1e6, 1), "big_slide_s": significant(wall)}


def fresh_memory_of(name: str) -> dict[str, Any]:
    """`memory_of` in a process of its own."""
    call = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"big_slide_error": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- results -----------------------------------------------------------------------------------------


def ratios(samples: dict[str, list[dict[str, Any]]], name: str, others: Sequence[str]) -> list[float]:
    """Per round: the rate of `name` over the best rate among `others`; nothing where one side was not timed."""
    there = [samples[other] for other in others if samples.get(other)]
    if not there or not samples.get(name):
        return []
    best = [max(sample["slides_per_s"] for sample in of_round) for of_round in zip(*there, strict=True)]
    return [sample["slides_per_s"] / rate for sample, rate in zip(samples[name], best, strict=True)]


def result(one: Competitor, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The numbers of one competitor."""
    own, plan = samples[one.name], one.data.plan
    rates = [sample["slides_per_s"] for sample in own]
    return {
        "slides_per_s": quartiles(rates),
        "gb_per_s_fp16": quartiles([rate * AVERAGE_ROWS * plan.dim * 2 / 1e9 for rate in rates]),
        "cpu_ms_per_slide": quartiles([sample["cpu_ms_per_slide"] for sample in own]),
        "bytes_vs_float32": significant(folder_bytes(one.files()) / (one.data.rows * plan.dim * 4)),
        "vs_limit": quartiles(ratios(samples, one.name, [f"limit x{one.threads}"])),
        "vs_paper": quartiles(ratios(samples, one.name, ["paper"])),
        "samples": [
            {key: significant(value) if isinstance(value, float) else value for key, value in sample.items()}
            for sample in own
        ],
    }


def goals(found: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The goals with what was measured; `met` is null where something it needs was not."""
    table: list[dict[str, Any]] = []

    def add(goal: str, target: float, measured: float | None, met: Callable[[float], bool]) -> None:
        value = None if measured is None else significant(measured)
        table.append({"goal": goal, "target": target, "measured": value, "met": None if value is None else met(value)})

    def faster(profile: str, others: Sequence[str], words: str, target: float) -> None:
        found_ratios = ratios(samples, f"cfstore {profile} x4", others)
        measured = float(np.median(found_ratios)) if found_ratios else None
        add(f"{profile} x4: speed over {words}", target, measured, lambda value: value >= target)

    def smaller(profile: str, target: float) -> None:
        measured = found.get(f"cfstore {profile} x4", {}).get("bytes_vs_float32")
        add(f"{profile}: bytes over float32", target, measured, lambda value: round(value, 2) <= target)

    faster(PLAIN, ["limit x4"], "the limit", 0.8)
    faster(PLAIN, ["paper"], "the paper's code", 15)
    faster(DEFAULT, ["limit x4"], "the limit", 0.25)
    faster(DEFAULT, ["paper"], "the paper's code", 5)
    smaller(DEFAULT, 0.45)
    faster(SMALL, [f"cfstore {PLAIN} x4"], PLAIN, 1.6)
    smaller(SMALL, 0.25)
    for profile in COMPARED:
        others = [f"{kind.label} {profile} x{n}" for kind in (ZarrPython, Zarrs, Tensorstore) for n in (1, 4)]
        if profile != SMALL:
            others += [f"webdataset float16 x{n}" for n in (1, 4)]
        faster(profile, others, "the best of zarr-python, zarrs, tensorstore and WebDataset", 2)
    for profile in COMPARED:
        extra = found.get(f"cfstore {profile} x1", {}).get("big_slide_extra_mb")
        add(f"{profile}: MB beyond the ring for the 138k slide", MEMORY_MB, extra, lambda value: value <= MEMORY_MB)
    return table


def summary(found: dict[str, Any]) -> None:
    """The medians as a table on stderr, fastest first."""

    def cells(name: str, entry: dict[str, Any]) -> dict[str, Any]:
        medians = {key: value["median"] for key, value in entry.items() if isinstance(value, dict)}
        return {"reader": name, **entry, **medians}

    columns = ("reader", "slides_per_s", "gb_per_s_fp16", "cpu_ms_per_slide", "bytes_vs_float32", "vs_limit",
               "vs_paper", "big_slide_extra_mb", "big_slide_s")  # fmt: skip
    rows = [cells(name, entry) for name, entry in found.items() if entry.get("slides_per_s")]
    print_table(sorted(rows, key=lambda row: -row["slides_per_s"]), columns)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data and stores are made and kept below it")
    parser.add_argument("--out", type=Path, help="the JSON; stdout without it")
    parser.add_argument("--kind", choices=("vit", "resnet"), default="vit")
    parser.add_argument("--slides", type=int, default=60, help="slides of average size; one of 138k comes on top")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--subset", type=int, default=12, help="slides of a round")
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of a sample")
    parser.add_argument("--profiles", nargs="*", default=PROFILES, help="dtype/codec of our stores")
    parser.add_argument("--only", default="*", help="names of competitors, comma-separated, with * and ?")
    parser.add_argument("--fresh", action="store_true", help="ingest again instead of using the stores that are there")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    told = arguments()
    torch.set_num_threads(1)
    data = slide_set(told.root.resolve(), DataPlan(told.kind, told.slides, told.dim, told.seed))
    if told.fresh and not told.memory_of:
        shutil.rmtree(data.folder / "stores", ignore_errors=True)
    fits = range(len(data.sizes)) if told.memory_of else range(data.big)
    ring = Ring(max(data.half_bytes(i) for i in fits) * 2 + (1 << 20), 1 if told.memory_of else 4)
    patterns = told.only.split(",")
    everyone = [
        one
        for one in competitors(data, ring, told.profiles)
        if any(fnmatch.fnmatch(one.name, pattern) for pattern in patterns)
    ]
    if told.memory_of:
        print(json.dumps(memory_of(next(one for one in everyone if one.name == told.memory_of))))
        return
    ready, states = enter(everyone, (0, data.big - 1))
    samples = rounds(ready, told)
    found: dict[str, Any] = {name: {"state": state} for name, state in states.items()}
    for one in ready:
        found[one.name] |= result(one, samples)
        if one.threads == 1 and not told.no_memory:
            found[one.name] |= fresh_memory_of(one.name)
    report = {
        "benchmark": "whole slides from a warm page cache",
        "notes": __doc__,
        "machine": machine(),
        "versions": versions(PACKAGES),
        **commit(),
        "parameters": {name: value for name, value in vars(told).items() if name not in ("root", "out", "memory_of")},
        "competitors": found,
        "goals": goals(found, samples),
    }
    summary(found)
    print_table(report["goals"], ("goal", "target", "measured", "met"))
    text = json.dumps(report, indent=1) + "\n"
    if told.out:
        told.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
