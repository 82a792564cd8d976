"""`heatmap_run`: one slide of a run explained, and everything about it written into one folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from cftrain.device import choose_device
from cftrain.errors import ConfigError
from cftrain.heatmap import about
from cftrain.heatmap.explain import Explained, agreement, check, choose_maps, explain, standardised_risk
from cftrain.heatmap.folder import check_replaceable, folder_name, write_folder
from cftrain.heatmap.layers import FILE_ORDER, Grid, Heatmap
from cftrain.heatmap.overview import FOLDER, extremes, write_overview
from cftrain.heatmap.places import grids_of, reach
from cftrain.heatmap.slide_image import SlideImage, check_fits, find_slide, open_slide
from cftrain.heatmap.subject import Source, Subject, choose_members, find_subject, honesty
from cftrain.prediction.trained import Member, TrainedRun, Weights, read_trained
from cftrain.provenance import this_process
from cftrain.results import without_nan

_NOMINAL: Final = 10.0  # microns per pixel times magnification, as scanners have it, within a tenth


@dataclass(frozen=True)
class HeatmapOptions:
    """What to make of a slide.

    Parameters
    ----------
    maps
        Their names; empty: all of the model's, and the gradient.
    fold, ensemble
        Which models; neither: those that were not trained on the slide's patient.
    weights
        Those of each fold's last epoch, or of its best one.
    check
        Also drop the patches of highest score and look at the risk.
    share, draws, seed
        Of the check: which part of the patches, and how many random choices it is held against.
    wsi
        The slide's image, or a folder that has it; None: maps are drawn on the patches' grid.
    device
        "auto", "cpu", "cuda", "cuda:1".
    """

    maps: Sequence[str] = ()
    fold: int | None = None
    ensemble: bool = False
    weights: Weights = "last"
    check: bool = False
    share: float = 0.05
    draws: int = 10
    seed: int = 0
    wsi: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class HeatmapWatcher:
    """What the caller wants to hear: a sentence as each part begins."""

    on_stage: Callable[[str], None] = lambda sentence: None


@dataclass(frozen=True)
class FinishedHeatmap:
    """Where it was written, and its heatmap.json."""

    path: Path
    about: Mapping[str, Any]


@dataclass(frozen=True)
class FinishedHeatmaps:
    """Several of them, and the page of all heatmaps of the run; None where they lie elsewhere."""

    heatmaps: tuple[FinishedHeatmap, ...]
    overview: Path | None


def explain_slides(
    run: Path,
    slides: Sequence[str],
    top: int | None = None,
    out: Path | None = None,
    *,
    source: Source | None = None,
    options: HeatmapOptions | None = None,
    command: Sequence[str] = (),
    watch: HeatmapWatcher | None = None,
) -> FinishedHeatmaps:
    """Make heatmaps of these slides, or of the `top` slides of highest and of lowest risk, and the page of all.

    Parameters
    ----------
    slides, top
        One of them: slide ids, or how many at either end.
    out
        Folder of the one heatmap; None: RUN/heatmaps, where index.html links to all.

    Other parameters and errors are those of `heatmap_run`.
    """
    options, watch = options or HeatmapOptions(), watch or HeatmapWatcher()
    trained = read_trained(run, options.weights)
    if top is not None:
        highest, lowest = extremes(trained, top)
        slides = [*highest, *lowest]
    done = []
    for place, slide_id in enumerate(slides):
        if len(slides) > 1:
            watch.on_stage(f"slide {place + 1} of {len(slides)}")
        done.append(
            heatmap_run(
                run, slide_id, out, source=source, options=options, command=command, watch=watch, trained=trained
            )
        )
    return FinishedHeatmaps(tuple(done), write_overview(run) if out is None else None)


def heatmap_run(
    run: Path,
    slide_id: str,
    out: Path | None = None,
    *,
    source: Source | None = None,
    options: HeatmapOptions | None = None,
    command: Sequence[str] = (),
    watch: HeatmapWatcher | None = None,
    trained: TrainedRun | None = None,
) -> FinishedHeatmap:
    """Explain what a finished run predicts for one slide.

    Writes index.html (a viewer that needs no network), heatmap.json, patches.parquet and .csv; per scale a
    `.geojson.gz` for QuPath and a float `.ome.tif`; per map a `.png` and a colour `.tif`.

    Parameters
    ----------
    run
        A directory that `cftrain run` wrote.
    slide_id
        A slide of the store, one of the run or another.
    out
        A folder; None: RUN/heatmaps/SLIDE. A heatmap that is there already is replaced, anything else is not.
    source
        The store or the tars; None: the run's.
    trained
        The run, where it has been read already.

    Raises
    ------
    RunError
        The run is not finished or cannot be read, or `out` holds something else or cannot be written.
    ConfigError
        No such map or fold, the image is not the slide's, or openslide is missing.
    StoreError, MissingScaleError, ShapeError
        The store has no such slide, or not with the features that the models read.
    NonFiniteError
        A model gives NaN or Inf.
    """
    options, watch = options or HeatmapOptions(), watch or HeatmapWatcher()
    device = choose_device(options.device)
    trained = trained or read_trained(run, options.weights)
    names = choose_maps(trained.config.model.name, options.maps)
    out = out or run / FOLDER / folder_name(slide_id)
    check_replaceable(out)
    source = (source or Source()).resolved(trained)
    with _image(options.wsi, slide_id) as image:
        subject = find_subject(trained, source, slide_id)
        grids = grids_of(subject.bags, subject.catalog)
        size, resolution = _size(grids, image), _resolution(subject, grids, image)
        empty = Heatmap(slide_id, grids, (), size, resolution.mpp, {})
        _check_image(image, empty)
        members = choose_members(trained, subject, fold=options.fold, ensemble=options.ensemble)
        watch.on_stage(f"{slide_id}: {_counted(subject)}; {', '.join(names)} by {honesty(members, subject)}")
        explained, found = _explained(trained, members, subject, names, options, device, watch)
        watch.on_stage(f"{slide_id}: writing {out}")
        said = {
            **about.of_subject(trained, str(source.shards or source.store), subject, members),
            **found,
            "maps": explained.facts,
            "normalisation": about.NORMALISATION,
            "agreement": agreement(explained.layers),
            "grids": about.of_grids(grids),
            "notes": [*about.notes(members, subject, grids, explained.facts), *resolution.notes],
            "image": None if image is None else str(image.path),
            "size": list(empty.size),
            "mpp": empty.mpp,
            "provenance": this_process(device, command),
        }
        heatmap = replace(empty, layers=explained.layers, about=without_nan(said))
        return FinishedHeatmap(out, write_folder(heatmap, out, image).about)


def _explained(
    trained: TrainedRun,
    members: Sequence[Member],
    subject: Subject,
    names: Sequence[str],
    options: HeatmapOptions,
    device: torch.device,
    watch: HeatmapWatcher,
) -> tuple[Explained, dict[str, Any]]:
    """The maps, the risk, the check where it is asked for, and how long they took."""
    started, loss = time.monotonic(), trained.config.train.loss
    explained = explain(members, subject, names, loss, device)
    found = about.of_risk(trained, explained.risk)
    seconds = {"explaining": time.monotonic() - started}
    if options.check:
        watch.on_stage(f"{subject.slide_id}: the risk without the top {100 * options.share:g} % of the patches")
        started = time.monotonic()
        risk = standardised_risk(members, loss, device)
        dropped = check(risk, subject, explained, share=options.share, draws=options.draws, seed=options.seed)
        found |= {"check": about.of_check(dropped), "check_rule": about.CHECK, "check_share": options.share}
        seconds["checking"] = time.monotonic() - started
    return explained, {**found, "seconds": seconds}


def _check_image(image: SlideImage | None, heatmap: Heatmap) -> None:
    if image is None:
        return
    if any(grid.unit == FILE_ORDER for grid in heatmap.grids.values()):
        message = f"{heatmap.slide_id}: has no coordinates, its patches have no place on {image.path}; leave --wsi out"
        raise ConfigError(message)
    check_fits(image.size, heatmap)


@contextmanager
def _image(wsi: Path | None, slide_id: str) -> Iterator[SlideImage | None]:
    if wsi is None:
        yield None
    else:
        with open_slide(find_slide(wsi, slide_id)) as image:
            yield image


def _counted(subject: Subject) -> str:
    return ", ".join(f"{bag.n_patches:,} patches at {scale}x" for scale, bag in sorted(subject.bags.items()))


def _size(grids: Mapping[int, Grid], image: SlideImage | None) -> tuple[int, int]:
    """Width and height of level 0: the image's, else as far as the patches reach."""
    return image.size if image is not None else reach(grids)


class _Resolution(NamedTuple):
    """Microns per level-0 pixel, None where nobody knows; and what has to be said of it."""

    mpp: float | None
    notes: tuple[str, ...] = ()


def _resolution(subject: Subject, grids: Mapping[int, Grid], image: SlideImage | None) -> _Resolution:
    """As the image says, else the source files; else what a magnification mostly means, which is noted."""
    if any(grid.unit == FILE_ORDER for grid in grids.values()):
        return _Resolution(None)
    told = [row["mpp"] for row in subject.catalog if row["mpp"]]
    known = [*([image.mpp] if image is not None and image.mpp else []), *told]
    if known:
        return _Resolution(float(known[0]))
    levels = [row["level0_magnification"] for row in subject.catalog if row["level0_magnification"]]
    if not levels:
        return _Resolution(None)
    mpp = _NOMINAL / levels[0]
    return _Resolution(mpp, (f"microns are nominal, {mpp:g} per pixel for {levels[0]:g}x: no file gives them",))
