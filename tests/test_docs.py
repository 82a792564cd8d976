"""The documents say what is true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import click
import pytest

from cfstore.cli import main as cfstore
from cftrain.cli import main as cftrain

ROOT = Path(__file__).resolve().parents[1]


COMMANDS = [
    pytest.param(command, id=f"{group} {name}")
    for group, commands in (("cfstore", cfstore.commands), ("cftrain", cftrain.commands))
    for name, command in commands.items()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does_and_gives_an_example(command):
    assert command.help
    assert "Example:" in command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in ("help", "dtype", "form", "seed"):
            assert parameter.help, f"--{parameter.name} has no help"


@pytest.mark.parametrize(("page", "writer"), [("cli.md", "command_line"), ("sql.md", "sql")])
def test_generated_pages_are_up_to_date(page, writer):
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "tools" / "write_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / page).read_text() == getattr(module, writer)(), "run `make docs`"


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for group, name in ((cfstore, "cfstore"), (cftrain, "cftrain")):
        for called in re.findall(rf"^\s*\$?\s*{name} ([\w-]+)", text, flags=re.MULTILINE):
            assert called in group.commands, f"README calls {name} {called}"
