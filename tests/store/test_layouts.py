"""Folders as CLAM, TRIDENT, CrossFusion and users leave them: which file is which bag."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import cfstore
from cfstore import IngestOptions, LayoutError, MissingScaleError, SourceError, Store

TCGA = "TCGA-02-0047-01Z-00-DX1.4755D138-5842-4159-848C-4248D6D53DE0"
Make = Callable[..., Any]


def bags(folder: Path, **options: Any) -> set[tuple[str, int, str]]:
    """(slide, scale, encoder) of every bag that an ingest would take."""
    plan = cfstore.plan_ingest(folder, IngestOptions(**options))
    assert not plan.problems
    return {(job.slide_id, source.scale, job.encoder) for job in plan.jobs for source in job.sources}


def paths(folder: Path, **options: Any) -> set[str]:
    plan = cfstore.plan_ingest(folder, IngestOptions(**options))
    return {source.path.relative_to(folder).as_posix() for job in plan.jobs for source in job.sources}


def notes(folder: Path, **options: Any) -> str:
    return " | ".join(cfstore.plan_ingest(folder, IngestOptions(**options)).notes)


def save_pt(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


# --- CLAM and CrossFusion -------------------------------------------------------------------


def test_clam_scale_folders_with_h5_files_are_one_slide_at_three_scales(tmp_path: Path, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", ("a", "b"))
    expected = {(slide, scale, "uni") for slide in "ab" for scale in (5, 10, 20)}
    assert bags(tmp_path / "uni") == expected
    assert cfstore.plan_ingest(tmp_path / "uni", IngestOptions()).layout == "clam"


@pytest.mark.parametrize("name", ["x{}", "{}x", "X{}", "{}X"])
def test_a_scale_folder_may_be_spelt_in_four_ways(name: str, tmp_path: Path, make_clam_h5: Make) -> None:
    for scale in (5, 10, 20):
        make_clam_h5(tmp_path / "enc" / name.format(scale) / "h5_files" / "a.h5")
    assert bags(tmp_path / "enc") == {("a", scale, "enc") for scale in (5, 10, 20)}


def test_crossfusion_pt_folders_below_the_encoder_name_the_encoder(tmp_path: Path, draw: Make) -> None:
    for encoder in ("uni", "resnet50"):
        for scale in (5, 10, 20):
            save_pt(tmp_path / encoder / f"x{scale}" / "pt_files" / "a.pt", torch.from_numpy(draw()[0]))
    assert bags(tmp_path) == {("a", scale, encoder) for scale in (5, 10, 20) for encoder in ("uni", "resnet50")}


def test_encoder_option_chooses_one_of_several_crossfusion_encoders(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "uni" / "x20" / "h5_files" / "a.h5")
    make_clam_h5(tmp_path / "conch" / "x10" / "h5_files" / "a.h5")
    assert bags(tmp_path, encoder="uni") == {("a", 20, "uni")}
    with pytest.raises(LayoutError, match=r"virchow.*conch, uni.*--encoder"):
        bags(tmp_path, encoder="virchow")


def test_encoder_option_names_a_clam_folder_that_names_none(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "x20" / "h5_files" / "a.h5")
    assert bags(tmp_path, encoder="uni") == {("a", 20, "uni")}


def test_h5_is_preferred_over_pt_of_the_same_slide_and_said(tmp_path: Path, make_clam_h5: Make) -> None:
    features, _ = make_clam_h5(tmp_path / "x20" / "h5_files" / "a.h5")
    save_pt(tmp_path / "x20" / "pt_files" / "a.pt", torch.from_numpy(features))
    save_pt(tmp_path / "x20" / "pt_files" / "only_pt.pt", torch.from_numpy(features))
    assert paths(tmp_path, encoder="e") == {"x20/h5_files/a.h5", "x20/pt_files/only_pt.pt"}
    assert "1 .pt files repeat .h5 files" in notes(tmp_path, encoder="e")


def test_the_ingested_folder_may_itself_be_the_scale_folder(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "uni" / "x20" / "h5_files" / "a.h5")
    assert bags(tmp_path / "uni" / "x20") == {("a", 20, "uni")}


def test_a_dot_stands_for_the_scale_folder_one_is_in(
    tmp_path: Path, make_clam_h5: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_clam_h5(tmp_path / "uni" / "x20" / "h5_files" / "a.h5")
    monkeypatch.chdir(tmp_path / "uni" / "x20")
    assert bags(Path()) == {("a", 20, "uni")}


def test_a_40x_folder_is_left_out_and_named(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / "a.h5")
    make_clam_h5(tmp_path / "e" / "x40" / "h5_files" / "a.h5")
    assert bags(tmp_path / "e") == {("a", 20, "e")}
    assert "x40/h5_files: x40 is none of (5, 10, 20): left out" in notes(tmp_path / "e")


def test_a_folder_with_40x_alone_is_refused(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "e" / "x40" / "h5_files" / "a.h5")
    with pytest.raises(LayoutError, match="x40 is none of"):
        bags(tmp_path / "e")


def test_scale_option_that_contradicts_the_folders_is_refused(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / "a.h5")
    with pytest.raises(MissingScaleError, match=r"\[20\].*--scale 10"):
        bags(tmp_path / "e", scale=10)


def test_clams_patches_folder_is_no_bag(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / "a.h5")
    (tmp_path / "e" / "x20" / "patches").mkdir()
    with h5py.File(tmp_path / "e" / "x20" / "patches" / "a.h5", "w") as file:
        file["coords"] = np.zeros((3, 2), np.int64)
    assert paths(tmp_path / "e") == {"x20/h5_files/a.h5"}


# --- TRIDENT ---------------------------------------------------------------------------------


def job_folder(root: Path, scale: int) -> Path:
    return root / f"{scale}x_256px_0px_overlap"


def test_trident_job_gives_scales_and_encoders_from_its_folders(tmp_path: Path, make_trident_h5: Make) -> None:
    for scale in (5, 10, 20):
        for encoder in ("uni_v1", "conch_v15"):
            make_trident_h5(job_folder(tmp_path, scale) / f"features_{encoder}" / "a.h5", scale)
    assert bags(tmp_path) == {("a", scale, encoder) for scale in (5, 10, 20) for encoder in ("uni_v1", "conch_v15")}
    assert bags(tmp_path, encoder="uni_v1") == {("a", scale, "uni_v1") for scale in (5, 10, 20)}
    assert cfstore.plan_ingest(tmp_path, IngestOptions()).layout == "trident"


def test_an_encoder_that_trident_did_not_run_is_refused_naming_those_it_did(
    tmp_path: Path, make_trident_h5: Make
) -> None:
    make_trident_h5(job_folder(tmp_path, 20) / "features_uni_v1" / "a.h5")
    with pytest.raises(LayoutError, match=r"virchow2.*uni_v1.*--encoder"):
        bags(tmp_path, encoder="virchow2")


def test_tridents_patches_and_slide_features_are_no_bags(tmp_path: Path, make_trident_h5: Make) -> None:
    job = job_folder(tmp_path, 20)
    make_trident_h5(job / "features_uni_v1" / "a.h5")
    make_trident_h5(job / "slide_features_titan" / "a.h5")
    make_trident_h5(job / "patches" / "a_patches.h5")
    assert paths(tmp_path) == {"20x_256px_0px_overlap/features_uni_v1/a.h5"}


def test_tridents_attributes_become_columns(tmp_path: Path, store: Store, make_trident_h5: Make) -> None:
    make_trident_h5(job_folder(tmp_path / "job", 10) / "features_uni_v1" / "a.h5", 10)
    store.ingest(tmp_path / "job")
    row = store.sql("SELECT patch_size, patch_size_level0, level0_magnification, mpp FROM bags").to_pylist()
    assert row == [{"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 20.0, "mpp": None}]


# --- flat folders ------------------------------------------------------------------------------


def test_a_flat_folder_with_scale_is_taken_whatever_the_suffix(tmp_path: Path, make_clam_h5: Make, draw: Make) -> None:
    make_clam_h5(tmp_path / "hipt" / "a.h5")
    save_pt(tmp_path / "hipt" / "b.pt", torch.from_numpy(draw()[0]))
    assert bags(tmp_path / "hipt", scale=20) == {("a", 20, "hipt"), ("b", 20, "hipt")}
    assert "encoder 'hipt' is the folder's name" in notes(tmp_path / "hipt", scale=20)


def test_a_flat_folder_without_scale_is_refused_naming_the_option(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "hipt" / "a.h5")
    with pytest.raises(MissingScaleError, match=r"a\.h5.*--scale 20"):
        bags(tmp_path / "hipt")


def test_a_flat_h5_that_states_its_magnification_needs_no_option(tmp_path: Path, make_trident_h5: Make) -> None:
    make_trident_h5(tmp_path / "uni" / "a.h5", scale=10)
    assert bags(tmp_path / "uni") == {("a", 10, "uni")}


def test_an_unreadable_file_among_such_is_a_problem_of_its_slide_alone(tmp_path: Path, make_trident_h5: Make) -> None:
    make_trident_h5(tmp_path / "uni" / "good.h5")
    make_trident_h5(tmp_path / "uni" / "broken.h5")
    (tmp_path / "uni" / "broken.h5").write_bytes(b"no HDF5")
    plan = cfstore.plan_ingest(tmp_path / "uni", IngestOptions())
    assert [job.slide_id for job in plan.jobs] == ["good"]
    assert [problem.slide_id for problem in plan.problems] == ["broken"]


def test_clam_and_trident_in_one_folder_are_refused_naming_both(
    tmp_path: Path, make_clam_h5: Make, make_trident_h5: Make
) -> None:
    make_clam_h5(tmp_path / "x20" / "h5_files" / "a.h5")
    make_trident_h5(job_folder(tmp_path, 20) / "features_uni_v1" / "a.h5")
    with pytest.raises(LayoutError, match=r"several layouts.*clam: .*h5_files; trident: .*features_uni_v1"):
        bags(tmp_path)


def test_a_folder_without_feature_files_is_refused_saying_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(LayoutError, match=r"no \.h5 or \.pt feature files.*CLAM.*TRIDENT"):
        bags(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere: no such folder"):
        bags(tmp_path / "nowhere")


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "slide"),
    [
        (f"{TCGA}.h5", TCGA),
        (f"{TCGA}.svs.h5", TCGA),
        (f"{TCGA.lower()}.H5", TCGA.lower()),
        ("1.2.840.113619.h5", "1.2.840.113619"),
        ("slide.v2.final.H5", "slide.v2.final"),
        ("Fall Müller 3.h5", "Fall Müller 3"),
    ],
)
def test_only_known_suffixes_are_taken_off_a_slide_name(
    file: str, slide: str, tmp_path: Path, make_clam_h5: Make
) -> None:
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / file)
    assert bags(tmp_path / "e") == {(slide, 20, "e")}


def test_hidden_files_are_passed_over(tmp_path: Path, make_clam_h5: Make) -> None:
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / "a.h5")
    (tmp_path / "e" / "x20" / "h5_files" / "._a.h5").write_bytes(b"macOS leaves these on network drives")
    assert bags(tmp_path / "e") == {("a", 20, "e")}


# --- what a file may hold ----------------------------------------------------------------------


def test_uni2h_files_with_a_leading_one_lose_it(tmp_path: Path, store: Store, make_clam_h5: Make, draw: Make) -> None:
    features, coords = draw(n_patches=13)
    path = tmp_path / "e" / "x20" / "h5_files" / "a.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features[None], coords[None]
    store.ingest(tmp_path / "e")
    bag = store.slide("a").bags[20]
    np.testing.assert_array_equal(bag.features, features.astype(np.float16))
    np.testing.assert_array_equal(bag.coords, coords)


def test_one_patch_of_a_leading_one_file_stays_one_patch(tmp_path: Path, store: Store, draw: Make) -> None:
    features, _ = draw(n_patches=1)
    path = tmp_path / "e" / "x20" / "a.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["features"] = features[None]
    store.ingest(tmp_path / "e")
    assert store.slide("a").bags[20].features.shape == (1, 8)


def test_float16_source_is_stored_without_any_error(tmp_path: Path, store: Store, make_trident_h5: Make) -> None:
    features, _ = make_trident_h5(job_folder(tmp_path / "j", 20) / "features_uni" / "a.h5", dtype="float16")
    store.ingest(tmp_path / "j")
    np.testing.assert_array_equal(store.slide("a").bags[20].features, features)
    row = store.sql("SELECT source_dtype, max_abs_error, rms_relative_error FROM bags").to_pylist()[0]
    assert row == {"source_dtype": "float16", "max_abs_error": 0.0, "rms_relative_error": 0.0}


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f8"])
def test_big_endian_and_double_sources_are_read(
    dtype: str, tmp_path: Path, store: Store, make_clam_h5: Make, draw: Make
) -> None:
    features = draw()[0].astype(dtype)
    make_clam_h5(tmp_path / "e" / "x20" / "h5_files" / "a.h5", features=features)
    store.ingest(tmp_path / "e", IngestOptions(dtype="float32"))
    stored = store.slide("a").bags[20].features
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, features.astype(np.float32))
    assert store.sql("SELECT source_dtype FROM bags").to_pylist() == [{"source_dtype": np.dtype(dtype).name}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float64])
def test_every_float_precision_of_pt_is_read_and_named(
    dtype: torch.dtype, tmp_path: Path, store: Store, draw: Make
) -> None:
    tensor = torch.from_numpy(draw()[0]).to(dtype)
    save_pt(tmp_path / "e" / "x20" / "pt_files" / "a.pt", tensor)
    store.ingest(tmp_path / "e", IngestOptions(dtype="float32"))
    np.testing.assert_array_equal(store.slide("a").bags[20].features, tensor.float().numpy())
    assert store.sql("SELECT 'torch.' || source_dtype AS d FROM bags").to_pylist() == [{"d": str(dtype)}]


def test_pt_without_coords_has_none(tmp_path: Path, store: Store, draw: Make) -> None:
    save_pt(tmp_path / "e" / "x20" / "pt_files" / "a.pt", torch.from_numpy(draw()[0]))
    store.ingest(tmp_path / "e")
    assert store.slide("a").bags[20].coords is None
    assert store.sql("SELECT has_coords FROM bags").to_pylist() == [{"has_coords": False}]


def test_the_head_of_a_pt_is_known_without_reading_its_rows(tmp_path: Path) -> None:
    """400 MB of rows may not add 400 MB of memory: the file is mapped."""
    save_pt(tmp_path / "a.pt", torch.zeros(100_000, 1024))
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from cfstore.parsers import torch_file\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "head = torch_file.head(Path(sys.argv[1]))\n"
        "print(head.n_patches, head.dim, (used() - before) // 1024)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    n_patches, dim, megabytes = map(int, done.stdout.split())
    assert (n_patches, dim) == (100_000, 1024)
    assert megabytes < 100


def test_slideflow_centres_are_not_read_and_this_is_said(tmp_path: Path, draw: Make) -> None:
    save_pt(tmp_path / "bags" / "a.pt", torch.from_numpy(draw()[0]))
    np.savez(tmp_path / "bags" / "a.index.npz", np.zeros((7, 2)))
    plan = cfstore.plan_ingest(tmp_path / "bags", IngestOptions(scale=20))
    assert any("index.npz" in note and "without coordinates" in note for note in plan.notes)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_pt_dict_with_features_and_coords_keeps_both(
    dtype: torch.dtype, tmp_path: Path, store: Store, draw: Make
) -> None:
    features = torch.from_numpy(draw()[0]).requires_grad_()
    coords = torch.arange(14).reshape(7, 2).to(dtype) * 256
    save_pt(tmp_path / "e" / "x20" / "a.pt", {"features": features, "coords": coords})
    store.ingest(tmp_path / "e")
    bag = store.slide("a").bags[20]
    np.testing.assert_array_equal(bag.features, features.detach().half().numpy())
    np.testing.assert_array_equal(bag.coords, np.arange(14).reshape(7, 2) * 256)
