"""`cftrain heatmap`: where a run's models look on a slide."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import click

from cftrain.cli.columns import padded
from cftrain.cli.places import StorePlace

_SYNTHETIC: Final = {
    True: "SYNTHETIC DATA: invented by `cfstore synth`, about no real patient",
    False: "SYNTHETIC DATA: the model was trained on what `cfstore synth` invented; its maps say nothing of this slide",
}


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--slide", "slides", metavar="ID", multiple=True, help="The slide to explain; may be given several times."
)
@click.option(
    "--top", metavar="N", type=click.IntRange(min=1), help="The N slides of highest and the N of lowest risk."
)
@click.option(
    "--map", "maps", metavar="NAME", multiple=True, help="Which maps [default: all]; see `cftrain models NAME`."
)
@click.option("--fold", type=int, help="By this fold's model [default: those not trained on the slide's patient].")
@click.option("--ensemble", is_flag=True, help="The mean over all folds.")
@click.option(
    "--weights", type=click.Choice(["last", "best"]), default="last", show_default=True, help="Of which epoch."
)
@click.option("--check", is_flag=True, help="Drop the patches of highest score and look at the risk.")
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05, show_default=True,
    help="Of the check: which part of the patches.",
)  # fmt: skip
@click.option(
    "--draws", type=click.IntRange(min=1), default=10, show_default=True, help="Of the check: random choices."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the check: of the random choices.")
@click.option("--wsi", type=click.Path(exists=True, path_type=Path), help="The slide's image, or a folder that has it.")
@click.option("--store", type=StorePlace(), help="The store of the slide [default: the run's].")
@click.option("--shards", metavar="TARS", help="Tars in place of a store: 'path/{000..031}.tar'.")
@click.option("--encoder", metavar="NAME", help="Encoder of the features [default: the run's, by name].")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of one heatmap [default: RUN/heatmaps/ID].")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print heatmap.json instead of text.")
def heatmap(
    run: Path,
    slides: tuple[str, ...],
    top: int | None,
    maps: tuple[str, ...],
    fold: int | None,
    ensemble: bool,
    weights: Literal["last", "best"],
    check: bool,
    share: float,
    draws: int,
    seed: int,
    wsi: Path | None,
    store: Path | str | None,
    shards: str | None,
    encoder: str | None,
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Explain what a finished RUN predicts for a slide: an exact score for each patch, at all scales.

    Writes a folder: index.html to look at (pan, zoom, layers; no network), PNG pictures, GeoJSON tiles for QuPath,
    OME-TIFF, CSV and Parquet. Coordinates are level-0 pixels. The maps are those of the model (`cftrain models NAME`),
    "gradient" as a second opinion, and "integrated" where it is named, which takes longer.

    \b
    Example:
        cftrain heatmap runs/BLCA-crossfusion-20261121-120000 --slide TCGA-2F-A9KO-01Z-00-DX1 --check
        cftrain heatmap runs/BLCA-crossfusion-20261121-120000 --slide TCGA-2F-A9KO-01Z-00-DX1 --wsi slides/
        cftrain heatmap runs/BLCA-crossfusion-20261121-120000 --top 10
    """
    if bool(slides) == (top is not None):
        raise click.UsageError("name slides with --slide, or ask for the extremes with --top, one of them")
    if out is not None and (top is not None or len(slides) > 1):
        raise click.UsageError("-o is the folder of one heatmap; leave it out")
    if store is not None and shards is not None:
        raise click.UsageError("--store and --shards name two places for one slide; give one of them")
    if fold is not None and ensemble:
        raise click.UsageError("--fold and --ensemble say different things; give one of them")
    from cftrain.heatmap import HeatmapOptions, HeatmapWatcher, Source, explain_slides
    from cftrain.report import write_report

    options = HeatmapOptions(maps, fold, ensemble, weights, check, share, draws, seed, wsi, device)
    watch = HeatmapWatcher(lambda sentence: click.echo(sentence, err=True))
    source = Source(store, shards, encoder)
    done = explain_slides(run, slides, top, out, source=source, options=options, command=sys.argv, watch=watch)
    if done.overview:
        write_report(run)  # it links to the heatmaps
    if as_json:
        about = [dict(each.about) for each in done.heatmaps]
        click.echo(json.dumps(about[0] if len(slides) == 1 else about, indent=2))
        return
    for each in done.heatmaps:
        for line in heatmap_lines(each.about):
            click.echo(line)
        click.echo(f"open        {each.path / 'index.html'}\n")
    if done.overview:
        click.echo(f"all of them {done.overview}")


def heatmap_lines(about: Mapping[str, Any]) -> list[str]:
    """One heatmap, for a terminal."""
    lines = [_SYNTHETIC[about["synthetic_slide"]]] if about["synthetic"] else []
    patches = ", ".join(f"{grid['n_patches']:,} at {grid['scale']}x" for grid in about["grids"])
    lines += [
        f"slide       {about['slide_id']}: {patches}",
        f"risk        {about['risk']:+.2f} standard deviations, higher than {about['risk_percentile']:.0f} % of the "
        "run's slides",
        *(f"note        {note}" for note in about["notes"]),
        "",
        *padded([("map", "scale", "highest / mean", "highest / lowest"), *map(_row, about["maps"].items())]),
    ]
    agreeing = [each for each in about["agreement"] if each["spearman"] is not None]
    if agreeing:
        lines += ["", "rank correlation of attention with what moves the risk: attention is not explanation"]
        lines += [f"  {each['map']} with {each['with']}  {each['spearman']:+.2f}" for each in agreeing]
    if about.get("check"):
        lines += ["", f"risk without the top {100 * about['check_share']:g} % of the patches, and without random ones"]
        lines += padded(
            [
                ("map", "dropped", "risk", "without top", "without random", "moves more than"),
                *((
                    each["map"],
                    f"{each['n_dropped']} of {each['n_patches']}",
                    f"{each['risk']:+.3f}",
                    f"{each['without_top']:+.3f}",
                    f"{each['without_random_mean']:+.3f} ± {each['without_random_sd'] or 0:.3f}",
                    f"{100 * each['more_than_random']:.0f} % of draws",
                ) for each in about["check"]),
            ]
        )  # fmt: skip
    return [*lines, ""]


def _row(item: tuple[str, Mapping[str, Any]]) -> tuple[str, str, str, str]:
    name, facts = item
    if facts["kind"] == "attention":
        return name, f"{facts['scale']}x", f"{facts['highest_to_mean']:.2f}", ""
    return name, f"{facts['scale']}x", "", f"{facts['highest']:+.3g} / {facts['lowest']:+.3g}"
