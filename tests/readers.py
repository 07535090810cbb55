"""Who reads the README and types what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    """The README's code blocks in this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def environment() -> dict[str, str]:
    """What a reader's shell has: the commands on its PATH, nothing of the farm's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FARM_", "FLOWER_"))}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def shell(script: str, home: Path) -> str:
    """What the script prints; it must succeed."""
    # Where the package is not installed (a bare checkout), `farm` is still the same program.
    function = f'farm() {{ "{sys.executable}" -m farm.cli "$@"; }}\n'
    return _done(["/bin/bash", "-euo", "pipefail", "-c", function + script], home)


def python(program: str, home: Path) -> str:
    """What the program prints; it must succeed."""
    return _done([sys.executable, "-c", program], home)


def _done(command: list[str], home: Path) -> str:
    done = subprocess.run(
        command, cwd=home, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
