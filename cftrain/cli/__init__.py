"""The `cftrain` command: arguments in, library calls, text out. The only room here that prints."""

from __future__ import annotations

import signal
from typing import Any

import click

from cfstore import StoreError
from cftrain.cli.heatmap import heatmap
from cftrain.cli.model_zoo import import_weights, models
from cftrain.cli.results import compare, predict, report
from cftrain.cli.running import run
from cftrain.cli.sweeping import sweep
from cftrain.errors import StoppedError, TrainError

STOPPED = 75
"""Exit code of a run that wrote its checkpoints and left: what SLURM and sysexits call "try again later"."""


class _Group(click.Group):
    """Turns what the libraries raise on purpose into one message and exit code 1; a stop into 75, Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoppedError as error:
            click.echo(str(error), err=True)
            ctx.exit(130 if error.signal_number == signal.SIGINT else STOPPED)
        except KeyboardInterrupt:  # before anybody listened, or the second
            click.echo("Aborted!", err=True)
            ctx.exit(130)
        except (TrainError, StoreError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="crossfusion-store")
def main() -> None:
    """Train and compare survival models on the slides of a store.

    \b
    Example:
        cftrain run --cohort GBMLGG
        cftrain models
    """


for command in (run, sweep, report, compare, predict, heatmap, models, import_weights):
    main.add_command(command)
