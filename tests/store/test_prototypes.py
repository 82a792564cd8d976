"""Prototypes are fitted to the slides that are named, and nothing else can change or get them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.cluster.vq import kmeans2

from cfstore import DerivationError, IngestOptions, SlideNotFoundError, Store, StoreFormatError, clusters, prototypes
from cfstore.clusters import k_means
from cfstore.errors import StoreWriteError

Make = Callable[..., Any]
TRAIN = ("s1", "s2", "s3")
UNI = IngestOptions(encoder="uni")


@pytest.fixture
def filled(tmp_path: Path, store: Store, make_clam_h5: Make) -> Store:
    for number, slide in enumerate(("s1", "s2", "s3", "s4", "s5")):
        make_clam_h5(tmp_path / "uni" / "x20" / "h5_files" / f"{slide}.h5", n_patches=20 + 7 * number)
    store.ingest(tmp_path / "uni")
    return store


def blobs(rng: np.random.Generator, sizes: tuple[int, ...] = (50, 30, 20, 10), far: float = 100) -> Any:
    centres = rng.normal(size=(len(sizes), 6)) * far
    rows = np.concatenate([centre + rng.normal(size=(size, 6)) for centre, size in zip(centres, sizes, strict=True)])
    return centres, rng.permutation(rows).astype(np.float32)


def test_well_parted_clusters_are_found_whole_largest_first(rng: np.random.Generator) -> None:
    _, rows = blobs(rng)
    found = k_means(rows, 4, rng)
    assert found.sizes.tolist() == [50, 30, 20, 10]
    label = ((rows[:, None] - found.centroids) ** 2).sum(axis=2).argmin(axis=1)
    for number in range(4):
        own = rows[label == number].astype(np.float64)
        np.testing.assert_allclose(found.centroids[number], own.mean(axis=0), rtol=1e-5, atol=1e-4)
    squares = ((rows.astype(np.float64) - found.centroids[label].astype(np.float64)) ** 2).sum(axis=1)
    assert found.inertia == pytest.approx(squares.mean(), rel=1e-4)


def test_no_worse_than_scipy_on_features_without_clusters(rng: np.random.Generator) -> None:
    rows = rng.normal(size=(3000, 12)).astype(np.float32) + 50
    found = k_means(rows, 16, np.random.default_rng(0))
    tried = []
    for seed in range(5):
        centroids, label = kmeans2(rows.astype(np.float64), 16, iter=50, minit="++", rng=np.random.default_rng(seed))
        tried.append(((rows - centroids[label]) ** 2).sum(axis=1).mean())
    assert found.inertia < np.median(tried) * 1.005
    again = k_means(rows, 16, np.random.default_rng(0))
    np.testing.assert_array_equal(found.centroids, again.centroids)
    assert list(found.sizes) == sorted(found.sizes, reverse=True)


def test_fewer_different_rows_than_centroids_give_some_twice_and_nothing_undefined(rng: np.random.Generator) -> None:
    rows = np.repeat(np.array([[0.0, 0], [5, 5]], np.float32), 6, axis=0)
    found = k_means(rows, 4, rng)
    assert np.isfinite(found.centroids).all()
    assert found.sizes.sum() == 12
    assert found.inertia == pytest.approx(0, abs=1e-9)
    assert {tuple(row) for row in found.centroids.tolist()} == {(0.0, 0.0), (5.0, 5.0)}
    with pytest.raises(ValueError, match="13 centroids of 12 rows"):
        k_means(rows, 13, rng)


def test_a_cluster_that_loses_its_rows_begins_anew_at_the_farthest_row() -> None:
    rows = np.array([[0.0], [1], [10], [11], [50]], np.float32)
    centroids = np.array([[5.0], [1000.0]])
    label, squares = clusters._assign(rows, (rows.astype(np.float64) ** 2).sum(axis=1), centroids)
    assert label.tolist() == [0] * 5
    assert clusters._means(rows, label, squares, centroids).ravel().tolist() == pytest.approx([14.4, 50.0])


def test_prototypes_of_a_fold_are_the_centroids_of_its_patches_and_found_again(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = filled.prototypes("uni", 20, TRAIN, 3, seed=5)
    assert (found.shape, found.dtype) == ((3, 8), np.float32)
    rows = np.concatenate([filled.slide(slide).bags[20].features for slide in TRAIN]).astype(np.float64)
    label = ((rows[:, None] - found) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_allclose(found, [rows[label == number].mean(axis=0) for number in range(3)], rtol=1e-4, atol=1e-4)
    [row] = filled.sql("SELECT * FROM prototypes").to_pylist()
    assert (row["n"], row["scale"], row["seed"], row["n_slides"], row["n_sampled"]) == (3, 20, 5, 3, 20 + 27 + 34)
    table = pq.read_table(filled.path / row["file"])
    np.testing.assert_array_equal(np.array(table["centroid"].to_pylist(), np.float32), found)
    monkeypatch.setattr(prototypes, "k_means", None)  # nothing is fitted again, in whatever order slides are named
    np.testing.assert_array_equal(filled.prototypes("uni", 20, ["s3", "s1", "s2", "s1"], 3, seed=5), found)


def test_a_slide_outside_the_training_fold_changes_nothing_and_one_inside_gives_another_set(
    filled: Store, tmp_path: Path, make_clam_h5: Make
) -> None:
    before = filled.prototypes("uni", 20, TRAIN, 3)
    keys = [row["key"] for row in filled.sql("SELECT key FROM prototypes").to_pylist()]
    filled.remove(["s4", "s5"])
    filled.compact()
    make_clam_h5(tmp_path / "new" / "x20" / "h5_files" / "s4.h5", n_patches=50)
    filled.ingest(tmp_path / "new", UNI)
    assert [row["key"] for row in filled.sql("SELECT key FROM prototypes").to_pylist()] == keys
    shutil.rmtree(filled.path / "derived")
    np.testing.assert_array_equal(filled.prototypes("uni", 20, TRAIN, 3), before)  # fitted anew, to the last bit
    filled.remove(["s2"])
    assert len(filled.sql("SELECT * FROM prototypes")) == 0
    with pytest.raises(SlideNotFoundError, match="s2"):
        filled.prototypes("uni", 20, TRAIN, 3)
    make_clam_h5(tmp_path / "other" / "x20" / "h5_files" / "s2.h5", n_patches=27)
    filled.ingest(tmp_path / "other", UNI)
    after = filled.prototypes("uni", 20, TRAIN, 3)
    assert not np.array_equal(after, before)
    assert [row["key"] for row in filled.sql("SELECT key FROM prototypes").to_pylist()] != keys


def test_another_number_seed_or_fold_is_another_set(filled: Store) -> None:
    filled.prototypes("uni", 20, TRAIN, 3)
    filled.prototypes("uni", 20, TRAIN, 4)
    filled.prototypes("uni", 20, TRAIN, 3, seed=1)
    filled.prototypes("uni", 20, TRAIN[:2], 3)
    assert filled.sql("SELECT count(DISTINCT key) FROM prototypes")[0][0].as_py() == 4
    assert filled.verify().findings == ()


def test_as_many_patches_of_each_slide_are_sampled_and_all_of_a_smaller_one(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prototypes, "MOST_PATCHES", 90)
    ids = ["s1", "s2", "s3"]
    rows = prototypes.sample_patches(filled.path, "uni", 20, ids, np.random.default_rng(0))
    assert len(rows) == 20 + 27 + 30
    start = 0
    for slide, count in zip(ids, (20, 27, 30), strict=True):
        held = {tuple(row) for row in filled.slide(slide).bags[20].features.astype(np.float32).tolist()}
        part = {tuple(row) for row in rows[start : start + count].tolist()}
        assert len(part) == count
        assert part <= held
        start += count


def test_in_a_store_that_cannot_be_written_they_are_fitted_all_the_same(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = filled.prototypes("uni", 20, TRAIN, 3)
    shutil.rmtree(filled.path / "derived")

    def refuse(*_: Any, **__: Any) -> Any:
        raise StoreWriteError("read-only")

    monkeypatch.setattr(prototypes, "new_file", refuse)
    np.testing.assert_array_equal(filled.prototypes("uni", 20, TRAIN, 3), expected)
    assert not list(filled.path.glob("derived/*/*/*"))


def test_what_cannot_be_fitted_is_said(filled: Store) -> None:
    with pytest.raises(DerivationError, match="100 prototypes of 20 patches at 20x of 1 slides"):
        filled.prototypes("uni", 20, ["s1"], 100)
    with pytest.raises(SlideNotFoundError, match="no slide"):
        filled.prototypes("uni", 20, [], 3)
    with pytest.raises(SlideNotFoundError, match="nobody"):
        filled.prototypes("uni", 20, ["s1", "nobody"], 3)
    with pytest.raises(DerivationError, match="at 7x"):
        filled.prototypes("uni", 7, ["s1"], 3)


def test_a_damaged_file_of_prototypes_is_named_and_not_used(filled: Store) -> None:
    filled.prototypes("uni", 20, TRAIN, 3)
    [path] = filled.path.glob("derived/uni/*/*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    findings = filled.verify().findings
    assert [finding.shard for finding in findings] == [path.relative_to(filled.path).as_posix()]
    with pytest.raises(StoreFormatError, match="delete it"):
        filled.prototypes("uni", 20, TRAIN, 3)
    path.unlink()
    filled.prototypes("uni", 20, TRAIN, 3)
    assert filled.verify().findings == ()
