"""SQL over a store: the documented tables, read and never written, and no way out of the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import cfstore
from cfstore import QueryError, Store
from cfstore.query import run_query
from cfstore.schema import TABLES

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    import h5py
    import numpy as np

    root = tmp_path_factory.mktemp("sql")
    for i, slide in enumerate("abc"):
        path = root / "uni" / "x20" / "h5_files" / f"{slide}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["features"] = np.full((i + 1, 4), i, np.float32)
    (root / "uni" / "t.csv").write_text(
        "case_id,slide_id,survival_months,censorship,smoker,Gleason grade,scale,pack_years\n"
        "p1,a.svs,3.5,0,yes,7,one,\np2,b.svs,4,1,,8,two,\np3,c.svs,9,1,no,6,three,\n"
    )
    store = cfstore.open(root / "store", create=True)
    store.ingest(root / "uni")
    return store


@pytest.mark.parametrize(
    "statement",
    [
        "COPY bags TO '{out}'",
        "COPY (SELECT 1) TO '{out}' (FORMAT parquet)",
        "EXPLAIN ANALYZE COPY bags TO '{out}'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_csv_auto('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM read_parquet('{store}/catalog.parquet')",
        "SELECT * FROM '{store}/catalog.parquet'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT (SELECT count(*) FROM read_text('/etc/passwd'))",
        "WITH x AS (SELECT * FROM read_csv('/etc/passwd')) SELECT * FROM x",
        "FROM sniff_csv('/etc/passwd')",
        "ATTACH '{out}'",
        "ATTACH '{store}/catalog.duckdb' AS again",
        "DETACH store",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET threads = 1",
        "SET enable_external_access = true",
        "RESET enable_external_access",
        "PRAGMA enable_external_access = true",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "CREATE TABLE mine (x INTEGER)",
        "CREATE VIEW bags AS SELECT 1",
        "DELETE FROM bags",
        "DELETE FROM store.bags",
        "UPDATE store.bags SET dim = 1",
        "INSERT INTO store.slides VALUES ('x', 'y', 'z')",
        "EXPLAIN ANALYZE INSERT INTO store.slides VALUES ('x', 'y', 'z')",
        "DROP TABLE store.bags",
        "ALTER TABLE store.bags ADD COLUMN x INTEGER",
        "EXPORT DATABASE '{out}'",
        "IMPORT DATABASE '{store}'",
        "USE memory",
        "BEGIN",
        "CHECKPOINT store",
    ],
)
def test_what_writes_or_leaves_the_store_is_refused_saying_why(statement: str, filled: Store, tmp_path: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in filled.path.rglob("*"))
    with pytest.raises(QueryError, match=r"this store's tables only|read-only"):
        filled.sql(statement.format(out=tmp_path / "out", store=filled.path))
    assert not list(tmp_path.iterdir())
    assert sorted((path, path.stat().st_mtime_ns) for path in filled.path.rglob("*")) == before


@pytest.mark.parametrize(("query", "count"), [("SELECT 1; SELECT 2", 2), ("", 0), ("-- nothing", 0)])
def test_anything_but_one_statement_is_refused(query: str, count: int, filled: Store) -> None:
    with pytest.raises(QueryError, match=f"expected one SQL statement, found {count}"):
        filled.sql(query)


def test_two_statements_are_refused_before_the_first_runs(filled: Store, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="found 2"):
        filled.sql(f"SELECT 1; COPY bags TO '{tmp_path / 'out'}'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("query", ["SELEC 1", "SELECT nothing FROM bags", "SELECT * FROM nowhere", "SELECT 1/'x'"])
def test_sql_that_fails_is_a_query_error_with_duckdbs_words(query: str, filled: Store) -> None:
    with pytest.raises(QueryError, match="Error: "):
        filled.sql(query)


def test_a_table_that_is_not_there_is_said_in_one_line_with_those_that_are(filled: Store) -> None:
    with pytest.raises(QueryError) as caught:
        filled.sql("SELECT * FROM nothing")
    assert "nothing does not exist" in str(caught.value)
    assert str(caught.value).endswith("Tables: patients, slides, bags, splits, skipped, derived, prototypes")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(QueryError, match=r", prototypes, runs$"):
        run_query(filled.path, "SELECT * FROM nothing", {"runs": pa.table({"run": ["a"]})})


def test_python_variables_are_no_tables(filled: Store) -> None:
    secret = pa.table({"x": [1]})
    with pytest.raises(QueryError, match="secret"):
        filled.sql("SELECT * FROM secret")
    assert secret.num_rows == 1


@pytest.mark.parametrize(
    ("query", "n_rows"),
    [
        ("SELECT * FROM bags", 3),
        ("SELECT * FROM bags;", 3),
        ("FROM slides WHERE slide_id > 'a'", 2),
        ("WITH x AS (SELECT 1 AS y) SELECT y FROM x", 1),
        ("SHOW TABLES", len(TABLES)),
        ("DESCRIBE bags", len(TABLES["bags"])),
        ("SUMMARIZE slides", len(TABLES["slides"])),
        ("EXPLAIN SELECT * FROM bags", 1),
        ("SELECT * FROM bags WHERE false", 0),
        ("VALUES (1), (2)", 2),
    ],
)
def test_reading_statements_work(query: str, n_rows: int, filled: Store) -> None:
    assert filled.sql(query).num_rows == n_rows


@pytest.mark.parametrize("table", list(TABLES))
def test_a_table_has_exactly_the_documented_columns_and_types(table: str, filled: Store) -> None:
    found = [(row["column_name"], row["column_type"]) for row in filled.sql(f"DESCRIBE {table}").to_pylist()]
    documented = [(name, kind) for name, kind, _ in TABLES[table]]
    assert found[: len(documented)] == documented
    extra = [name for name, _ in found[len(documented) :]]
    assert extra == (["smoker", "Gleason grade", "scale", "pack_years"] if table == "patients" else [])


def test_extra_clinical_columns_can_be_asked_for(filled: Store) -> None:
    query = """
        SELECT slide_id, smoker, "Gleason grade" AS grade, patients.scale, pack_years, n_patches
        FROM bags JOIN slides USING (slide_id) JOIN patients USING (cohort, patient_id)
        WHERE smoker IS NULL OR grade > 6 ORDER BY slide_id"""
    assert filled.sql(query).to_pylist() == [
        {"slide_id": "a", "smoker": "yes", "grade": 7, "scale": "one", "pack_years": None, "n_patches": 1},
        {"slide_id": "b", "smoker": None, "grade": 8, "scale": "two", "pack_years": None, "n_patches": 2},
    ]


def test_event_is_true_where_death_was_observed(filled: Store) -> None:
    rows = filled.sql("SELECT patient_id, time_months, event FROM patients ORDER BY 1").to_pylist()
    assert [tuple(row.values()) for row in rows] == [("p1", 3.5, True), ("p2", 4.0, False), ("p3", 9.0, False)]


def test_extra_tables_can_be_joined(filled: Store) -> None:
    predictions = pa.table({"slide_id": ["a", "c"], "risk": [0.5, 1.5]})
    query = "SELECT slide_id, n_patches, risk FROM bags JOIN predictions USING (slide_id) ORDER BY risk"
    assert filled.sql(query, {"predictions": predictions}).to_pylist() == [
        {"slide_id": "a", "n_patches": 1, "risk": 0.5},
        {"slide_id": "c", "n_patches": 3, "risk": 1.5},
    ]


def test_an_empty_store_has_all_tables_empty(store: Store) -> None:
    for table in TABLES:
        assert store.sql(f"SELECT count(*) AS n FROM {table}").to_pylist() == [{"n": 0}]


def test_tables_of_two_cohorts_with_other_columns_and_types_are_one_table(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("cohort,case_id,survival_months,censorship,stage\nA,p1,3,0,1\n")
    store.import_clinical(file)
    file.write_text("cohort,case_id,survival_months,censorship,STAGE,grade\nB,p1,5,1,IIa,3\n")
    store.import_clinical(file)
    rows = store.sql("SELECT cohort, time_months, stage, grade FROM patients ORDER BY cohort").to_pylist()
    assert [tuple(row.values()) for row in rows] == [("A", 3.0, "1", None), ("B", 5.0, "IIa", 3)]
