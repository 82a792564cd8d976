"""Where slides come from: a condition instead of a cohort, tars instead of a store, shard after shard."""

from __future__ import annotations

import json
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from cftrain.cache import CachePlan
from cftrain.cli import main
from cftrain.config import DataConfig, load_config
from cftrain.data import load_data
from cftrain.errors import ConfigError, MissingScaleError
from cftrain.experiment import Watcher, cross_validate
from cftrain.feed import Feed
from cftrain.order import Visit, cohort_places

SCALES = (5, 10, 20)
QUICK = ["train.epochs=2", "train.select_from=1", "model.hidden_dim=8", "model.attention_dim=4"]


@pytest.fixture(scope="module")
def tars(demo_store, tmp_path_factory):
    """The cohort as four tars, and the pattern that names them."""
    folder = tmp_path_factory.mktemp("tars") / "demo"
    demo_store.export(folder, shard_slides=7)
    return f"{folder}/{{000000..000003}}.tar"


def load(store, **settings):
    return load_data(store, DataConfig(**settings), {"crossfusion": SCALES}, seed=0)


def invoke(*arguments):
    settings = [text for setting in QUICK for text in ("--set", setting)]
    given = ["run", "--model", "abmil", "--device", "cpu", *map(str, arguments), *settings]
    return CliRunner().invoke(main, given)


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


# -- tars ----------------------------------------------------------------------------------------


def test_tars_alone_give_the_slides_labels_folds_and_features_of_the_store(demo_store, tars, tmp_path):
    ours = load(demo_store.path, cohort="DEMO")
    theirs = load(tmp_path / "no store", shards=tars)
    assert theirs.cohort.slides == ours.cohort.slides
    assert theirs.folds == ours.folds
    assert theirs.patients.keys() == ours.patients.keys()
    step = [Visit(example, place) for place, example in enumerate(ours.examples[:4])]
    feeds = [Feed(data, SCALES, DataConfig(), torch.device("cpu")) for data in (ours, theirs)]
    with feeds[0].window([step]) as one, feeds[1].window([step]) as other:
        for scale in SCALES:
            assert torch.equal(*(window.batch(step, SCALES).features[scale] for window in (one, other)))


def test_a_run_on_tars_in_random_order_has_the_numbers_of_the_run_on_the_store(demo_store, tars, tmp_path):
    for name, flags in (
        ("store", {"data.cohort": "DEMO"}),
        ("tars", {"data.shards": tars, "data.order": "shuffled"}),
    ):
        config = load_config(flags={"model.name": "abmil", **flags}, settings=QUICK)
        store = demo_store.path if name == "store" else tmp_path / "none"
        cross_validate(config, store, tmp_path / name, device="cpu")
    one, other = (pq.read_table(tmp_path / name / "predictions.parquet").to_pandas() for name in ("store", "tars"))
    np.testing.assert_array_equal(one.slide_id, other.slide_id)
    np.testing.assert_allclose(one.risk, other.risk, rtol=0, atol=1e-6)


def test_tars_are_visited_one_after_another_from_beginning_to_end(tars, tmp_path):
    data = load(tmp_path / "none", shards=tars, order="shard")
    assert data.order is not None
    assert [len(shard) for shard in data.order.shards] == [7, 7, 7, 3]
    place = {s: (i, at) for i, shard in enumerate(data.order.shards) for at, s in enumerate(shard)}
    for number in range(3):
        places = cohort_places(data.examples, 7, number, data.order)
        visited = [place[name] for name in sorted(places, key=places.get)]
        runs = [list(run) for _, run in groupby(visited, key=lambda at: at[0])]
        assert len(runs) == 4
        assert all(run == sorted(run) for run in runs)


def test_the_command_trains_on_tars_without_a_store_and_says_where_the_data_came_from(tars, tmp_path):
    out = tmp_path / "run"
    done = invoke("--shards", tars, "--store", tmp_path / "none", "--out", out)
    assert done.exit_code == 0, done.output
    assert summary_of(out)["cohort"] == "DEMO"
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["shards"] == tars
    assert [path.rsplit("/", 1)[1] for path in provenance["tars"]] == [f"{i:06}.tar" for i in range(4)]
    assert all(digest.startswith("sha256:") for digest in provenance["tars"].values())
    assert "store" not in provenance
    assert 'order = "shard"' in (out / "config.toml").read_text()
    assert "cache: " in done.stderr
    assert done.stderr.count("cache: ") == 1


@pytest.mark.slow
def test_folds_side_by_side_read_tars_too(tars, tmp_path):
    config = load_config(flags={"model.name": "abmil", "data.shards": tars}, settings=QUICK)
    plans: list[CachePlan] = []
    one = cross_validate(config, tmp_path, tmp_path / "one", device="cpu")
    two = cross_validate(config, tmp_path, tmp_path / "two", device="cpu", jobs=2, watch=Watcher(on_cache=plans.append))
    np.testing.assert_allclose(two.summary["c_index"]["folds"], one.summary["c_index"]["folds"], atol=1e-9)
    assert [plan.why.endswith("in each of 2 jobs") for plan in plans] == [True]


# -- a condition ---------------------------------------------------------------------------------


def test_a_condition_chooses_slides_and_folds_are_made_by_patient(demo_store):
    ages = {row["patient_id"]: row["age"] for row in demo_store.sql("SELECT patient_id, age FROM patients").to_pylist()}
    limit = sorted(ages.values())[len(ages) // 4]
    data = load(demo_store.path, where=f"cohort = 'DEMO' AND age > {limit}", folds=3)
    assert data.cohort.slides
    assert all(ages[slide.patient_id] > limit for slide in data.cohort.slides)
    assert len(data.cohort.slides) < 24
    assert data.splits.name == "made3-seed0"
    for fold in data.folds:
        assert not {slide.patient_id for slide in fold.train} & {slide.patient_id for slide in fold.val}


def test_a_named_split_set_holds_for_the_slides_that_meet_the_condition(demo_store):
    data = load(demo_store.path, cohort="DEMO", where="age > 0", splits="splits")
    assert data.folds == load(demo_store.path, cohort="DEMO", splits="splits").folds


def test_a_model_whose_scales_are_missing_is_refused_for_a_condition_too(demo_store):
    with pytest.raises(MissingScaleError, match=r"needs 5x, 40x; encoder toy of the chosen slides has 5x, 10x, 20x"):
        load_data(demo_store.path, DataConfig(where="age > 0"), {"crossfusion": (5, 40)}, seed=0)


def test_the_command_says_the_condition_in_summary_provenance_and_report(demo_store, tmp_path):
    out = tmp_path / "run"
    done = invoke("--where", "age > 1 OR age IS NULL", "--store", demo_store.path, "--out", out)
    assert done.exit_code == 0, done.output
    assert summary_of(out)["where"] == "age > 1 OR age IS NULL"
    assert json.loads((out / "provenance.json").read_text())["where"] == "age > 1 OR age IS NULL"
    assert "age &gt; 1 OR age IS NULL" in (out / "report.html").read_text()


@pytest.mark.parametrize("where", ["agee > 40", "age > 40) --", "age > 4000"])
def test_a_condition_that_cannot_be_used_is_one_line(where, demo_store, tmp_path):
    done = invoke("--where", where, "--store", demo_store.path, "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert "--where" in done.output
    assert "Traceback" not in done.output


# -- order and cache -----------------------------------------------------------------------------


def test_a_store_visited_by_shard_permutes_slides_within_it(demo_store):
    data = load(demo_store.path, cohort="DEMO", order="shard")
    assert data.order is not None
    assert not data.order.sequential
    assert {slide_id for shard in data.order.shards for slide_id in shard} == {s.slide_id for s in data.cohort.slides}


def test_a_gpu_cache_on_the_cpu_is_refused_before_anything_is_written(demo_store, tmp_path):
    config = load_config(flags={"data.cohort": "DEMO", "data.cache": "gpu"})
    with pytest.raises(ConfigError, match="on the CPU"):
        cross_validate(config, demo_store.path, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_caching_changes_no_number_of_a_run(demo_store, tmp_path):
    risks = []
    for cache in ("off", "ram", "ram:4KB"):
        config = load_config(flags={"data.cohort": "DEMO", "model.name": "abmil", "data.cache": cache}, settings=QUICK)
        cross_validate(config, demo_store.path, tmp_path / cache, device="cpu")
        risks.append(pq.read_table(tmp_path / cache / "predictions.parquet")["risk"].to_numpy())
    np.testing.assert_array_equal(risks[0], risks[1])
    np.testing.assert_array_equal(risks[0], risks[2])
