"""The `cfstore` command: arguments in, one library call, text out. The only room here that prints."""

from __future__ import annotations

from typing import Any

import click

from cfstore.cli.bench import bench
from cfstore.cli.derive import derive
from cfstore.cli.export import export
from cfstore.cli.ingest import ingest
from cfstore.cli.keeping import compact, reindex, rm, verify
from cfstore.cli.looking import info, show, sql
from cfstore.cli.synth import synth
from cfstore.cli.tables import clinical, splits
from cfstore.errors import StoreError


class _Group(click.Group):
    """Turns what the library raises on purpose into one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoreError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="crossfusion-store")
def main() -> None:
    """Patch embeddings of whole-slide images in a verified store, with SQL.

    \b
    Example:
        cfstore ingest h5dir/
        cfstore sql "SELECT cohort, count(*) FROM slides GROUP BY cohort"
    """


for command in (
    ingest,
    clinical,
    splits,
    sql,
    info,
    show,
    synth,
    derive,
    verify,
    reindex,
    rm,
    compact,
    export,
    bench,
):
    main.add_command(command)
