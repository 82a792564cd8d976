"""The report's sections on uncertainty, calibration, hazard ratios and cost, against summaries written by hand."""

from __future__ import annotations

import json
import re

import pytest
from report_runs import (
    assessed,
    assessment,
    cox,
    epochs,
    hazard,
    make_run,
    metric,
    page_of,
    parsed,
    predictions,
    summary,
    words,
)

from cftrain.report.wording import hazard_ratio, percent, size

RULE = "last epoch of a schedule fixed beforehand (20 epochs)"


def section(page, name):
    """What a reader sees of one section."""
    return words(re.search(rf'<section aria-labelledby="{name}">.*?</section>', page, flags=re.DOTALL).group())


def section_of(folder, name, **changes):
    return section(page_of(make_run(folder, **assessed() | changes)), name)


def figure(page, name):
    return parsed(re.search(rf'<svg [^>]*aria-labelledby="{name}-title.*?</svg>', page, flags=re.DOTALL).group())


def nothing(value):
    """The same structure with every number of it undefined, counts and months apart."""
    if isinstance(value, dict):
        kept = ("n", "n_patients", "n_events", "fold", "time_months", "n_dead", "n_alive", "n_undefined", "replicates")
        return {name: each if name in kept else nothing(each) for name, each in value.items()}
    if isinstance(value, list):
        return [nothing(each) for each in value]
    return None if isinstance(value, float) else value


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(make_run(tmp_path_factory.mktemp("assessed"), **assessed()))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("result", f"Per patient 0.668 ± 0.048 95 % interval of the mean 0.638-0.697 {RULE}"),
        ("result", f"Per slide 0.655 ± 0.046 {RULE}"),
        ("result", "1,000 resamples of the validated patients within each fold"),
        ("result", "Fold 0 0.622 (0.571-0.673)"),
        ("result", "Fold 2 0.717 (n/a)"),
        ("result", "Mean 0.668 (0.638-0.697)"),
        ("folds", "0 0.622 0.571-0.673 0.612 0.552-0.664 61.2 0.701 0.181 0.203 1.5-51.0"),
        ("folds", "2 0.717 n/a n/a n/a n/a 0.733 n/a n/a n/a"),
        ("folds", "Mean 0.668 0.638-0.697 0.627 0.587-0.667 0.725 0.177 0.204"),
        ("folds", "Std. dev. 0.048 0.022 0.022 0.005"),
        ("folds", f"Per patient; {RULE}."),
        ("folds", "Integrated Brier score (0 is perfect): 0.177, better than the 0.204 of the training patients'"),
        ("folds", "All folds AUC at 60 months left out: 1 of 3 folds support it Fold 1 AUC at 36 months rests on 3"),
        ("time", "12 0.725 ± 0.022 3 of 3 29 / 499 36 0.650 ± 0.014 2 of 3 3 / 188 Over time 0.725 ± 0.022 3 of 3"),
        ("time", f"Per patient; {RULE}."),
        ("survival", f"risk: {RULE}."),
        ("calibration", "death by 36 months are 4.1 percentage points apart on average over patients (ICI)"),
        ("calibration", "at most 3.2 for half of them (E50) and at most 11 for nine in ten (E90)"),
        ("calibration", "Fewer died than predicted in 2 of 3 groups; the 95 % limits hold the prediction in 1 of 2."),
        ("calibration", "the predicted curves do not fit (D-calibration p = 0.032)"),
        ("calibration", f"Per patient, folds pooled; {RULE}."),
        ("calibration", "ICI 0.041"),
        ("calibration", "E50 · E90 0.032 · 0.115"),
        ("calibration", "χ² = 18.250, p = 0.032"),
        ("calibration", "Note nobody of the last group is followed for 36 months"),
        ("cox", "per standard deviation, beside 1 clinical coefficient: 1.65 (1.49-1.83), p < 0.001."),
        ("cox", RULE),
        ("cox", "Cox regression of 1,789 patients (618 deaths), of all covariates together 1,786 (617)."),
        ("cox", "risk (per SD within its fold) 1.81 (1.65-1.99) < 0.001 1,789 (618) 1.65 (1.49-1.83) < 0.001"),
        ("cox", "age (per 10 years) 1.20 (1.10-1.31) < 0.001 1,786 (617) 1.15 (1.05-1.26) 0.003"),
        ("cox", "grade: G3 vs G2 n/a n/a 1,700 (600) - -"),
        ("cox", "mutations 1.0003 (1.0001-1.0005) 0.002"),
        ("cox", "rare 31.00 (4.00-240)"),
        ("cox", "smoker missing in 1400 of 1789 patients site constant Note multivariable: without grade: too few"),
        ("cost", "Computing was the larger part: 23 % of the time in steps was spent waiting for data"),
        ("cost", "Time taken 17 min Slides per second 67.4 Patches per second 412,345.6"),
        ("cost", "Waiting for data 4 min (23 % of waiting and computing) Computing 13 min"),
        ("cost", "Read from the store 5.0 GiB, 5.0 MiB per second"),
        ("cost", "Most memory of one process 1.5 GiB"),
        ("who", "smoker missing in 1400 of 1789 patients age (per 10 years) 3 patients not in its fit"),
        ("who", "grade 89 patients not in its fit"),
        ("who", "All columns together 1,786 of 1,789 patients, 617 of 618 deaths in the fit"),
        ("configuration", "One training example a slide Loss nll: negative log-likelihood of time bins"),
    ],
)
def test_the_section_says(page, name, said):
    assert said in section(page, name)


def test_no_undefined_number_is_printed_as_python_does(page):
    assert not re.search(r"\b(nan|None|null)\b", words(page), flags=re.IGNORECASE)


def test_whiskers_stand_where_their_limits_are(page):
    """Fold 0, 0.571 to 0.673, then fold 1; fold 2 has an open limit and none; the mean has."""
    drawn = figure(page, "overview")
    whiskers = [path.get("d") for path in drawn.iter("path") if path.get("class") == "mark open low"]
    assert len(whiskers) == 3
    left, right, low = 152, 152 + 394, 0.4
    for path, limits in zip(whiskers, [(0.571, 0.673), (0.611, 0.715), (0.638, 0.697)], strict=True):
        start, end = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", path).groups())
        for x, value in zip((start, end), limits, strict=True):
            assert x == pytest.approx(left + (value - low) / (1 - low) * (right - left), abs=0.01)


def test_an_auc_stands_over_its_month(page):
    drawn = figure(page, "auc")
    ticks = {text.text: float(text.get("x")) for text in drawn.iter("text")}
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in drawn.iter("circle")]
    assert [x for x, _ in dots] == [ticks["12"]] * 3 + [ticks["36"]] * 2
    assert ticks["36"] - 58 == pytest.approx(3 * (ticks["12"] - 58), abs=0.02)
    assert dots[3][1] - dots[0][1] == pytest.approx((0.701 - 0.66) / (1 - 0.4) * 210, abs=0.01)


def test_calibration_points_lie_on_equal_axes_around_the_diagonal(page):
    drawn = figure(page, "calibration")
    for circle, predicted, observed in zip(drawn.iter("circle"), (0.1, 0.3, 0.55), (0.15, 0.25, 0.5), strict=True):
        assert float(circle.get("cx")) == pytest.approx(62 + 300 * predicted / 0.6, abs=0.01)
        assert float(circle.get("cy")) == pytest.approx(312 - 300 * observed / 0.6, abs=0.01)
    assert next(drawn.iter("circle"))[0].text == "357 patients: predicted 10 %, 15 % died"
    assert sum(path.get("class") == "mark open low" for path in drawn.iter("path")) == 2


def test_bars_are_as_high_as_their_counts(page):
    bars = [path.get("d") for path in figure(page, "deciles").iter("path") if path.get("class") == "bar low-fill"]
    heights = [312 - float(re.search(r"V([\d.]+)H", bar).group(1)) for bar in bars]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2, 3, 4], abs=0.001)


def test_hazard_ratios_lie_on_a_logarithmic_axis_and_end_in_an_arrow_beyond_it(page):
    drawn = figure(page, "forest")
    ticks = {text.text: float(text.get("x")) for text in drawn.iter("text") if text.get("text-anchor") == "middle"}
    assert [tick for tick in ticks if re.fullmatch(r"[\d.]+", tick)] == ["0.5", "1", "2", "5", "10", "20", "50"]
    assert ticks["2"] - ticks["1"] == pytest.approx(ticks["10"] - ticks["5"], abs=0.02)
    circles = {dot.get("class"): float(dot.get("cx")) for dot in reversed(list(drawn.iter("circle")))}
    factor = (ticks["10"] - ticks["1"]) / 2.302585
    assert circles["ring plain"] == pytest.approx(ticks["1"] + factor * 0.594597, abs=0.05)  # log 1.8123
    assert circles["low-fill"] == pytest.approx(ticks["1"] + factor * 0.501502, abs=0.05)  # log 1.6512
    arrows = [path for path in drawn.iter("path") if re.fullmatch(r"M\S+ \S+L\S+ \S+L\S+ \S+", path.get("d"))]
    assert len(arrows) == 1
    assert float(re.search(r"L(\S+)", arrows[0].get("d")).group(1)) == ticks["50"]
    assert "no estimate" in [text.text for text in drawn.iter("text")]


def test_every_figure_is_described(page):
    found = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(found) == 7 + 2 * 3
    assert all(parsed(each)[0].text and parsed(each)[1].text for each in found)


def test_an_old_run_says_what_it_does_not_have(tmp_path):
    page = page_of(make_run(tmp_path))
    for name in ("time", "calibration", "cox"):
        assert section(page, name).endswith("Not in this run.")
    assert "Intervals, Uno's C, AUC and Brier score of each fold are not in this run." in section(page, "folds")
    assert "How long this run waited for its data is not in it." in section(page, "cost")
    assert "Which clinical values are missing is not in this run." in section(page, "who")
    assert "95 % interval of the mean" not in page


def test_null_is_the_same_as_absent(tmp_path):
    page = page_of(make_run(tmp_path, assessment=None, cox=None, loss=None))
    assert section(page, "cox").endswith("Not in this run.")
    assert section(page, "calibration").endswith("Not in this run.")


def test_a_model_that_only_ranks_is_called_so(tmp_path):
    ranks = assessment() | {"calibration": None}
    ranks["ibs"] = metric(None, None, None) | {"kaplan_meier": None}
    page = page_of(make_run(tmp_path, **assessed() | {"assessment": ranks, "loss": "cox"}))
    assert "This model only ranks patients: it predicts no probabilities (Cox loss)" in section(page, "calibration")
    assert "There is no Brier score" in section(page, "folds")
    assert "Loss cox: Cox partial likelihood" in section(page, "configuration")


def test_a_run_in_which_nothing_is_defined_is_rendered(tmp_path):
    undefined = nothing(assessment())
    undefined["calibration"] |= {
        "horizon_months": None, "points": [], "notes": ["no calibration: a single time bin"],
        "d_calibration": {"statistic": None, "p_value": None, "counts": []},
    }  # fmt: skip
    page = page_of(make_run(tmp_path, **assessed() | {"assessment": undefined, "cox": nothing(cox())}))
    assert "Note no calibration: a single time bin" in section(page, "calibration")
    assert "Brier, months 0 n/a n/a n/a n/a n/a n/a n/a n/a n/a 1 n/a" in section(page, "folds")
    assert "12 n/a 0 of 3 n/a / n/a" in section(page, "time")
    assert "beside 1 clinical coefficient: n/a, p n/a" in section(page, "cox")
    assert not re.search(r"\b(nan|None|null)\b", words(page), flags=re.IGNORECASE)
    assert "nan" not in "".join(re.findall(r' (?:d|x|y|cx|cy)="([^"]*)"', page))


def test_months_that_too_few_folds_support_leave_the_section_without_figure(tmp_path):
    said = section_of(tmp_path, "time", assessment=assessment() | {"auc": []})
    assert "No month is supported by more than half of the folds." in said


def test_one_fold_is_enough(tmp_path):
    one = assessment()
    one["folds"] = one["folds"][:1]
    one["c_index"] = metric(0.622) | {"lower": 0.571, "upper": 0.673}
    one["auc"] = [{"time_months": 12.0, **metric(0.701)}, {"time_months": 36.0, **metric(0.66)}]
    rows = [row for row in predictions() if row["fold"] == 0]
    run = make_run(tmp_path, rows=rows, **assessed() | {"assessment": one, "folds": summary()["folds"][:1]})
    page = page_of(run)
    assert "Mean 0.622 (0.571-0.673)" in section(page, "result")
    assert "12 0.701 ± n/a 1 of 1" in section(page, "time")


def test_assessments_without_the_numbers_behind_an_auc_are_rendered(tmp_path):
    plain = assessment()
    for fold in plain["folds"]:
        fold["auc"] = [{name: entry[name] for name in ("time_months", "value")} for entry in fold["auc"]]
    assert "12 0.725 ± 0.022 3 of 3 n/a / n/a" in section_of(tmp_path, "time", assessment=plain)


def test_a_model_worse_than_no_model_is_called_so(tmp_path):
    worse = assessment()
    worse["ibs"] = metric(0.21, 0.22, None) | {"kaplan_meier": 0.2045}
    assert "0.215, no better than the 0.204" in section_of(tmp_path, "folds", assessment=worse)


def test_a_large_p_of_d_calibration_is_no_praise(tmp_path):
    fits = assessment()
    fits["calibration"]["d_calibration"]["p_value"] = 0.4
    said = section_of(tmp_path, "calibration", assessment=fits)
    assert (
        "no misfit was found (D-calibration p = 0.40); with many censored patients this test rarely finds one" in said
    )


def test_a_risk_that_is_constant_has_no_hazard_ratio(tmp_path):
    alone = cox() | {"univariable": cox()["univariable"][1:2], "multivariable": [], "left_out": {"risk": "constant"}}
    said = section_of(tmp_path, "cox", cox=alone)
    assert "The predicted risk is the same for all patients of a fold: it has no hazard ratio." in said


def test_a_risk_without_clinical_columns_says_so(tmp_path):
    alone = cox() | {"multivariable": cox()["multivariable"][:1]}
    assert "with no clinical column beside it: 1.65" in section_of(tmp_path, "cox", cox=alone)


def test_a_forest_of_many_covariates_is_cut_and_the_table_is_not(tmp_path):
    many = cox() | {"univariable": [hazard(f"column {number}", 1.2, 1.0, 1.5, 0.04) for number in range(45)]}
    page = page_of(make_run(tmp_path, **assessed() | {"cox": many}))
    drawn = [text.text for text in figure(page, "forest").iter("text")]
    assert "column 39" in drawn
    assert "column 40" not in drawn
    assert "Rows not drawn: 7; all are in the table" in section(page, "cox")  # risk and age are in the other fit
    assert "column 44 1.20 (1.00-1.50) 0.040" in section(page, "cox")


def test_a_long_name_is_cut_in_the_figure_and_whole_on_hovering(tmp_path):
    name = "paraffin_embedded_diagnosis: oligodendroglioma vs astrocytoma"
    long = cox() | {"univariable": [hazard(name, 1.2, 1.0, 1.5, 0.04)], "multivariable": []}
    drawn = figure(page_of(make_run(tmp_path, **assessed() | {"cox": long})), "forest")
    label = next(text for text in drawn.iter("text") if text.text.startswith("paraffin"))
    assert label.text == "paraffin_embed…vs astrocytoma"
    assert label[0].text == name


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.003, "Computing was the limit: 0.3 % of the time in steps was spent waiting for data."),
        (0.31, "Computing was the larger part: 31 %"),
        (0.5, "Reading was the limit: 50 %"),
        (None, "How long this run waited for its data is not in it."),
    ],
)
def test_the_limit_is_named(tmp_path, share, said):
    assert said in section_of(tmp_path, "cost", data_wait_share=share)


@pytest.mark.parametrize(
    ("config", "shown"),
    [("[train]\nbatch_patches = 8192\n", True), ("[train]\n", False), ("train = 3\n", False), ("not [toml", False)],
)
def test_patches_per_batch_are_those_of_the_configuration(tmp_path, config, shown):
    said = section(page_of(make_run(tmp_path, config=config, **assessed())), "cost")
    assert ("Patches per batch 8,192" in said) == shown
    assert ("Patches per batch" in said) == shown


def with_skipped(folder, **changes):
    run = make_run(folder, **assessed() | changes)
    rows = [row | {"skipped": ["loss is nan <b>; slides P001, P002"] if row["epoch"] == 3 else []} for row in epochs(1)]
    (run / "fold_1" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return page_of(run)


def test_steps_left_out_are_told_at_the_top_and_listed(tmp_path):
    folds = [fold | {"skipped_steps": int(fold["fold"] == 1)} for fold in summary()["folds"]]
    page = with_skipped(tmp_path, folds=folds)
    said = words(page)
    assert "1 training step left out." in said
    assert said.index("1 training step left out.") < said.index("Concordance")
    assert "1, 3 loss is nan <b>; slides P001, P002" in section(page, "training")
    assert "nan <b>" not in page


def test_a_long_list_of_steps_is_cut_and_says_so(tmp_path):
    folds = [fold | {"skipped_steps": 70 * int(fold["fold"] == 1)} for fold in summary()["folds"]]
    page = with_skipped(tmp_path, folds=folds)
    assert "70 training steps had a loss or gradient that was not finite" in section(page, "training")
    assert "Steps left out, the first of them" in section(page, "training")


def test_a_run_without_skipped_steps_does_not_mention_them(page):
    assert "left out." not in words(page).split("Concordance")[0]
    assert "Steps that were left out" not in words(page)


def test_a_bag_per_patient_is_said_and_so_is_a_selection(tmp_path):
    page = words(page_of(make_run(tmp_path, **assessed() | {"unit": "patient", "where": "age > 50 & x < 3"})))
    assert "One training example a patient, all their slides in one bag" in page
    assert "A patient is one bag: all their slides have its risk." in page
    assert "Only where age > 50 & x < 3." in page


def test_text_of_the_assessment_and_regression_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&'
    bad = assessment() | {"notes": [evil]}
    bad["calibration"]["notes"] = [evil]
    bad["folds"][0]["notes"] = [evil]
    row = hazard(evil, 1.2, 1.0, 1.5, 0.04, 3)
    odd = cox() | {"univariable": [row], "left_out": {evil: f"missing in {evil}"}, "notes": [evil]}
    page = page_of(make_run(tmp_path, **assessed() | {"assessment": bad, "cox": odd, "loss": evil, "where": evil}))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12


def test_links_of_the_page_lead_to_its_sections(page):
    links = re.findall(r'href="([^"]*)"', page)
    assert len(links) == 12
    assert {link.removeprefix("#") for link in links} <= set(re.findall(r'<h2 id="([^"]+)"', page))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((1.6512, 1.4876, 1.8328), "1.65 (1.49-1.83)"), ((1.0003, 1.0001, 1.0005), "1.0003 (1.0001-1.0005)"),
        ((0.002, 0.00001, 0.4), "0.002 (1e-05-0.40)"), ((31.0, 4.0, 2400.0), "31.00 (4.00-2.4e+03)"),
        ((0.0, 0.0, 5.0), "0.00 (0.00-5.00)"), ((None, None, None), "n/a"), ((1.2, 1.1, float("nan")), "n/a"),
    ],
)  # fmt: skip
def test_hazard_ratios_keep_the_digits_that_count(row, said):
    assert hazard_ratio(*row).replace("\u2013", "-") == said


@pytest.mark.parametrize(
    ("n_bytes", "said"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (716771328, "684 MiB"), (3 * 1024**5, "3,072 TiB"),
     (None, "n/a")],
)  # fmt: skip
def test_sizes_are_said_in_one_unit(n_bytes, said):
    assert size(n_bytes) == said


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0.0 %"), (0.0033, "0.3 %"), (0.0994, "9.9 %"), (0.0996, "10 %"), (1.0, "100 %")]
)
def test_shares_have_a_decimal_below_ten_percent(value, said):
    assert percent(value) == said
