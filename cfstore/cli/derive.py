"""`cfstore derive`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cfstore.cli.terminal import engine_options, json_option, print_json, printer, progress, store_option


@click.command()
@click.argument("derivations", nargs=-1, metavar="[DERIVATION]...")
@click.option("--cohort", metavar="NAME", help="Only slides of this cohort.")
@click.option("--encoder", metavar="NAME", help="Encoder of the bags [default: the only one].")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes [default: one per core, where there is work].")
@engine_options
@click.option(
    "--prototypes",
    "n_prototypes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Fit N k-means centroids to each training fold of --splits; derivations only if named.",
)
@click.option("--splits", metavar="NAME", help="Split set of --prototypes [default: the cohort's only one].")
@click.option("--scale", type=click.Choice(["5", "10", "20"]), help="Scale of --prototypes [default: 20].")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of --prototypes [default: 0].")
@store_option
@json_option
def derive(
    derivations: tuple[str, ...],
    cohort: str | None,
    encoder: str | None,
    jobs: int | None,
    engine: Any,
    address: str | None,
    n_prototypes: int | None,
    splits: str | None,
    scale: str | None,
    seed: int | None,
    store: Path | str,
    as_json: bool,
) -> None:
    """Compute what graph and multi-scale models need of bags besides features, once, and keep it.

    \b
    DERIVATION is one of
        nearest8-20x       the 8 nearest patches of each by place (any number, any scale)
        similar8-20x       the same by features: takes minutes for the largest slides
        parents-20x-10x    the 10x patch that each 20x patch lies in
        mean-20x           the mean of the features
    Without any: nearest8 and mean at every scale, parents between neighbouring scales and from the
    finest to the coarsest. What is there already, of the same bags, is not computed again.

    \b
    Example:
        cfstore derive
        cfstore derive nearest8-20x similar8-20x --cohort BLCA --encoder uni
        cfstore derive --prototypes 16 --splits 5foldcv --cohort BLCA
    """
    from cfstore.derivation import Derivation
    from cfstore.describe import describe_derive
    from cfstore.opening import open_store

    if n_prototypes is None and (splits or scale or seed is not None):
        message = "--splits, --scale and --seed are of --prototypes N: name it too"
        raise click.UsageError(message)
    wanted = [Derivation.parse(name) for name in dict.fromkeys(derivations)]
    opened, say = open_store(store), printer(as_json)
    content: dict[str, Any] = {}
    if wanted or n_prototypes is None:
        with progress("deriving", "slides") as step:
            report = opened.derive(
                wanted or None, encoder=encoder, cohort=cohort, jobs=jobs, engine=engine, address=address, progress=step
            )
        for line in describe_derive(report):
            say(line)
        content = asdict(report)
    if n_prototypes is not None:
        with progress("fitting", "folds") as step:
            made = opened.fold_prototypes(
                n_prototypes,
                splits,
                scale=int(scale or 20),
                seed=seed or 0,
                cohort=cohort,
                encoder=encoder,
                progress=step,
            )
        for row in made:
            kept = (
                f" ({row['n_sampled']} patches), {row['file']}" if row["file"] else ", not kept: cannot be written now"
            )
            of = f"{row['n']} centroids at {row['scale']}x of {row['n_slides']} training slides"
            say(f"prototypes fold {row['fold']}: {of}{kept}")
        content["prototypes"] = made
    if as_json:
        print_json(content)
