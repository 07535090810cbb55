"""Every `farm` command of README.md and docs/ is one the command line takes: its name, its options, its arguments."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from farm.cli.app import app

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
UsageError = typer.BadParameter.__base__ or Exception
"""What typer's parser raises for a wrong line; typer itself names only its child."""
LINE = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?(farm .+)$", re.MULTILINE)


def documented() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block.replace("\\\n", " ") for page in pages for block in FENCE.findall(page.read_text("utf-8"))]
    return sorted({line for block in blocks for line in LINE.findall(block)})


def taken(line: str) -> None:
    """Parse a line without running it. Raises UsageError for what the command line does not know."""
    words = shlex.split(line, comments=True)[1:]
    words = words[: next((place for place, word in enumerate(words) if word in {"|", ">", "&", "&&", ";"}), None)]
    command: Any = get_command(app)
    context = command.make_context("farm", words)
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, words, parent=context)


def test_every_command_in_the_docs_is_one() -> None:
    lines = documented()
    assert len(lines) > 25
    wrong = []
    for line in lines:
        try:
            taken(line)
        except typer.BadParameter as error:
            # A file that a reader has and this machine lacks.
            if "does not exist" not in str(error):
                wrong.append((line, str(error)))
        except UsageError as error:
            wrong.append((line, str(error)))
    assert wrong == []


def test_one_that_is_none_is_found() -> None:
    for line in ("farm rendr x", "farm render x --mesk y", "farm models add onlyaname"):
        with pytest.raises(UsageError):
            taken(line)
