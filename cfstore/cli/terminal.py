"""What the commands share: options, progress, and text or JSON to where it belongs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cfstore.errors import StoreError
from cfstore.remote.disk_cache import CACHE_VARIABLE, parse_cache
from cfstore.remote.locate import is_url, normal_url
from cfstore.render import plain, text_table

F = TypeVar("F", bound=Callable[..., Any])
_QUIET_SECONDS = 2.0


if TYPE_CHECKING:
    _ParamType = click.ParamType[Path | str]
else:
    _ParamType = click.ParamType  # not generic at run time in every release


class StorePlace(_ParamType):
    """A folder, as a Path; or an address such as s3://bucket/folder, as a str."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        if isinstance(value, str) and is_url(value):
            try:
                return normal_url(value)
            except StoreError as error:
                self.fail(str(error), param, ctx)
        return Path(value)


def store_option(command: F) -> F:
    """--store and --cache."""
    cache = click.option(
        "--cache",
        metavar="disk:DIR:SIZE",
        expose_value=False,
        callback=_use_cache,
        help="Keep on a local disk what is read of a store on object storage; also $CFSTORE_CACHE.",
    )
    store = click.option(
        "--store",
        type=StorePlace(),
        envvar="CFSTORE",
        default=Path("cfstore-data"),
        show_default=True,
        help="The store's directory or address (s3://bucket/folder, gs://, az://, https://); also $CFSTORE.",
    )
    return store(cache(command))


def _use_cache(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """Let this command, and the processes it starts, open stores with that cache."""
    if value is None:
        return
    parse_cache(value)
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = value

    def restore() -> None:
        if before is None:
            os.environ.pop(CACHE_VARIABLE, None)
        else:
            os.environ[CACHE_VARIABLE] = before

    ctx.call_on_close(restore)


def json_option(command: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def engine_options(command: F) -> F:
    """--engine and --address."""
    address = click.option(
        "--address",
        metavar="HOST:PORT",
        help='Of the Ray cluster; "auto": the one that runs here [default: Ray on this machine alone].',
    )
    engine = click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Processes on this machine, or tasks on a Ray cluster: docs/cluster.md.",
    )
    return engine(address(command))


def printer(as_json: bool) -> Callable[[str], None]:
    """Text goes to stdout, or to stderr where stdout carries JSON."""
    return lambda line: click.echo(line, err=as_json)


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line at every tenth of what takes long. All on stderr."""
    if sys.stderr.isatty():
        with _bar(label) as step:
            yield step
        return
    last, started = 0, time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // max(total, 1)
        if tenth > last and time.monotonic() - started > _QUIET_SECONDS:
            last = tenth
            click.echo(f"{label}: {done} of {total} {unit}", err=True)

    yield tell


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    bar: Any = None

    def step(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True)
            bar.__enter__()
        bar.update(done - bar.pos)

    try:
        yield step
    finally:
        if bar is not None:
            bar.update(bar.length - bar.pos if sys.exc_info()[0] is None else 0)
            bar.__exit__(None, None, None)


def print_json(content: Any) -> None:
    """One JSON object to stdout."""
    click.echo(json.dumps(plain(content), indent=2))


def echo_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table."""
    click.echo(text_table(list(rows[0]), [tuple(row.values()) for row in rows]))
