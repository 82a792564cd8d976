"""`cfstore sql`, `info` and `show`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import click

from cfstore.cli.terminal import echo_rows, json_option, print_json, store_option
from cfstore.render import human_bytes, plain, text_table

_BY_ENDING = {".csv": "csv", ".json": "json", ".parquet": "parquet"}


@click.command()
@click.argument("query")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", *_BY_ENDING.values()]),
    help="[default: what the name of -o says (.csv, .json, .parquet), else table]",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.option(
    "--runs", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Also see these training runs."
)
@store_option
def sql(query: str, form: str | None, output: Path | None, runs: Path | None, store: Path | str) -> None:
    """Run one read-only SQL query over patients, slides, bags, splits, skipped, derived and prototypes.

    With --runs DIR also over runs and predictions. Nothing outside the store can be read or
    written from SQL.

    \b
    Example:
        cfstore sql "SELECT cohort, count(*), sum(event::int) FROM patients GROUP BY cohort"
        cfstore sql "SELECT * FROM bags WHERE scale = 20" -o bags.parquet
        cfstore sql "SELECT run, c_index FROM runs ORDER BY c_index DESC" --runs runs/
    """
    from cfstore.opening import open_store
    from cfstore.runs import read_runs

    form = form or _BY_ENDING.get(output.suffix.lower() if output else "", "table")
    if form == "parquet" and output is None and sys.stdout.isatty():
        message = "parquet is binary: write it to a file with -o FILE"
        raise click.UsageError(message)
    rows = open_store(store).sql(query, read_runs(runs) if runs else None)
    _write_rows(rows, form, output)


def _write_rows(rows: Any, form: str, output: Path | None) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    twice = sorted({name for name in rows.column_names if rows.column_names.count(name) > 1})
    if form == "json" and twice:
        message = f"JSON holds one column of a name, and there are several called {', '.join(twice)}: rename with AS"
        raise click.ClickException(message)
    if output is None and form in ("json", "table"):
        click.echo(_as_text(rows, form))
        return
    with _opened(output) as file:
        try:
            if form == "csv":
                pyarrow.csv.write_csv(rows, file)
            elif form == "parquet":
                pyarrow.parquet.write_table(rows, file)
            else:
                file.write((_as_text(rows, form) + "\n").encode())
        except pyarrow.ArrowException as error:
            if isinstance(error, OSError):
                raise
            message = f"{form} cannot hold this ({error}); try --format json, or cast with ::VARCHAR"
            raise click.ClickException(message) from error


def _as_text(rows: Any, form: str) -> str:
    if form == "json":
        return json.dumps(plain(rows.to_pylist()), indent=2)
    columns = [rows.column(i).to_pylist() for i in range(rows.num_columns)]
    return text_table(rows.column_names, list(zip(*columns, strict=True)))


@contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    """A file to write, else stdout; where it cannot be written that is said, and no part of an answer stays."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    whole = True
    try:
        with output.open("wb") as file:
            whole = False
            yield file
        whole = True
    except OSError as error:
        message = f"{output}: cannot be written ({error.strerror or error}); name another file with -o, or free space"
        raise click.ClickException(message) from error
    finally:
        if not whole and output.is_file():
            output.unlink()


@click.command()
@store_option
@json_option
def info(store: Path | str, as_json: bool) -> None:
    """Show what the store holds, which labels and slides miss each other, and what was left out.

    \b
    Example:
        cfstore info
        cfstore info --json
    """
    from cfstore.opening import open_store

    found = open_store(store).info()
    if as_json:
        print_json(asdict(found))
        return
    click.echo(f"store {found.path}: {human_bytes(found.stored_bytes)} of shards on disk, made {found.created}")
    for title, rows in (
        ("cohorts", found.cohorts),
        ("bags", _readable(found.encoders)),
        ("derived", [{**row, "bytes": human_bytes(row["bytes"])} for row in found.derived]),
        ("splits", found.splits),
    ):
        if rows:
            click.echo(f"\n{title}")
            echo_rows(rows)
    for title, rows in (
        ("slides without a label", found.slides_without_label),
        ("labels without a slide", found.labels_without_slide),
        ("slides lacking a scale", found.slides_missing_scale),
        ("slides left out at ingest", found.skipped),
    ):
        click.echo(f"\n{title}: {len(rows)}")
        if rows:
            echo_rows(rows[:20])
        if len(rows) > 20:
            click.echo(f"... and {len(rows) - 20} more; all of them with --json")


def _readable(encoders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**row, "bytes": human_bytes(row["bytes"]), "rms_relative_error": f"{row['rms_relative_error']:.1e}"}
        for row in encoders
    ]


@click.command()
@click.argument("slide")
@store_option
@json_option
def show(slide: str, store: Path | str, as_json: bool) -> None:
    """Show one slide: its patient and its bags.

    \b
    Example:
        cfstore show TCGA-02-0047-01Z-00-DX1.4755D138-5842-4159-848C-4248D6D53DE0
    """
    from cfstore.names import strip_suffixes
    from cfstore.opening import open_store

    found = open_store(store).slide_rows(strip_suffixes(slide))
    if as_json:
        print_json(found)
        return
    for name, value in {**found["slide"], **(found["patient"] or {})}.items():
        click.echo(f"{name:<16} {'' if value is None else value}")
    click.echo()
    echo_rows(
        [
            {
                k: bag[k]
                for k in ("encoder", "scale", "n_patches", "dim", "dtype", "has_coords", "shard", "row_start", "source")
            }
            for bag in found["bags"]
        ]
    )
