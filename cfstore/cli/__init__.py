"""The `cfstore` command: arguments in, one library call, text out. The only room here that prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cfstore.cli.derive import derive
from cfstore.cli.terminal import echo_rows, json_option, print_json, printer, progress, store_option
from cfstore.errors import StoreError
from cfstore.render import human_bytes, plain, text_table

_CODECS = ("none", "blosc-zstd", "blosc-zstd-bitshuffle", "blosc-lz4", "blosc-lz4-bitshuffle", "zstd")


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


# -- ingest --------------------------------------------------------------------------------------


@main.command()
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
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="Bad files: stop before anything is written, or leave their slides out.",
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
    on_error: Any,
    dry_run: bool,
    store: Path,
    as_json: bool,
) -> None:
    """Take over a folder of feature files (CLAM, TRIDENT, or plain .h5/.pt).

    Slides that are in the store already are left as they are: run it again after adding files.

    \b
    Example:
        cfstore ingest h5dir/
        cfstore ingest bags/ --scale 20 --encoder uni --cohort BLCA --clinical blca.csv
    """
    from cfstore.describe import describe_plan, describe_report, plan_json, report_json
    from cfstore.store import IngestOptions, open_store, plan_ingest

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
    exists = (store / "store.json").exists()
    opened = open_store(store, create=True) if exists or not dry_run else None
    with progress("looking at files", "files") as step:
        plan = plan_ingest(h5dir, options, opened, step)
    say = printer(as_json)
    for line in describe_plan(plan, store):
        say(line)
    if dry_run or opened is None:
        for problem in plan.problems:
            say(f"problem    {problem.error}")
        if as_json:
            print_json(plan_json(plan))
        sys.exit(1 if plan.problems and on_error == "stop" else 0)
    with progress("writing", "slides") as step:
        report = opened.ingest(h5dir, options, plan=plan, on_error=on_error, jobs=jobs, progress=step)
    for line in describe_report(report):
        say(line)
    for row in opened.info().cohorts:
        say(
            f"cohort     {row['cohort']}: {row['n_slides']} slides; with a label {row['n_labelled_slides']} "
            f"of {row['n_labelled_patients']} patients, {row['n_events']} events"
        )
    if as_json:
        print_json(report_json(plan, report, store))


# -- tables --------------------------------------------------------------------------------------


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--cohort", metavar="NAME", help="Cohort of its patients, where the table does not say.")
@store_option
@json_option
def clinical(file: Path, cohort: str | None, store: Path, as_json: bool) -> None:
    """Import a clinical table: who, how long followed, died or not, and every other column.

    Recognised by their columns: MCAT/PORPOISE/CrossFusion, SurvPath, MMP, TCGA-CDR, cBioPortal,
    GDC (old and new), and plain patient_id, time_months, event.

    \b
    Example:
        cfstore clinical tcga_blca_all_clean.csv.zip --cohort BLCA
    """
    from cfstore.store import open_store

    opened = open_store(store, create=True)
    table = opened.import_clinical(file, cohort)
    events = sum(bool(event) for event in table.patients["event"].to_pylist())
    say = printer(as_json)
    cohorts = sorted(set(table.patients["cohort"].to_pylist()))
    say(f"{file} ({table.format}): {len(table.patients)} patients, {events} events, cohort {', '.join(cohorts)}")
    for note in table.notes:
        say(f"  {note}")
    if as_json:
        print_json(
            {
                "format": table.format,
                "cohorts": cohorts,
                "n_patients": len(table.patients),
                "n_events": events,
                "notes": table.notes,
            }
        )


@main.command()
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
    store: Path,
    as_json: bool,
) -> None:
    """Import folds of patients from splits_<k>.csv files, or make them.

    \b
    Example:
        cfstore splits splits/tcga_blca --cohort BLCA
        cfstore splits --make 5
    """
    from cfstore.store import open_store

    if (folder is None) == (n_folds is None):
        message = "give a folder of splits_<k>.csv, or --make K"
        raise click.UsageError(message)
    opened = open_store(store)
    if folder is not None:
        made = opened.import_splits(folder, cohort, name)
    else:
        made = opened.make_splits(n_folds or 0, cohort, seed=seed, name=name)
    rows = [{"fold": k, "train": len(fold.train), "val": len(fold.val)} for k, fold in made.folds.items()]
    if as_json:
        print_json({"name": made.name, "folds": rows})
    else:
        click.echo(f"splits {made.name}: {len(rows)} folds of patients")
        echo_rows(rows)


# -- looking -------------------------------------------------------------------------------------


@main.command()
@click.argument("query")
@click.option(
    "--format", "form", type=click.Choice(["table", "csv", "json", "parquet"]), default="table", show_default=True
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.option(
    "--runs", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Also see these training runs."
)
@store_option
def sql(query: str, form: str, output: Path | None, runs: Path | None, store: Path) -> None:
    """Run one read-only SQL query over patients, slides, bags, splits, skipped, derived and prototypes.

    With --runs DIR also over runs and predictions. Nothing outside the store can be read or
    written from SQL.

    \b
    Example:
        cfstore sql "SELECT cohort, count(*), sum(event::int) FROM patients GROUP BY cohort"
        cfstore sql "SELECT * FROM bags WHERE scale = 20" --format parquet -o bags.parquet
        cfstore sql "SELECT run, c_index FROM runs ORDER BY c_index DESC" --runs runs/
    """
    from cfstore.runs import read_runs
    from cfstore.store import open_store

    if form == "parquet" and output is None and sys.stdout.isatty():
        message = "parquet is binary: write it to a file with -o FILE"
        raise click.UsageError(message)
    rows = open_store(store).sql(query, read_runs(runs) if runs else None)
    _write_rows(rows, form, output)


def _write_rows(rows: Any, form: str, output: Path | None) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    if form in ("csv", "parquet"):
        write = pyarrow.csv.write_csv if form == "csv" else pyarrow.parquet.write_table
        write(rows, str(output) if output else sys.stdout.buffer)
        return
    if form == "json":
        text = json.dumps(plain(rows.to_pylist()), indent=2)
    else:
        columns = [rows.column(i).to_pylist() for i in range(rows.num_columns)]
        text = text_table(rows.column_names, list(zip(*columns, strict=True)))
    if output:
        output.write_text(text + "\n")
    else:
        click.echo(text)


@main.command()
@store_option
@json_option
def info(store: Path, as_json: bool) -> None:
    """Show what the store holds, which labels and slides miss each other, and what was left out.

    \b
    Example:
        cfstore info
        cfstore info --json
    """
    from cfstore.store import open_store

    found = open_store(store).info()
    if as_json:
        print_json(asdict(found))
        return
    click.echo(f"store {found.path}: {human_bytes(found.stored_bytes)} of features, made {found.created}")
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


@main.command()
@click.argument("slide")
@store_option
@json_option
def show(slide: str, store: Path, as_json: bool) -> None:
    """Show one slide: its patient and its bags.

    \b
    Example:
        cfstore show TCGA-02-0047-01Z-00-DX1.4755D138-5842-4159-848C-4248D6D53DE0
    """
    from cfstore.names import strip_suffixes
    from cfstore.store import open_store

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


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--slides", type=click.IntRange(min=10), default=100, show_default=True, help="Number of slides.")
@click.option("--patches", type=click.IntRange(min=16), default=13_496, show_default=True, help="Mean patches at 20x.")
@click.option("--dim", type=click.IntRange(min=8), default=64, show_default=True, help="Feature dimension.")
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
def synth(directory: Path, slides: int, patches: int, dim: int, seed: int, as_json: bool) -> None:
    """Make a synthetic cohort DEMO to try things on: CLAM files, clinical table, splits.

    Survival depends on a signal that needs 5x and 20x together; the C-index of the planted
    risk, and of the best predictor that sees one scale only, are printed and kept.

    \b
    Example:
        cfstore synth demo/h5 --slides 80 --patches 256
        cfstore ingest demo/h5
    """
    from cfstore.synth import synthesize

    with progress("making slides", "slides") as step:
        made = synthesize(directory, slides=slides, patches=patches, dim=dim, seed=seed, progress=step)
    if as_json:
        print_json(asdict(made))
        return
    counts = ", ".join(f"{scale}x {total:,}" for scale, total in sorted(made.n_patches.items()))
    click.echo(
        f"synthetic cohort DEMO in {directory}: {made.n_slides} slides of {made.n_patients} patients; patches {counts}"
    )
    click.echo(
        f"C-index of the planted risk {made.c_index_oracle:.3f}; "
        f"of the best single-scale predictor {made.c_index_best_single_scale:.3f}"
    )


main.add_command(derive)


# -- keeping -------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--deep",
    is_flag=True,
    help="Also compare every value with the source files, within the recorded error, and derive again.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Slides checked at once [default: one per core].")
@store_option
@json_option
def verify(deep: bool, threads: int | None, store: Path, as_json: bool) -> None:
    """Check that catalog, shards and every stored byte are what was written.

    Names every slide that is damaged, and what to do; exit code 1 if there is one.

    \b
    Example:
        cfstore verify
        cfstore verify --deep
    """
    from cfstore.describe import describe_verify
    from cfstore.store import open_store

    with progress("verifying", "slides") as step:
        report = open_store(store).verify(deep=deep, threads=threads, progress=step)
    say = printer(as_json)
    for line in describe_verify(report):
        say(line)
    if as_json:
        print_json(asdict(report))
    sys.exit(1 if report.findings else 0)


@main.command()
@store_option
@json_option
def reindex(store: Path, as_json: bool) -> None:
    """Make the catalog anew from the shards, imported tables and derived files alone.

    \b
    Example:
        cfstore reindex
    """
    from cfstore.store import open_store

    report = open_store(store).reindex()
    say = printer(as_json)
    say(f"reindexed  {report.n_shards} shards, {report.n_slides} slides ({report.n_bags} bags)")
    for shard in report.gone:
        say(f"gone       {shard}: was in the catalog, is not on disk; restore it, or ingest its slides again")
    if as_json:
        print_json(asdict(report))


@main.command()
@click.argument("slides", nargs=-1, required=True, metavar="SLIDE...")
@click.option("--encoder", metavar="NAME", help="Only what this encoder made of them [default: all].")
@store_option
@json_option
def rm(slides: tuple[str, ...], encoder: str | None, store: Path, as_json: bool) -> None:
    """Take slides out of the store. `cfstore compact` frees their space.

    \b
    Example:
        cfstore rm TCGA-02-0047-01Z-00-DX1.4755D138-5842-4159-848C-4248D6D53DE0
        cfstore rm slide1 slide2 --encoder uni
    """
    from cfstore.names import strip_suffixes
    from cfstore.store import open_store

    slide_ids = list(dict.fromkeys(strip_suffixes(slide) for slide in slides))
    n_bags = open_store(store).remove(slide_ids, encoder)
    say = printer(as_json)
    for slide_id in slide_ids:
        say(f"removed    {slide_id}")
    say(f"done       {len(slide_ids)} slides ({n_bags} bags) removed; `cfstore compact` frees their space")
    if as_json:
        print_json({"slides": slide_ids, "encoder": encoder, "n_bags": n_bags})


@main.command()
@store_option
@json_option
def compact(store: Path, as_json: bool) -> None:
    """Free the space of removed slides, and put small shards together.

    Every slide is checked against its digest while it is copied.

    \b
    Example:
        cfstore compact
    """
    from cfstore.describe import describe_compact
    from cfstore.store import open_store

    with progress("compacting", "slides") as step:
        report = open_store(store).compact(step)
    printer(as_json)(describe_compact(report))
    if as_json:
        print_json(asdict(report))


# -- files and numbers out -----------------------------------------------------------------------


@main.command()
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
    store: Path,
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
    from cfstore.store import open_store

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
        f"{directory}: {done.n_slides} slides ({done.n_bags} bags of {done.encoder}) in {done.n_files} files, "
        f"{human_bytes(done.bytes)}, {done.seconds:.1f} s; {done.n_without_label} slides without a label"
    )


@main.group()
def bench() -> None:
    """Measure on your own data.

    \b
    Example:
        cfstore bench codecs h5dir/
    """


@bench.command("codecs")
@click.argument("path", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--encoder", metavar="NAME", help="Encoder of the features, where there are several.")
@click.option("--scale", type=click.Choice(["5", "10", "20"]), help="Scale of PATH, where nothing says.")
@click.option("--mb", type=click.IntRange(min=1), default=64, show_default=True, help="Megabytes of rows to take.")
@click.option("--threads", type=click.IntRange(min=1), help="For the last decode column [default: one per core].")
@store_option
@json_option
def bench_codecs(
    path: Path | None,
    encoder: str | None,
    scale: str | None,
    mb: int,
    threads: int | None,
    store: Path,
    as_json: bool,
) -> None:
    """Compare precisions and codecs on your features: those of the folder PATH, else of the store.

    Ratio is stored / source bytes. Convert (to the precision) and encode are one thread's, per
    source byte; decode is per decoded byte, without reading from disk. `*` marks the default codec.

    \b
    Example:
        cfstore bench codecs h5dir/
        cfstore bench codecs --store cfstore-data --threads 8 --json
    """
    from cfstore import bench as library

    nbytes = mb * 1_000_000
    if path is not None:
        rows = library.rows_of_folder(path, scale=int(scale) if scale else None, encoder=encoder, max_bytes=nbytes)
    else:
        rows = library.rows_of_store(store, encoder=encoder, max_bytes=nbytes)
    with progress("measuring", "runs") as step:
        found = library.bench_codecs(rows, threads=threads, progress=step)
    if as_json:
        print_json(asdict(found))
        return
    machine = found.machine
    click.echo(
        f"{found.n_bags} bags, {found.n_patches} patches x {found.dim} of {found.source_dtype}: "
        f"{human_bytes(found.source_bytes)}; medians of {found.repetitions}\n"
        f"{machine['processor']}, {machine['cores']} cores; numpy {machine['numpy']}, "
        f"numcodecs {machine['numcodecs']}\n"
    )
    echo_rows(
        [
            {
                "dtype": row.dtype,
                "codec": row.codec + (" *" if row.default else ""),
                "ratio": round(row.ratio, 3),
                "convert MB/s": round(row.convert_mb_s),
                "encode MB/s": round(row.encode_mb_s),
                "decode GB/s": round(row.decode_gb_s, 2),
                f"x{found.threads} threads": round(row.decode_gb_s_threads, 2),
                "max error": float(f"{row.max_abs_error:.2e}"),
                "rms error": float(f"{row.rms_relative_error:.2e}"),
            }
            for row in found.rows
        ]
    )
    for dtype, reason in found.refused.items():
        click.echo(f"{dtype}: {reason}")
