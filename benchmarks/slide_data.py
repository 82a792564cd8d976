"""Synthetic slides with the statistics of real patch features: written once per folder in every format.

Features follow smooth latent fields over a tissue mask, in CLAM's raster order, so that neighbouring patches
correlate as they do in real slides and the last mantissa bits are noise: what compresses here compresses there.

- `vit`: low rank plus noise, log-normal channel scales, four channels of massive activations.
- `resnet`: mean of ReLU(Gaussian) over 196 correlated positions, in closed form; exact zeros where none fires.

A data set is a function of (kind, slides, dim, seed). Each slide is made and written by one process:

    <root>/<kind>-d<dim>-n<slides>-s<seed>/
      data.json                         sizes; written last, so a folder without it is made again
      h5/x20/h5_files/<id>.h5           float32, CLAM's layout: chunks of 32 rows, int32 coords
      pt/x20/pt_files/<id>.pt           float32, CrossFusion's layout: one bare tensor per scale
      raw.bin                           float16 rows back to back, slides at multiples of 4,096 bytes
      safetensors/<id>.safetensors      float16, three tensors
      tar/<id>.tar                      float16, WebDataset's layout: <id>.x20.npy
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

Rows = Sequence[NDArray[Any]]
Buffer = NDArray[np.uint8]

SCALES = (5, 10, 20)
MEAN_PATCHES = (895, 3_449, 13_496)
BIG_PATCHES = (8_624, 34_498, 137_990)
AVERAGE_ROWS = sum(MEAN_PATCHES)
PAGE = 4096
LATENTS = 64
BLOCK = 16_384  # rows made at a time


@dataclass(frozen=True)
class DataPlan:
    """What to make: `slides` slides of average size and, last, one of 138k patches at 20x."""

    kind: str = "vit"
    slides: int = 60
    dim: int = 1024
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}-d{self.dim}-n{self.slides}-s{self.seed}"

    def sizes(self) -> list[tuple[int, ...]]:
        """Patches per slide and scale: log-normal, scaled so that their mean is the stated one."""
        rng = np.random.default_rng((self.seed, 0x51DE))
        factor = np.exp(rng.normal(0, 0.5, self.slides))
        factor /= factor.mean()
        counts = np.outer(factor, MEAN_PATCHES) * rng.uniform(0.9, 1.1, (self.slides, 3))
        return [tuple(int(max(8, n)) for n in row) for row in counts] + [BIG_PATCHES]


@dataclass(frozen=True)
class SlideSet:
    """A data set on disk. The last slide is the big one."""

    folder: Path
    plan: DataPlan

    @cached_property
    def sizes(self) -> list[tuple[int, ...]]:
        return self.plan.sizes()

    @cached_property
    def ids(self) -> list[str]:
        return [f"BENCH-{i:04d}" for i in range(len(self.sizes))]

    @cached_property
    def offsets(self) -> list[int]:
        """Where each slide begins in raw.bin."""
        starts = [0]
        for i in range(len(self.sizes)):
            starts.append(starts[-1] + -(-self.half_bytes(i) // PAGE) * PAGE)
        return starts

    @property
    def big(self) -> int:
        return len(self.sizes) - 1

    @property
    def rows(self) -> int:
        """All rows of all slides."""
        return sum(map(sum, self.sizes))

    def half_bytes(self, i: int) -> int:
        """Bytes of slide `i` as float16."""
        return sum(self.sizes[i]) * self.plan.dim * 2

    def half(self, i: int) -> list[NDArray[np.float16]]:
        """The float16 rows of slide `i`, per scale: what every competitor must deliver."""
        shape = (sum(self.sizes[i]), self.plan.dim)
        rows = np.memmap(self.folder / "raw.bin", np.float16, "r", offset=self.offsets[i], shape=shape)
        return np.split(rows, np.cumsum(self.sizes[i])[:-1])

    def h5(self, i: int, scale: int) -> Path:
        return self.folder / "h5" / f"x{scale}" / "h5_files" / f"{self.ids[i]}.h5"

    def pt(self, i: int, scale: int) -> Path:
        return self.folder / "pt" / f"x{scale}" / "pt_files" / f"{self.ids[i]}.pt"

    def safetensors(self, i: int) -> Path:
        return self.folder / "safetensors" / f"{self.ids[i]}.safetensors"

    def tar(self, i: int) -> Path:
        return self.folder / "tar" / f"{self.ids[i]}.tar"


# -- the features ------------------------------------------------------------------------------------


def smooth_fields(count: int, side: int, width: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """`count` unit-variance random fields [side, side], white noise under a Gaussian filter of `width` cells."""
    white = np.fft.rfft2(rng.standard_normal((count, side, side), dtype=np.float32))
    down, across = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    gain = np.exp(-2 * (math.pi * width) ** 2 * (down**2 + across**2))
    fields = np.fft.irfft2(white * gain, s=(side, side)).astype(np.float32)
    return fields / (fields.std(axis=(1, 2), keepdims=True) + 1e-9)


def tissue(patches: int, rng: np.random.Generator) -> tuple[int, NDArray[np.intp]]:
    """Side of the slide's grid, and `patches` of its cells in raster order: the top of a smooth field."""
    side = math.ceil(math.sqrt(patches * 2.2))
    field = smooth_fields(1, side, side / 6, rng).ravel()
    return side, np.sort(np.argpartition(field, field.size - patches)[field.size - patches :])


class Encoder:
    """Latent fields to features; its channels depend on (kind, dim, seed) only, not on the slide."""

    def __init__(self, plan: DataPlan) -> None:
        random = torch.Generator().manual_seed(plan.seed)
        self.kind, dim = plan.kind, plan.dim
        spectrum = torch.linspace(0, -2.5, LATENTS).exp()[:, None]
        mixing = torch.randn(LATENTS, dim, generator=random) * spectrum
        self.mixing = mixing / mixing.norm(dim=0, keepdim=True)
        first, second = torch.randn(2, dim, generator=random)
        if self.kind == "vit":
            self.scale = 0.6 * (0.6 * first).exp()
            self.scale[torch.randperm(dim, generator=random)[:4]] *= 15
            self.shift = 0.4 * second * self.scale
        else:
            self.scale = 0.12 * (0.5 * first).exp()
            self.shift = 0.9 * second - 1.2

    def __call__(self, latent: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        signal = latent @ self.mixing
        noise = torch.randn(signal.shape, generator=random)
        if self.kind == "vit":
            return (0.8 * signal + 0.6 * noise) * self.scale + self.shift
        mean = 0.7 * signal + self.shift
        density = torch.exp(-mean * mean / 2) / math.sqrt(2 * math.pi)
        fires = 0.5 * torch.erfc(-mean / math.sqrt(2))
        first = mean * fires + density  # E relu
        variance = ((mean * mean + 1) * fires + mean * density - first * first).clamp_min(0)
        pooled = first + (variance / 40).sqrt() * noise  # 196 positions are worth about 40 independent ones
        uniform = torch.rand(signal.shape, generator=random)
        pooled = torch.where(pooled < 0, 0.3 * first.abs() * uniform, pooled)
        return pooled.masked_fill(uniform < (1 - fires) ** 80, 0.0) * self.scale


def bag(
    encoder: Encoder, patches: int, dim: int, seed: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Features and grid cells of one slide at one scale."""
    rng = np.random.default_rng(seed)
    random = torch.Generator().manual_seed(int(rng.integers(2**62)))
    side, cells = tissue(patches, rng)
    fields = smooth_fields(LATENTS, side, 2.0, rng).reshape(LATENTS, -1)
    features = np.empty((patches, dim), np.float32)
    for start in range(0, patches, BLOCK):
        block = cells[start : start + BLOCK]
        latent = torch.from_numpy(np.ascontiguousarray(fields[:, block].T)) * math.sqrt(0.6)
        latent += math.sqrt(0.4) * torch.randn(latent.shape, generator=random)
        features[start : start + len(block)] = encoder(latent, random).numpy()
    return features, np.stack(np.divmod(cells, side), axis=1).astype(np.int32)


# -- the files ---------------------------------------------------------------------------------------


def _write_h5(path: Path, features: NDArray[np.float32], coords: NDArray[np.int32]) -> None:
    with h5py.File(path, "w") as file:
        for name, rows in (("features", features), ("coords", coords)):
            width = rows.shape[1]
            file.create_dataset(name, data=rows, chunks=(min(32, len(rows)), width), maxshape=(None, width))


def _write_tar(path: Path, slide_id: str, halves: dict[int, NDArray[np.float16]]) -> None:
    with tarfile.open(path, "w") as tar:
        for scale, rows in halves.items():
            content = io.BytesIO()
            np.save(content, rows)
            member = tarfile.TarInfo(f"{slide_id}.x{scale}.npy")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)


def _write_slide(data: SlideSet, i: int) -> int:
    """Make slide `i` and write it in every format."""
    torch.set_num_threads(1)
    encoder, halves = Encoder(data.plan), {}
    for scale, patches in zip(SCALES, data.sizes[i], strict=True):
        features, cells = bag(encoder, patches, data.plan.dim, (data.plan.seed, i, scale))
        _write_h5(data.h5(i, scale), features, cells * (5120 // scale))  # 256 pixels at `scale`, level 0 at 20x
        torch.save(torch.from_numpy(features), data.pt(i, scale))
        halves[scale] = torch.from_numpy(features).half().numpy()
    with (data.folder / "raw.bin").open("r+b") as raw:
        raw.seek(data.offsets[i])
        for rows in halves.values():
            raw.write(memoryview(rows).cast("B"))
    _write_tar(data.tar(i), data.ids[i], halves)
    try:
        from safetensors.numpy import save_file
    except ImportError:
        return i
    save_file({f"x{scale}": rows for scale, rows in halves.items()}, data.safetensors(i))
    return i


def _folders(data: SlideSet) -> Iterator[Path]:
    for scale in SCALES:
        yield data.h5(0, scale).parent
        yield data.pt(0, scale).parent
    yield data.safetensors(0).parent
    yield data.tar(0).parent


def slide_set(root: Path, plan: DataPlan) -> SlideSet:
    """The data set of `plan` below `root`: the one that is there, or made now (a minute at full size)."""
    data = SlideSet(root / plan.name, plan)
    record = data.folder / "data.json"
    if record.is_file():
        return data
    for folder in _folders(data):
        folder.mkdir(parents=True, exist_ok=True)
    with (data.folder / "raw.bin").open("wb") as raw:
        raw.truncate(data.offsets[-1])
    order = sorted(range(len(data.sizes)), key=lambda i: -sum(data.sizes[i]))
    workers = min(4, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(as_completed([pool.submit(_write_slide, data, i) for i in order]), 1):
            print(f"\r{plan.name}: {done} of {len(order)} slides made", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    record.write_text(json.dumps({**asdict(plan), "sizes": data.sizes}) + "\n")
    return data
