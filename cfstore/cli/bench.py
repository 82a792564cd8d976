"""`cfstore bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cfstore.cli.terminal import echo_rows, json_option, print_json, progress, store_option
from cfstore.render import human_bytes


@click.group()
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
    store: Path | str,
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
    from cfstore.opening import open_store

    nbytes = mb * 1_000_000
    if path is not None:
        rows = library.rows_of_folder(path, scale=int(scale) if scale else None, encoder=encoder, max_bytes=nbytes)
    else:
        rows = library.rows_of_store(open_store(store).path, encoder=encoder, max_bytes=nbytes)
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
