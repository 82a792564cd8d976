"""Graphs, parents and coordinates on their way from the store to a model's batch."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cfstore
from cfstore.errors import StoreWriteError
from cfstore.synth import synthesize
from cftrain.cache import plan_cache
from cftrain.cli import main
from cftrain.config import DataConfig, load_config
from cftrain.data import load_data
from cftrain.errors import MissingExtraError, RunError
from cftrain.experiment import Watcher, cross_validate
from cftrain.extras import ExtraReader, derive_missing, extra_bytes
from cftrain.feed import Feed
from cftrain.fitting_models import fitting_models
from cftrain.order import Visit
from cftrain.survival import TimeBins
from cftrain.training_fold import FoldData
from cftrain.zoo import MODELS
from cftrain.zoo.extras import coords, mean, nearest, parents, similar

CPU = torch.device("cpu")
ALL = (coords(20), nearest(20, 4), nearest(10, 8), parents(20, 10), similar(20, 8))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """16 slides at three scales with coordinates; graphs derived by the first test that needs them."""
    base = tmp_path_factory.mktemp("extras")
    synthesize(base / "h5", slides=16, patches=40, dim=8, seed=5)
    store = cfstore.open(base / "store", create=True)
    store.ingest(base / "h5", cfstore.IngestOptions(encoder="toy"))
    return store


@pytest.fixture(scope="module")
def without_coordinates(tmp_path_factory):
    """The same kind of slides as .pt files, which hold features alone."""
    base = tmp_path_factory.mktemp("bare")
    synthesize(base / "h5", slides=16, patches=40, dim=8, seed=5)
    source = cfstore.open(base / "store", create=True)
    source.ingest(base / "h5", cfstore.IngestOptions(encoder="toy"))
    folder = base / "pt" / "x20"
    folder.mkdir(parents=True)
    for row in source.sql("SELECT slide_id FROM slides").to_pylist():
        features = source.slide(row["slide_id"]).bags[20].features
        torch.save(torch.from_numpy(features.astype(np.float32)), folder / f"{row['slide_id']}.pt")
    bare = cfstore.open(base / "bare", create=True)
    tables = [path for path in (base / "h5").iterdir() if path.suffix == ".csv"]
    bare.ingest(base / "pt", cfstore.IngestOptions(encoder="toy", scale=20, clinical=tables[0]))
    return bare


def derived(store, extras=ALL):
    data = load_data(store.path, DataConfig(cohort="DEMO"), {"any": [5, 10, 20]}, 0, {"any": extras})
    ids = [slide.slide_id for slide in data.cohort.slides]
    derive_missing(store, data.cohort.encoder, extras, ids, lambda done, total: None)
    return data


def batches(data, extras, cache="off"):
    plan = plan_cache(cache, cohort_bytes=1 << 20, ram_free=1 << 34, gpu_free=None, jobs=1)
    feed = Feed(data, (10, 20), DataConfig(cohort="DEMO"), CPU, plan, extras)
    visits = [Visit(example, place) for place, example in enumerate(data.examples)]
    packs = [visits[:3], visits[3:]]
    found = []
    for _ in range(2):
        with feed.window(packs) as window:
            for pack in packs:
                batch = window.batch(pack, (10, 20), extras)
                found.append((batch.slide_ids, {extra: rows.clone() for extra, rows in batch.extras.items()}))
                window.done(pack)
    return found


def test_neighbours_in_a_batch_are_those_that_lie_nearest(store):
    data = derived(store)
    ids, extras = batches(data, ALL)[0]
    starts = np.cumsum([0, *(store.slide(slide_id).bags[20].n_patches for slide_id in ids)])
    for slide_id, start, stop in zip(ids, starts, starts[1:], strict=False):
        places = store.slide(slide_id).bags[20].coords.astype(float)
        assert np.array_equal(extras[coords(20)][start:stop], places)
        for row, named in enumerate(extras[nearest(20, 4)][start:stop].numpy()):
            distances = np.hypot(*(places - places[row]).T)
            distances[row] = np.inf
            expected = np.argsort(distances, kind="stable")[:4]
            assert (named - start).tolist() == expected.tolist()


def test_parents_in_a_batch_hold_the_patch(store):
    data = derived(store)
    ids, extras = batches(data, ALL)[1]
    fine, coarse = (np.concatenate([store.slide(i).bags[scale].coords for i in ids]) for scale in (20, 10))
    slide_of_fine = np.repeat(np.arange(len(ids)), [store.slide(i).bags[20].n_patches for i in ids])
    slide_of_coarse = np.repeat(np.arange(len(ids)), [store.slide(i).bags[10].n_patches for i in ids])
    named = extras[parents(20, 10)].numpy()
    has = named >= 0
    assert has.any()
    inside = fine[has] - coarse[named[has]]
    assert (inside >= 0).all()
    assert (slide_of_fine[has] == slide_of_coarse[named[has]]).all()


def test_what_is_kept_in_ram_comes_back_the_same(store):
    data = derived(store)
    off, kept = batches(data, ALL), batches(data, ALL, cache="ram")
    for (ids, extras), (other_ids, others) in zip(off, kept, strict=True):
        assert ids == other_ids
        assert all(torch.equal(extras[extra], others[extra]) for extra in ALL)


def test_bytes_of_extras_are_those_of_the_arrays(store):
    data = derived(store)
    slide = data.cohort.slides[0]
    reader = ExtraReader(store, "toy", ALL, [slide.slide_id])
    assert reader.with_coords
    read = reader.read(store.slide(slide.slide_id))
    assert extra_bytes(ALL, slide.n_patches) == sum(rows.nbytes for rows in read.values())


def test_prototypes_and_means_are_of_the_training_slides_alone(store):
    data = derived(store, (*ALL, mean(20)))
    fold = FoldData(data, data.folds[0], TimeBins((10.0,)))
    first = data.folds[0].train[0]
    expected = store.slide(first.slide_ids[0]).bags[20].features.astype(float).mean(0)
    np.testing.assert_allclose(fold.means(20)[0], expected, atol=1e-4)
    assert len(fold.means(20)) == len(fold.time_months) == len(data.folds[0].train)
    patches = np.concatenate([store.slide(each.slide_ids[0]).bags[20].features for each in data.folds[0].train])
    centres = fold.prototypes(20, 3).numpy()
    distance = ((patches[:, None].astype(float) - centres) ** 2).sum(2)
    again = np.stack([patches[distance.argmin(1) == k].astype(float).mean(0) for k in range(3)])
    np.testing.assert_allclose(again, centres, atol=0.05)


def test_a_store_without_coordinates_names_what_is_missing(without_coordinates):
    with pytest.raises(MissingExtraError, match="any needs 8 nearest patches at 20x, and no slide of encoder toy"):
        load_data(without_coordinates.path, DataConfig(), {"any": [20]}, 0, {"any": (nearest(20),)})


def test_all_models_are_those_that_the_features_allow(without_coordinates, store):
    def fitting(where, **flags):
        return fitting_models(where.path, preset=None, file=None, flags=flags, settings=[])

    every = fitting(store)
    assert every.models == tuple(MODELS)
    bare = fitting(without_coordinates)
    assert {"abmil", "mean-cox"} <= set(bare.models)
    assert bare.left_out["crossfusion"] == "needs 5x, 10x, 20x, there is 20x"


def test_a_few_slides_with_coordinates_do_not_shrink_the_cohort_of_all_models(
    without_coordinates, store, tmp_path, monkeypatch
):
    n_slides = len(store.cohort("DEMO", scales=[20]).slides)
    ids = [slide.slide_id for slide in store.cohort("DEMO", scales=[20]).slides]

    def fitting(bare):
        monkeypatch.setattr("cftrain.fitting_models.slides_without_coordinates", lambda *_: {20: set(ids[:bare])})
        return fitting_models(store.path, preset=None, file=None, flags={}, settings=[])

    few = fitting(n_slides - 1)
    said = f"and only 1 of {n_slides} slides have coordinates"
    assert few.left_out["patch-gcn"].endswith(said)
    assert "abmil" in few.models
    assert "patch-gcn" in fitting(n_slides // 10).models


def test_a_run_that_cannot_derive_what_it_needs_has_not_begun(store, tmp_path, monkeypatch):
    def refuse(*_):
        raise StoreWriteError("read-only")

    monkeypatch.setattr("cftrain.experiment.derive_missing", refuse)
    config = load_config(flags={"data.cohort": "DEMO", "model.name": "mean-cox"})
    for _ in range(2):  # the same command may be given again
        with pytest.raises(StoreWriteError):
            cross_validate(config, store.path, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(RunError, match="holds files already"):
        cross_validate(config, store.path, tmp_path / "mine")


def test_a_run_of_the_floor_derives_means_and_has_one_epoch(store, tmp_path):
    told = []
    config = load_config(flags={"data.cohort": "DEMO", "model.name": "mean-cox"})
    done = cross_validate(
        config, store.path, tmp_path / "run", watch=Watcher(on_derive=lambda done, total: told.append((done, total)))
    )
    assert done.summary["c_index"]["mean"] > 0
    lines = (tmp_path / "run" / "fold_0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1]


def test_model_all_says_what_is_left_out(without_coordinates, tmp_path):
    told = CliRunner().invoke(
        main, ["run", "--store", str(without_coordinates.path), "--cohort", "DEMO", "--model", "all", "--dry-run"]
    )
    assert "model crossfusion left out: needs 5x, 10x, 20x, there is 20x" in told.stderr
