"""Where the patches of a slide lie: from coordinates, and honestly from none."""

from __future__ import annotations

import numpy as np
import pytest

from cfstore import Bag
from cftrain.heatmap.about import place_notes
from cftrain.heatmap.layers import FILE_ORDER, LEVEL0
from cftrain.heatmap.places import grids_of, reach


def bag(corners):
    corners = np.array(corners, dtype=np.int32)
    return Bag(np.zeros((len(corners), 2), np.float16), corners)


def bag_without_coordinates(n):
    return Bag(np.zeros((n, 2), np.float16), None)


def told(**edges):
    return [{"scale": int(scale[1:]), "patch_size_level0": edge} for scale, edge in edges.items()]


FULL = {
    5: [(x, y) for y in (0, 1024) for x in (0, 1024)],
    10: [(x, y) for y in range(0, 2048, 512) for x in range(0, 2048, 512)],
    20: [(x, y) for y in range(0, 2048, 256) for x in range(0, 2048, 256)],
}


def test_patches_lie_where_the_source_says_and_know_their_parents():
    grids = grids_of({scale: bag(corners) for scale, corners in FULL.items()}, told(x5=1024, x10=512, x20=256))
    assert list(grids) == [5, 10, 20]
    assert {scale: (grid.edge, grid.unit) for scale, grid in grids.items()} == {
        5: (1024, LEVEL0), 10: (512, LEVEL0), 20: (256, LEVEL0),
    }  # fmt: skip
    assert grids[5].parents is None
    for scale in (10, 20):
        above = grids[scale // 2].corners[grids[scale].parents]
        assert (above == grids[scale].corners // (2 * grids[scale].edge) * (2 * grids[scale].edge)).all()
    assert grids[20].parents_note == "the grids nest: every 20x patch lies in one 10x patch"
    assert reach(grids) == (2048, 2048)


def test_a_patch_size_that_no_file_gives_comes_from_the_spacing_and_the_map_says_so():
    grids = grids_of({20: bag(FULL[20]), 10: bag(FULL[10])}, told(x10=None, x20=None))
    assert (grids[10].edge, grids[20].edge) == (512, 256)
    assert all("spacing" in grid.note for grid in grids.values())


def test_too_few_patches_to_show_a_spacing_take_that_of_the_finest_scale():
    grids = grids_of({5: bag([(0, 0), (2048, 0)]), 20: bag(FULL[20])}, told(x5=None, x20=None))
    assert grids[5].edge == 1024  # not 2048, the hole between the two
    assert "spacing at 20x" in grids[5].note


def test_a_note_on_places_says_of_which_scales_it_is_unless_it_is_of_all():
    mixed = grids_of({5: bag([(0, 0), (2048, 0)]), 20: bag(FULL[20])}, told(x5=None, x20=None))
    first, second = place_notes(mixed)
    assert first.startswith("5x: corners from the source files; patch size from the spacing at 20x")
    assert second.startswith("20x: corners from the source files; they do not give the patch size")
    [of_all] = place_notes(grids_of({20: bag(FULL[20]), 10: bag(FULL[10])}, told(x10=None, x20=None)))
    assert of_all.startswith("corners from the source files; they do not give the patch size")
    assert place_notes(grids_of({20: bag(FULL[20])}, told(x20=256))) == []


def test_a_single_patch_of_unknown_size_is_drawn_and_the_guess_is_said():
    grid = grids_of({20: bag([(300, 700)])}, told(x20=None))[20]
    assert (grid.edge, grid.corners.tolist()) == (256, [[300, 700]])
    assert "unknown" in grid.note


def test_patches_larger_than_those_of_the_coarser_scale_have_no_parents():
    grids = grids_of({10: bag(FULL[10]), 20: bag(FULL[5])}, told(x10=512, x20=1024))
    assert grids[20].parents is None
    assert "no patch of it has a parent" in grids[20].parents_note


def test_a_bag_without_coordinates_is_a_square_in_file_order():
    grid = grids_of({20: bag_without_coordinates(7)}, told(x20=None))[20]
    assert grid.unit == FILE_ORDER
    assert grid.corners.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 2]]
    assert "no coordinates" in grid.note


def test_squares_of_several_scales_are_of_about_one_size():
    bags = {scale: bag_without_coordinates(n) for scale, n in ((5, 100), (10, 400), (20, 1600))}
    grids = grids_of(bags, told(x5=None, x10=None, x20=None))
    assert {scale: int((grid.corners + grid.edge).max()) for scale, grid in grids.items()} == {5: 40, 10: 40, 20: 40}


@pytest.mark.parametrize("lacking", [5, 20])
def test_one_scale_without_coordinates_leaves_all_in_file_order_and_says_which(lacking):
    bags = {scale: bag(FULL[scale]) for scale in (5, 20) if scale != lacking} | {lacking: bag_without_coordinates(9)}
    grids = grids_of(bags, told(x5=1024, x20=256))
    assert {grid.unit for grid in grids.values()} == {FILE_ORDER}
    assert all(f"no coordinates at {lacking}x" in grid.note for grid in grids.values())
