"""`cfstore export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cfstore.cli.terminal import json_option, print_json, progress, store_option
from cfstore.render import counted, human_bytes


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["webdataset", "h5"]),
    default="webdataset",
    show_default=True,
    help="Tars with a sample per slide, or CLAM's x20/h5_files/*.h5 in float32.",
)
@click.option("--where", metavar="SQL", help="Only slides for which this condition over slides and patients holds.")
@click.option("--cohort", metavar="NAME", help="Only slides of this cohort.")
@click.option("--encoder", metavar="NAME", help="Encoder of the features [default: the only one].")
@click.option("--shard-slides", type=click.IntRange(min=1), default=64, show_default=True, help="Most slides in a tar.")
@store_option
@json_option
def export(
    directory: Path,
    form: Any,
    where: str | None,
    cohort: str | None,
    encoder: str | None,
    shard_slides: int,
    store: Path | str,
    as_json: bool,
) -> None:
    """Write slides with their labels into a new folder, for other programs or another machine.

    WebDataset tars hold .npy members and a .json with labels and folds; `cftrain run --shards`
    trains on them without a store. HDF5 folders have clinical.csv beside them.

    \b
    Example:
        cfstore export shards/ --where "cohort = 'GBMLGG' AND age > 40"
        cfstore export h5/ --format h5 --cohort BLCA --encoder uni
    """
    from cfstore.opening import open_store

    with progress("writing", "slides") as step:
        done = open_store(store).export(
            directory,
            format=form,
            where=where,
            cohort=cohort,
            encoder=encoder,
            shard_slides=shard_slides,
            progress=step,
        )
    if as_json:
        print_json(asdict(done))
        return
    click.echo(
        f"{directory}: {done.n_slides} slides ({done.n_bags} bags of {done.encoder}) "
        f"in {counted(done.n_files, 'file')}, {human_bytes(done.bytes)}, {done.seconds:.1f} s; "
        f"{done.n_without_label} slides without a label"
    )
