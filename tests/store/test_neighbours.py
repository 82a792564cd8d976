"""The nearest patches, by place and by features, against every distance written out."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from cfstore import Bag, Derivation, DerivationError, ShapeError, neighbours
from cfstore.neighbours import nearest_patches, similar_patches
from cfstore.types import Affine


def brute(values: NDArray[Any], k: int) -> NDArray[np.int32]:
    """All distances of each row, sorted by (distance, row) as Python sorts tuples."""
    wide = values.astype(np.int64 if values.dtype.kind in "iu" else np.float64)
    found = np.full((len(wide), k), -1, np.int32)
    for n, row in enumerate(wide):
        squares = ((wide - row) ** 2).sum(axis=1)
        order = sorted((square, other) for other, square in enumerate(squares.tolist()) if other != n)
        found[n, : len(order[:k])] = [other for _, other in order[:k]]
    return found


def test_five_patches_in_a_row_written_out_by_hand() -> None:
    coords = np.array([[0, 0], [256, 0], [512, 0], [768, 0], [1024, 0]], np.int32)
    assert nearest_patches(coords, 2).tolist() == [[1, 2], [0, 2], [1, 3], [2, 4], [3, 2]]


@pytest.mark.parametrize("k", [1, 4, 8, 23])
@pytest.mark.parametrize("shuffled", [False, True])
def test_on_a_grid_where_most_distances_are_tied_the_row_decides(k: int, shuffled: bool) -> None:
    rng = np.random.default_rng(1)
    coords = np.stack(np.meshgrid(np.arange(17), np.arange(11)), axis=-1).reshape(-1, 2).astype(np.int32) * 224
    coords = coords[rng.random(len(coords)) < 0.8]
    if shuffled:
        coords = rng.permutation(coords)
    np.testing.assert_array_equal(nearest_patches(coords, k), brute(coords, k))


def test_many_patches_as_far_as_the_last_one_are_all_looked_at() -> None:
    """Around one patch 52 others at exactly the same distance: more than are asked for at first."""
    circle = np.array([(x, y) for x in range(-1105, 1106) for y in range(-1105, 1106) if x * x + y * y == 1105**2][:52])
    circle = np.concatenate([circle, [[0, 0]]])[::-1].astype(np.int32)
    np.testing.assert_array_equal(nearest_patches(circle, 5), brute(circle, 5))
    assert nearest_patches(circle, 5)[0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_fewer_others_than_asked_for_end_in_minus_one(n: int) -> None:
    rng = np.random.default_rng(n)
    coords = rng.integers(0, 9, (n, 2)).astype(np.int32)
    np.testing.assert_array_equal(nearest_patches(coords, 6), brute(coords, 6))
    features = rng.normal(size=(n, 3)).astype(np.float32)
    np.testing.assert_array_equal(similar_patches(Bag(features, None), 6), brute(features, 6))


@pytest.mark.parametrize("places", [1, 2, 7])
def test_patches_that_come_many_times_are_each_others_nearest_first_rows_first(places: int) -> None:
    rng = np.random.default_rng(places)
    coords = (rng.integers(0, places, (120, 2)) * 512).astype(np.int32)
    np.testing.assert_array_equal(nearest_patches(coords, 8), brute(coords, 8))
    features = coords.astype(np.float16)
    np.testing.assert_array_equal(similar_patches(Bag(features, None), 8), brute(features, 8))


def test_places_far_beyond_single_precision_are_compared_exactly() -> None:
    coords = np.array([[0, 0], [2**30, 2**30], [2**30 + 1, 2**30], [2**30, 2**30 - 1], [5, 2**30]], np.int32)
    np.testing.assert_array_equal(nearest_patches(coords, 3), brute(coords, 3))
    with pytest.raises(ShapeError, match="farther apart"):
        nearest_patches(np.array([[-(2**31), 0], [2**31 - 1, 0]], np.int64), 1)
    with pytest.raises(ShapeError, match=r"\[N, 2\]"):
        nearest_patches(np.zeros((3, 3), np.int32), 1)


@pytest.mark.parametrize("pattern", ["h5/trident/*/features_*/*.h5", "h5/clam/x*/h5_files/*.h5"])
def test_of_every_real_slide_the_neighbours_are_those_of_all_distances(pattern: str, shared: Path) -> None:
    files = sorted(shared.glob(pattern))
    assert files
    for path in files:
        with h5py.File(path) as file:
            coords, features = file["coords"][()].astype(np.int32), file["features"][()]
        coords, features = coords[:1500], features[:300].astype(np.float16)
        np.testing.assert_array_equal(nearest_patches(coords, 8), brute(coords, 8), err_msg=str(path))
        np.testing.assert_array_equal(similar_patches(Bag(features, None), 8), brute(features, 8), err_msg=str(path))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    "kind", ["plain", "far from zero", "one far out", "nearly equal", "tiny", "whole numbers", "two far"]
)
def test_similar_patches_are_those_of_all_distances(kind: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 64 << 10)  # several blocks
    monkeypatch.setattr(neighbours, "_PAIRS", 500)
    rng = np.random.default_rng(5)
    features = rng.normal(size=(700, 24))
    features = {
        "plain": features,
        "far from zero": features + 300,
        "one far out": np.where(np.arange(700)[:, None] == 3, features * 1e4, features),
        "nearly equal": 1 + features * 1e-3 * (np.arange(700)[:, None] % 3),
        "tiny": features * (1e-6 if dtype == np.float16 else 1e-36),
        "two far": np.where(np.arange(700)[:, None] % 2, 1, -1) + features * 1e-4,  # float32 cannot tell who is near
        "whole numbers": rng.integers(0, 3, (700, 24)),  # distances tie everywhere
    }[kind].astype(dtype)
    np.testing.assert_array_equal(similar_patches(Bag(features, None), 8), brute(features.astype(np.float64), 8))


@pytest.mark.parametrize("dim", [3, 64, 1024])
def test_float32_distances_are_off_by_no_more_than_the_bound(dim: int) -> None:
    rng = np.random.default_rng(dim)
    x = rng.uniform(0.5, 1, (200, dim)).astype(np.float32)  # all of one sign: sums grow, and so do their errors
    wide, squares = x.astype(np.float64), (x.astype(np.float64) ** 2).sum(axis=1)
    narrow = squares.astype(np.float32) - 2 * (x @ x.T)
    off = np.abs(narrow - (squares - 2 * wide @ wide.T))
    allowed = neighbours._error_share(dim) * (squares + squares[:, None])
    assert (off <= allowed).all()
    assert off.max() > allowed.max() / 1000


def test_similar_patches_of_int8_are_those_of_the_numbers_it_stands_for() -> None:
    rng = np.random.default_rng(6)
    affine = Affine(rng.uniform(0.001, 0.1, 16).astype(np.float32), rng.normal(size=16).astype(np.float32))
    bag = Bag(rng.integers(0, 255, (400, 16), np.uint8), None, affine)
    np.testing.assert_array_equal(similar_patches(bag, 8), brute(bag.dequantised().features, 8))


PEAK = """
import resource, sys, numpy as np
from cfstore import Bag
from cfstore.neighbours import similar_patches
n, dim = 24_000, 512
rng = np.random.default_rng(0)
bag = Bag(rng.standard_normal((n, dim), np.float32).astype(np.float16), None)
warm = similar_patches(Bag(bag.features[:2000], None), 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
similar_patches(bag, 8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_beyond_the_bag_is_its_features_in_float32_and_less_than_half_a_gigabyte() -> None:
    assert resource.getpagesize()
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24_000 * 512 * 4 + 400e6


NAMES = {
    "nearest8-20x": Derivation.nearest(20),
    "nearest4-5x": Derivation.nearest(5, k=4),
    "similar8-10x": Derivation.similar(10),
    "parents-20x-5x": Derivation.parents(20, 5),
    "mean-20x": Derivation.mean(20),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_derivation_is_read_back_from_its_name(name: str) -> None:
    assert NAMES[name].name == name
    assert Derivation.parse(name) == NAMES[name]
    assert sorted([NAMES[name], Derivation.mean(5)])


@pytest.mark.parametrize(
    "name", ["", "nearest-20x", "nearest0-20x", "nearest8-40x", "parents-20x", "parents-10x-20x", "parents-20x-20x",
             "mean-20x-10x", "mean8-20x", "similar8", "nearest9999-20x", "NEAREST8-20x", "nearest8-20x-10x"]
)  # fmt: skip
def test_what_names_no_derivation_is_refused_with_the_forms_there_are(name: str) -> None:
    with pytest.raises(DerivationError, match=r"nearest8-20x, similar8-20x, parents-20x-10x, mean-20x"):
        Derivation.parse(name)
