"""Where stores are, on the command line, and what of them is kept on a local disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

_DISK: Final = "disk:"
_VARIABLE: Final = "CFSTORE_CACHE"


if TYPE_CHECKING:
    _ParamType = click.ParamType[Path | str]
else:
    _ParamType = click.ParamType  # not generic at run time in every release


class StorePlace(_ParamType):
    """A folder, as a Path; or an address such as s3://bucket/folder, as a str."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        from cfstore import is_url

        return str(value) if is_url(value) else Path(value)


def kept_between_epochs(ctx: click.Context, caches: Sequence[str]) -> str | None:
    """Of several --cache the one that is a setting of runs; one of a disk is for all stores that are opened now.

    Raises
    ------
    click.UsageError
        More than one of a kind.
    """
    disks = [cache for cache in caches if cache.startswith(_DISK)]
    others = [cache for cache in caches if not cache.startswith(_DISK)]
    if len(disks) > 1 or len(others) > 1:
        raise click.UsageError("--cache: name one of auto, off, ram and gpu, and one disk:DIR:SIZE at most")
    if disks:
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = disks[0]  # also of processes started from here
        ctx.call_on_close(lambda: _restore(before))
    return others[0] if others else None


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = before
