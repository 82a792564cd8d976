"""Print docs/cli.md: the help of every command, as it is. `make docs` writes it, a test compares it."""

from __future__ import annotations

from collections.abc import Iterator

import click

from cfstore.cli import main as cfstore
from cftrain.cli import main as cftrain

HEAD = """# Command line

Generated from the commands' own help by `make docs`.

Data goes to stdout, progress and logs to stderr. Exit codes: 0 done, 1 something failed and was
named, 2 wrong usage. The store is `--store`, else `$CFSTORE`, else `./cfstore-data`.
"""


def pages(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """(full command name, help text) of a command and everything below it."""
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield from pages(command.commands[child], child, context)


def document() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, name in ((cfstore, "cfstore"), (cftrain, "cftrain")):
        parts += [f"## {path}\n\n```\n{text}\n```\n" for path, text in pages(group, name)]
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
