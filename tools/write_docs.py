"""Write docs/cli.md (the commands' own help) and docs/sql.md (the catalog's columns); a test compares both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from cfstore.cli import main as cfstore
from cfstore.schema import TABLES
from cftrain.cli import main as cftrain

HEAD = """# Command line

Generated from the commands' own help by `make docs`.

Data goes to stdout, progress and logs to stderr. Exit codes: 0 done, 1 something failed and was
named, 2 wrong usage. The store is `--store`, else `$CFSTORE`, else `./cfstore-data`.
"""


def pages(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """(full command name, help text) of a command and everything below it."""
    width = {"terminal_width": 100, "max_content_width": 100, "help_option_names": ["-h", "--help"]}
    context = click.Context(command, info_name=name, parent=parent, **width)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield from pages(command.commands[child], child, context)


def command_line() -> str:
    """docs/cli.md."""
    parts = [HEAD]
    for group, name in ((cfstore, "cfstore"), (cftrain, "cftrain")):
        parts += [f"## {path}\n\n```\n{text}\n```\n" for path, text in pages(group, name)]
    return "\n".join(parts)


SQL_HEAD = """# SQL

`cfstore sql "SELECT ..."` and `store.sql(...)` see these tables. Generated from `cfstore/schema.py` by
`make docs`. Only reads are allowed, and nothing outside the store can be reached. With `--runs DIR`
there are also `runs` (one row per run directory) and `predictions` (its predictions.parquet).

```sql
-- patients by outcome
SELECT cohort, event, count(*), median(time_months) FROM patients GROUP BY ALL;
-- slides of patients over 60, with their 20x bags
SELECT slide_id, n_patches FROM bags JOIN slides USING (slide_id) JOIN patients USING (cohort, patient_id)
WHERE scale = 20 AND age > 60;
```
"""

SQL_NOTES = {
    "patients": "One row per patient of an imported clinical table; every other column of that table follows these.",
    "slides": "One row per slide in the store.",
    "bags": "One row per slide, scale and encoder.",
    "splits": "One row per patient, fold and part.",
    "skipped": "Slides that the last ingest of a folder left out. Mended and ingested, they leave this table.",
    "derived": "One row per slide and derivation: what `cfstore derive` computed of the bags that are there now.",
    "prototypes": "One row per set of k-means centroids, each of exactly one training set.",
}


def sql() -> str:
    """docs/sql.md."""
    parts = [SQL_HEAD]
    for table, columns in TABLES.items():
        rows = "\n".join(f"| `{name}` | {kind} | {text} |" for name, kind, text in columns)
        parts.append(f"## {table}\n\n{SQL_NOTES[table]}\n\n| column | type | meaning |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    docs = Path(__file__).resolve().parents[1] / "docs"
    (docs / "cli.md").write_text(command_line())
    (docs / "sql.md").write_text(sql())
