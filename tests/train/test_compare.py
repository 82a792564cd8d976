"""Tables of finished runs against run directories written by hand, with numbers from lifelines."""

from __future__ import annotations

import csv
import io
import json
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lifelines.utils import concordance_index

from cftrain.compare import compare, to_csv, to_dict, to_html, to_latex, to_markdown, to_text
from cftrain.errors import ConfigError, RunError

LAST, BEST = "last epoch of a schedule fixed beforehand (20 epochs)", "best epoch on the reported fold"
N_FOLDS = 4
EVIL = 'a|b_c%d&e#f$g{h}~i^j\\k,"l"*m`<b>\n[n]\x1b[31m'


def people(n=160, seed=0, n_folds=N_FOLDS):
    """Patients with a hidden hazard and a fold each."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=n)
    death, censoring = rng.exponential(40 * np.exp(-hidden)), rng.uniform(6, 90, n)
    return {
        "patient_id": [f"P{i:03d}" for i in range(n)],
        "hidden": hidden,
        "time": np.ceil(np.minimum(death, censoring)),
        "event": death <= censoring,
        "fold": rng.permutation(n) % n_folds,
    }


def slides(cohort, noise, seed):
    """Two slides of every third patient, one of the others; risks on another scale in every fold."""
    rng = np.random.default_rng([seed, 5])
    for i, patient in enumerate(cohort["patient_id"]):
        for number in range(2 if i % 3 == 0 else 1):
            risk = 3.0 * cohort["fold"][i] + cohort["hidden"][i] + noise * rng.normal()
            yield {
                "slide_id": f"{patient}-{number}", "patient_id": patient, "fold": int(cohort["fold"][i]),
                "time_months": float(cohort["time"][i]), "event": bool(cohort["event"][i]), "risk": risk,
                "risk_best_epoch": risk + 0.3 * cohort["hidden"][i],
            }  # fmt: skip


def by_patient(rows, risk):
    """(fold, time, event, mean risk) of every patient, by plain loops."""
    found = {}
    for row in rows:
        found.setdefault(row["patient_id"], []).append(row)
    return {
        name: (own[0]["fold"], own[0]["time_months"], own[0]["event"], sum(row[risk] for row in own) / len(own))
        for name, own in found.items()
    }


def fold_c(rows):
    """lifelines' C-index of (fold, time, event, risk) rows in each fold."""
    found = []
    for fold in sorted({row[0] for row in rows}):
        _, time, event, risk = zip(*[row for row in rows if row[0] == fold], strict=True)
        try:
            found.append(concordance_index(time, -np.array(risk), event))
        except ZeroDivisionError:
            found.append(None)
    return found


def metric(folds, rule):
    defined = [value for value in folds if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "folds": folds, "n_undefined": len(folds) - len(defined), "rule": rule,
    }  # fmt: skip


def make_run(folder, *, noise=1.0, seed=1, people_of=None, **changes):
    """A finished run as far as a comparison reads it; lifelines' numbers in its summary."""
    rows = list(slides(people_of or people(), noise, seed))
    content = {"cohort": "BLCA", "model": "abmil", "encoder": "uni", "preset": "default", "seed": seed, "where": None}
    content |= {"synthetic": False, "selection": {"c_index": LAST, "c_index_best_epoch": BEST}}
    for suffix, risk, rule in (("", "risk", LAST), ("_best_epoch", "risk_best_epoch", BEST)):
        slide_rows = [(row["fold"], row["time_months"], row["event"], row[risk]) for row in rows]
        content[f"c_index{suffix}"] = metric(fold_c(slide_rows), rule)
        content[f"c_index_patient{suffix}"] = metric(fold_c(list(by_patient(rows, risk).values())), rule)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(content | changes))
    pq.write_table(pa.Table.from_pylist(rows), folder / "predictions.parquet")
    return folder


def folds_of(run, name="c_index_patient"):
    return json.loads((run / "summary.json").read_text())[name]["folds"]


def rows_of(run):
    return pq.read_table(run / "predictions.parquet").to_pylist()


# ---- numbers ----


@pytest.mark.parametrize(
    "name", ["c_index_patient", "c_index", "c_index_patient_best_epoch", "c_index_best_epoch"]
)  # fmt: skip
def test_a_cell_is_mean_and_sample_deviation_of_the_folds(tmp_path, name):
    run = make_run(tmp_path / "a")
    found = compare([run], metric=name)
    cell = found.rows[0].cells[0]
    folds = folds_of(run, name)
    assert (cell.mean, cell.std) == (pytest.approx(np.mean(folds)), pytest.approx(np.std(folds, ddof=1)))
    assert (cell.n, cell.n_undefined, cell.seeds) == (N_FOLDS, 0, (1,))
    assert (cell.n_patients, cell.n_events) == (160, people()["event"].sum())
    rule = BEST if name.endswith("best_epoch") else LAST
    assert f"Rule: {rule}." in found.caption
    assert ("per patient" in found.caption[0]) == ("patient" in name)


def test_models_are_rows_and_cohorts_columns_with_a_mean_over_cohorts(tmp_path):
    luad = people(120, seed=7)
    make_run(tmp_path / "1", model="abmil", noise=1.5)
    make_run(tmp_path / "2", model="abmil", noise=1.5, people_of=luad, cohort="LUAD")
    make_run(tmp_path / "3", model="crossfusion", noise=0.5)
    make_run(tmp_path / "4", model="transmil", noise=3.0)
    make_run(tmp_path / "5", model="transmil", noise=3.0, people_of=luad, cohort="LUAD")
    found = compare([tmp_path])
    assert found.cohorts == ("BLCA", "LUAD")
    assert [row.name for row in found.rows] == ["abmil", "crossfusion", "transmil"]
    abmil, crossfusion, transmil = found.rows
    assert crossfusion.cells[1] is None
    assert math.isnan(crossfusion.mean)
    assert abmil.mean == pytest.approx((np.mean(folds_of(tmp_path / "1")) + np.mean(folds_of(tmp_path / "2"))) / 2)
    assert [row.place for row in found.rows] == [1, 0, 2]
    assert [row.cells[0].place for row in found.rows] == [2, 1, 0]
    assert [abmil.cells[1].place, transmil.cells[1].place] == [1, 2]


def test_seeds_of_a_model_are_one_cell_and_the_caption_says_how(tmp_path):
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in (1, 2, 3)]
    found = compare(runs)
    folds = np.array([folds_of(run) for run in runs])
    cell = found.rows[0].cells[0]
    assert len(found.rows) == 1
    assert cell.mean == pytest.approx(folds.mean(axis=1).mean())
    assert cell.std == pytest.approx(folds.ravel().std(ddof=1))
    assert (cell.n, cell.seeds) == (12, (1, 2, 3))
    assert any("the mean over seeds of the means over folds" in line for line in found.caption)
    assert "abmil (3 seeds)" in to_text(found)


def test_other_settings_are_another_row_and_never_more_seeds(tmp_path):
    for seed, sampling in ((1, "weighted"), (2, "weighted"), (3, "uniform")):
        run = make_run(tmp_path / str(seed), seed=seed)
        lines = [
            "[data]",
            'cache = "ram"',
            f"order_seed = {seed}",
            "[train]",
            f'sampling = "{sampling}"',
            f"seed = {seed}",
        ]
        (run / "config.toml").write_text("\n".join([*lines, "epochs = 20"]) + "\n")
    found = compare([tmp_path])
    assert [(row.name, row.settings, row.cells[0].seeds) for row in found.rows] == [
        ("abmil, train.sampling=weighted", "train.sampling=weighted", (1, 2)),
        ("abmil, train.sampling=uniform", "train.sampling=uniform", (3,)),
    ]


def test_encoders_and_presets_name_a_row_only_where_they_differ(tmp_path):
    make_run(tmp_path / "1", encoder="uni")
    make_run(tmp_path / "2", encoder="conch")
    make_run(tmp_path / "3", encoder="conch", preset="paper")
    both = [row.name for row in compare([tmp_path]).rows]
    assert both == ["abmil, uni, default", "abmil, conch, default", "abmil, conch, paper"]
    assert [row.name for row in compare([tmp_path / "1", tmp_path / "2"]).rows] == ["abmil, uni", "abmil, conch"]
    assert [row.name for row in compare([tmp_path / "1"]).rows] == ["abmil"]


def test_a_part_of_a_cohort_is_a_column_of_its_own(tmp_path):
    make_run(tmp_path / "1")
    make_run(tmp_path / "2", where="age > 60")
    assert compare([tmp_path]).cohorts == ("BLCA", "BLCA (age > 60)")


def test_a_fold_without_a_comparable_pair_does_not_count_and_is_noted(tmp_path):
    cohort = people()
    cohort["event"][cohort["fold"] == 2] = False
    run = make_run(tmp_path / "a", people_of=cohort)
    found = compare([run])
    folds = [value for value in folds_of(run) if value is not None]
    cell = found.rows[0].cells[0]
    assert (cell.n, cell.n_undefined) == (3, 1)
    assert cell.mean == pytest.approx(np.mean(folds))
    assert "abmil on BLCA: 1 of 4 folds have no comparable pair and do not count." in found.notes


def test_a_metric_that_no_fold_defines_is_not_a_number(tmp_path):
    cohort = people()
    cohort["event"][:] = False
    make_run(tmp_path / "a", people_of=cohort)
    make_run(tmp_path / "b", people_of=cohort, model="crossfusion")
    found = compare([tmp_path])
    assert all(math.isnan(row.cells[0].mean) and row.cells[0].place == 0 for row in found.rows)
    assert "n/a ± n/a" in to_text(found)
    assert "nan" not in to_text(found) + to_markdown(found) + to_latex(found) + to_csv(found)


# ---- p-values ----


def test_the_p_value_is_that_of_patients_copied_row_by_row(tmp_path):
    a, b = make_run(tmp_path / "a", noise=0.8, model="crossfusion"), make_run(tmp_path / "b", noise=1.4)
    cell = compare([a, b], replicates=60, seed=3).rows[1].cells[0]
    first, second = (by_patient(rows_of(run), "risk") for run in (a, b))
    names = sorted(first)
    drawn = np.random.default_rng(3).integers(0, len(names), size=(60, len(names)))  # as bootstrap_weights draws
    differences = []
    for rows in drawn:
        chosen = [names[i] for i in rows]
        better, worse = (np.mean(fold_c([found[name] for name in chosen])) for found in (first, second))
        differences.append(worse - better)
    differences = np.array(differences)
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    assert cell.p_value == pytest.approx(min(1, 2 * (rarer + 1) / 61))
    assert cell.difference == pytest.approx(np.mean(folds_of(b)) - np.mean(folds_of(a)))


def test_a_clearly_worse_model_has_a_small_p_and_the_best_has_none(tmp_path):
    make_run(tmp_path / "1", noise=0.2, model="good")
    make_run(tmp_path / "2", noise=8.0, model="bad")
    make_run(tmp_path / "3", noise=0.2, model="twin")
    found = compare([tmp_path])
    good, bad, twin = (row.cells[0] for row in found.rows)
    assert math.isnan(good.p_value)
    assert bad.p_value == pytest.approx(2 / 1001)
    assert (twin.p_value, twin.difference) == (1, 0)
    assert found.notes == ()
    assert any("1000 resamples" in line and "not corrected" in line for line in found.caption)


def test_seeds_with_folds_of_their_own_are_tested_together(tmp_path):
    for seed in (1, 2):
        cohort = people() | {"fold": np.random.default_rng(seed).permutation(160) % N_FOLDS}
        make_run(tmp_path / f"a{seed}", people_of=cohort, seed=seed, noise=0.3, model="good")
        make_run(tmp_path / f"b{seed}", people_of=cohort, seed=seed, noise=5.0, model="bad")
    found = compare([tmp_path], replicates=200)
    bad = found.rows[1].cells[0]
    assert bad.p_value == pytest.approx(2 / 201)
    means = {name: np.mean([folds_of(tmp_path / f"{name}{seed}") for seed in (1, 2)]) for name in "ab"}
    assert bad.difference == pytest.approx(means["b"] - means["a"])


def relabelled():
    cohort = people()
    cohort["time"][3] += 1
    return cohort


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (people(150), "their runs are not all on the same patients (150, 160)"),
        (relabelled(), "their runs do not agree on the follow-up of every patient"),
        (people() | {"fold": np.arange(160) % N_FOLDS}, "their runs are on different folds"),
    ],
    ids=["patients", "labels", "folds"],
)
def test_models_on_other_patients_labels_or_folds_are_not_tested(tmp_path, other, reason):
    make_run(tmp_path / "1", noise=0.1, model="good")
    make_run(tmp_path / "2", noise=3.0, model="bad", people_of=other)
    found = compare([tmp_path])
    assert math.isnan(found.rows[1].cells[0].p_value)
    assert f"BLCA: no p-value for bad against good: {reason}." in found.notes
    assert not any("resamples" in line for line in found.caption)


def test_folds_of_another_numbering_are_the_same_folds(tmp_path):
    make_run(tmp_path / "1", noise=0.1, model="good")
    cohort = people()
    make_run(tmp_path / "2", noise=3.0, model="bad", people_of=cohort | {"fold": N_FOLDS - 1 - cohort["fold"]})
    assert not math.isnan(compare([tmp_path]).rows[1].cells[0].p_value)


# ---- finding and reading ----


def test_runs_are_found_one_and_two_levels_down_and_each_once(tmp_path):
    make_run(tmp_path / "a" / "1", seed=1)
    make_run(tmp_path / "2", seed=2)
    make_run(tmp_path / "x" / "y" / "z", seed=9)  # too deep
    found = compare([tmp_path, tmp_path / "2"])
    assert sorted(found.rows[0].cells[0].seeds) == [1, 2]
    assert len(found.runs) == 2


def test_two_runs_with_one_seed_are_pointed_out(tmp_path):
    make_run(tmp_path / "1")
    make_run(tmp_path / "2")
    assert any("several runs with the same seed (1)" in note for note in compare([tmp_path]).notes)


def test_rules_that_differ_are_listed_and_not_refused(tmp_path):
    make_run(tmp_path / "short", model="a", c_index_patient=metric([0.6, 0.7], "last epoch (5)"))
    make_run(tmp_path / "long", model="b", c_index_patient=metric([0.6, 0.7], "last epoch (50)"))
    found = compare([tmp_path])
    long, short = (f"{tmp_path.name}/{name}" for name in ("long", "short"))
    assert f"The rule differs between runs. last epoch (50): {long}; last epoch (5): {short}." in found.notes
    assert "Rule: differs between runs, see the notes." in found.caption


def test_a_metric_without_a_rule_takes_the_rule_of_the_selection(tmp_path):
    bare = metric([0.6, 0.7], "")
    del bare["rule"]
    run = make_run(tmp_path / "a", c_index_patient=bare, c_index_best_epoch=bare)
    assert f"Rule: {LAST}." in compare([run]).caption
    assert f"Rule: {BEST}." in compare([run], metric="c_index_best_epoch").caption


def test_a_synthetic_cohort_is_called_so(tmp_path):
    run = make_run(tmp_path / "a", synthetic=True, people_of=people())
    assert "BLCA is synthetic." in compare([run]).notes
    assert "synthetic" in to_latex(compare([run]))


def test_runs_of_a_folder_that_were_begun_and_not_finished_are_left_out_by_name(tmp_path):
    make_run(tmp_path / "runs" / "seed_1")
    (tmp_path / "runs" / "seed_1" / "config.toml").touch()
    for killed in ("seed_2", "several/seed_3"):
        (tmp_path / "runs" / killed).mkdir(parents=True)
        (tmp_path / "runs" / killed / "config.toml").touch()
    notes = compare([tmp_path / "runs"]).notes
    left_out = [note.split(":")[0] for note in notes if note.endswith("left out, it is not finished.")]
    assert left_out == ["runs/seed_2", "several/seed_3"]


@pytest.mark.parametrize("name", ["summary.json", "predictions.parquet"])
def test_an_unfinished_run_is_named_with_what_to_do(tmp_path, name):
    run = make_run(tmp_path / "a")
    (run / name).unlink()
    with pytest.raises(RunError, match="cftrain run --resume --out") as caught:
        compare([run])
    assert str(run) in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"cohort": "BLCA"}'),
        ("predictions.parquet", "PAR1"),
    ],
)
def test_an_unusable_file_is_an_error_that_names_the_run(tmp_path, name, content):
    run = make_run(tmp_path / "a")
    (run / name).write_text(content)
    with pytest.raises(RunError, match="run `cftrain run` again") as caught:
        compare([run])
    assert str(run) in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no slide|has no"),
        ([{"patient_id": "P", "fold": 0, "time_months": 1.0, "event": True}], "has no risk"),
        (
            [
                {"patient_id": "P", "fold": 0, "time_months": 1.0, "event": True, "risk": 1.0},
                {"patient_id": "P", "fold": 0, "time_months": 2.0, "event": True, "risk": 1.0},
            ],
            "slides disagree",
        ),
        ([{"patient_id": "P", "fold": 0, "time_months": 1.0, "event": True, "risk": math.nan}], "risk: 1 of 1"),
    ],
    ids=["empty", "no-risk", "disagreeing", "nan"],
)
def test_predictions_that_cannot_be_compared_are_an_error(tmp_path, rows, said):
    run = make_run(tmp_path / "a")
    pq.write_table(pa.Table.from_pylist(rows), run / "predictions.parquet")
    with pytest.raises(RunError, match=said):
        compare([run])


def test_a_folder_without_runs_or_none_at_all_is_an_error(tmp_path):
    with pytest.raises(RunError, match=f"{tmp_path}: no finished run in it"):
        compare([tmp_path])
    with pytest.raises(RunError, match="no such folder"):
        compare([tmp_path / "nowhere"])
    with pytest.raises(RunError, match="no runs to compare"):
        compare([])


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="c_index_patient_best_epoch"):
        compare([make_run(tmp_path / "a")], metric="auc")


# ---- as text ----


@pytest.fixture
def table(tmp_path):
    make_run(tmp_path / "1", model="good", c_index_patient=metric([0.7, 0.8], LAST))
    make_run(tmp_path / "2", model="fair", noise=2.0, c_index_patient=metric([0.6, 0.7], LAST))
    make_run(tmp_path / "3", model="poor", c_index_patient=metric([0.5, 0.5], LAST), people_of=people(150))
    return compare([tmp_path], replicates=99)


def test_markdown_has_the_best_in_bold_and_the_second_underlined(table):
    lines = to_markdown(table).splitlines()
    assert lines[:3] == ["| Model | BLCA |", "| --- | --- |", "| good | **0.750 ± 0.071** |"]
    assert re.fullmatch(r"\| fair \| <ins>0\.650 ± 0\.071</ins> \(p (= [01]|\\< 0)\.\d+\) \|", lines[3])
    assert lines[4] == "| poor | 0.500 ± 0.000 |"
    assert f"Rule: {LAST}." in lines[6]
    assert lines[8].startswith("- BLCA: no p-value for poor against good")


def test_latex_has_booktabs_and_marks(table):
    text = to_latex(table)
    assert r"good & \textbf{0.750 $\pm$ 0.071} \\" in text
    assert r"fair & \underline{0.650 $\pm$ 0.071} (p " in text
    assert r"poor & 0.500 $\pm$ 0.000 \\" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"\begin{tabular}{lc}" in text
    assert f"Rule: {LAST}." in text


def test_text_is_aligned_and_says_what_its_marks_mean(table):
    lines = to_text(table).splitlines()
    assert lines[0].split() == ["Model", "BLCA"]
    assert lines[2] == "good   0.750 ± 0.071 *"
    assert lines[3].startswith("fair   0.650 ± 0.071 + (p ")
    assert "The best of a cohort is marked *, the second marked +." in lines
    assert f"Rule: {LAST}." in lines


def test_csv_has_every_number_in_a_column_of_its_own(table):
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["model"] for row in rows] == ["good", "fair", "poor"]
    assert [float(row["mean"]) for row in rows] == pytest.approx([0.75, 0.65, 0.5])
    assert [float(row["std"]) for row in rows] == pytest.approx([0.005**0.5, 0.005**0.5, 0])
    assert [row["n"] for row in rows] == ["2", "2", "2"]
    assert [row["place"] for row in rows] == ["1", "2", "0"]
    assert [row["p_value"] == "" for row in rows] == [True, False, True]
    assert [row["n_patients"] for row in rows] == ["160", "160", "150"]


def test_the_dict_is_json_with_nothing_undefined_in_it(table):
    content = json.loads(json.dumps(to_dict(table), allow_nan=False))
    good = content["rows"][0]["cells"]["BLCA"]
    assert (good["mean"], good["place"], good["p_value"]) == (0.75, 1, None)
    assert content["metric"] == "c_index_patient"
    assert len(content["runs"]) == 3


def test_one_model_alone_is_neither_best_nor_second(tmp_path):
    found = compare([make_run(tmp_path / "a")])
    assert found.rows[0].cells[0].place == 0
    assert "**" not in to_markdown(found)
    assert "best of a cohort" not in to_markdown(found)


def test_hostile_names_do_not_break_a_table(tmp_path):
    make_run(tmp_path / "1", model=EVIL, cohort=EVIL)
    make_run(tmp_path / "2", model="b", noise=3.0, cohort=EVIL)
    found = compare([tmp_path], replicates=20)
    markdown = to_markdown(found).splitlines()
    assert len(re.findall(r"(?<!\\)\|", markdown[0])) == len(re.findall(r"(?<!\\)\|", markdown[2])) == 3
    assert r"a\|b\_c%d\&e" in markdown[2]
    assert r"\<b\>" in markdown[2]
    latex = to_latex(found)
    assert r"a|b\_c\%d\&e\#f\$g\{h\}\textasciitilde{}i\textasciicircum{}j\textbackslash{}k" in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [1, 1, 1]
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [row["model"] for row in rows] == [EVIL, "b"]
    for text in (to_text(found), to_markdown(found), to_latex(found)):
        assert "\x1b" not in text
    assert len(to_text(found).splitlines()[:4]) == 4
    assert to_text(found).splitlines()[3].startswith("b ")


def test_a_page_has_the_tables_numbers_links_its_runs_and_fetches_nothing(tmp_path):
    runs = [make_run(tmp_path / name, model=name, noise=noise) for name, noise in (("good", 0.5), ("bad", 4.0))]
    evil = make_run(tmp_path / "1", model=EVIL, noise=2.0)
    found = compare([*runs, evil], replicates=20)
    page = to_html(found, {runs[0]: "good run/report.html"})
    for row in found.rows:
        assert f'<span class="mean">{row.cells[0].mean:.3f}</span>' in page
    assert page.index('class="best"') > page.index("good")
    assert 'href="good%20run/report.html"' in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "\x1b" not in page
    assert not re.search(r"https?://|<script", page)


def test_the_same_runs_give_the_same_table(tmp_path):
    make_run(tmp_path / "1", model="a")
    make_run(tmp_path / "2", model="b")
    assert to_dict(compare([tmp_path])) == to_dict(compare([tmp_path]))
