"""`cfstore clinical` and `cfstore splits`."""

from __future__ import annotations

from pathlib import Path

import click

from cfstore.cli.terminal import echo_rows, json_option, print_json, printer, store_option


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--cohort", metavar="NAME", help="Cohort of its patients, where the table does not say.")
@store_option
@json_option
def clinical(file: Path, cohort: str | None, store: Path | str, as_json: bool) -> None:
    """Import a clinical table: who, how long followed, died or not, and every other column.

    Recognised by their columns: MCAT/PORPOISE/CrossFusion, SurvPath, MMP, TCGA-CDR, cBioPortal,
    GDC (old and new), and plain patient_id, time_months, event.

    \b
    Example:
        cfstore clinical tcga_blca_all_clean.csv.zip --cohort BLCA
    """
    from cfstore.describe import describe_cohort
    from cfstore.opening import open_store

    opened = open_store(store, create=True)
    counts = "SELECT cohort, count(*) AS n_patients FROM patients GROUP BY cohort ORDER BY cohort"
    before = {row["cohort"]: row["n_patients"] for row in opened.sql(counts).to_pylist()}
    table = opened.import_clinical(file, cohort)
    events = sum(bool(event) for event in table.patients["event"].to_pylist())
    say = printer(as_json)
    cohorts = sorted(set(table.patients["cohort"].to_pylist()))
    say(f"{file} ({table.format}): {len(table.patients)} patients, {events} events, cohort {', '.join(cohorts)}")
    for note in table.notes:
        say(f"  {note}")
    replaced = {name: n for name, n in before.items() if name in cohorts}
    for name, n_patients in replaced.items():
        say(f"  replaces the table of cohort {name} imported before, {n_patients} patients")
    held = opened.info().cohorts
    for row in held:
        say(f"  in the store {describe_cohort(row)}")
    if as_json:
        print_json(
            {
                "format": table.format,
                "cohorts": cohorts,
                "n_patients": len(table.patients),
                "n_events": events,
                "notes": table.notes,
                "replaced": replaced,
                "in_store": held,
            }
        )


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--make", "n_folds", type=click.IntRange(min=2), help="Make this many folds instead, stratified by event."
)
@click.option("--cohort", metavar="NAME", help="The cohort [default: the only one].")
@click.option("--name", help="Name of the split set [default: the folder's name].")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --make.")
@store_option
@json_option
def splits(
    folder: Path | None,
    n_folds: int | None,
    cohort: str | None,
    name: str | None,
    seed: int,
    store: Path | str,
    as_json: bool,
) -> None:
    """Import folds of patients from splits_<k>.csv files, or make them.

    \b
    Example:
        cfstore splits splits/tcga_blca --cohort BLCA
        cfstore splits --make 5
    """
    from cfstore.opening import open_store

    if (folder is None) == (n_folds is None):
        message = "give a folder of splits_<k>.csv, or --make K"
        raise click.UsageError(message)
    opened = open_store(store)
    if folder is not None:
        made = opened.import_splits(folder, cohort, name)
    else:
        made = opened.make_splits(n_folds or 0, cohort, seed=seed, name=name)
    rows = [{"fold": k, "train": len(fold.train), "val": len(fold.val)} for k, fold in made.folds.items()]
    folded = frozenset[str]().union(*(part for fold in made.folds.values() for part in (fold.train, fold.val)))
    slides = opened.sql("SELECT DISTINCT cohort, patient_id FROM slides WHERE patient_id IS NOT NULL").to_pylist()
    held = {row["patient_id"] for row in slides if cohort in (None, row["cohort"])}
    if as_json:
        print_json({"name": made.name, "folds": rows, "n_patients": len(held), "n_in_folds": len(held & folded)})
    else:
        click.echo(f"splits {made.name}: {len(rows)} folds of patients")
        echo_rows(rows)
        whose = f"patients with a slide in cohort {cohort}" if cohort else "patients with a slide"
        click.echo(f"of {len(held)} {whose}, {len(held & folded)} are in these folds")
