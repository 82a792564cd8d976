"""Real slides of TCGA and OpenSlide, through the store and back."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cfstore import IngestOptions, Store


def test_907_real_slides_come_in_with_their_patients_and_labels(shared: Path, store: Store) -> None:
    folder, table = shared / "bags" / "gbmlgg_vit4k_20x", shared / "clinical" / "tcga_gbmlgg_min.csv"
    report = store.ingest(folder, IngestOptions(scale=20, encoder="vit4k", clinical=table))
    assert (report.n_slides, report.problems) == (907, ())
    query = """
        SELECT count(*) AS n_slides, count(DISTINCT patient_id) AS n_patients, max(n_patches) AS largest
        FROM bags JOIN slides USING (slide_id)"""
    found = store.sql(query).to_pylist()[0]
    assert (found["n_slides"], found["n_patients"]) == (907, 492)

    rows = list(csv.DictReader(table.read_text().splitlines()))
    patients = {row["case_id"]: float(row["censorship"]) for row in rows}
    counts = store.sql("SELECT count(*) AS n, count(*) FILTER (event) AS n_events FROM patients").to_pylist()[0]
    assert counts == {"n": len(patients), "n_events": sum(value == 0 for value in patients.values())}
    assert counts == {"n": 569, "n_events": 187}
    assert {row["cohort"] for row in store.sql("SELECT DISTINCT cohort FROM slides").to_pylist()} == {"GBMLGG"}

    files = sorted(folder.glob("*.pt"))
    shapes = {path.name.removesuffix(".pt"): torch.load(path, weights_only=True).shape for path in files}
    catalog = store.sql("SELECT slide_id, n_patches, dim FROM bags").to_pylist()
    assert {row["slide_id"]: (row["n_patches"], row["dim"]) for row in catalog} == shapes
    assert found["largest"] == max(shape[0] for shape in shapes.values())

    reader = store.reader("vit4k", [20], sorted(shapes))
    for slide in reader.stream([path.name.removesuffix(".pt") for path in files[::40]]):
        source = torch.load(folder / f"{slide.slide_id}.pt", weights_only=True).half().numpy()
        np.testing.assert_array_equal(slide.bags[20].features, source)
    cohort = store.cohort("GBMLGG", scales=[20])
    assert (len(cohort.slides), cohort.n_patients, cohort.dim) == (907, 492, 192)


@pytest.mark.parametrize(
    ("layout", "pattern", "encoder"),
    [
        ("trident", "{}x_256px_0px_overlap/features_toy64/*.h5", "toy64"),
        ("clam", "x{}/h5_files/*.h5", "clam"),
    ],
)
def test_every_real_h5_file_is_in_the_catalog_with_its_own_count_and_rows(
    layout: str, pattern: str, encoder: str, shared: Path, store: Store
) -> None:
    folder = shared / "h5" / layout
    store.ingest(folder)
    expected = []
    for scale in (5, 10, 20):
        for path in folder.glob(pattern.format(scale)):
            with h5py.File(path) as file:
                slide, features, coords = path.stem, file["features"][()], file["coords"][()]
            expected.append((slide, scale, len(features)))
            bag = store.slide(slide, encoder).bags[scale]
            np.testing.assert_array_equal(bag.features, features.astype(np.float16))
            np.testing.assert_array_equal(bag.coords, coords)
    assert len(expected) == 6
    rows = store.sql("SELECT slide_id, scale, n_patches FROM bags ORDER BY 1, 2").to_pylist()
    assert [tuple(row.values()) for row in rows] == sorted(expected)


def test_tridents_attributes_reach_sql_for_every_real_file(shared: Path, store: Store) -> None:
    store.ingest(shared / "h5" / "trident")
    rows = store.sql("SELECT source, patch_size, patch_size_level0, level0_magnification FROM bags").to_pylist()
    assert len(rows) == 6
    for row in rows:
        with h5py.File(row["source"]) as file:
            for name in ("patch_size", "patch_size_level0", "level0_magnification"):
                assert row[name] == file["coords"].attrs[name]
