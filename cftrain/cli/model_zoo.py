"""`cftrain models` and `cftrain import-weights`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cftrain.cli.model_costs import SIZES, CostRequest, cost_lines, cost_rows, on_device, row_json

if TYPE_CHECKING:
    from cftrain.costs import PassRow
    from cftrain.zoo import Extra, ModelInfo

_NEEDS: Final = {
    "coords": "coordinates",
    "nearest": "spatial graph",
    "similar": "feature graph",
    "parents": "parents",
    "mean": "means",
    "prototypes": "prototypes",
}
"""In the list: what a model needs besides features; the store derives all but coordinates from what it holds."""


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--dim", type=click.IntRange(min=1), default=1024, show_default=True, help="Width of the features.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N: what the costs are for.")
@click.option("--measure", type=click.Choice(list(SIZES)), help="Run the models, all unless named, on such slides.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Of what is measured.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def models(names: tuple[str, ...], dim: int, device: str, measure: str | None, repeats: int, as_json: bool) -> None:
    """List the models, or the options, defaults, maps and costs of those named.

    Costs are those of one average and one largest slide of the paper's cohorts: parameters, operations and
    memory, counted without running the model. --measure runs it, on features drawn at random, and prints the
    seconds and the peak of memory beside them.

    \b
    Example:
        cftrain models
        cftrain models crossfusion
        cftrain models abmil transmil --measure average --device cpu
    """
    from cftrain.zoo import MODELS, model_info

    chosen = [model_info(name) for name in names] or list(MODELS.values())
    request = CostRequest(dim, device, measure, repeats)
    asked = [info.name for info in chosen] if names or measure else []
    if asked:
        request = on_device(request)
    rows, parameters = _costs(asked, request)
    if as_json:
        costs = [_cost_json(info.name, rows, parameters, request) if asked else {} for info in chosen]
        click.echo(json.dumps([_about(info) | cost for info, cost in zip(chosen, costs, strict=True)], indent=2))
        return
    if not measure:
        for info in chosen:
            _tell(info, details=bool(names))
    if asked:
        lines = cost_lines(rows, parameters, request)
        click.echo("\n".join(lines if measure else ["", *lines]))


def _costs(names: Sequence[str], request: CostRequest) -> tuple[list[PassRow], dict[str, int]]:
    """Rows and numbers of parameters of the models named; without any, torch is not loaded."""
    if not names:
        return [], {}
    from cftrain.costs import parameter_count

    parameters = {name: parameter_count(name, {}, request.dim) for name in names}
    return [row for name in names for row in cost_rows(name, request)], parameters


def _about(info: ModelInfo) -> dict[str, Any]:
    options = {item.name: item.default for item in dataclasses.fields(info.options) if item.name != "n_bins"}
    return {
        "name": info.name,
        "scales": list(info.scales),
        "needs": [extra.label for extra in _extras(info)],
        "summary": info.summary,
        "reference": info.reference,
        "options": options,
        "maps": dict(info.maps),
    }


def _extras(info: ModelInfo) -> tuple[Extra, ...]:
    """What it reads besides features, with default options."""
    options = info.options()
    return options.extras() + options.fit_extras()


def _cost_json(
    name: str, rows: Sequence[PassRow], parameters: Mapping[str, int], request: CostRequest
) -> dict[str, Any]:
    costs = [row_json(row) for row in rows if row.model == name]
    return {"dim": request.dim, "device": request.device, "parameters": parameters[name], "costs": costs}


def _tell(info: ModelInfo, *, details: bool) -> None:
    about = _about(info)
    scales = ", ".join(f"{scale}x" for scale in info.scales)
    needs = ", ".join(dict.fromkeys(_NEEDS[extra.kind] for extra in _extras(info))) or "-"
    click.echo(f"{info.name:<20} {scales:<12} {needs:<25} {info.summary}")
    if details:
        click.echo(f"{'':<20} {info.reference}")
        for need in about["needs"]:
            click.echo(f"{'':<20} needs {need}")
        for option, default in about["options"].items():
            click.echo(f"{'':<20} --set model.{option}={json.dumps(default)}")
        for map_name, meaning in info.maps.items():
            click.echo(f"{'':<20} map {map_name}: {meaning}")


@click.command("import-weights")
@click.argument("official", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to write [default: OFFICIAL.safetensors].")
@click.option(
    "--heads", type=click.IntRange(min=1), default=4, show_default=True, help="Of CrossFusion: its tensors do not tell."
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def import_weights(official: Path, out: Path | None, heads: int, force: bool, as_json: bool) -> None:
    """Turn weights that a model's authors released into a model of this package.

    OFFICIAL is a state dict of CrossFusion, CrossFusionConcat, CrossFusionSingle, AMIL, DSMIL or TransMIL
    (RustinS/CrossFusion), Patch-GCN, ZoomMIL or MuSTMIL; which, and its sizes, is read from the tensors. Nothing but
    tensors is loaded from it.

    \b
    Example:
        cftrain import-weights best_model.pt
        python -c "from cftrain.checkpoints import load_model; print(load_model('best_model.safetensors'))"
    """
    out = out or official.with_suffix(".safetensors")
    if out.resolve() == official.resolve():
        raise click.UsageError(f"{out} would be written over itself; name another with --out")
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists; name another with --out, or replace it with --force")
    from cftrain.checkpoints import load_released, save_weights

    model = load_released(official, n_heads=heads)
    save_weights(model, out, source=official.name)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    options = dataclasses.asdict(model.options)
    if as_json:
        about = {"model": model.name, "feature_dim": model.feature_dim, "parameters": n_parameters}
        click.echo(json.dumps({**about, "options": options, "weights": str(out)}, indent=2))
        return
    told = ", ".join(f"{key}={value}" for key, value in options.items())
    click.echo(f"{model.name}, D={model.feature_dim}, {n_parameters:,} parameters ({told})")
    click.echo(out)
