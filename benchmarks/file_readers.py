"""Other ways to read slides from files: what people do today, and the limit. See read.py."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from harness import Ring
from numpy.typing import NDArray
from slide_data import SCALES, SlideSet
from torch.utils.data import DataLoader, Dataset

Rows = Sequence[NDArray[np.generic]]
Buffer = NDArray[np.uint8]


def shaped(buffer: Buffer, data: SlideSet, i: int, dtype: str) -> Rows:
    """The three bags of slide `i` as views of `buffer`, back to back."""
    dim, item = data.plan.dim, np.dtype(dtype).itemsize
    flat = buffer[: sum(data.sizes[i]) * dim * item].view(dtype).reshape(-1, dim)
    return np.split(flat, np.cumsum(data.sizes[i])[:-1])


class Competitor:
    """One way to read slide after slide."""

    label = ""
    needs = "numpy"
    """The package without which it cannot be tried."""
    least_passes = 1
    """How often a sample goes over its slides at the least."""

    def __init__(self, data: SlideSet, ring: Ring, threads: int, profile: str = "") -> None:
        self.data, self.ring, self.threads, self.profile = data, ring, threads, profile
        self.name = " ".join(filter(None, (self.label, profile, f"x{threads}")))

    def open(self) -> None:
        """What is done once, and not timed."""

    def prepare(self) -> None:
        """What must be set before each run because another competitor may have changed it."""

    def files(self) -> Path:
        """The file or folder that it reads."""
        raise NotImplementedError

    def read(self, i: int, buffer: Buffer) -> Rows:
        """The bags of slide `i`, in `buffer` if it can."""
        raise NotImplementedError

    def run(self, slides: Sequence[int]) -> None:
        """Read these slides."""
        self.ring.each(self.read, slides, self.threads)

    def check(self, i: int) -> None:
        """Raise ValueError unless it delivers slide `i`."""
        with self.ring.buffer() as buffer:
            buffer[:] = 0xA5
            self.compare(i, self.read(i, buffer))

    def compare(self, i: int, bags: Rows) -> None:
        """Raise ValueError unless `bags`, rounded to float16, are slide `i` bit by bit."""
        for scale, rows, truth in zip(SCALES, bags, self.data.half(i), strict=True):
            half = torch.from_numpy(rows).half().numpy()
            if half.shape != truth.shape or not np.array_equal(half.view(np.uint16), truth.view(np.uint16)):
                message = f"{self.name}: wrong rows of slide {i} at {scale}x"
                raise ValueError(message)


class Limit(Competitor):
    """The float16 bytes, by preadv."""

    label = "limit"

    def files(self) -> Path:
        return self.data.folder / "raw.bin"

    def open(self) -> None:
        self.file = os.open(self.files(), os.O_RDONLY)

    def read(self, i: int, buffer: Buffer) -> Rows:
        end, done, start = self.data.half_bytes(i), 0, self.data.offsets[i]
        while done < end:
            done += os.preadv(self.file, [memoryview(buffer)[done:end]], start + done)
        return shaped(buffer, self.data, i, "float16")


class H5(Competitor):
    """h5py on CLAM's files, straight into the buffer as float32."""

    label, needs = "h5py float32", "h5py"

    def files(self) -> Path:
        return self.data.folder / "h5"

    def read(self, i: int, buffer: Buffer) -> Rows:
        bags = shaped(buffer, self.data, i, "float32")
        for scale, rows in zip(SCALES, bags, strict=True):
            with h5py.File(self.data.h5(i, scale)) as file:
                file["features"].read_direct(rows)
        return bags


class TorchLoad(Competitor):
    """torch.load of a slide's three float32 files, in this process."""

    label, needs = "torch.load float32", "torch"

    def files(self) -> Path:
        return self.data.folder / "pt"

    def read(self, i: int, buffer: Buffer) -> Rows:
        return [torch.load(self.data.pt(i, scale), weights_only=True).numpy() for scale in SCALES]


class PtSlides(Dataset[list[torch.Tensor]]):
    """What the paper's code does for one slide."""

    def __init__(self, data: SlideSet) -> None:
        self.data = data

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return [torch.load(self.data.pt(i, scale), weights_only=True) for scale in SCALES]


def only_one(batch: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Collate a batch of one."""
    return batch[0]


class Paper(TorchLoad):
    """The same in four DataLoader processes, with the copy to pinned memory."""

    label, least_passes = "paper", 4

    def __init__(self, data: SlideSet, ring: Ring, threads: int, profile: str = "") -> None:
        super().__init__(data, ring, threads, profile)
        self.name, self.order = self.label, list[int]()

    def open(self) -> None:
        self.pins = torch.cuda.is_available()
        self.loader = DataLoader(
            PtSlides(self.data),
            sampler=self.order,
            collate_fn=only_one,
            num_workers=4,
            persistent_workers=True,
            multiprocessing_context="spawn",
            pin_memory=self.pins,
        )

    def run(self, slides: Sequence[int]) -> None:
        self.order[:] = slides
        with self.ring.buffer() as buffer:
            for i, bags in zip(slides, self.loader, strict=True):
                if not self.pins:
                    for rows, bag in zip(shaped(buffer, self.data, i, "float32"), bags, strict=True):
                        torch.from_numpy(rows).copy_(bag)

    def check(self, i: int) -> None:
        self.order[:] = [i]
        self.compare(i, [bag.numpy() for bag in next(iter(self.loader))])


class Safetensors(Competitor):
    """A mapped float16 file per slide, copied into the buffer."""

    label, needs = "safetensors float16", "safetensors"

    def files(self) -> Path:
        return self.data.folder / "safetensors"

    def open(self) -> None:
        from safetensors import safe_open

        self.safe_open = safe_open

    def read(self, i: int, buffer: Buffer) -> Rows:
        bags = shaped(buffer, self.data, i, "float16")
        with self.safe_open(self.data.safetensors(i), "pt") as file:
            for scale, rows in zip(SCALES, bags, strict=True):
                torch.from_numpy(rows).copy_(file.get_tensor(f"x{scale}"))
        return bags


class WebDataset(Competitor):
    """Tars of float16 arrays, one slide each, in sequence; x4: four sequences in four threads."""

    label, needs = "webdataset float16", "webdataset"

    def files(self) -> Path:
        return self.data.folder / "tar"

    def sequence(self, slides: Sequence[int]) -> Iterator[Rows]:
        from webdataset import WebDataset as Tars

        tars = [str(self.data.tar(i)) for i in slides]
        for sample in Tars(tars, shardshuffle=False, empty_check=False).decode():
            yield [sample[f"x{scale}.npy"] for scale in SCALES]

    def read(self, i: int, buffer: Buffer) -> Rows:
        return next(self.sequence([i]))

    def run(self, slides: Sequence[int]) -> None:
        def part(start: int, buffer: Buffer) -> int:
            return sum(1 for _ in self.sequence(slides[start :: self.threads]))

        self.ring.each(part, range(self.threads), self.threads)
