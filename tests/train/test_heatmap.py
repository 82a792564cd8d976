"""A trained run explains slides: against its models loaded and asked by hand, and what people open."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import cfstore
from cftrain.checkpoints import load_model
from cftrain.cli import main
from cftrain.config import load_config
from cftrain.errors import ConfigError, RunError
from cftrain.experiment import cross_validate
from cftrain.heatmap import HeatmapOptions, Source, explain_slides, heatmap_run
from cftrain.heatmap.overview import extremes
from cftrain.models import BagBatch
from cftrain.prediction.trained import read_trained
from cftrain.report import write_report

SMALL = ["train.epochs=2", "train.accumulate=4", "train.select_from=1", "train.learning_rate=0.01"]
CROSSFUSION = ("model.embed_dim=8", "model.n_heads=2", "train.epochs=1")
ABMIL = ("model.name=abmil", "model.hidden_dim=8", "model.attention_dim=4")


@pytest.fixture(scope="module")
def store(demo_store, tmp_path_factory):
    """The demo's store with three folds."""
    own = cfstore.open(shutil.copytree(demo_store.path, tmp_path_factory.mktemp("own") / "store"))
    own.make_splits(3, "DEMO", name="three")
    return own


@pytest.fixture(scope="module")
def train(store, tmp_path_factory):
    """A run with these settings, made once."""
    made = {}

    def run(*settings):
        if settings not in made:
            flags = {"data.cohort": "DEMO", "data.splits": "three"}
            config = load_config(flags=flags, settings=[*SMALL, *settings])
            made[settings] = cross_validate(
                config, store.path, tmp_path_factory.mktemp("runs") / "run", device="cpu"
            ).path
        return made[settings]

    return run


@pytest.fixture
def abmil(train, tmp_path):
    """A copy of a run of one scale, to write into."""
    return shutil.copytree(train(*ABMIL), tmp_path / "abmil")


@pytest.fixture
def crossfusion(train, tmp_path):
    """A copy of a run of three scales, to write into."""
    return shutil.copytree(train(*CROSSFUSION), tmp_path / "crossfusion")


def validated(run, fold):
    """The first slide that a fold was validated on, and all (slide, risk) of that fold."""
    table = pq.read_table(run / "predictions.parquet", columns=["slide_id", "fold", "risk"]).to_pylist()
    own = [(row["slide_id"], row["risk"]) for row in table if row["fold"] == fold]
    return own[0][0], own


def model_of(run, fold):
    return load_model(run / f"fold_{fold}" / "last_epoch.safetensors")


def batch_of(store, slide_id):
    bags = store.slide(slide_id).bags
    return BagBatch.pack([slide_id], [{scale: torch.from_numpy(bag.features) for scale, bag in bags.items()}])


def scores_of(folder, column, scale):
    table = pq.read_table(folder / "patches.parquet").to_pylist()
    return np.array([row[column] for row in table if row["scale"] == scale])


# -- which model speaks of a slide ---------------------------------------------------------------------


@pytest.mark.parametrize("fold", [0, 2])
def test_a_slide_of_the_run_is_explained_by_the_fold_that_was_not_trained_on_it(abmil, store, fold):
    slide, own = validated(abmil, fold)
    done = heatmap_run(abmil, slide)
    assert done.path == abmil / "heatmaps" / slide
    assert done.about["folds"] == [fold]
    assert done.about["folds_trained_on_patient"] == [each for each in range(3) if each != fold]
    assert "not trained on this slide's patient" in done.about["notes"][0]
    model = model_of(abmil, fold)
    expected = model.patch_maps(batch_of(store, slide))["attention"].scores[0].numpy()
    np.testing.assert_allclose(scores_of(done.path, "attention", 20), expected, rtol=1e-12)
    risks = np.array([risk for _, risk in own])
    assert done.about["risk"] == pytest.approx((dict(own)[slide] - risks.mean()) / risks.std(ddof=1), abs=1e-4)


def test_a_named_fold_that_was_trained_on_the_patient_is_used_and_said_aloud(abmil, store):
    slide, _ = validated(abmil, 0)
    done = heatmap_run(abmil, slide, options=HeatmapOptions(fold=1))
    assert "TRAINED on this slide's patient" in done.about["notes"][0]
    expected = model_of(abmil, 1).patch_maps(batch_of(store, slide))["attention"].scores[0].numpy()
    np.testing.assert_allclose(scores_of(done.path, "attention", 20), expected, rtol=1e-12)


def test_an_ensemble_shows_the_mean_of_its_folds_maps(crossfusion, store):
    slide, _ = validated(crossfusion, 0)
    done = heatmap_run(crossfusion, slide, options=HeatmapOptions(ensemble=True))
    assert done.about["folds"] == [0, 1, 2]
    assert "2 of them TRAINED" in done.about["notes"][0]
    maps = [model_of(crossfusion, fold).patch_maps(batch_of(store, slide)) for fold in range(3)]
    for name, scale in (("coarse-cross", 5), ("fine-cross", 20), ("source", 10), ("fused", 10)):
        expected = np.mean([own[name].scores[0].numpy() for own in maps], axis=0)
        np.testing.assert_allclose(
            scores_of(done.path, name.replace("-", "_"), scale), expected, rtol=1e-9, err_msg=name
        )
    assert done.about["maps"]["fused"]["attention_elsewhere"] == pytest.approx(
        np.mean([own["fused"].elsewhere[0] for own in maps])
    )


@pytest.fixture
def elsewhere(make_trident_h5, tmp_path):
    """A store of one slide of nobody's, with TRIDENT's attributes, on nested grids; no labels."""
    for scale, n in ((5, 4), (10, 16), (20, 64)):
        edge, side = 256 * 20 // scale, int(n**0.5)
        path = tmp_path / "h5" / f"{scale}x_256px_0px_overlap" / "features_toy" / "NEW-1.h5"
        make_trident_h5(path, scale, n_patches=n, dim=8)
        with h5py.File(path, "r+") as file:
            file["coords"][:] = [(x * edge, y * edge) for y in range(side) for x in range(side)]
    own = cfstore.open(tmp_path / "elsewhere", create=True)
    own.ingest(tmp_path / "h5", cfstore.IngestOptions(encoder="toy", cohort="NEW"))
    return own


def test_a_slide_that_the_run_does_not_know_is_explained_by_all_folds(crossfusion, elsewhere):
    done = heatmap_run(crossfusion, "NEW-1", source=Source(elsewhere.path))
    assert done.about["folds"] == [0, 1, 2]
    assert done.about["folds_trained_on_patient"] == []
    assert "does not know this slide's patient" in done.about["notes"][0]
    assert done.about["event"] is None
    assert done.about["mpp"] == 0.5  # level 0 is 20x
    assert "microns are nominal, 0.5 per pixel for 20x: no file gives them" in done.about["notes"]
    parents = [grid["parents"] for grid in done.about["grids"]]
    assert parents[1:] == ["the grids nest: every 10x patch lies in one 5x patch",
                           "the grids nest: every 20x patch lies in one 10x patch"]  # fmt: skip


# -- what is written -----------------------------------------------------------------------------------


def test_the_folder_holds_every_format_and_heatmap_json_lists_them(crossfusion, elsewhere):
    done = heatmap_run(crossfusion, "NEW-1", source=Source(elsewhere.path))
    there = {path.name for path in done.path.iterdir()}
    assert set(done.about["files"]) | {"index.html", "viewer"} == there
    assert {f"{scale}x{end}" for scale in (5, 10, 20) for end in (".geojson.gz", ".ome.tif")} <= there
    assert json.loads((done.path / "heatmap.json").read_text()) == done.about
    features = json.loads(gzip.decompress((done.path / "20x.geojson.gz").read_bytes()))["features"]
    rows = pq.read_table(done.path / "patches.parquet").to_pylist()
    with (done.path / "patches.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 4 + 16 + 64
    fine = [row for row in rows if row["scale"] == 20]
    assert [feature["geometry"]["coordinates"][0][0] for feature in features] == [[row["x"], row["y"]] for row in fine]
    assert [feature["properties"]["measurements"]["fine-cross"] for feature in features] == pytest.approx(
        [row["fine_cross"] for row in fine], rel=1e-6
    )


def test_only_the_maps_that_are_named_are_made(crossfusion):
    slide, _ = validated(crossfusion, 0)
    done = heatmap_run(crossfusion, slide, options=HeatmapOptions(maps=("source", "integrated")))
    assert list(done.about["maps"]) == ["source", "integrated-5x", "integrated-10x", "integrated-20x"]
    gap = done.about["maps"]["integrated-5x"]["completeness_gap"]
    assert 0 <= gap < 0.05  # standard deviations of the risk


def test_a_heatmap_is_replaced_and_anything_else_is_not(abmil, tmp_path):
    slide, _ = validated(abmil, 0)
    first = heatmap_run(abmil, slide, tmp_path / "out")
    second = heatmap_run(abmil, slide, tmp_path / "out", options=HeatmapOptions(maps=("attention",)))
    assert not (second.path / "gradient-20x.png").exists()
    assert (first.path / "attention.png").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="holds something else than a heatmap"):
        heatmap_run(abmil, slide, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_heatmap_that_cannot_be_replaced_is_still_there(abmil, tmp_path, monkeypatch):
    slide, _ = validated(abmil, 0)
    first = heatmap_run(abmil, slide, tmp_path / "out")
    rename = Path.rename

    def fails(path, target):
        if path.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RunError, match="cannot be written"):
        heatmap_run(abmil, slide, tmp_path / "out", options=HeatmapOptions(maps=("attention",)))
    assert json.loads((tmp_path / "out" / "heatmap.json").read_text()) == first.about
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_bag_without_coordinates_is_drawn_in_file_order_and_says_so(abmil, tmp_path):
    folder = tmp_path / "pt" / "x20" / "pt_files"
    folder.mkdir(parents=True)
    torch.save(torch.randn(7, 8, generator=torch.Generator().manual_seed(0)), folder / "PT-1.pt")
    own = cfstore.open(tmp_path / "pts", create=True)
    own.ingest(tmp_path / "pt", cfstore.IngestOptions(encoder="toy", scale=20, cohort="PT"))
    done = heatmap_run(abmil, "PT-1", source=Source(own.path))
    assert done.about["grids"][0]["unit"] == "file order"
    assert any("no coordinates" in note for note in done.about["notes"])
    assert not (done.path / "20x.geojson.gz").exists()
    assert "file order" in (done.path / "index.html").read_text()
    wsi = tmp_path / "PT-1.svs"
    wsi.write_bytes(b"")
    with pytest.raises(ConfigError):
        heatmap_run(abmil, "PT-1", source=Source(own.path), options=HeatmapOptions(wsi=wsi))


# -- the second opinion --------------------------------------------------------------------------------


def test_the_check_drops_the_patches_that_score_highest(abmil, store):
    slide, own = validated(abmil, 1)
    done = heatmap_run(abmil, slide, options=HeatmapOptions(check=True, share=0.2, draws=3))
    model, batch = model_of(abmil, 1), batch_of(store, slide)
    scores = model.patch_maps(batch)["attention"].scores[0]
    n = len(scores)
    kept = sorted(scores.argsort(descending=True, stable=True)[round(0.2 * n) :].tolist())
    without = BagBatch.pack([slide], [{20: batch.features[20][kept]}])
    risks = np.array([risk for _, risk in own])
    with torch.no_grad():
        expected = (float(model(without).risk) - risks.mean()) / risks.std(ddof=1)
    (row,) = [each for each in done.about["check"] if each["map"] == "attention"]
    assert (row["n_dropped"], row["n_patches"]) == (round(0.2 * n), n)
    assert row["without_top"] == pytest.approx(expected, abs=1e-4)
    assert len(row["without_random"]) == 3
    assert len(set(row["without_random"])) == 3


def test_random_choices_are_the_same_for_maps_of_one_scale(crossfusion):
    slide, _ = validated(crossfusion, 0)
    done = heatmap_run(crossfusion, slide, options=HeatmapOptions(maps=("source", "fused"), check=True, draws=2))
    one, two = done.about["check"]
    assert one["without_random"] == two["without_random"]


def test_attention_and_attribution_are_compared_by_rank(abmil):
    slide, _ = validated(abmil, 0)
    done = heatmap_run(abmil, slide)
    (row,) = done.about["agreement"]
    assert (row["map"], row["with"]) == ("attention", "|gradient-20x|")
    one, two = scores_of(done.path, "attention", 20), np.abs(scores_of(done.path, "gradient_20x", 20))
    ranks = [np.argsort(np.argsort(each)) for each in (one, two)]
    assert row["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


# -- a patient's slides as one bag ---------------------------------------------------------------------


def test_of_a_patients_bag_the_slides_own_patches_are_shown(train, store, tmp_path):
    run = shutil.copytree(train(*ABMIL, "data.unit=patient"), tmp_path / "by-patient")
    several = store.sql(
        "SELECT patient_id, list(slide_id ORDER BY slide_id) AS slides FROM slides "
        "GROUP BY patient_id HAVING count(*) > 1 ORDER BY patient_id LIMIT 1"
    ).to_pylist()[0]
    second = several["slides"][1]
    done = heatmap_run(run, second)
    assert done.about["bag"] == several["slides"]
    bags = [torch.from_numpy(store.slide(slide).bags[20].features) for slide in several["slides"]]
    whole = BagBatch.pack(["patient"], [{20: torch.cat(bags)}])
    (fold,) = done.about["folds"]
    scores = model_of(run, fold).patch_maps(whole)["attention"].scores[0].numpy()
    start = len(bags[0])
    np.testing.assert_allclose(scores_of(done.path, "attention", 20), scores[start : start + len(bags[1])], rtol=1e-9)
    assert any("slides of the patient at once" in note for note in done.about["notes"])


def test_a_real_slide_under_a_model_of_synthetic_data_says_which_of_them_is_invented(abmil, elsewhere):
    done = invoke(abmil, "--slide", "NEW-1", "--store", elsewhere.path)
    assert done.exit_code == 0, done.output
    assert "the model was trained on what `cfstore synth` invented" in done.output
    about = json.loads((abmil / "heatmaps" / "NEW-1" / "heatmap.json").read_text())
    assert (about["cohort"], about["trained_on"], about["patient_id"]) == ("NEW", "DEMO", None)
    assert "A model of synthetic data" in (abmil / "heatmaps" / "NEW-1" / "index.html").read_text()


def test_an_even_map_says_so(abmil, store):
    slide, _ = validated(abmil, 0)
    about = heatmap_run(abmil, slide, options=HeatmapOptions(maps=("attention",))).about
    scores = model_of(abmil, 0).patch_maps(batch_of(store, slide))["attention"].scores[0].numpy()
    ratio = about["maps"]["attention"]["highest_to_mean"]
    assert ratio == pytest.approx(scores.max() * len(scores), rel=1e-9)
    assert any("nearly even" in note for note in about["notes"]) == (ratio < 1.1)


# -- several slides ------------------------------------------------------------------------------------


def test_the_extremes_of_risk_are_on_one_page_and_the_report_links_to_it(abmil):
    done = explain_slides(abmil, (), top=2, options=HeatmapOptions(maps=("attention",)))
    table = pq.read_table(abmil / "predictions.parquet", columns=["slide_id", "fold", "risk"]).to_pandas()
    table["z"] = table.groupby("fold")["risk"].transform(lambda risk: (risk - risk.mean()) / risk.std(ddof=1))
    ordered = table.sort_values("z", ascending=False)["slide_id"].tolist()
    assert [each.about["slide_id"] for each in done.heatmaps] == [*ordered[:2], ordered[-1], ordered[-2]]
    page = done.overview.read_text()
    places = [page.index(f">{slide}</a>") for slide in (*ordered[:2], *reversed(ordered[-2:]))]
    assert places == sorted(places)
    for each in done.heatmaps:
        assert f"{each.path.name}/attention.png" in page
    report = write_report(abmil).read_text()
    assert 'href="heatmaps/index.html"' in report
    assert f'href="heatmaps/{ordered[0]}/index.html"' in report


def test_a_report_without_heatmaps_says_nothing_of_them(abmil):
    assert "heatmaps" not in write_report(abmil).read_text()


def test_no_slide_is_both_highest_and_lowest(abmil):
    highest, lowest = extremes(read_trained(abmil, "last"), 100)
    assert not set(highest) & set(lowest)
    assert len(highest) + len(lowest) == pq.read_table(abmil / "predictions.parquet").num_rows


# -- the command ---------------------------------------------------------------------------------------


def invoke(*words):
    return CliRunner().invoke(main, ["heatmap", *map(str, words)])


def test_the_command_prints_the_maps_and_where_to_look(abmil):
    slide, _ = validated(abmil, 0)
    done = invoke(abmil, "--slide", slide, "--check", "--draws", 2)
    assert done.exit_code == 0, done.output
    assert "SYNTHETIC DATA" in done.output
    assert "risk without the top 5 % of the patches" in done.output
    assert str(abmil / "heatmaps" / slide / "index.html") in done.output
    assert str(abmil / "heatmaps" / "index.html") in done.output
    assert 'href="heatmaps/index.html"' in (abmil / "report.html").read_text()


def test_json_is_heatmap_json_alone_on_stdout(abmil):
    slide, _ = validated(abmil, 0)
    done = invoke(abmil, "--slide", slide, "--json", "--map", "attention")
    assert json.loads(done.stdout) == json.loads((abmil / "heatmaps" / slide / "heatmap.json").read_text())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "--slide"),
        (("--slide", "A", "--top", 3), 2, "one of them"),
        (("--top", 3, "-o", "x"), 2, "-o is the folder of one heatmap"),
        (("--slide", "A", "--fold", 0, "--ensemble"), 2, "different things"),
        (("--slide", "DEMO-0001-O1"), 1, "near names: DEMO-0001-01"),
        (("--slide", "DEMO-0001-01", "--fold", 7), 1, "no fold 7; its folds are 0, 1, 2"),
        (("--slide", "DEMO-0001-01", "--map", "fused"), 1, "abmil has no map 'fused'; it has attention, gradient"),
        (("--slide", "DEMO-0001-01", "--store", "nowhere"), 1, "nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(abmil, words, code, said):
    done = invoke(abmil, *words)
    assert done.exit_code == code, done.output
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (abmil / "heatmaps").exists()


def test_a_store_that_moved_is_asked_for_by_name(abmil):
    provenance = json.loads((abmil / "provenance.json").read_text())
    (abmil / "provenance.json").write_text(json.dumps({**provenance, "store": "/moved/away"}))
    done = invoke(abmil, "--slide", "DEMO-0001-01")
    assert done.exit_code == 1
    assert "no longer at /moved/away; name where it is with --store" in done.output


def test_an_unfinished_run_is_refused(abmil):
    (abmil / "summary.json").unlink()
    done = invoke(abmil, "--slide", "DEMO-0001-01")
    assert done.exit_code == 1
    assert "not a finished run" in done.output
