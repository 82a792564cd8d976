"""The synthetic cohort: its files as CLAM and MCAT write them, and its signal as promised.

Everything is read back with h5py and csv; C-indices come from lifelines.
"""

from __future__ import annotations

import csv
import json

import h5py
import numpy as np
import pytest
from lifelines.utils import concordance_index

from cfstore.errors import LayoutError, StoreError
from cfstore.synth import planted_directions, synthesize

STEP = {5: 1024, 10: 512, 20: 256}


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_features(directory, scale, slide_id):
    with h5py.File(directory / f"x{scale}" / "h5_files" / f"{slide_id}.h5") as file:
        return file["features"][:]


def read_coords(directory, scale):
    for path in sorted((directory / f"x{scale}" / "h5_files").iterdir()):
        with h5py.File(path) as file:
            yield path.stem, file["coords"][:]


def all_bytes(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    return synthesize(tmp_path_factory.mktemp("synth") / "demo", slides=60, patches=700, dim=24, seed=3)


@pytest.fixture(scope="module")
def demo(summary):
    return summary.directory


@pytest.fixture(scope="module")
def follow_up(demo):
    """Per slide, in the order of the clinical table: ids, months, event, and the oracle's row."""
    rows, oracle = read_csv(demo / "clinical.csv"), {r["slide_id"]: r for r in read_csv(demo / "oracle.csv")}
    ids = [row["slide_id"].removesuffix(".svs") for row in rows]
    months = np.array([float(row["survival_months"]) for row in rows])
    event = np.array([row["censorship"] == "0" for row in rows])
    return ids, months, event, [oracle[slide_id] for slide_id in ids]


@pytest.fixture(scope="module")
def first_slide_of_each_patient(follow_up):
    return [i for i, slide_id in enumerate(follow_up[0]) if slide_id.endswith("-01")]


def projected_fraction(demo, scale, ids, direction):
    """The share of patches past half the shift, along `direction`."""
    return np.array([(read_features(demo, scale, s) @ direction > 1.75).mean() for s in ids])


@pytest.mark.parametrize("scale", [5, 10, 20])
def test_every_slide_has_a_file_as_clam_writes_it_at_each_scale(demo, summary, scale):
    paths = sorted((demo / f"x{scale}" / "h5_files").iterdir())
    assert [p.name for p in paths] == sorted(f"{r['slide_id']}.h5" for r in read_csv(demo / "oracle.csv"))
    total = 0
    for path in paths:
        with h5py.File(path) as file:
            assert sorted(file) == ["coords", "features"]
            features, coords = file["features"], file["coords"]
            n = features.shape[0]
            assert (features.dtype, features.shape, features.chunks) == (np.float32, (n, 24), (32, 24))
            assert (coords.dtype, coords.shape) == (np.int32, (n, 2))
            assert features.compression is None
            assert not file.attrs
            assert not features.attrs
            assert not coords.attrs
            assert n >= 1
            assert np.isfinite(features[:]).all()
            total += n
    assert total == summary.n_patches[scale]


def test_bag_sizes_follow_the_requested_mean_and_the_ratios_of_tcga(summary):
    n = summary.n_patches
    assert n[20] / 60 == pytest.approx(700, rel=0.01)
    assert n[10] / n[5] == pytest.approx(3449 / 895, rel=0.02)
    assert n[20] / n[10] == pytest.approx(13496 / 3449, rel=0.02)


def test_bag_sizes_have_a_heavy_tail(tmp_path):
    demo = synthesize(tmp_path / "demo", slides=250, patches=100, dim=8).directory
    sizes = np.array([len(coords) for _, coords in read_coords(demo, 20)])
    assert 5 < sizes.max() / sizes.mean() < 20
    assert np.median(sizes) < 0.85 * sizes.mean()


@pytest.mark.parametrize(("parent", "child"), [(5, 10), (10, 20)])
def test_patches_lie_in_a_patch_of_the_coarser_scale_and_every_patch_has_children(demo, parent, child):
    children_of = dict(read_coords(demo, child))
    for slide_id, coords in read_coords(demo, parent):
        children = children_of[slide_id].astype(int)
        origin = coords.min(0).astype(int)
        snapped = (children - origin) // STEP[parent] * STEP[parent] + origin
        assert not ((children - origin) % STEP[child]).any()
        assert {tuple(xy) for xy in snapped} == {tuple(xy) for xy in coords.astype(int)}
        assert len({tuple(xy) for xy in children}) == len(children)


@pytest.mark.parametrize("scale", [5, 10, 20])
def test_patches_are_in_the_x_major_order_of_clam(demo, scale):
    for _, coords in read_coords(demo, scale):
        assert [tuple(xy) for xy in coords] == sorted(tuple(xy) for xy in coords)


def test_a_5x_region_is_in_one_piece(demo):
    for slide_id, coords in read_coords(demo, 5):
        left = {tuple(xy) for xy in (coords - coords.min(0)) // 1024}
        front = [left.pop()]
        while front:
            x, y = front.pop()
            near = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} & left
            left -= near
            front.extend(near)
        assert not left, slide_id


def test_the_clinical_table_has_the_columns_of_mcat_and_plainly_synthetic_ids(demo):
    rows = read_csv(demo / "clinical.csv")
    assert list(rows[0]) == [
        "cohort", "case_id", "slide_id", "survival_months", "censorship", "age", "is_female", "oncotree_code",
        "site", "synthetic", "oracle_risk", "oracle_5x", "oracle_20x",
    ]  # fmt: skip
    assert {row["synthetic"] for row in rows} == {"yes"}
    assert {row["cohort"] for row in rows} == {"DEMO"}
    assert all(row["slide_id"] in (f"{row['case_id']}-01.svs", f"{row['case_id']}-02.svs") for row in rows)
    assert rows[0]["case_id"] == "DEMO-0001"
    assert len({row["slide_id"] for row in rows}) == len(rows) == 60


def test_slides_of_one_patient_share_its_follow_up_and_fractions(demo, summary):
    seen = {}
    for row, oracle in zip(read_csv(demo / "clinical.csv"), read_csv(demo / "oracle.csv"), strict=True):
        values = [v for k, v in [*row.items(), *oracle.items()] if k != "slide_id"]
        assert seen.setdefault(row["case_id"], values) == values
    assert len(seen) == summary.n_patients == 56


def test_follow_up_is_positive_and_about_45_percent_of_patients_die(follow_up, first_slide_of_each_patient):
    _, months, event, _ = follow_up
    assert (months > 0).all()
    assert 5 < np.median(months) < 60
    assert 0.4 <= event[first_slide_of_each_patient].mean() <= 0.5


def test_folds_hold_each_patient_out_once_and_deaths_are_spread_evenly(demo):
    died = {row["case_id"]: row["censorship"] == "0" for row in read_csv(demo / "clinical.csv")}
    held_out = []
    for fold in range(5):
        rows = read_csv(demo / "splits" / f"splits_{fold}.csv")
        assert list(rows[0]) == ["", "train", "val"]
        train = [row["train"] for row in rows if row["train"]]
        val = [row["val"] for row in rows if row["val"]]
        assert sorted(train + val) == sorted(died)
        assert sum(died[p] for p in val) in (5, 6)  # 25 or 26 deaths among 56 patients
        held_out += val
    assert sorted(held_out) == sorted(died)


def test_stored_c_indices_are_those_lifelines_computes(demo, summary, follow_up, first_slide_of_each_patient):
    _, months, event, oracle = follow_up
    stored = json.loads((demo / "synth.json").read_text())
    first = first_slide_of_each_patient

    def c_index(column):
        return concordance_index(months[first], [-float(oracle[i][column]) for i in first], event[first])

    expected = {5: c_index("tissue_fraction"), 10: 0.5, 20: c_index("cell_fraction")}
    assert summary.c_index_oracle == stored["c_index_oracle"] == pytest.approx(c_index("risk"))
    assert summary.c_index_single_scale == pytest.approx(expected)
    assert stored["c_index_single_scale"] == pytest.approx({str(k): v for k, v in expected.items()})
    assert summary.c_index_best_single_scale == pytest.approx(max(expected.values()))


def test_the_oracle_risk_rises_in_the_product_of_the_fractions(follow_up):
    *_, oracle = follow_up
    product = [float(row["tissue_fraction"]) * float(row["cell_fraction"]) for row in oracle]
    risk = [float(row["risk"]) for row in oracle]
    assert np.corrcoef(product, risk)[0, 1] == pytest.approx(1)


@pytest.mark.parametrize(("scale", "column"), [(5, "tissue_fraction"), (20, "cell_fraction")])
def test_the_drawn_fraction_of_patches_carries_the_planted_direction(demo, follow_up, scale, column):
    ids, _, _, oracle = follow_up
    share = projected_fraction(demo, scale, ids, planted_directions(24, 3)[scale])
    drawn = np.array([float(row[column]) for row in oracle])
    assert np.abs(share - drawn).mean() < 0.05


@pytest.mark.parametrize(("scale", "planted_at"), [(5, 20), (10, 5), (10, 20), (20, 5)])
def test_no_other_scale_shows_the_planted_direction(demo, follow_up, scale, planted_at):
    ids, *_ = follow_up
    direction = planted_directions(24, 3)[planted_at]
    values = np.concatenate([read_features(demo, scale, s) @ direction for s in ids])
    assert values.mean() == pytest.approx(0, abs=0.1)
    assert values.std() == pytest.approx(1, abs=0.05)


def test_mean_features_of_two_scales_rank_patients_better_than_either_alone(demo, summary, follow_up):
    ids, months, event, _ = follow_up
    tissue, cell = (
        np.array([(read_features(demo, scale, s) @ direction).mean() for s in ids])
        for scale, direction in planted_directions(24, 3).items()
    )
    both, coarse, fine = (concordance_index(months, -risk, event) for risk in (tissue * cell, tissue, cell))
    assert both > max(coarse, fine) + 0.03
    assert both == pytest.approx(summary.c_index_oracle, abs=0.05)


def test_over_many_cohorts_one_scale_alone_tells_only_part(tmp_path):
    runs = [synthesize(tmp_path / str(k), slides=100, patches=16, dim=8, seed=k) for k in range(5)]
    oracle = np.mean([run.c_index_oracle for run in runs])
    single = np.mean([run.c_index_best_single_scale for run in runs])
    assert 0.78 < oracle < 0.88
    assert oracle - single > 0.06


def test_features_of_neighbours_resemble_each_other_more_than_distant_ones(demo, follow_up):
    slide_id = max(follow_up[0], key=lambda s: len(read_features(demo, 20, s)))
    features, coords = read_features(demo, 20, slide_id), dict(read_coords(demo, 20))[slide_id]
    apart = np.abs(coords[:, None].astype(int) - coords[None]).max(-1)
    centred = features - features.mean(0)
    alike = centred @ centred.T
    assert alike[apart == 256].mean() > 0
    assert alike[apart == 256].mean() > alike[apart > 8 * 1024].mean()


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    one = synthesize(tmp_path / "one", slides=12, patches=64, dim=8, seed=7)
    two = synthesize(tmp_path / "two", slides=12, patches=64, dim=8, seed=7)
    assert all_bytes(one.directory) == all_bytes(two.directory)


def test_another_seed_writes_another_cohort(tmp_path):
    one = all_bytes(synthesize(tmp_path / "one", slides=12, patches=64, dim=8, seed=7).directory)
    two = all_bytes(synthesize(tmp_path / "two", slides=12, patches=64, dim=8, seed=8).directory)
    for name in ("clinical.csv", "oracle.csv", "splits/splits_0.csv", "x20/h5_files/DEMO-0001-01.h5"):
        assert one[name] != two[name]


def test_the_manifest_says_that_the_cohort_is_synthetic_and_how_it_was_made(demo):
    stored = json.loads((demo / "synth.json").read_text())
    assert stored["synthetic"] is True
    assert stored["cohort"] == "DEMO"
    assert (stored["n_slides"], stored["mean_patches"], stored["dim"], stored["seed"]) == (60, 700, 24, 3)


def test_the_smallest_cohort_has_a_patch_at_every_scale(tmp_path):
    tiny = synthesize(tmp_path / "demo", slides=10, patches=16, dim=8)
    for scale in (5, 10, 20):
        assert all(len(coords) >= 1 for _, coords in read_coords(tiny.directory, scale))


def test_progress_is_told_after_each_slide(tmp_path):
    calls = []
    synthesize(tmp_path / "demo", slides=11, patches=16, dim=8, progress=lambda *call: calls.append(call))
    assert calls == [(done, 11) for done in range(1, 12)]


def test_a_directory_that_holds_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(LayoutError, match="holds files already") as caught:
        synthesize(tmp_path, slides=10, patches=16, dim=8)
    assert isinstance(caught.value, StoreError)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(LayoutError, match="is a file"):
        synthesize(tmp_path / "demo", slides=10, patches=16, dim=8)


def test_an_empty_directory_is_filled(tmp_path):
    synthesize(tmp_path, slides=10, patches=16, dim=8)
    assert (tmp_path / "synth.json").is_file()


@pytest.mark.parametrize(("argument", "value"), [("slides", 9), ("patches", 15), ("dim", 7), ("seed", -1)])
def test_a_value_too_small_is_refused_by_name(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be at least {value + 1}, got {value}"):
        synthesize(tmp_path / "demo", **{argument: value})
    assert not (tmp_path / "demo").exists()
