"""What a person at a terminal, and a program reading JSON, get from `cfstore`."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from cfstore.cli import main
from cfstore.synth import synthesize


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic slides, ingested: `demo/h5` and `demo/store`."""
    base = tmp_path_factory.mktemp("demo")
    synthesize(base / "h5", slides=12, patches=32, dim=8, seed=5)
    done = invoke("ingest", base / "h5", "--store", base / "store", "--encoder", "toy")
    assert done.exit_code == 0, done.output
    return base


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_dry_run_says_what_was_understood_and_writes_nothing(demo: Path, tmp_path: Path) -> None:
    done = invoke("ingest", demo / "h5", "--store", tmp_path / "store", "--dry-run")
    assert done.exit_code == 0
    assert "clam: scales 5x, 10x, 20x" in done.stdout
    assert "12 found, 0 in the store already, 12 to write" in done.stdout
    assert "12 of 12 slides matched" in done.stdout
    assert not (tmp_path / "store").exists()


def test_an_ingest_as_json_prints_one_object_and_its_text_elsewhere(demo: Path, tmp_path: Path) -> None:
    done = invoke("ingest", demo / "h5", "--store", tmp_path / "store", "--json")
    report = json.loads(done.stdout)
    assert (report["n_slides"], report["n_bags"], report["problems"]) == (12, 36, [])
    assert report["plan"]["layout"] == "clam"
    assert "layout" in done.stderr


def test_a_second_ingest_says_that_there_is_nothing_to_do(demo: Path) -> None:
    done = invoke("ingest", demo / "h5", "--store", demo / "store", "--encoder", "toy")
    assert done.exit_code == 0
    assert "nothing to write: all 12 slides are in the store already" in done.stdout


def test_bad_files_are_all_named_and_nothing_is_written_unless_skipped(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x20" / "h5_files"
    folder.mkdir(parents=True)
    good = next((demo / "h5" / "x20" / "h5_files").iterdir())
    (folder / "good.h5").write_bytes(good.read_bytes())
    for name in ("bad1.h5", "bad2.h5"):
        (folder / name).write_bytes(good.read_bytes()[:100])
    store = tmp_path / "store"
    stopped = invoke("ingest", tmp_path / "x20", "--store", store, "--encoder", "toy", "--cohort", "C")
    assert stopped.exit_code == 1
    assert "bad1.h5" in stopped.output
    assert "bad2.h5" in stopped.output
    assert "Traceback" not in stopped.output
    assert json.loads(invoke("info", "--json", "--store", store).stdout)["encoders"] == []
    skipped = invoke(
        "ingest", tmp_path / "x20", "--store", store, "--encoder", "toy", "--cohort", "C", "--on-error", "skip"
    )
    assert skipped.exit_code == 0
    assert "left out   bad1" in skipped.stdout
    shown = invoke("info", "--store", store)
    assert "slides left out at ingest: 2" in shown.stdout


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_sql_answers_in_every_format(form: str, demo: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out.{form}"
    query = "SELECT scale, count(*) AS slides FROM bags GROUP BY scale ORDER BY scale"
    done = invoke("sql", query, "--format", form, "-o", out, "--store", demo / "store")
    assert done.exit_code == 0, done.output
    if form == "parquet":
        rows = [(row["scale"], row["slides"]) for row in pq.read_table(out).to_pylist()]
    elif form == "json":
        rows = [(row["scale"], row["slides"]) for row in json.loads(out.read_text())]
    elif form == "csv":
        rows = [(int(row["scale"]), int(row["slides"])) for row in csv.DictReader(out.read_text().splitlines())]
    else:
        rows = [tuple(map(int, line.split())) for line in out.read_text().splitlines()[2:]]
    assert rows == [(5, 12), (10, 12), (20, 12)]


def test_the_name_of_the_file_says_the_format_where_none_is_named(demo: Path, tmp_path: Path) -> None:
    def written(name: str, *words: str) -> bytes:
        done = invoke("sql", "SELECT 1 AS a, 'x' AS b", "-o", tmp_path / name, *words, "--store", demo / "store")
        assert done.exit_code == 0, done.output
        return (tmp_path / name).read_bytes()

    assert list(csv.reader(written("rows.csv").decode().splitlines())) == [["a", "b"], ["1", "x"]]
    assert json.loads(written("rows.JSON")) == [{"a": 1, "b": "x"}]
    assert written("rows.parquet").startswith(b"PAR1")
    assert written("rows.txt").decode().split() == ["a", "b", "-", "-", "1", "x"]
    assert json.loads(written("named.csv", "--format", "json")) == [{"a": 1, "b": "x"}]


def test_what_a_format_cannot_hold_is_said_in_one_line_and_leaves_no_file(demo: Path, tmp_path: Path) -> None:
    for form, query, said in (
        ("csv", "SELECT [1, 2] AS both", "csv cannot hold this"),
        ("json", "SELECT 1 AS a, 2 AS b, 3 AS a", "several called a"),
    ):
        out = tmp_path / f"out.{form}"
        for words in ((), ("-o", out)):
            done = invoke("sql", query, "--format", form, *words, "--store", demo / "store")
            assert (done.exit_code, len(done.stderr.splitlines()), done.stdout) == (1, 1, ""), done.output
            assert said in done.stderr
        assert not out.exists()


def test_sums_are_numbers_and_missing_values_null_in_json(demo: Path) -> None:
    query = "SELECT sum(event::int) AS events, NULL AS nothing, 'nan'::double AS undefined FROM patients"
    (row,) = json.loads(invoke("sql", query, "--format", "json", "--store", demo / "store").stdout)
    assert isinstance(row["events"], int)
    assert row["nothing"] is None
    assert row["undefined"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sql", "DELETE FROM bags"], 1, "refused"),
        (["sql", "SELECT * FROM nope"], 1, "nope"),
        (["show", "DEMO-0001"], 1, "near names: DEMO-0001-01"),
        (["splits"], 2, "--make"),
        (["splits", "--make", "1"], 2, "--make"),
        (["ingest"], 2, "H5DIR"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_what_is_wrong_is_said_with_an_exit_code(arguments: list[str], code: int, message: str, demo: Path) -> None:
    store = [] if arguments == ["nonsense"] else ["--store", str(demo / "store")]
    done = invoke(*arguments, *store)
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_missing_store_is_named_with_the_way_to_make_one(tmp_path: Path) -> None:
    done = invoke("info", "--store", tmp_path / "none")
    assert done.exit_code == 1
    assert "cfstore ingest" in done.output


def test_the_store_may_come_from_the_environment(demo: Path) -> None:
    done = CliRunner(env={"CFSTORE": str(demo / "store")}).invoke(main, ["sql", "SELECT 42 AS answer"])
    assert "42" in done.stdout


def test_a_slide_is_shown_with_or_without_its_suffix(demo: Path) -> None:
    for name in ("DEMO-0001-01", "DEMO-0001-01.svs"):
        done = invoke("show", name, "--store", demo / "store", "--json")
        assert [bag["scale"] for bag in json.loads(done.stdout)["bags"]] == [5, 10, 20]


def test_made_splits_are_printed_and_kept(demo: Path) -> None:
    done = invoke("splits", "--make", "3", "--store", demo / "store", "--json")
    made = json.loads(done.stdout)
    assert [fold["fold"] for fold in made["folds"]] == [0, 1, 2]
    listed = invoke("sql", "SELECT DISTINCT name FROM splits ORDER BY 1", "--store", demo / "store").stdout
    assert made["name"] in listed


def test_synth_prints_both_c_indices(tmp_path: Path) -> None:
    done = invoke("synth", tmp_path / "h5", "--slides", 10, "--patches", 16, "--dim", 8, "--json")
    made = json.loads(done.stdout)
    assert 0.5 < made["c_index_best_single_scale"] < 1
    assert made["c_index_oracle"] == json.loads((tmp_path / "h5" / "synth.json").read_text())["c_index_oracle"]


def clinical_table(path: Path, *patients: str) -> Path:
    path.write_text("patient_id,time_months,event\n" + "".join(f"{patient},12,1\n" for patient in patients))
    return path


def test_an_imported_table_says_what_it_replaces_and_how_many_slides_have_a_label(demo: Path, tmp_path: Path) -> None:
    bags, store = tmp_path / "bags" / "x20", tmp_path / "store"
    bags.mkdir(parents=True)
    source = next((demo / "h5" / "x20" / "h5_files").iterdir()).read_bytes()
    for patient in ("TCGA-AA-0001", "TCGA-AA-0002"):
        (bags / f"{patient}-01Z-00-DX1.h5").write_bytes(source)
    assert invoke("ingest", bags, "--encoder", "toy", "--store", store).exit_code == 0
    right = clinical_table(tmp_path / "right.csv", "TCGA-AA-0001", "TCGA-AA-0002", "TCGA-AA-0003")
    wrong = clinical_table(tmp_path / "wrong.csv", "P1", "P2")

    def imported(table: Path, cohort: str) -> str:
        done = invoke("clinical", table, "--cohort", cohort, "--store", store)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "replaces" not in (first := imported(right, "GBM"))
    assert "in the store GBM: 2 slides; 2 with a label, of 2 patients, 2 events" in first
    second = imported(wrong, "GBM")
    assert "replaces the table of cohort GBM imported before, 3 patients" in second
    assert "2 slides; 0 with a label, of 0 patients" in second
    imported(right, "GBM")
    assert "2 slides; 0 with a label, of 0 patients" in imported(right, "GLIOMA")
    lacking = json.loads(invoke("info", "--json", "--store", store).stdout)["slides_without_label"]
    assert {row["reason"] for row in lacking} == {"patient in the tables of several cohorts: GBM, GLIOMA"}
    for path in (store / "tables").glob("*-GLIOMA.parquet"):
        path.unlink()
    assert invoke("reindex", "--store", store).exit_code == 0
    assert json.loads(invoke("info", "--json", "--store", store).stdout)["slides_without_label"] == []


def test_imported_folds_say_how_many_patients_of_the_store_they_hold(demo: Path, tmp_path: Path) -> None:
    store = shutil.copytree(demo / "store", tmp_path / "store")
    query = "SELECT DISTINCT patient_id FROM slides ORDER BY 1"
    answer = json.loads(invoke("sql", query, "--format", "json", "--store", store).stdout)
    ours = [row["patient_id"] for row in answer]

    def imported(name: str, train: str, val: str, *words: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "splits_0.csv").write_text(f",train,val\n0,{train},{val}\n")
        done = invoke("splits", tmp_path / name, "--store", store, *words)
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()[-1]

    assert imported("some", ours[0], ours[1]) == f"of {len(ours)} patients with a slide, 2 are in these folds"
    assert imported("others", "P1", "P2") == f"of {len(ours)} patients with a slide, 0 are in these folds"
    said = imported("misspelt", ours[0], ours[1], "--cohort", "DEM")
    assert said == "of 0 patients with a slide in cohort DEM, 0 are in these folds"
