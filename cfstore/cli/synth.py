"""`cfstore synth`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cfstore.cli.terminal import json_option, print_json, progress


@click.command()
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
