"""Nested validation: an inner learner of each fold chooses the epoch, looking at training patients alone."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from lifelines.utils import concordance_index
from safetensors import safe_open

import cfstore
from cfstore.synth import synthesize
from cftrain.cli import main
from cftrain.cli.progress import Progress
from cftrain.compare import compare
from cftrain.config import TrainConfig, load_config
from cftrain.errors import ConfigError, RunError
from cftrain.examples import Example
from cftrain.experiment import Watcher, cross_validate, prepare
from cftrain.feed import Work
from cftrain.folds import FoldExamples, inner_fold
from cftrain.forecast import forecast
from cftrain.learner import bins_of
from cftrain.nested import chosen_epoch, nested_rule, with_choice
from cftrain.report import write_report
from cftrain.results import Epoch, FoldResult, Predictions
from cftrain.survival import TimeBins

SETTINGS = [
    "train.epochs=4", "train.accumulate=8", "train.select_from=2", "train.batch_patches=200",
    "train.learning_rate=3e-3", "model.name=abmil", "model.hidden_dim=8",
    "model.attention_dim=4", "model.dropout=0.3",
]  # fmt: skip


def config(*more):
    return load_config(flags={"data.cohort": "DEMO"}, settings=[*SETTINGS, *more])


def nested(*more):
    return config("train.nested=0.3", *more)


# -- the rule, on numbers made by hand ---------------------------------------------------------------


def epochs(*c_indices):
    return tuple(Epoch(number, 1.0, 1.0, c, 0.5, 1e-4, 1.0) for number, c in enumerate(c_indices, start=1))


@pytest.mark.parametrize(
    ("c_indices", "select_from", "chosen"),
    [
        ((0.5, 0.6, 0.7, 0.65), 1, 3),
        ((0.5, 0.7, 0.7, 0.65), 1, 2),  # the first of equals
        ((0.9, 0.8, 0.6, 0.7), 3, 4),  # not before select_from
        ((0.9, 0.8, 0.6, 0.7), 9, 4),  # a shorter schedule: its last
        ((math.nan, 0.2, math.nan, 0.1), 1, 2),
        ((0.9, math.nan, math.nan, math.nan), 2, None),
    ],
)
def test_the_chosen_epoch_is_the_first_of_highest_c_index_that_may_be_selected(c_indices, select_from, chosen):
    assert chosen_epoch(epochs(*c_indices), TrainConfig(epochs=4, select_from=select_from)) == chosen


def example(number, months, event, patches=10):
    return Example(f"S{number}", f"P{number}", (f"S{number}",), months, event, {20: patches})


BINS = TimeBins((12.0, 24.0))


def hand_made(n_epochs, inner_c):
    """A fold of three validated slides whose order is right after epoch 2 alone, and the inner learner's result."""
    val = (example(1, 5.0, event=True), example(2, 15.0, event=True), example(3, 30.0, event=False))
    logits = np.zeros((n_epochs, 3, 3))
    logits[:, :, 0] = [-1.0, 0.0, 1.0]  # hazards rise the wrong way round
    logits[1, :, 0] = [1.0, 0.0, -1.0]
    nothing = Predictions(np.zeros(3), None, 0.0)
    work = Work(n_slides=10, compute_seconds=2.0)
    own = FoldResult(
        FoldExamples(4, (), val), BINS, epochs(*[0.0, 1.0, 0.0, 0.0][:n_epochs]), 1, nothing, nothing, work, logits
    )
    held_out = (example(7, 8.0, event=True), example(8, 9.0, event=False))
    inner = FoldResult(FoldExamples(4, (), held_out, inner=True), BINS, epochs(*inner_c), 1, nothing, nothing, work)
    return own, inner


def test_what_is_reported_is_the_folds_own_model_at_the_inner_ones_epoch():
    settings = config("train.nested=0.2", "train.epochs=4")
    own, inner = hand_made(4, (0.1, 0.9, 0.3, 0.2))
    found = with_choice(own, inner, settings)
    # hazard = sigmoid(logit), survival = running product of 1 - hazard, risk = -sum of survival
    hazard = 1 / (1 + np.exp(-own.logits[1]))
    np.testing.assert_allclose(found.nested.prediction.risk, -np.cumprod(1 - hazard, axis=1).sum(axis=1))
    assert (found.nested.epoch, found.nested.c_index, found.nested.c_index_patient) == (2, 1.0, 1.0)
    assert (found.nested.n_held_out, found.nested.n_held_out_events, found.nested.c_index_held_out) == (2, 1, 0.9)
    assert found.work == Work(n_slides=20, compute_seconds=4.0)
    assert "best on 20 % of the training patients" in nested_rule(settings, [(4, found.nested)])
    worse = with_choice(own, hand_made(4, (0.1, 0.2, 0.9, 0.2))[1], settings)
    assert (worse.nested.epoch, worse.nested.c_index) == (3, 0.0)  # the reported fold has no say


def test_where_no_epoch_has_a_c_index_it_is_the_last_of_the_schedule_and_said():
    settings = config("train.nested=0.2", "train.epochs=4")
    own, inner = hand_made(4, (0.9, math.nan, math.nan))  # patience ended the inner learner; epoch 1 is too early
    found = with_choice(own, inner, settings).nested
    assert (found.epoch, found.c_index, found.undecided) == (4, 0.0, True)
    assert "the schedule's last epoch in fold 4, where the C-index" in nested_rule(settings, [(4, found)])


# -- who is held out ---------------------------------------------------------------------------------


def fold_of(n_dead, n_alive, slides_each=2):
    people = [(f"P{n:03d}", n < n_dead) for n in range(n_dead + n_alive)]
    train = tuple(
        Example(f"{name}-{slide}", name, (f"{name}-{slide}",), 10.0 + row, event, {20: 5})
        for row, (name, event) in enumerate(people)
        for slide in range(slides_each)
    )
    return FoldExamples(2, train, (example(999, 3.0, event=True),))


@pytest.mark.parametrize("slides_each", [1, 3])  # as many examples as patients, as with unit=patient; and more
def test_the_inner_split_is_by_patient_by_event_and_within_the_training_part(slides_each):
    fold = fold_of(20, 30, slides_each)
    inner = inner_fold(fold, 0.2, seed=7)
    train, val = ({each.patient_id for each in part} for part in (inner.train, inner.val))
    assert not train & val
    assert train | val == {each.patient_id for each in fold.train}
    assert sorted(each.name for each in inner.train + inner.val) == sorted(each.name for each in fold.train)
    assert len(val) == 10
    assert len({each.patient_id for each in inner.val if each.event}) == 4
    assert (inner.number, inner.inner, inner.name) == (2, True, "fold 2 inner")


def test_the_inner_split_is_a_function_of_seed_fold_and_training_patients():
    fold = fold_of(20, 30)
    one = inner_fold(fold, 0.2, 7)
    assert inner_fold(fold, 0.2, 7) == one
    assert inner_fold(fold, 0.2, 8) != one
    other_val = FoldExamples(2, fold.train[::-1], ())
    assert {each.name for each in inner_fold(other_val, 0.2, 7).val} == {each.name for each in one.val}
    other_number = FoldExamples(3, fold.train, fold.val)
    assert {each.name for each in inner_fold(other_number, 0.2, 7).val} != {each.name for each in one.val}


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5])
@pytest.mark.parametrize(("n_dead", "n_alive"), [(1, 1), (1, 9), (2, 0), (2, 1), (3, 0), (9, 1)])
def test_there_is_always_a_death_to_learn_from_and_somebody_held_out(n_dead, n_alive, share):
    inner = inner_fold(fold_of(n_dead, n_alive), share, 7)
    assert inner.val
    assert any(each.event for each in inner.train)
    assert n_dead == 1 or any(each.event for each in inner.val)


def test_a_single_training_patient_cannot_be_cut_in_two():
    with pytest.raises(ConfigError, match=r"fold 2 has a single training patient.*train\.nested"):
        inner_fold(fold_of(1, 0), 0.2, 7)


@pytest.mark.parametrize("share", ["-0.1", "0.51", "1"])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigError, match=r"train\.nested must lie between 0 and 0\.5"):
        config(f"train.nested={share}")


# -- whole runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """40 synthetic slides at three scales, with labels and five folds."""
    base = tmp_path_factory.mktemp("nested")
    synthesize(base / "h5", slides=40, patches=24, dim=8, seed=3)
    made = cfstore.open(base / "store", create=True)
    made.ingest(base / "h5", cfstore.IngestOptions(encoder="toy"))
    return made


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    return cross_validate(nested(), store.path, tmp_path_factory.mktemp("whole") / "run", device="cpu")


@pytest.fixture(scope="module")
def plain(store, tmp_path_factory):
    return cross_validate(config(), store.path, tmp_path_factory.mktemp("plain") / "run", device="cpu")


def log(path):
    return [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]


def logs(run):
    return {path.relative_to(run): log(path) for path in sorted(run.glob("fold_*/**/metrics.jsonl"))}


def weights(run):
    """Every tensor by its bytes, and the epoch, of every file."""
    found = {}
    for path in sorted(run.glob("fold_*/**/*.safetensors")):
        with safe_open(path, framework="np") as file:
            found[path.relative_to(run)] = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
            found[path.relative_to(run)]["epoch"] = file.metadata()["epoch"]
    return found


def assert_equal_runs(one, other):
    assert logs(one) == logs(other)
    assert weights(one) == weights(other)
    assert pq.read_table(one / "predictions.parquet").equals(pq.read_table(other / "predictions.parquet"))
    first, second = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    assert first["c_index_nested"] == second["c_index_nested"]
    assert [fold["epoch_nested"] for fold in first["folds"]] == [fold["epoch_nested"] for fold in second["folds"]]


def test_the_epoch_of_a_fold_is_the_best_of_its_inner_log_and_its_number_that_of_its_own(whole):
    predictions = pq.read_table(whole.path / "predictions.parquet").to_pandas()
    for fold in whole.summary["folds"]:
        folder = whole.path / f"fold_{fold['fold']}"
        inner = {row["epoch"]: row["c_index"] for row in log(folder / "inner" / "metrics.jsonl")[1:]}  # select_from=2
        assert fold["epoch_nested"] == max(inner, key=inner.get)
        assert fold["c_index_held_out"] == max(inner.values())
        own = log(folder / "metrics.jsonl")[fold["epoch_nested"] - 1]
        assert (fold["c_index_nested"], fold["c_index_patient_nested"]) == (own["c_index"], own["c_index_patient"])
        rows = predictions[predictions.fold == fold["fold"]]
        assert fold["c_index_nested"] == concordance_index(rows.time_months, -rows.risk_nested, rows.event)
        assert fold["n_held_out_events"] > 0
        assert {path.name for path in (folder / "inner").iterdir()} == {"metrics.jsonl"}
        assert not (folder / "checkpoint.safetensors").exists()
    assert len({fold["epoch_nested"] for fold in whole.summary["folds"]}) > 1  # not the last of all by chance
    found = whole.summary["c_index_patient_nested"]
    assert found["folds"] == [fold["c_index_patient_nested"] for fold in whole.summary["folds"]]
    assert found["mean"] == pytest.approx(np.mean(found["folds"]))
    assert found["rule"] == whole.summary["selection"]["c_index_nested"]


def test_no_other_number_changes_and_a_run_without_it_says_nothing_of_it(whole, plain):
    assert {name: rows for name, rows in logs(whole.path).items() if "inner" not in name.parts} == logs(plain.path)
    assert weights(whole.path) == weights(plain.path)
    one, other = (pq.read_table(run.path / "predictions.parquet") for run in (whole, plain))
    assert one.drop_columns(["risk_nested"]).equals(other)
    for name in ("c_index", "c_index_patient", "c_index_best_epoch", "c_index_patient_best_epoch", "assessment"):
        assert whole.summary[name] == plain.summary[name]
    assert "nested" not in json.dumps(plain.summary)
    assert not list(plain.path.glob("fold_*/inner"))


def test_inner_learners_share_the_readings_of_the_others(whole, plain):
    assert whole.summary["bytes_read"] == plain.summary["bytes_read"]


@pytest.mark.parametrize("way", [{"fuse": False}, pytest.param({"jobs": 2}, marks=pytest.mark.slow)])
def test_other_groups_give_the_same_numbers(whole, store, tmp_path, way):
    other = cross_validate(nested(), store.path, tmp_path / "run", device="cpu", **way)
    assert_equal_runs(whole.path, other.path)


class _StopError(Exception):
    pass


def cut_at(n_words, settings, store, out, monkeypatch, *, fuse=True):
    """A run that ends at the n-th thing it tells."""
    monkeypatch.setattr("cftrain.passes.BEAT_SECONDS", 0.0)
    left = [n_words]

    def count(*told):
        left[0] -= 1
        if left[0] == 0:
            raise _StopError

    watch = Watcher(on_beat=count, on_epoch=count, on_inner_epoch=count)
    cross_validate(settings, store.path, out, device="cpu", fuse=fuse, watch=watch)


@pytest.mark.parametrize(("at", "fuse"), [(3, True), (100, True), (200, True), (120, False)])
def test_a_nested_run_cut_anywhere_goes_on_to_the_same_end(whole, store, tmp_path, monkeypatch, at, fuse):
    out = tmp_path / "run"
    with pytest.raises(_StopError):
        cut_at(at, nested("train.checkpoint_minutes=0"), store, out, monkeypatch, fuse=fuse)
    cross_validate(nested(), store.path, out, device="cpu", resume=True)
    assert_equal_runs(whole.path, out)
    assert not list(out.glob("fold_*/**/checkpoint*"))


def test_another_share_is_not_gone_on_with(store, tmp_path, monkeypatch):
    def leave(*told):
        raise _StopError

    with pytest.raises(_StopError):
        cross_validate(nested(), store.path, tmp_path / "run", device="cpu", watch=Watcher(on_inner_epoch=leave))
    with pytest.raises(RunError, match=r"another train\.nested;"):
        cross_validate(config("train.nested=0.2"), store.path, tmp_path / "run", device="cpu", resume=True)


@pytest.mark.parametrize("more", [(), ("bins.fitted_on=cohort", "train.patience=1", "train.select_from=1")])
def test_labels_of_the_reported_part_have_no_say(store, tmp_path, more):
    """Turned round and given to others, they change what is measured there, and no epoch that was chosen."""
    settings = nested(*more)
    before = cross_validate(settings, store.path, tmp_path / "before", device="cpu")
    reported = store.split_set("DEMO", "splits").folds[0].val

    def turned(row):
        own = row["patient_id"] in reported
        return 200 - row["time_months"] if own else row["time_months"], int(row["event"] != own)

    changed = relabelled(store, tmp_path, turned)
    after = cross_validate(settings, changed.path, tmp_path / "after", device="cpu")
    one, other = before.summary["folds"][0], after.summary["folds"][0]
    assert other["n_val_patients"] == one["n_val_patients"]
    assert other["c_index"] != one["c_index"]
    assert other["epoch_nested"] == one["epoch_nested"]
    inner = "fold_0/inner/metrics.jsonl"
    assert log(before.path / inner) == log(after.path / inner)


def relabelled(store, folder, label):
    """A copy of the store in which `label` gives every patient months and event."""
    changed = cfstore.open(shutil.copytree(store.path, folder / "store"))
    rows = changed.sql("SELECT patient_id, time_months, event FROM patients ORDER BY patient_id").to_pylist()
    lines = [",".join([row["patient_id"], *map(str, label(row))]) for row in rows]
    (folder / "clinical.csv").write_text("\n".join(["patient_id,time_months,event", *lines]) + "\n")
    changed.import_clinical(folder / "clinical.csv", "DEMO")
    return changed


@pytest.mark.parametrize(
    ("n_deaths", "message"), [(4, r"fold \d inner: .*train\.nested=0"), (2, r"fold \d: 4 bins of 1 events")]
)
def test_too_few_deaths_for_the_bins_are_said_before_anything_is_written(n_deaths, message, store, tmp_path):
    query = f"SELECT patient_id FROM patients ORDER BY 1 LIMIT {n_deaths}"
    few = {row["patient_id"] for row in store.sql(query).to_pylist()}
    changed = relabelled(store, tmp_path, lambda row: (row["time_months"], int(row["patient_id"] in few)))
    with pytest.raises(ConfigError, match=message):
        cross_validate(nested(), changed.path, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_bins_of_an_inner_model_know_no_label_of_the_reported_part(store):
    settings = nested("bins.fitted_on=cohort")
    data = prepare([settings], store.path, device="cpu").data
    fold = data.folds[0]
    inner = inner_fold(fold, 0.3, settings.train.seed)
    deaths = [each.time_months for each in fold.train if each.event]
    assert bins_of(settings, data, inner).edges == pytest.approx(np.quantile(deaths, [0.25, 0.5, 0.75]))


def test_patience_ends_the_other_rules_as_ever_and_the_nested_one_at_its_own(store, tmp_path, monkeypatch):
    more = (
        "train.sampling=weighted",
        "train.epochs=8",
        "train.patience=1",
        "train.learning_rate=2e-2",
        "train.select_from=1",
    )
    plain = cross_validate(config(*more), store.path, tmp_path / "plain", device="cpu")
    both = cross_validate(nested(*more), store.path, tmp_path / "nested", device="cpu")
    assert any(fold["epochs"] < fold["epoch_nested"] for fold in both.summary["folds"])
    bests = [log(both.path / f"fold_{fold['fold']}" / "metrics.jsonl") for fold in both.summary["folds"]]
    assert any(
        max(row["c_index"] for row in rows) > fold["c_index_best_epoch"]
        for rows, fold in zip(bests, both.summary["folds"], strict=True)
    )  # a fold would have got better later
    for one, other in zip(plain.summary["folds"], both.summary["folds"], strict=True):
        same = ("epochs", "best_epoch", "c_index", "c_index_patient", "c_index_best_epoch")
        assert [one[name] for name in same] == [other[name] for name in same]
        assert len(log(both.path / f"fold_{one['fold']}" / "metrics.jsonl")) == 8  # it trained on, for the inner choice
    assert weights(plain.path) == weights(both.path)
    one, other = (pq.read_table(run.path / "predictions.parquet") for run in (plain, both))
    assert other.drop_columns(["risk_nested"]).equals(one)
    with pytest.raises(_StopError):
        cut_at(230, nested(*more, "train.checkpoint_minutes=0"), store, tmp_path / "cut", monkeypatch)
    cross_validate(nested(*more), store.path, tmp_path / "cut", device="cpu", resume=True)
    assert_equal_runs(both.path, tmp_path / "cut")


def test_the_risks_are_those_of_the_saved_model_where_the_last_epoch_was_chosen(store, tmp_path):
    """With one epoch that may be selected there is no choice, and no inner learner."""
    run = cross_validate(nested("train.select_from=4"), store.path, tmp_path / "run", device="cpu")
    table = pq.read_table(run.path / "predictions.parquet").to_pandas()
    assert (table.risk_nested == table.risk).all()
    assert {fold["epoch_nested"] for fold in run.summary["folds"]} == {4}
    assert "epoch 4, the only one that may be selected" in run.summary["c_index_nested"]["rule"]
    assert not list(run.path.glob("fold_*/inner"))


@pytest.mark.parametrize("more", [("data.unit=patient", "train.loss=cox"), ("data.order=independent",)])
def test_other_units_losses_and_orders_are_nested_too(store, tmp_path, more):
    run = cross_validate(nested("train.epochs=2", "train.select_from=1", *more), store.path, tmp_path, device="cpu")
    assert all(fold["epoch_nested"] in (1, 2) for fold in run.summary["folds"])


def test_a_model_that_is_only_fitted_needs_no_inner_one(store, tmp_path):
    settings = ["model.name=mean-cox", "train.nested=0.2"]
    fitted = load_config(flags={"data.cohort": "DEMO"}, settings=settings)
    assert not fitted.has_inner


# -- what a person sees ------------------------------------------------------------------------------


def command(store, *more):
    words = [word for each in SETTINGS for word in ("--set", each)]
    start = ["run", "--cohort", "DEMO", "--store", str(store.path), "--device", "cpu"]
    return CliRunner().invoke(main, [*start, *words, *map(str, more)])


def test_the_terminal_the_report_and_the_plan_speak_of_it(store, tmp_path):
    done = command(store, "--nested", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "nested = 0.2\n" in (tmp_path / "run" / "config.toml").read_text()
    found = summary["c_index_nested"]
    assert f"C-index, nested     {found['mean']:.3f} +- {found['std']:.3f} per slide" in done.stdout
    assert f"                    {found['rule']}\n" in done.stdout
    assert "fold 2 inner  done in" in done.stderr
    assert "fold 2 inner  epoch" not in done.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert found["rule"] in page
    assert f"{summary['c_index_patient_nested']['mean']:.3f}" in page
    assert "Nested, patient" in page
    share = command(store, "--nested", "--set", "train.nested=0.25", "--dry-run", "--json", "--out", tmp_path / "no")
    assert json.loads(share.stdout)["runs"][0]["held_out"] == 0.25
    assert "(20 % held out)" in command(store, "--nested", "--dry-run").stdout


def test_a_terminal_shows_inner_learners_below_the_folds_and_counts_them(capsys):
    measured = SimpleNamespace(epoch=1, train_loss=1.25, val_loss=1.5, c_index_patient=0.7, skipped=())
    work = SimpleNamespace(n_slides=50, wait_seconds=1.0, compute_seconds=9.0)
    cohort = SimpleNamespace(name="C", encoder="e", dim=8, scales=(20,), slides=[], n_patients=0)
    data = SimpleNamespace(cohort=cohort, splits=SimpleNamespace(name="s"), folds=[1, 2], excluded={})
    told = Progress((), [4], live=True, n_inner=1)
    told.data(data, [1234])
    told.inner_epoch(0, 1, measured)
    told.epoch(0, 1, measured)
    told.beat(SimpleNamespace(learners=("x/fold_0", "x/fold_1"), number=1, share=0.5, work=work))
    shown = capsys.readouterr().err.splitlines()
    assert [line[:15] for line in shown[-3:-1]] == ["fold 1  epoch 1", "fold 1 inner  e"]
    assert " 15 %" in shown[-1]  # 1.5 of 5 passes of 2 learners of 4
    inner = SimpleNamespace(number=1, inner=True)
    told.fold(0, SimpleNamespace(examples=inner, work=work, last_epoch=SimpleNamespace(c_index_patient=0.75)))
    told.epoch(0, 1, measured)
    told.end()
    shown = capsys.readouterr().err
    assert "fold 1 inner  done in 10 s (10 % waiting for data): C-index 0.750 per patient, held out" in shown
    assert "fold 1 inner  epoch" not in shown


def test_without_it_nothing_is_said(plain):
    page = write_report(plain.path).read_text()
    assert "Nested" not in page
    assert "nested validation" not in page
    assert "The second rule looks at the fold it reports" in page


def test_a_plan_counts_the_inner_learners(store):
    nested_plan, plain_plan = (prepare([each], store.path, device="cpu") for each in (nested(), config()))
    assert [len(team) for team in plain_plan.teams()] == [5]
    assert [len(team) for team in nested_plan.teams()] == [10]
    apart = [prepare([each], store.path, device="cpu", fuse=False) for each in (nested(), config())]
    sizes = [forecast(each).bytes_per_pass for each in apart]
    # an inner learner visits the training part of its fold, 4 of 5 parts
    assert sizes[0] / sizes[1] == pytest.approx(1.8, rel=0.01)
    jobs = prepare([nested()], store.path, device="cpu", jobs=2)
    assert [sum(spec.inner for spec in team) for team in jobs.teams()] in ([2, 3], [3, 2])


def test_compare_shows_the_runs_that_have_it_and_names_those_that_do_not(whole, plain, tmp_path):
    for name, run in (("with", whole), ("without", plain)):
        shutil.copytree(run.path, tmp_path / "runs" / name)
    found = compare([tmp_path / "runs"], metric="c_index_nested", replicates=10)
    (row,) = found.rows
    assert row.cells[0].mean == pytest.approx(whole.summary["c_index_nested"]["mean"])
    assert whole.summary["c_index_nested"]["rule"] in " ".join(found.caption)
    assert "runs/without: left out, it has no c_index_nested." in found.notes
    with pytest.raises(RunError, match=r"has no c_index_patient_nested; train with `cftrain run --nested`"):
        compare([tmp_path / "runs" / "without"], metric="c_index_patient_nested")
    (both,) = compare([tmp_path / "runs"], metric="c_index", replicates=10).rows
    assert both.settings == ""  # what is held out makes no other experiment of the other metrics
