"""`cftrain models` and `cftrain import-weights`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def models(name: str | None, as_json: bool) -> None:
    """List the models, or one model's options, defaults and maps.

    \b
    Example:
        cftrain models
        cftrain models crossfusion
    """
    from cftrain.zoo import MODELS, model_info

    chosen = [model_info(name)] if name else list(MODELS.values())
    rows: list[dict[str, Any]] = [
        {
            "name": info.name,
            "scales": list(info.scales),
            "summary": info.summary,
            "reference": info.reference,
            "options": {item.name: item.default for item in dataclasses.fields(info.options) if item.name != "n_bins"},
            "maps": dict(info.maps),
        }
        for info in chosen
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        scales = ", ".join(f"{scale}x" for scale in row["scales"])
        click.echo(f"{row['name']:<20} {scales:<12} {row['summary']}")
        if name:
            click.echo(f"{'':<20} {row['reference']}")
            for option, default in row["options"].items():
                click.echo(f"{'':<20} --set model.{option}={json.dumps(default)}")
            for map_name, meaning in row["maps"].items():
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
    """Turn weights of the authors' code (RustinS/CrossFusion) into a model of this package.

    OFFICIAL is a state dict of CrossFusion, CrossFusionConcat, CrossFusionSingle, AMIL, DSMIL or TransMIL;
    which, and its sizes, is read from the tensors. Nothing but tensors is loaded from it.

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
