"""Every command of README.md and docs/ is one that is taken: of `farm` its name, its options and its arguments; of
`python -m` the program and its options."""

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
INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n)+)")
LINE = re.compile(r"^ *(?:\$ )?(?:\.venv/bin/)?(farm .+)$", re.MULTILINE)
PROGRAM = re.compile(r"python -m ((?:farm|workers|api|benchmarks)[.\w]*)([^\n`]*)")
OPTION = re.compile(r"(?<!\S)--[a-z][-a-z0-9]*")


def pages() -> list[str]:
    found = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [re.sub(r" *\\\n *", " ", page.read_text("utf-8")) for page in found]


def documented() -> list[str]:
    blocks = [block for page in pages() for block in (*FENCE.findall(page), *INDENTED.findall(page))]
    return sorted({line for block in blocks for line in LINE.findall(block)})


def programs() -> list[tuple[str, str]]:
    """Modules that are run as programs, in blocks and in the running text, each with what stands behind it."""
    return sorted({found for page in pages() for found in PROGRAM.findall(page)})


def untaken(module: str, words: str) -> list[str]:
    """The options in `words` of which the program, or the settings it makes options of, says nothing."""
    place = ROOT / Path(*module.split("."))
    file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    if not file.is_file():
        return [module]
    sources = file.read_text("utf-8")
    sources += "".join(other.read_text("utf-8") for other in file.parent.glob(f"{file.stem}_settings.py"))
    fields = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", sources, re.MULTILINE)}
    return [option for option in OPTION.findall(words) if f'"{option}"' not in sources and option not in fields]


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


def test_every_program_in_the_docs_takes_what_is_said_behind_it() -> None:
    found = programs()
    assert {"workers.training.crack_tiny", "workers.training.crack_tiny_hone", "benchmarks.control"} <= {
        module for module, _ in found
    }
    assert {(module, option) for module, words in found for option in untaken(module, words)} == set()


def test_a_program_or_an_option_that_is_none_is_found() -> None:
    assert untaken("workers.training.crack_tinny", "") == ["workers.training.crack_tinny"]
    assert untaken("workers.training.crack_tiny", " --work DIR --qwick") == ["--qwick"]
    assert untaken("workers.training.crack_tiny", " --quick --base-steps 9") == []


def test_indented_blocks_are_read_too() -> None:
    (block,) = INDENTED.findall("To see it:\n\n    farm up\n    farm down\n\nThen that.\n")
    assert LINE.findall(block) == ["farm up", "farm down"]
    assert "farm models add quick /tmp/quick/model" in documented()
