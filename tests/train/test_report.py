"""The report of a run: its numbers against a run directory written by hand, lifelines and brute force."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from report_runs import METRICS, N_EPOCHS, epochs, make_run, metric, page_of, parsed, predictions, summary, words

from cftrain.errors import RunError
from cftrain.report import write_report
from cftrain.report.figures import month_ticks
from cftrain.report.groups import RiskGroup, risk_table
from cftrain.report.svg import ticks_between
from cftrain.report.wording import duration, p_value
from cftrain.survival.metrics import kaplan_meier

VOID = {"meta", "br", "hr", "link", "img", "input", "col"}
FILES = ["summary.json", "predictions.parquet", "fold_1/metrics.jsonl", "config.toml", "provenance.json"]


def patients(rows):
    """One (time, event, high) per patient by plain loops: mean risk over slides, median within the fold."""
    found = []
    for fold in sorted({row["fold"] for row in rows}):
        here = {}
        for row in rows:
            if row["fold"] == fold:
                here.setdefault(row["patient_id"], []).append(row)
        risks = {name: sum(row["risk"] for row in own) / len(own) for name, own in here.items()}
        ordered = sorted(risks.values())
        half = len(ordered) // 2
        median = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
        found += [(own[0]["time_months"], own[0]["event"], risks[name] >= median) for name, own in here.items()]
    return found


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def test_the_report_is_where_it_says(run):
    assert write_report(run) == run / "report.html"
    assert {path.name for path in (run / "figures").iterdir()} == {"kaplan_meier.svg", "kaplan_meier.csv"}


@pytest.mark.parametrize(
    "number",
    [
        "BLCA · crossfusion · uni_v2", "3,456 slides", "1,789 patients", "618 deaths",
        "0.655 ± 0.046", "0.668 ± 0.048", "0.691 ± 0.048", "0.698 ± 0.049", "log-rank p = 0.012", "93 high, 90 low",
        "0.611", "0.703", "0.717", "0.739", "0.751", "2,313", "1,144", "594", "206", "20 (11)", "6 min", "10 %",
        "0.0 · 11.5 · 26.2 · 51.0 · 132.0", "no 5x bag 23", "five-by-patient, 3 folds", "1234", "1,536", "2,345,678",
        "17 min", "67.4", "5x, 10x, 20x", "versions.torch 2.13.0", "store.uuid 0b5c2f0e-77aa", "af04535",
        "cftrain run --cohort BLCA", "2026-11-21T10:00:00Z", "40 entries", "lr = 2e-4",
    ],
)  # fmt: skip
def test_the_page_shows(run, number):
    assert number in words(page_of(run))


def test_each_headline_number_stands_beside_its_rule_the_honest_one_first(run):
    tiles = [words(tile) for tile in re.findall(r'<div class="tile.*?</div>', page_of(run), flags=re.DOTALL)]
    assert tiles == [
        "Per patient 0.668 ± 0.048 last epoch of a schedule fixed beforehand (20 epochs)",
        "Per slide 0.655 ± 0.046 last epoch of a schedule fixed beforehand (20 epochs)",
        "Per patient optimistic 0.698 ± 0.049 best epoch on the reported fold (the paper's rule; optimistic)",
        "Per slide optimistic 0.691 ± 0.048 best epoch on the reported fold (the paper's rule; optimistic)",
    ]


def test_the_sections_come_in_their_order(run):
    assert re.findall(r'<h2 id="([^"]+)"', page_of(run)) == [
        "result", "folds", "time", "survival", "calibration", "cox", "risk", "training", "cost", "who",
        "configuration", "provenance", "reading",
    ]  # fmt: skip


def test_a_synthetic_cohort_says_so_before_anything_else(tmp_path):
    page = words(page_of(make_run(tmp_path, synthetic=True)))
    assert "invented by cfstore synth ; nothing here is about real patients" in page
    assert page.index("invented by") < page.index("Concordance")


def test_a_synthetic_figure_says_so_wherever_it_goes(tmp_path):
    run = make_run(tmp_path, synthetic=True)
    write_report(run)
    assert "Synthetic data</text>" in (run / "figures" / "kaplan_meier.svg").read_text(encoding="utf-8")


def test_a_real_cohort_has_no_synthetic_banner(run):
    assert "ynthetic" not in page_of(run)
    assert "ynthetic" not in (run / "figures" / "kaplan_meier.svg").read_text(encoding="utf-8")


def test_reference_values_are_shown_where_they_are_given(tmp_path):
    reference = {"oracle": metric(0.81, 0.83, 0.85), "best_single_scale": {**metric(0.71, 0.73, 0.75), "scale": 5}}
    page = words(page_of(make_run(tmp_path, synthetic=True, reference=reference)))
    assert "planted risk itself reaches 0.830 ± 0.020 , by its best single scale (5x) 0.730 ± 0.020" in page


def test_undefined_numbers_are_n_a(tmp_path):
    folds = [fold | dict.fromkeys(METRICS) | {"best_epoch": None} for fold in summary()["folds"]]
    undefined = {name: metric(None, None, None) for name in METRICS}
    run = make_run(tmp_path, folds=folds, log_rank_p=None, log_rank=None, **undefined)
    rows = [row | {"c_index": None, "c_index_patient": float("nan")} for row in epochs(0)]
    (run / "fold_0" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = words(page_of(run))
    assert "Per patient n/a last epoch of a schedule fixed beforehand (20 epochs); undefined in 3 of 3 folds" in page
    assert "20 (n/a)" in page
    assert "log-rank p n/a" in page
    assert not re.search(r"\b(nan|None|null)\b", page, flags=re.IGNORECASE)


def test_a_metric_defined_in_one_fold_has_a_mean_and_no_spread(tmp_path):
    page = words(page_of(make_run(tmp_path, c_index=metric(0.6, None, None))))
    assert "Per slide 0.600 ± n/a last epoch of a schedule fixed beforehand (20 epochs); undefined in 2 of 3" in page


def test_text_from_the_run_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&'
    rows = predictions()
    rows[0]["slide_id"] = evil
    run = make_run(
        tmp_path, rows=rows, cohort=evil, model=evil, encoder=evil, splits=evil, excluded={evil: 1}, config=evil,
        device=evil, selection={"c_index": evil, "c_index_best_epoch": evil},
    )  # fmt: skip
    (run / "provenance.json").write_text(json.dumps({evil: evil}))
    page = page_of(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12
    assert f"{evil}: {rows[0]['risk']:.3f}" in words(page)  # the slide's dot


def test_the_machine_is_not_named(run):
    assert "secret-machine" not in page_of(run)


def test_the_curve_in_the_csv_is_that_of_lifelines(run):
    write_report(run)
    with (run / "figures" / "kaplan_meier.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["time_months", "group", "survival", "lower", "upper", "at_risk"]
    for name, wanted in (("low", False), ("high", True)):
        time, event = zip(
            *[(time, event) for time, event, high in patients(predictions()) if high == wanted], strict=True
        )
        fitted = KaplanMeierFitter().fit(time, event)
        lower, upper = fitted.confidence_interval_.to_numpy().T
        rows = [row for row in table if row["group"] == name]
        written = {column: [float(row[column]) for row in rows] for column in table[0] if column != "group"}
        np.testing.assert_array_equal(written["time_months"], fitted.survival_function_.index)
        np.testing.assert_allclose(written["survival"], fitted.survival_function_.iloc[:, 0], rtol=1e-12)
        np.testing.assert_allclose(written["lower"], lower, rtol=1e-12)
        np.testing.assert_allclose(written["upper"], upper, rtol=1e-12)
        assert written["at_risk"] == [sum(t >= asked for t in time) for asked in written["time_months"]]


def test_at_risk_censored_and_events_are_counted_as_by_hand():
    rng = np.random.default_rng(3)
    time, event = rng.integers(0, 30, 53).astype(float), rng.random(53) < 0.5
    at = [0.0, 3.0, 7.5, 12.0, 29.0, 30.0]
    table = risk_table(RiskGroup("high", time, event, kaplan_meier(time, event)), at)
    assert table.at_risk.tolist() == [sum(t >= asked for t in time) for asked in at]
    assert table.events.tolist() == [sum(t < asked and e for t, e in zip(time, event, strict=True)) for asked in at]
    assert table.censored.tolist() == [
        sum(t < asked and not e for t, e in zip(time, event, strict=True)) for asked in at
    ]


def test_the_numbers_under_the_curve_stand_under_their_months(run):
    """Every number of the table, read from the drawing by its place, against counting patients."""
    write_report(run)
    texts = [
        (element.get("x"), float(element.get("y")), element.text)
        for element in parsed((run / "figures" / "kaplan_meier.svg").read_text(encoding="utf-8")).iter()
        if element.tag.endswith("}text")
    ]
    everyone = patients(predictions())
    heads = {word: y for x, y, word in texts if word in ("Low risk", "High risk")}
    axis = max(y for x, y, word in texts if word == "0" and y < min(heads.values()))
    months = {x: float(word) for x, y, word in texts if y == axis}
    assert sorted(months.values()) == [0, 24, 48, 72, 96, 120]
    for word, wanted in (("Low risk", False), ("High risk", True)):
        group = [(time, event) for time, event, high in everyone if high == wanted]
        rows = [
            {x: int(n) for x, y, n in texts if y == heads[word] + 18 * place and x in months} for place in (1, 2, 3)
        ]
        for x, month in months.items():
            assert [row[x] for row in rows] == [
                sum(time >= month for time, _ in group),
                sum(time < month and not event for time, event in group),
                sum(time < month and event for time, event in group),
            ]


def test_the_median_follow_up_is_reverse_kaplan_meier(run):
    everyone = patients(predictions())
    reverse = KaplanMeierFitter().fit([time for time, _, _ in everyone], [not event for _, event, _ in everyone])
    assert f"Median follow-up {reverse.median_survival_time_:.1f} months (reverse" in words(page_of(run))


def test_a_model_that_ranks_nobody_has_one_curve(tmp_path):
    rows = [row | {"risk": -1.0} for row in predictions()]
    run = make_run(tmp_path, rows=rows, log_rank_p=None)
    page = words(page_of(run))
    assert "High risk: 183 patients" in page
    assert "Low risk:" not in page


def test_a_log_rank_of_the_groups_drawn_needs_no_warning(run):
    assert "does not belong" not in words(page_of(run))


def test_a_test_on_other_groups_is_called_so(tmp_path):
    run = make_run(tmp_path, log_rank=summary()["log_rank"] | {"n_high": 89, "n_low": 91})
    assert "it does not belong to this figure exactly" in words(page_of(run))


def test_patients_of_several_folds_are_counted_in_each_and_said(tmp_path):
    rows = predictions()
    again = [row | {"fold": 1} for row in rows if row["patient_id"] == "P000"]
    assert "1 patient is in more than one fold and counted in each" in words(
        page_of(make_run(tmp_path, rows=rows + again))
    )


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_the_run_and_what_to_do(run, name):
    (run / name).unlink()
    with pytest.raises(RunError, match="cftrain run") as caught:
        write_report(run)
    assert str(run) in str(caught.value)
    assert f"no {name}" in str(caught.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["summary.json", "predictions.parquet", "fold_1/metrics.jsonl", "provenance.json"])
@pytest.mark.parametrize("content", ["", "[1, 2", "[]"], ids=["empty", "cut short", "a list"])
def test_an_unusable_file_is_named(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(RunError, match=r"cftrain run"):
        write_report(run)


@pytest.mark.parametrize(
    "name", ["cohort", "c_index_patient", "log_rank_p", "reference", "folds", "device", "excluded"]
)
def test_a_summary_without_a_number_it_should_have_is_an_error(run, name):
    content = summary()
    del content[name]
    (run / "summary.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"summary\.json"):
        write_report(run)


def test_the_page_fetches_nothing(run):
    page = page_of(run)
    assert "http" not in page
    assert "src=" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page


def test_the_same_run_gives_the_same_bytes(run):
    def written():
        write_report(run)
        return [
            (run / name).read_bytes()
            for name in ("report.html", "figures/kaplan_meier.svg", "figures/kaplan_meier.csv")
        ]

    assert written() == written()


def test_every_figure_is_well_formed_and_described(run):
    found = re.findall(r"<svg.*?</svg>", page_of(run), flags=re.DOTALL)
    assert len(found) == 3 + 2 * 3
    for each in found:
        root = parsed(each)
        title, about = root[0], root[1]
        assert (title.tag, about.tag) == ("title", "desc")
        assert title.text
        assert about.text
        assert root.get("role") == "img"
        assert root.get("aria-labelledby") == f"{title.get('id')} {about.get('id')}"


def test_the_figure_in_a_file_of_its_own_has_its_colours(run):
    write_report(run)
    text = (run / "figures" / "kaplan_meier.svg").read_text(encoding="utf-8")
    assert parsed(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text


def test_training_panels_mark_the_last_and_the_best_epoch(run):
    panel = re.search(r"<svg [^>]*c-index-1-title.*?</svg>", page_of(run), flags=re.DOTALL).group()
    circles = [(circle.get("class"), float(circle.get("cx"))) for circle in parsed(panel).iter("circle")]
    assert [css for css, _ in circles] == ["ring low", "low-fill"]
    left, right = 38, 38 + 244
    assert circles[1][1] == right
    assert circles[0][1] == pytest.approx(left + (10 - 1) / (N_EPOCHS - 1) * (right - left), abs=0.01)


def test_a_run_of_one_epoch_is_drawn(tmp_path):
    folds = [fold | {"epochs": 1, "best_epoch": 1} for fold in summary()["folds"]]
    run = make_run(tmp_path, folds=folds)
    for fold in range(3):
        path = run / f"fold_{fold}" / "metrics.jsonl"
        path.write_text(path.read_text().splitlines()[0])
    assert "1 epoch." in words(page_of(run))


class Balance(HTMLParser):
    """Complains about the first tag that closes something else than what is open; collects ids and headings."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.headings, self.tables = [], [], [], Counter()

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.tables[tag] += tag in ("table", "caption")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


@pytest.mark.parametrize("synthetic", [True, False])
def test_the_html_is_balanced_with_headings_in_steps_and_a_caption_per_table(tmp_path, synthetic):
    page = page_of(make_run(tmp_path, synthetic=synthetic))
    reader = Balance()
    reader.feed(page)
    assert page.startswith("<!DOCTYPE html>")
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.headings[0] == 1
    assert all(deeper <= above + 1 for above, deeper in zip(reader.headings, reader.headings[1:], strict=False))
    assert reader.tables["table"] == reader.tables["caption"] > 0
    assert set(re.findall(r'aria-labelledby="([^"]+)"', page)) >= {"result", "survival"}


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(0.0, [0]), (5.5, [0, 1, 2, 3, 4, 5]), (60.0, [0, 12, 24, 36, 48, 60]), (130.0, [0, 24, 48, 72, 96, 120])],
)
def test_months_are_marked_in_calendar_steps(last, ticks):
    assert month_ticks(last) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-2.31, -0.9, [-2, -1.5, -1]), (3.0, 7.0, [3, 4, 5, 6, 7])],
)
def test_axes_are_marked_at_round_numbers(low, high, ticks):
    assert ticks_between(low, high, 5) == ticks


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.0123, "p = 0.012"), (0.4567, "p = 0.46"), (0.0009, "p < 0.001"), (None, "p n/a"), (1.0, "p = 1.00")],
)
def test_p_values_are_printed_as_journals_do(p, said):
    assert p_value(p) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.21, "4.2 s"), (341.0, "6 min"), (9000.0, "2 h 30 min"), (7199.0, "2 h 0 min"), (None, "n/a")],
)
def test_durations_are_said_in_one_unit_or_two(seconds, said):
    assert duration(seconds) == said
