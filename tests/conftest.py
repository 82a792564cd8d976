"""Tiny real files, as the tools write them, for every test that needs a folder or a store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

# read when a kernel is defined: without it there is nothing to run on machines without a GPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import cfstore

Rows = tuple[NDArray[Any], NDArray[Any]]
SCALES = (5, 10, 20)
LEVEL0 = {5: 1024, 10: 512, 20: 256}  # patch edge on a 20x slide


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def draw(rng: np.random.Generator) -> Callable[..., Rows]:
    """Features [N, D] float32 and coords [N, 2] int32 in no order at all."""

    def make(n_patches: int = 7, dim: int = 8) -> Rows:
        features = rng.normal(scale=3, size=(n_patches, dim)).astype(np.float32)
        return features, rng.integers(0, 90_000, (n_patches, 2)).astype(np.int32)

    return make


@pytest.fixture
def make_clam_h5(draw: Callable[..., Rows]) -> Callable[..., Rows]:
    """CLAM's file: resizable float32 features in chunks of 32 rows, int32 coords, no attributes."""

    def make(path: Path, n_patches: int = 7, dim: int = 8, **values: Any) -> Rows:
        features, coords = draw(n_patches, dim)
        features, coords = values.get("features", features), values.get("coords", coords)
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for name, rows in (("features", features), ("coords", coords)):
                growing = (None, *rows.shape[1:])
                file.create_dataset(name, data=rows, maxshape=growing, chunks=(32, *rows.shape[1:]))
        return features, coords

    return make


@pytest.fixture
def make_trident_h5(draw: Callable[..., Rows]) -> Callable[..., Rows]:
    """TRIDENT's file: one row per chunk, int64 coords, what it knows of the slide as attributes."""

    def make(path: Path, scale: int = 20, n_patches: int = 7, dim: int = 8, dtype: str = "float16") -> Rows:
        features, coords = draw(n_patches, dim)
        features = features.astype(dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            stored = file.create_dataset("features", data=features, chunks=(1, dim), maxshape=(None, dim))
            stored.attrs.update({"name": path.stem, "encoder": "uni_v1"})
            places = file.create_dataset("coords", data=coords.astype(np.int64), chunks=(1, 2), maxshape=(None, 2))
            places.attrs.update(
                {
                    "patch_size": 256,
                    "patch_size_level0": LEVEL0[scale],
                    "level0_magnification": 20,
                    "target_magnification": scale,
                    "overlap": 0,
                    "name": path.stem,
                    "savetodir": "None",
                }
            )
        return features, coords

    return make


@pytest.fixture
def make_cohort(make_clam_h5: Callable[..., Rows]) -> Callable[..., dict[tuple[str, int], Rows]]:
    """A CLAM folder `x5|x10|x20/h5_files`; every bag has its own, awkward number of patches."""

    def make(
        folder: Path, slides: tuple[str, ...] = ("s1", "s2", "s3"), scales: tuple[int, ...] = SCALES, dim: int = 8
    ) -> dict[tuple[str, int], Rows]:
        return {
            (slide, scale): make_clam_h5(
                folder / f"x{scale}" / "h5_files" / f"{slide}.h5", n_patches=1 + i + scale * (i % 3 + 1) // 4, dim=dim
            )
            for i, slide in enumerate(slides)
            for scale in scales
        }

    return make


@pytest.fixture
def store(tmp_path: Path) -> cfstore.Store:
    """An empty store."""
    return cfstore.open(tmp_path / "store", create=True)


@pytest.fixture
def shared() -> Path:
    """`../shared/data` beside the repository: real slides and tables."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder
