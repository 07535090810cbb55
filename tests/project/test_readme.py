"""Everything the README says to type works: commands run on a farm with the default model, the example prints."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from farm.cli.app import app
from farm.stack.stack import Stack
from tests.project.compose import resolve
from tests.project.test_compose import GIVEN

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
MAKE = shutil.which("make") or "make"
pytestmark = pytest.mark.timeout(300)


def blocks(language: str) -> list[str]:
    """The README's code blocks in this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with a running farm in `.farm`, where README's reader stands. Others may walk through it, as PostgreSQL
    may run as another user."""
    folder = Path(tempfile.mkdtemp(prefix="farm-readme-"))
    folder.chmod(0o711)
    with Stack(folder / ".farm", 0):
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment() -> dict[str, str]:
    """What a reader's shell has: the commands on its PATH, nothing of the farm's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FARM_", "FLOWER_"))}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def shell(script: str, home: Path) -> str:
    """What the script prints; it must succeed."""
    # Where the package is not installed (a bare checkout), `farm` is still the same program.
    function = f'farm() {{ "{sys.executable}" -m farm.cli "$@"; }}\n'
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", function + script],
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_two_commands_are_targets_of_make() -> None:
    commands = re.findall(r"^make (\w+)", blocks("sh")[0], re.MULTILINE)
    assert commands == ["demo", "test"]
    for target in commands:
        done = subprocess.run([MAKE, "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
        assert {"demo": "farm demo", "test": "pytest"}[target] in done.stdout


def test_ci_runs_make_test_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test", "make chaos"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.xdist_group("readme")
def test_the_commands_in_order(home: Path) -> None:
    scripts = [block for block in blocks("sh") if "farm " in block]
    assert len(scripts) == 3, "render, submit, watch"
    said = ""
    for script in scripts:
        before, _, after = script.partition("farm download BATCH")
        said += (printed := shell(before, home))
        if after:
            batch = re.findall(r"^batch ([0-9a-f-]{36}): 3 jobs$", printed, re.MULTILINE)[-1]
            said += shell(f"farm download {batch}{after}", home)
    with Image.open(home / "crack.png") as picture:
        assert picture.info["parameters"].startswith("A single split crack on a concrete wall")
    assert len(list((home / "pictures").glob("*.png"))) == 3
    assert (home / "pictures/manifest.ndjson").read_text().count("\n") == 3
    assert "Water draining down" in said, "jobs by label"
    assert "crack-tiny" in said, "status"
    assert "walls" in said, "batches"


@pytest.mark.xdist_group("readme")
def test_the_python_example(home: Path) -> None:
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 of 8 pictures\n")
    assert len(list((home / "cracks").glob("*.png"))) == 8


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
