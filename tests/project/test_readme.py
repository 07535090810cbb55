"""What the README and the other documents say to type exists. What it says happens is tried in tests/cli."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farm.cli.app import app
from tests.project.compose import resolve
from tests.project.test_compose import GIVEN
from tests.readers import ROOT, blocks, environment

MAKE = shutil.which("make") or "make"


def test_the_two_commands_are_targets_of_make() -> None:
    commands = re.findall(r"^make (\w+)", blocks("sh")[0], re.MULTILINE)
    assert commands == ["demo", "test"]
    for target in commands:
        done = subprocess.run([MAKE, "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
        assert {"demo": "farm demo", "test": "pytest"}[target] in done.stdout


def test_ci_runs_the_tests_and_the_chaos_suite() -> None:
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test", "make chaos"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_python_example_is_typed(tmp_path: Path) -> None:
    (example,) = blocks("python")
    (tmp_path / "example.py").write_text(example)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(tmp_path / "example.py")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout


def documented_commands() -> list[list[str]]:
    """Every `farm ...` a document shows, and those that run inside a container."""
    found = set()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in re.findall(r"^\$ .*|`farm [a-z][^`]*`", path.read_text(), re.MULTILINE):
            for command in re.findall(r"(?:^|[ `/])farm ((?:[a-z]+)(?: [a-z-]+)?(?: [^`|]*)?)", line):
                found.add(command.split("`")[0].split("  #")[0].strip())
    return [command.split() for command in sorted(found)]


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_every_documented_command_and_option_exists(words: list[str]) -> None:
    group = words[:2] if words[0] in {"keys", "models", "projects", "train", "webhooks"} else words[:1]
    help_text = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert help_text.exit_code == 0, f"there is no farm {' '.join(group)}"
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert option in help_text.output, f"farm {' '.join(group)} has no {option}"


def test_every_service_a_document_names_is_in_compose() -> None:
    services = set(resolve(GIVEN)["services"])
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for options, name in re.findall(r"docker compose run ((?:--\S+ (?:\S+:\S+ )?)*)(\w+)", path.read_text()):
            assert name in services, f"{path.name}: docker compose run {options}{name}"
