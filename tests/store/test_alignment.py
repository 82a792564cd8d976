"""Patches of one scale and their parents at another: against every pair of them, one by one."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import cfstore
from cfstore import Alignment, ShapeError, Store, align, alignment, children_of, patch_edge

SLIDES = ("CMU-1-Small-Region", "TCGA-CR-7395-01A-01-TS1")
PAIRS_OF_SCALES = ((20, 10), (10, 5), (20, 5))


def lattice(n_x: int, n_y: int, edge: int, origin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Top-left corners [n_x * n_y, 2] of a full grid, row by row."""
    return np.array([(origin[0] + x * edge, origin[1] + y * edge) for y, x in product(range(n_y), range(n_x))])


def clam_like(rng: np.random.Generator, contours: np.ndarray, edge: int) -> np.ndarray:
    """CLAM's way: every contour (x, y, width, height) has its own origin; some patches come twice; any order."""
    grids = []
    for x, y, width, height in contours:
        grid = lattice(int(width // edge) + 1, int(height // edge) + 1, edge, (x - rng.integers(edge), y))
        grids.append(grid[rng.random(len(grid)) < 0.8])
    patches = np.concatenate(grids)
    return rng.permutation(np.concatenate([patches, patches[: len(patches) // 10]]))


def exactly(value: Any) -> Fraction:
    return Fraction(str(value))


def every_pair(fine: np.ndarray, fine_edge: Any, coarse: np.ndarray, coarse_edge: Any) -> tuple[list[Any], ...]:
    """Parent, share and number of patches touched, from all N x M pairs in exact fractions."""
    f, c = exactly(fine_edge), exactly(coarse_edge)
    parents, shares, touched = [], [], []
    for x, y in fine.tolist():
        found = []
        for row, (u, v) in enumerate(coarse.tolist()):
            width, height = min(x + f, u + c) - max(x, u), min(y + f, v + c) - max(y, v)
            if width > 0 and height > 0:
                apart = (u + c / 2 - x - f / 2) ** 2 + (v + c / 2 - y - f / 2) ** 2
                found.append((-width * height, apart, row))
        best = min(found, default=(0, 0, -1))
        parents.append(best[2])
        shares.append(float(-best[0] / f**2))
        touched.append(len(found))
    return parents, shares, touched


def assert_is_best_of_every_pair(fine: Any, fine_edge: Any, coarse: Any, coarse_edge: Any) -> Alignment:
    found = align(fine, fine_edge, coarse, coarse_edge)
    parents, shares, touched = every_pair(fine, fine_edge, coarse, coarse_edge)
    assert found.parent.tolist() == parents
    np.testing.assert_allclose(found.overlap, shares, rtol=0, atol=1e-11)
    nests = max(touched, default=0) == 1 and all(share in (0, 1) for share in shares)
    assert found.nests is nests
    return found


def attributes(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with h5py.File(path) as file:
        return file["coords"][()], dict(file["coords"].attrs)


# --- real slides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slide", "scales"), [*product(SLIDES, PAIRS_OF_SCALES)])
def test_tridents_grids_of_real_slides_nest_and_every_parent_is_the_cell_around_the_patch(
    slide: str, scales: tuple[int, int], shared: Path
) -> None:
    bags = [
        attributes(shared / "h5" / "trident" / f"{scale}x_256px_0px_overlap" / "patches" / f"{slide}_patches.h5")
        for scale in scales
    ]
    (fine, fine_attributes), (coarse, coarse_attributes) = bags
    edges = fine_attributes["patch_size_level0"], coarse_attributes["patch_size_level0"]
    found = assert_is_best_of_every_pair(fine, edges[0], coarse, edges[1])
    assert found.nests
    cells = {tuple(cell): row for row, cell in enumerate((coarse // edges[1]).tolist())}
    assert found.parent.tolist() == [cells.get(tuple(cell), -1) for cell in (fine // edges[1]).tolist()]
    _, start = children_of(found, len(coarse))
    assert np.diff(start).max() <= (scales[0] // scales[1]) ** 2


@pytest.mark.parametrize(("slide", "scales"), [*product(SLIDES, PAIRS_OF_SCALES)])
def test_bags_of_a_store_made_from_clams_files_align_with_edges_told_from_their_coordinates(
    slide: str, scales: tuple[int, int], shared: Path, store: Store
) -> None:
    store.ingest(shared / "h5" / "clam")
    bags = store.slide(slide, "clam").bags
    fine, coarse = (bags[scale].coords for scale in scales)
    edges = [attributes(shared / "h5" / "clam" / f"x{scale}" / "patches" / f"{slide}.h5")[1] for scale in scales]
    fine_edge, coarse_edge = (int(found["patch_size"] * found["downsample"][0]) for found in edges)
    assert (patch_edge(fine), patch_edge(coarse)) == (fine_edge, coarse_edge)
    assert_is_best_of_every_pair(fine, fine_edge, coarse, coarse_edge)


def test_the_edge_told_from_coordinates_is_that_of_every_real_file(shared: Path) -> None:
    edges = {}
    for path in (shared / "h5" / "trident").glob("*/patches/*.h5"):
        coords, found = attributes(path)
        assert patch_edge(coords) == found["patch_size_level0"]
        edges[found["name"], int(found["target_magnification"])] = patch_edge(coords)
    at_20x, at_40x = SLIDES
    assert edges == {(at_20x, s): 5120 // s for s in (5, 10, 20)} | {(at_40x, s): 10240 // s for s in (5, 10, 20)}


# --- alignment, by hand ----------------------------------------------------------------------------------------------


def test_a_10x_patch_has_its_four_20x_children_and_one_5x_parent() -> None:
    x5, x10, x20 = lattice(1, 1, 1024), lattice(2, 2, 512), lattice(4, 4, 256)
    found = align(x20, 256, x10, 512, scales=(20, 10))
    assert found.parent.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert found.overlap.tolist() == [1.0] * 16
    assert found.nests
    assert found.note == "the grids nest: every 20x patch lies in one 10x patch"
    order, start = children_of(found, 4)
    assert order[start[1] : start[2]].tolist() == [2, 3, 6, 7]
    above = align(x10, 512, x5, 1024)
    assert (above.parent.tolist(), above.nests) == ([0] * 4, True)
    assert above.note == "the grids nest: every fine patch lies in one coarse patch"


def test_a_shared_border_is_no_overlap_and_patches_without_a_parent_are_counted() -> None:
    fine = np.array([[512, 0], [0, 512], [-256, 0], [0, -256], [512, 512], [256, 256]])
    found = align(fine, 256, np.array([[0, 0]]), 512, scales=(20, 10))
    assert found.parent.tolist() == [-1, -1, -1, -1, -1, 0]
    assert found.overlap.tolist() == [0, 0, 0, 0, 0, 1]
    assert found.nests
    assert found.note == (
        "the grids nest: every 20x patch that touches a 10x patch lies in that one; 5 of 6 20x patches touch none"
    )


def test_a_patch_across_several_goes_with_the_one_it_overlaps_most_and_the_note_says_that_they_do_not_nest() -> None:
    coarse = lattice(2, 2, 100)
    fine = np.array([[90, 90], [60, 10], [500, 0]])  # 50 wide: 10, 40 | 10, 40; 40, 10 | 50
    found = align(fine, 50, coarse, 100, scales=(20, 10))
    assert found.parent.tolist() == [3, 0, -1]
    np.testing.assert_allclose(found.overlap, [0.64, 0.8, 0])
    assert not found.nests
    assert found.note == (
        "the grids do not nest: each 20x patch goes with the 10x patch that it overlaps most "
        "(0.72 of its area on average; 2 touch more than one); 1 of 3 20x patches touch none"
    )


def test_a_patch_that_sticks_out_of_its_only_parent_does_not_nest() -> None:
    found = align([[75, 0]], 50, [[0, 0]], 100)
    assert (found.parent.tolist(), found.overlap.tolist(), found.nests) == ([0], [0.5], False)
    assert found.note == (
        "the grids do not nest: each fine patch goes with the coarse patch that it overlaps most "
        "(0.50 of its area on average)"
    )


def test_of_parents_that_cover_as_much_the_nearest_centre_wins_and_then_the_lowest_row() -> None:
    fine = [[40, 40]]  # 20 wide, centre 50, 50
    covering = [[-30, -30], [10, 10], [0, 0], [0, 0], [-10, -10]]  # 100 wide; centres 20, 60, 50, 50, 40
    assert align(fine, 20, covering, 100).parent.tolist() == [2]
    assert align(fine, 20, covering[::-1], 100).parent.tolist() == [1]
    assert align(fine, 20, covering[:2], 100).parent.tolist() == [1]
    halves = [[50, 0], [-50, 0]]  # both cover half of the patch, centres 50 away
    assert align(fine, 20, halves, 100).parent.tolist() == [0]
    assert align(fine, 20, halves[::-1], 100).parent.tolist() == [0]


def test_duplicates_do_not_nest_although_every_patch_lies_wholly_inside() -> None:
    found = align(lattice(2, 2, 256), 256, [[0, 0], [0, 0]], 512)
    assert (found.parent.tolist(), found.overlap.tolist(), found.nests) == ([0] * 4, [1.0] * 4, False)
    assert "4 touch more than one" in found.note


def test_fractional_edges_are_exact_where_the_grid_is() -> None:
    fine, coarse = lattice(8, 8, 1), lattice(4, 4, 2)
    assert align(fine * 253, 252.7, coarse * 253, 2 * 253).nests
    found = align([[0, 0], [1, 0]], 0.1 + 0.2, [[0, 0], [1, 0]], 0.3000001)
    assert (found.parent.tolist(), found.overlap.tolist(), found.nests) == ([0, 1], [1.0, 1.0], True)
    beside = np.array([[-223, 0], [95, 0]])  # both cover 5.2 of 100.2; floats say 0.0518962075848302 and ...303
    assert align([[0, 0]], 100.2, beside, 228.2).parent.tolist() == [0]
    assert align([[0, 0]], 100.2, beside[::-1], 228.2).parent.tolist() == [0]


# --- alignment, against every pair -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_clam_like_layouts_align_as_every_pair_of_patches_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(alignment, "PAIRS", (7, 100, 2**17)[seed % 3])  # patches of many pairs, chunks of few
    corners, sizes = rng.integers(-200, 400, (4, 2)), rng.integers(20, 170, (4, 2))
    contours = np.concatenate([corners, sizes], axis=1)
    contours[3, :2] = contours[2, :2] + 5  # two that overlap
    coarse = clam_like(rng, contours[1:], 32)
    fine = clam_like(rng, contours, 16)  # the first contour is missing from the coarse scale
    found = assert_is_best_of_every_pair(fine, 16, coarse, 32)
    assert not found.nests
    assert (found.parent >= 0).any()


@pytest.mark.parametrize(
    ("fine_edge", "coarse_edge"), [(10, 10), (3, 29), (10, 11), (12.7, 25.4), (9.99, 10.01), (0.5, 7)]
)
def test_any_edges_align_as_every_pair_of_patches_says(fine_edge: float, coarse_edge: float) -> None:
    rng = np.random.default_rng(3)
    fine, coarse = rng.integers(-60, 60, (150, 2)), rng.integers(-50, 50, (60, 2))
    assert_is_best_of_every_pair(fine, fine_edge, coarse, coarse_edge)


def test_patches_as_far_apart_as_coordinates_can_be_align() -> None:
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    corners = np.array(list(product((low, -1, high), repeat=2)), np.int32)
    found = assert_is_best_of_every_pair(corners, 1, corners, 2)
    assert found.parent.tolist() == list(range(9))


def test_one_patch_or_none_on_either_side() -> None:
    assert align([[5, 5]], 10, [[0, 0]], 20).parent.tolist() == [0]
    none = np.empty((0, 2), np.int64)
    alone = align([[5, 5]], 10, none, 20, scales=(10, 5))
    assert (alone.parent.tolist(), alone.overlap.tolist(), alone.nests) == ([-1], [0], False)
    assert alone.note == "no 10x patch touches a 5x patch"
    assert align(none, 10, [[5, 5]], 20).parent.shape == (0,)
    assert children_of(alone, 0)[1].tolist() == [0]


def test_the_largest_slides_align_in_memory_that_grows_with_their_patches() -> None:
    width, edge = 372, 256
    at = np.arange(138_000)
    fine = np.stack([at % width * edge, at // width * edge], axis=1).astype(np.int32)
    coarse = np.unique(fine // 512, axis=0)[::-1] * 512 + 100
    tracemalloc.start()
    found = align(fine, edge, coarse, 512)
    order, start = children_of(found, len(coarse))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # every pair would be 4.7e9
    assert len(coarse) > 34_500
    inside = found.overlap == 1
    np.testing.assert_array_equal(coarse[found.parent[inside]], (fine[inside] - 100) // 512 * 512 + 100)
    assert inside.sum() > len(fine) // 5
    np.testing.assert_array_equal(found.parent[order], np.repeat(np.arange(len(coarse)), np.diff(start)))


# --- children --------------------------------------------------------------------------------------------------------


def test_children_are_the_rows_of_each_parent_in_order_and_nobody_elses() -> None:
    parent = np.array([3, -1, 0, 3, 0, -1, 3, 1])
    found = Alignment(parent, (parent >= 0).astype(float), nests=True, note="")
    order, start = children_of(found, 5)
    assert [order[a:b].tolist() for a, b in pairwise(start)] == [[2, 4], [7], [], [0, 3, 6], []]
    with pytest.raises(ValueError, match=r"coarse row 3, but n_coarse is 3"):
        children_of(found, 3)


# --- the edge --------------------------------------------------------------------------------------------------------


def test_the_edge_is_the_step_within_a_contour_not_between_contours() -> None:
    one, other = lattice(5, 6, 512), lattice(4, 5, 512, (5 * 512 + 37, 512))  # rows in step, columns 37 off
    apart = lattice(6, 3, 512, (91, 9_001))
    everything = np.concatenate([one, other, apart, one[:7]])
    rng = np.random.default_rng(0)
    assert {patch_edge(rng.permutation(everything)) for _ in range(5)} == {512}
    within = np.concatenate([lattice(9, 9, 512), lattice(5, 5, 512, (1024 + 64, 1024))])  # one inside the other
    assert patch_edge(within) == 512
    assert patch_edge(np.array([[0, 7], [512, 7], [552, 7], [1064, 7]])) == 512  # 40 is no step of one grid


@pytest.mark.parametrize("seed", range(10))
def test_the_edge_of_clam_like_layouts_is_told_whatever_the_origins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    contours = np.concatenate([rng.integers(0, 20_000, (6, 2)), rng.integers(1500, 8_000, (6, 2))], axis=1)
    contours[1:3, 1] = contours[0, 1]  # three in the same rows
    assert patch_edge(clam_like(rng, contours, 512)) == 512


def test_the_edge_is_told_from_a_sparse_grid_where_gaps_are_commoner_than_neighbours() -> None:
    row = np.array([[x * 256, 0] for x in (0, 2, 4, 6, 7, 9)])  # steps of 2, 2, 2, 1, 2
    assert patch_edge(row) == 256
    assert patch_edge(row[:, ::-1]) == 256  # a column


def test_with_overlap_the_edge_told_is_the_step() -> None:
    assert patch_edge(lattice(6, 6, 192)) == 192  # 256-pixel patches that overlap by 64 look no different


def test_no_edge_can_be_told_without_two_patches_in_a_row_or_column() -> None:
    assert patch_edge(np.array([[3, 4]])) is None
    assert patch_edge(np.array([[3, 4], [3, 4]])) is None
    assert patch_edge(np.array([[0, 0], [256, 100]])) is None
    assert patch_edge(np.empty((0, 2), np.int64)) is None
    assert patch_edge(np.array([[0, 0], [256, 0]], np.uint32)) == 256


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coords", "found"),
    [
        (None, r"shape \(\)"),  # a bag of a .pt file has no coordinates
        (np.zeros(4, int), r"shape \(4,\)"),
        (np.zeros((4, 3), int), r"shape \(4, 3\)"),
        (np.zeros((4, 2)), "float64"),
        (np.array([[0, 2**40]]), "1099511627776"),
    ],
)
def test_coordinates_that_are_none_are_refused(coords: Any, found: str) -> None:
    good = np.zeros((1, 2), np.int32)
    with pytest.raises(ShapeError, match=f"^coords .*{found}"):
        patch_edge(coords)
    with pytest.raises(ShapeError, match=f"^fine .*{found}"):
        align(coords, 1, good, 2)
    with pytest.raises(ShapeError, match=f"^coarse .*{found}"):
        align(good, 1, coords, 2)


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ((0, 512), "fine_edge must be a positive number of level-0 pixels, got 0"),
        ((256, -1), "coarse_edge must be a positive number of level-0 pixels, got -1"),
        ((float("nan"), 512), "got nan"),
        ((256, float("inf")), "got inf"),
        ((512, 256), "fine_edge 512 is larger than coarse_edge 256"),
    ],
)
def test_edges_that_cannot_be_are_refused(edges: tuple[float, float], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        align([[0, 0]], edges[0], [[0, 0]], edges[1])


def test_the_names_are_public() -> None:
    assert {"Alignment", "align", "children_of", "patch_edge"} <= set(cfstore.__all__)
