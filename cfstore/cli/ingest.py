"""`cfstore ingest`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from cfstore.cli.terminal import engine_options, json_option, print_json, printer, progress, store_option

_CODECS = ("none", "blosc-zstd", "blosc-zstd-bitshuffle", "blosc-lz4", "blosc-lz4-bitshuffle", "zstd")


@click.command()
@click.argument("h5dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cohort", metavar="NAME", help="Cohort of the slides [default: the clinical table's, else the folder].")
@click.option("--encoder", metavar="NAME", help="Encoder of the features [default: what the folders say].")
@click.option("--scale", type=click.Choice(["5", "10", "20"]), help="Scale, where neither folders nor files say.")
@click.option("--clinical", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Clinical table.")
@click.option(
    "--splits", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of splits_<k>.csv."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["zarr", "webdataset"]),
    default="zarr",
    show_default=True,
    help="Of the shards: Zarr v3 groups, or uncompressed tars.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float16-rounded", "float32", "int8"]),
    default="float16",
    show_default=True,
    help="Stored precision; the error is measured. float16-rounded keeps bfloat16's.",
)
@click.option(
    "--codec",
    type=click.Choice(_CODECS),
    help="Compression of the features [default: blosc-zstd; int8 and tars: none].",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes [default: one per core, where there is work].")
@engine_options
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="Bad files: stop before anything is written (at NaN rows: when the first is met), or leave their slides out.",
)
@click.option("--dry-run", is_flag=True, help="Say what was understood and what would be written; write nothing.")
@store_option
@json_option
def ingest(
    h5dir: Path,
    cohort: str | None,
    encoder: str | None,
    scale: str | None,
    clinical: Path | None,
    splits: Path | None,
    form: Any,
    dtype: Any,
    codec: str | None,
    jobs: int | None,
    engine: Any,
    address: str | None,
    on_error: Any,
    dry_run: bool,
    store: Path | str,
    as_json: bool,
) -> None:
    """Take over a folder of feature files (CLAM, TRIDENT, or plain .h5/.pt).

    Slides that are in the store already are left as they are: run it again after adding files.

    \b
    Example:
        cfstore ingest h5dir/
        cfstore ingest bags/ --scale 20 --encoder uni --cohort BLCA --clinical blca.csv
        cfstore ingest /shared/bags --store /shared/store --engine ray --address 10.0.0.5:6379
    """
    from cfstore.describe import describe_cohort, describe_plan, describe_report, plan_json, report_json
    from cfstore.opening import has_store, open_store
    from cfstore.store import IngestOptions, plan_ingest

    options = IngestOptions(
        cohort=cohort,
        encoder=encoder,
        scale=int(scale) if scale else None,
        clinical=clinical,
        splits=splits,
        dtype=dtype,
        codec=codec,
        format=form,
    )
    options.chosen_codec()
    opened = open_store(store, create=True) if not dry_run or has_store(store) else None
    with progress("looking at files", "files") as step:
        plan = plan_ingest(h5dir, options, opened, step)
    say = printer(as_json)
    for line in describe_plan(plan, store if isinstance(store, Path) else None):
        say(line)
    if dry_run or opened is None:
        for problem in plan.problems:
            say(f"problem    {problem.error}")
        if as_json:
            print_json(plan_json(plan))
        sys.exit(1 if plan.problems and on_error == "stop" else 0)
    with progress("writing", "slides") as step:
        report = opened.ingest(
            h5dir, options, plan=plan, on_error=on_error, jobs=jobs, engine=engine, address=address, progress=step
        )
    for line in describe_report(report):
        say(line)
    for row in opened.info().cohorts:
        say(f"cohort     {describe_cohort(row)}")
    if as_json:
        print_json(report_json(plan, report, store))
