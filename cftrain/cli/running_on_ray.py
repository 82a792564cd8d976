"""`cftrain run --engine ray`: the same command in several processes of a cluster; what they say, on this terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

_OF_RAY: Final = frozenset({"engine", "address", "workers", "worker_cpus"})
_LATER: Final = frozenset({"store", "fuse", "tensorboard", "as_json"})
"""What holds for a run that goes on; all else it has in its config.toml."""


@dataclass(frozen=True)
class OnRay:
    """What the options say of Ray; `gpu` None: as the cluster has some."""

    address: str | None
    workers: int
    cpus: int | None
    gpu: bool | None


def asked_of_ray(
    engine: str, address: str | None, workers: int | None, cpus: int | None, device: str, jobs: int
) -> OnRay | None:
    """None where the engine is another.

    Raises
    ------
    click.UsageError
        Options do not go together.
    """
    if engine == "local":
        given = [("--address", address), ("--workers", workers), ("--worker-cpus", cpus)]
        for name, value in given:
            if value is not None:
                raise click.UsageError(f"{name} is of --engine ray; name that too")
        return None
    if workers is None:
        raise click.UsageError("--engine ray needs --workers: how many processes train together")
    if device not in ("auto", "cpu", "cuda"):
        raise click.UsageError(f"--device {device}: on Ray each process gets a GPU of its own; name cuda, cpu or auto")
    if jobs > 1:
        raise click.UsageError("--jobs are groups of folds in one process's place; leave it out with --engine ray")
    return OnRay(address, workers, cpus, None if device == "auto" else device == "cuda")


def train_on_ray(ctx: click.Context, on_ray: OnRay, planned: Any, models: Sequence[str]) -> None:
    """Train `planned` on the cluster; ends the command with the exit code of the ranks."""
    from cftrain.ray_ranks import Asked, Heard, train_on_ray

    out = planned.outs[0].parent if planned.labels else planned.outs[0]
    asked = Asked(_arguments(ctx, out.absolute(), models), on_ray.workers, on_ray.cpus, on_ray.gpu)
    heard = Heard(
        out=lambda words: click.echo(words, nl=False),
        err=lambda words: click.echo(words, nl=False, err=True),
        note=lambda text: click.echo(text, err=True),
    )
    if code := train_on_ray(asked, on_ray.address, heard):
        ctx.exit(code)


def _arguments(ctx: click.Context, out: Path, models: Sequence[str]) -> Callable[[str], Sequence[str]]:
    """Of the first attempt: those of this command; of later ones: to go on in `out`, once a run was begun there."""
    first = words(ctx, {**ctx.params, "models": models, "out": out}, left_out=_OF_RAY | {"device"})
    later = words(ctx, {**ctx.params, "out": out}, left_out=frozenset(ctx.params) - _LATER - {"out"})

    before = ctx.params["resume"] or _begun(out)  # without --resume it is refused, and said why, as without Ray

    def arguments(device: str) -> Sequence[str]:
        later_on = not before and _begun(out)
        return ["run", *([*later, "--resume"] if later_on else first), "--device", device]

    return arguments


def _begun(out: Path) -> bool:
    return any(any(out.glob(name)) for name in ("config.toml", "*/config.toml"))


def words(ctx: click.Context, values: Mapping[str, Any], *, left_out: frozenset[str]) -> list[str]:
    """The options that were given, or that have a value of their own in `values`, as words of a command line."""
    found: list[str] = []
    for option in ctx.command.params:
        name = option.name or ""
        given = ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        if name not in left_out and (given or values[name] != ctx.params[name]):
            found += _words(option, values[name])
    return found


def _words(option: click.Parameter, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option.opts[0] if value else option.secondary_opts[0]]
    values = value if isinstance(value, tuple) else (value,)
    return [word for each in values for word in (option.opts[0], str(each))]
