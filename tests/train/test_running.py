"""`cftrain run` from the outside: several models and seeds, plans, resuming by name, what a person sees."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from cfstore.runs import read_runs
from cftrain import run_directory
from cftrain.cli import main
from cftrain.cli.progress import Progress
from cftrain.config import load_config
from cftrain.errors import ConfigError, RunError
from cftrain.experiment import prepare
from cftrain.planned import new_runs, resumed
from cftrain.summary import best_epoch_rule

QUICK = [
    "train.epochs=2", "train.accumulate=4", "train.select_from=1", "train.batch_patches=400",
    "model.hidden_dim=8", "model.attention_dim=4",
]  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run(store, *more):
    settings = [word for each in QUICK for word in ("--set", each)]
    words = ("run", "--cohort", "DEMO", "--model", "abmil", "--store", store.path, "--device", "cpu", *settings, *more)
    return invoke(*words)


def test_several_seeds_share_readings_and_each_is_a_run_that_can_be_repeated_alone(demo_store, tmp_path):
    done = run(demo_store, "--seeds", "2", "--out", tmp_path / "both", "--cache", "off")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["seed_7", "seed_8"]
    found = read_runs(tmp_path / "both")["runs"].to_pylist()
    assert [row["seed"] for row in found] == [7, 8]
    again = invoke(
        "run", "--config", tmp_path / "both" / "seed_8" / "config.toml", "--store", demo_store.path,
        "--out", tmp_path / "alone", "--device", "cpu",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    tables = [pq.read_table(tmp_path / name / "predictions.parquet") for name in ("both/seed_8", "alone")]
    assert tables[0].equals(tables[1])
    # the second seed's slides had all been read for the first
    read = [
        row["bytes_read"]
        for row in (json.loads((tmp_path / "both" / f"seed_{s}" / "summary.json").read_text()) for s in (7, 8))
    ]
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())["bytes_read"]
    assert sum(read) == alone


def test_a_plan_says_what_would_be_done_and_writes_nothing(demo_store, tmp_path):
    out = tmp_path / "run"
    done = run(demo_store, "--out", out, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    slides = demo_store.sql("SELECT count(*) AS n, count(DISTINCT patient_id) AS p FROM slides").to_pylist()[0]
    assert (plan["n_slides"], plan["n_patients"], plan["passes"]) == (slides["n"], slides["p"], 3)
    folds = demo_store.split_set("DEMO", "splits").folds
    assert [fold["fold"] for fold in plan["folds"]] == sorted(folds)
    assert sum(fold["val"] for fold in plan["folds"]) == slides["n"]
    stored = demo_store.sql("SELECT sum(n_patches * dim * 2)::BIGINT AS n FROM bags WHERE scale = 20").to_pylist()[0][
        "n"
    ]
    assert plan["bytes_per_pass"] == plan["cohort_bytes"] >= stored
    assert plan["runs"][0]["compute_seconds"] > 0
    assert plan["runs"][0]["step_bytes"] > plan["runs"][0]["n_parameters"] * 16
    text = run(demo_store, "--out", out, "--dry-run").stdout
    assert "nothing was trained or written" in text
    apart = json.loads(run(demo_store, "--out", out, "--dry-run", "--json", "--no-fuse").stdout)
    assert apart["bytes_per_pass"] > 4.9 * plan["bytes_per_pass"]
    assert not out.exists()


def test_resume_without_a_name_goes_on_with_the_latest_unfinished_run(demo_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        assert run(demo_store, "--out", f"runs/{name}").exit_code == 0
    (tmp_path / "runs/new/summary.json").unlink()
    again = invoke("run", "--resume", "--device", "cpu")
    assert again.exit_code == 0, again.output
    assert "runs/new" in again.stdout
    assert invoke("run", "--resume").output.strip().endswith("name its directory with --out")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--resume", "--model", "abmil"), 2, "leave out"),
        (("--resume", "--out", "nowhere"), 1, "no run to go on with"),
        (("--cohort", "DEMO", "--set", "train.loss=coxx"), 1, "nll, ce, cox"),
        (("--cohort", "DEMO", "--unit", "patch"), 2, "patch"),
        (("--cohort", "DEMO", "--set", "data.order_seed=-3"), 1, "data.order_seed"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(words, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("run", *words)
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output


def planned(models=(), seeds=1, out=None, tmp_path=None, **flags):
    settings = ["model.name=abmil"] if not models else []
    return new_runs(
        out, tmp_path / "runs", models, seeds, tmp_path, preset=None, file=None,
        flags={"data.cohort": "C", **flags}, settings=settings, stamp="now",
    )  # fmt: skip


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    assert [path.name for path in planned(tmp_path=tmp_path).outs] == ["C-abmil-now"]
    both = planned(("abmil", "crossfusion"), 2, tmp_path / "o", tmp_path)
    assert both.labels == ("abmil-seed_7", "abmil-seed_8", "crossfusion-seed_7", "crossfusion-seed_8")
    assert [config.train.seed for config in both.configs] == [7, 8, 7, 8]
    assert {config.order_seed for config in both.configs} == {7}
    assert [path.name for path in both.outs] == list(both.labels)


def test_runs_of_another_order_do_not_share_readings(demo_store, tmp_path):
    one, other = (load_config(flags={"data.cohort": "DEMO"}, settings=[f"train.seed={seed}"]) for seed in (1, 2))
    with pytest.raises(ConfigError, match=r"same \[data\] settings and data\.order_seed"):
        prepare([one, other], demo_store.path, device="cpu")


@pytest.mark.parametrize(
    ("select_from", "epochs", "said"), [(6, 20, " from epoch 6 on,"), (6, 3, " from epoch 3 on,"), (1, 9, "")]
)
def test_the_rule_of_the_best_epoch_says_from_which_epoch_on_it_chooses(select_from, epochs, said):
    settings = [f"train.select_from={select_from}", f"train.epochs={epochs}"]
    train = load_config(flags={"data.cohort": "C"}, settings=settings).train
    assert best_epoch_rule(train) == f"best epoch{said} on the reported fold (the paper's rule; optimistic)"


def test_nothing_to_go_on_with_is_said(tmp_path):
    with pytest.raises(RunError, match="no unfinished run here"):
        resumed(None, tmp_path, None, {}, ())


def test_runs_of_which_some_were_never_begun_are_not_gone_on_with_in_silence(demo_store, tmp_path, monkeypatch):
    begin, begun = run_directory.begin, []

    def stopped_at_the_second(out, config, provenance):
        if begun:
            raise KeyboardInterrupt
        begun.append(out.name)
        begin(out, config, provenance)

    monkeypatch.setattr(run_directory, "begin", stopped_at_the_second)
    assert run(demo_store, "--seeds", "2", "--out", tmp_path / "both").exit_code != 0
    assert begun == ["seed_7"]
    for out, runs in ((tmp_path / "both", tmp_path), (None, tmp_path)):
        with pytest.raises(RunError, match="both: stopped before all of its runs were begun; seed_8 would be missing"):
            resumed(out, runs, None, {}, ())
    shutil.rmtree(tmp_path / "both" / "seed_8")
    assert resumed(tmp_path / "both", tmp_path, None, {}, ()).outs == (tmp_path / "both" / "seed_7",)


def test_folders_that_are_locked_inside_of_a_run_are_no_runs_of_their_own(tmp_path):
    out = tmp_path / "run"
    run_directory.begin(out, load_config(flags={"data.cohort": "C"}), {"store": str(tmp_path / "store")})
    (out / "fold_1").mkdir()
    (out / "fold_1" / ".lock").touch()
    for where, runs in ((out, tmp_path), (None, tmp_path)):
        assert resumed(where, runs, None, {}, ()).outs == (out,)


def test_a_terminal_shows_every_fold_and_how_long_it_takes_and_a_pipe_shows_plain_lines(capsys):
    epoch = SimpleNamespace(epoch=1, train_loss=1.25, val_loss=1.5, c_index_patient=0.7, skipped=())
    work = SimpleNamespace(n_slides=50, wait_seconds=1.0, compute_seconds=9.0)
    cohort = SimpleNamespace(name="C", encoder="e", dim=8, scales=(20,), slides=[], n_patients=0)
    data = SimpleNamespace(
        cohort=cohort, splits=SimpleNamespace(name="s"), folds=[1, 2], excluded={"no label": ("a", "b")}
    )
    for live in (True, False):
        told = Progress((), [4], live=live)
        told.data(data, [1234])
        told.epoch(0, 0, epoch)
        told.epoch(0, 1, epoch)
        told.beat(SimpleNamespace(learners=("x/fold_0", "x/fold_1"), number=1, share=0.5, work=work))
        told.end()
        shown = capsys.readouterr().err
        assert "2 slides left out: no label (a, b)" in shown
        assert "fold 1  epoch 1/4  loss 1.250  val loss 1.500  val C-index 0.700 per patient" in shown
        assert ("#" in shown) == live
        assert ("10 % waiting for data" in shown) == live
        assert ("[#######.................]  30 %" in shown) == live


def test_a_model_in_closed_form_shows_no_training_loss_rather_than_nan(capsys):
    told = Progress((), [1], live=False)
    told.epoch(0, 0, SimpleNamespace(epoch=1, train_loss=math.nan, val_loss=0.7, c_index_patient=0.8, skipped=()))
    assert capsys.readouterr().err == "fold 0  epoch 1/1  loss n/a  val loss 0.700  val C-index 0.800 per patient\n"


def test_learners_that_part_and_meet_again_are_counted_once(capsys):
    work = SimpleNamespace(n_slides=50, wait_seconds=1.0, compute_seconds=9.0)
    told = Progress((), [4], live=True)
    cohort = SimpleNamespace(name="C", encoder="e", dim=8, scales=(20,), slides=[], n_patients=0)
    told.data(SimpleNamespace(cohort=cohort, splits=SimpleNamespace(name="s"), folds=[1, 2], excluded={}), [1234])
    for learners, number in ((("a",), 2), (("a", "b"), 3), (("a", "b"), 4)):
        told.beat(SimpleNamespace(learners=learners, number=number, share=1.0, work=work))
    assert capsys.readouterr().err.splitlines()[-1].startswith("[########################] 100 %")


def test_tensorboard_without_its_package_says_what_to_install(demo_store, tmp_path):
    if importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is installed")
    done = run(demo_store, "--out", tmp_path / "run", "--tensorboard")
    assert done.exit_code == 1
    assert "pip install 'crossfusion-store[tensorboard]'" in done.output


def test_tensorboard_events_are_written_where_the_package_is_there(demo_store, tmp_path):
    pytest.importorskip("tensorboard")
    done = run(demo_store, "--out", tmp_path / "run", "--tensorboard")
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "run").glob("fold_*/events.out.tfevents.*"))) == 5
