"""`cfstore verify`, `reindex`, `rm` and `compact`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from cfstore.cli.terminal import json_option, print_json, printer, progress, store_option


@click.command()
@click.option(
    "--deep",
    is_flag=True,
    help="Also compare every value with the source files, within the recorded error, and derive again.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Slides checked at once [default: one per core].")
@store_option
@json_option
def verify(deep: bool, threads: int | None, store: Path | str, as_json: bool) -> None:
    """Check that catalog, shards and every stored byte are what was written.

    Names every slide that is damaged, and what to do; exit code 1 if there is one.

    \b
    Example:
        cfstore verify
        cfstore verify --deep
    """
    from cfstore.describe import describe_verify
    from cfstore.opening import open_store

    with progress("verifying", "slides") as step:
        report = open_store(store).verify(deep=deep, threads=threads, progress=step)
    say = printer(as_json)
    for line in describe_verify(report):
        say(line)
    if as_json:
        print_json(asdict(report))
    sys.exit(1 if report.findings else 0)


@click.command()
@store_option
@json_option
def reindex(store: Path | str, as_json: bool) -> None:
    """Make the catalog anew from the shards, imported tables and derived files alone.

    \b
    Example:
        cfstore reindex
    """
    from cfstore.opening import open_store

    report = open_store(store).reindex()
    say = printer(as_json)
    say(f"reindexed  {report.n_shards} shards, {report.n_slides} slides ({report.n_bags} bags)")
    for shard in report.gone:
        say(f"gone       {shard}: was in the catalog, is not on disk; restore it, or ingest its slides again")
    if as_json:
        print_json(asdict(report))


@click.command()
@click.argument("slides", nargs=-1, required=True, metavar="SLIDE...")
@click.option("--encoder", metavar="NAME", help="Only what this encoder made of them [default: all].")
@store_option
@json_option
def rm(slides: tuple[str, ...], encoder: str | None, store: Path | str, as_json: bool) -> None:
    """Take slides out of the store. `cfstore compact` frees their space.

    \b
    Example:
        cfstore rm TCGA-02-0047-01Z-00-DX1.4755D138-5842-4159-848C-4248D6D53DE0
        cfstore rm slide1 slide2 --encoder uni
    """
    from cfstore.names import strip_suffixes
    from cfstore.opening import open_store

    slide_ids = list(dict.fromkeys(strip_suffixes(slide) for slide in slides))
    opened = open_store(store)
    n_bags = opened.remove(slide_ids, encoder)
    say = printer(as_json)
    for slide_id in slide_ids:
        say(f"removed    {slide_id}")
    space = "their space stays taken in a bucket" if opened.url else "`cfstore compact` frees their space"
    say(f"done       {len(slide_ids)} slides ({n_bags} bags) removed; {space}")
    if as_json:
        print_json({"slides": slide_ids, "encoder": encoder, "n_bags": n_bags})


@click.command()
@store_option
@json_option
def compact(store: Path | str, as_json: bool) -> None:
    """Free the space of removed slides, and put small shards together.

    Every slide is checked against its digest while it is copied.

    \b
    Example:
        cfstore compact
    """
    from cfstore.describe import describe_compact
    from cfstore.opening import open_store

    with progress("compacting", "slides") as step:
        report = open_store(store).compact(step)
    printer(as_json)(describe_compact(report))
    if as_json:
        print_json(asdict(report))
